"""What the study compares: the claims of the paper and three ideas since, and the rows, or runs, that try them.

A row that trains has settings of the model and of its training; one that draws says how a model in assets/ is asked. A
new row is an entry here, and a claim names the pairs of rows that are compared. An idea that needs code of its own adds
it where the code looks for it, as `whole_dct` does below.
"""

import dataclasses
import math

import torch

from model import PRESETS
from neural_field import ENCODINGS

# ---- rows that train -------------------------------------------------------------------------------------------------


def whole_dct(height, width, num_freqs):
    """Eq. 12 as the paper writes it, with whole frequencies 0, 1, ..., F-1: (height*width, F*F), as `dct_encoding`.

    Those are the basis of a cosine transform of F x F pixels; the released model has linspace(0, F, F) in their place.
    """
    k = torch.arange(num_freqs)  # (F)
    y = torch.cos(math.pi * torch.linspace(0, 1, height)[:, None] * k)  # (height, F)
    x = torch.cos(math.pi * torch.linspace(0, 1, width)[:, None] * k)  # (width, F)
    basis = x[None, :, :, None] * y[:, None, None, :] / (1 + k[:, None] * k)  # (height, width, F, F)
    return basis.reshape(height * width, num_freqs**2)  # (height*width, F*F)


ENCODINGS["dct, whole"] = whole_dct

# The paper's patch, and a token wider than its 3 * 16 * 16 = 768 numbers. The learning rate of the world's 256 numbers
# falls in proportion to the width, 2e-3 * 256 / 832; this width of the field makes the two decoders cost the same.
PAPERS_PATCH = {"resolution": 64, "patch_size": 16, "hidden_size": 832, "num_heads": 13}
PAPERS_PATCH |= {"field_width": 32, "field_ratio": 2, "lr": 6e-4}

# Settings of the model, or: repa, projector, loss, lr, steps_times. "field" is what the others are compared with: depth
# 2 and two blocks of field cost what depth 3 and a linear decoder do, 22 + 2 against 24 in the paper.
LINEAR = {"decoder": "linear", "depth": 3}
ROWS = {
    "field": {},
    "linear": LINEAR,
    "field, clean": {"prediction": "clean"},
    "linear, clean": LINEAR | {"prediction": "clean"},
    "norm none": {"field_norm": "none"},
    "norm first": {"field_norm": "first"},
    "norm both": {"field_norm": "both"},
    "sincos": {"encoding": "sincos"},
    "whole frequencies": {"encoding": "dct, whole"},
    "repa": {"repa": 0.5},
    "repa, conv": {"repa": 0.5, "projector": "conv"},
    "frequency loss": {"loss": "frequency"},
    "width 14": {"field_width": 14},
    "width 27": {"field_width": 27},
    "field depth 1": {"field_depth": 1},
    "field depth 4": {"field_depth": 4},
    "field, twice as long": {"steps_times": 2},
    "linear, twice as long": LINEAR | {"steps_times": 2},
    "sincos, twice as long": {"encoding": "sincos", "steps_times": 2},
    "field, patches of 16": PAPERS_PATCH,
    "linear, patches of 16": PAPERS_PATCH | LINEAR,
}
TRAINING = ("repa", "projector", "loss", "lr", "steps_times")  # settings that are not of the model

# ---- rows that draw --------------------------------------------------------------------------------------------------

STEP_COST = {"euler": 1, "heun": 2, "adams2": 1, "adams3": 1, "adams4": 1}  # evaluations a step
# What a row does not say. The emoji model's guidance is 2.5: small pictures want less than the paper's 3.5.
USUAL = {"model": "emoji", "solver": "adams2", "evaluations": 20, "scale": 2.5, "low": 0.1, "shift": 1.0, "side": 32}
TEXT = {"model": "emoji-text", "low": 0.0, "shift": 2.0}  # as sample.py draws sentences at this size


def solver_rows(counts, prefix="", **how):
    """Rows of solvers by evaluations, {evaluations: solvers}, and "finest", which their errors are measured against.

    Heun takes two evaluations a step, so that there is none of 5.
    """
    rows = {f"{prefix}finest": {"evaluations": 200} | how}
    for n, solvers in counts.items():
        for solver in solvers:
            if n % STEP_COST[solver] == 0:
                rows[f"{prefix}{solver} {n}"] = {"solver": solver, "evaluations": n, "finest": f"{prefix}finest"} | how
    return rows


def euler_50(prefix=""):
    """The row whose emoji distance fewer evaluations have to keep, in `solver_rows` of that prefix."""
    return f"{prefix}euler 50"


FEW = ("euler", "heun", "adams2")
OF_CLASSES = solver_rows({100: ("euler", "adams2"), 50: FEW, 20: STEP_COST, 10: STEP_COST, 6: FEW, 5: STEP_COST})
OF_TEXT = solver_rows({50: ("euler",), 20: FEW, 10: FEW, 5: STEP_COST}, "text, ", **TEXT)
CHOSEN = "scale 3.5 from 0.1"
GUIDED = {
    f"scale {scale:g} from {low:g}": {"scale": scale, "low": low}
    for scale, low in ((3.5, 0.1), (1.0, 0.1), (1.5, 0.1), (2.5, 0.1), (5.0, 0.1), (3.5, 0.0), (3.5, 0.3))
}
# The model of 32 pixels draws others: in more tokens, or by the trained 4 x 4 tokens with more pixels in each patch.
SIZES = {"32 pixels": {}}
for side in (48, 64):
    SIZES[f"{side} pixels, more tokens"] = {"side": side}
    SIZES[f"{side} pixels, denser"] = {"side": side, "tokens": (4, 4)}
DRAWN = OF_CLASSES | OF_TEXT | GUIDED | SIZES
# Rows of which samples are kept: of solvers those that differ to the eye, beside the finest.
SHOWN = {*SIZES, *GUIDED} | {name for name in OF_CLASSES | OF_TEXT if name.endswith(("finest", " 10", " 5"))}
COSTS = {"XL/16": PRESETS["XL"]}  # models whose time for one evaluation is measured, on random weights

# ---- claims ----------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim: what the paper (or a later one) says, and (row, base, sign) of each comparison.

    sign: -1 where the measure of the row should be below that of the base, 1 where above, 0 where nobody has said.
    kind: "train"; "draw" for models in assets/; "cost" for the time of an evaluation. measure: what is compared of rows
    that draw: the "error" of a picture against the finest, or "distance", the emoji distance. Rows that train are
    compared by the held-out "loss" and by "distance". unsaid: one of the two that the claim says nothing of. others:
    rows that are in no comparison and belong to it all the same. square: what two columns of rows have, and the
    rows: ("velocity", "clean", ("linear", "linear, clean"), ("field", "field, clean")). note: what a reader should know
    or look at, without measured numbers.
    """

    title: str
    says: str
    pairs: tuple
    kind: str = "train"
    measure: str = ""
    others: tuple = ()
    unsaid: str = ""
    square: tuple = ()
    note: str = ""

    def measures(self):
        """What its rows are compared by: some of "loss", "distance" and "error"."""
        return {"train": ("loss", "distance"), "cost": ()}.get(self.kind, (self.measure,))

    def rows(self):
        """All of its rows, each once, the base first."""
        return list(dict.fromkeys([name for row, base, _ in self.pairs for name in (base, row)] + list(self.others)))


def best_in_few_steps(prefix, rows):
    """Comparisons of Adams of order 2 with each other solver at 10 and 5 evaluations."""
    others = [(n, solver) for n in (10, 5) for solver in STEP_COST if solver != "adams2"]
    pairs = [(f"{prefix}adams2 {n}", f"{prefix}{solver} {n}", -1) for n, solver in others]
    return tuple(pair for pair in pairs if pair[1] in rows)


CLAIMS = {
    "decoder": Claim(
        "Fig. 4 and 5: the field against the linear baseline of equal cost",
        "the field is better at equal cost",
        (("field", "linear", -1),),
    ),
    "patch": Claim(
        "Fig. 4 and 5 with the paper's patch: 64 pixels in patches of 16",
        "the field is better at equal cost",
        (("field, patches of 16", "linear, patches of 16", -1),),
    ),
    "length": Claim(
        "Fig. 4 and 5 at twice the length",
        "the field is better at equal cost, also after the paper's 800,000 steps",
        (
            ("field, twice as long", "linear, twice as long", -1),
            ("field, twice as long", "field", 0),
            ("linear, twice as long", "linear", 0),
        ),
        note="The curves of the two lengths are in the plot, on the right. The learning rate falls to 0 at the end of "
        "each, so that the longer run is no continuation of the shorter one, and lies above it until the end of that.",
    ),
    "normalisation": Claim(
        "Fig. 6a: what of the field is normalised",
        "normalising both matrices and the output was chosen",
        (("norm none", "field", 1), ("norm first", "field", 1), ("norm both", "field", 1)),
    ),
    "width": Claim(
        "Fig. 6b: widths of the field in the ratios of 36, 64, 72",
        "64 was chosen",
        (("width 14", "field", 1), ("width 27", "field", 0)),
    ),
    "depth": Claim(
        "Fig. 6c: blocks of the field, 1, 2 and 4",
        "2 for L and 4 for XL were chosen",
        (("field depth 1", "field", 1), ("field depth 4", "field", 0)),
    ),
    "encoding": Claim(
        "Fig. 6d: the DCT basis against sines and cosines, and its frequencies",
        "the DCT basis was chosen; the paper writes whole frequencies, the released model has others",
        (
            ("sincos", "field", 1),
            ("sincos, twice as long", "field, twice as long", 1),
            ("whole frequencies", "field", 0),
            ("sincos", "whole frequencies", 1),
        ),
        note="Both encodings are tested against their equations, and the released DCT against golden numbers, so "
        "that a mistake of ours is unlikely. The released frequencies are F numbers evenly spaced from 0 to F and so "
        "F / (F - 1) apart; the paper's are 0, 1, ..., F - 1, whose cosines are orthogonal over the square of a patch. "
        "Nothing else differs between the rows field and whole frequencies, also not the factor 1 / (1 + fx fy) that "
        "damps high frequencies: as long as sincos and whole frequencies cannot be told apart, it is the choice of "
        "frequencies and not the damping that costs loss here. The paper compared pictures, by FID, after a far longer "
        "training; the emoji distance is the column to compare with that.",
    ),
    "guidance": Claim(
        "Fig. 6e: scale and interval of the guidance, on the model in assets/",
        "a scale of 3.5 from t = 0.1 on was chosen, for ImageNet",
        tuple((name, CHOSEN, 1) for name in GUIDED if name != CHOSEN),
        "draw",
        "distance",
    ),
    "solvers": Claim(
        "Fig. 6f: solvers by evaluations, on the model in assets/",
        "Adams of order 2 is best in few steps",
        best_in_few_steps("", OF_CLASSES),
        "draw",
        "error",
        tuple(OF_CLASSES),
    ),
    "sentences": Claim(
        "Fig. 6f for sentences: solvers by evaluations, on the text model in assets/",
        "Adams of order 2 is best in few steps",
        best_in_few_steps("text, ", OF_TEXT),
        "draw",
        "error",
        tuple(OF_TEXT),
    ),
    "cost": Claim(
        "What a picture of XL/16 costs on this machine",
        "Euler with 50 or 100 evaluations",
        (),
        "cost",
        others=tuple(COSTS),
    ),
    "resolution": Claim(
        "Section 4.5: pictures of other sizes than were trained, on the model in assets/",
        "without more training, the trained number of tokens and denser pixels in their patches",
        tuple((f"{side} pixels, denser", f"{side} pixels, more tokens", -1) for side in (48, 64))
        + tuple((f"{side} pixels, denser", "32 pixels", 0) for side in (48, 64)),
        "draw",
        "distance",
        note="The [samples](#samples) show what the distance does not: in the denser rows outlines are cross-hatched, "
        "with stripes along rows and columns of pixels inside a patch. The field is asked for places between those it "
        "was trained on, and the emoji distance shrinks its pictures to 32 pixels first, which averages the stripes.",
    ),
    "repa": Claim(
        "Alignment (REPA), its teacher the small classifier of the emoji in the place of DINOv2",
        "it is part of the recipe",
        (("repa", "field", -1),),
    ),
    "irepa": Claim(
        "iREPA (arXiv 2512.10794): a convolution as projector, the teacher normalised over the places",
        "iREPA: better than REPA's MLP",
        (("repa, conv", "repa", -1),),
    ),
    "prediction": Claim(
        "JiT (arXiv 2511.13720): predict the clean image or the velocity, for both decoders",
        "JiT: a linear decoder needs the clean image where a patch has more numbers than a token; here it has fewer, "
        "so nothing is said of this world, nor of fields",
        (("linear, clean", "linear", 0), ("field, clean", "field", 0), ("field, clean", "linear, clean", 0)),
        square=("velocity", "clean", ("linear", "linear, clean"), ("field", "field, clean")),
        note="The loss is of velocities for both targets. Of an image that is predicted it is the error of the image "
        "over max(1 - t, 0.05), squared: the last tenth of t counts errors up to 400 times, and from t = 0.95 on the "
        "clamp leaves even a perfect prediction short of the velocity, by a sixth of its mean square over that tenth. "
        "So the loss is compared without the last tenth, too. The samples are not touched by the clamp: their 20 steps "
        "end with one from t = 0.95.",
    ),
    "frequency": Claim(
        "DeCo (arXiv 2511.19365): a loss weighted by JPEG's table",
        "DeCo: better pictures; of the plain loss it says nothing",
        (("frequency loss", "field", -1),),
        unsaid="loss",
        note="The training loss in the plot, on the right, is the weighted one of its row and no comparison.",
    ),
}
NOT_HERE = (
    "FID, and the paper's sizes and lengths: what is drawn here are emoji of at most 64 pixels.",
    "XL/16's pictures, which need the released weights; only its time for one evaluation is measured.",
    "A model that is trained on at another size, as the paper's at 512 pixels.",
)


def bases_of(name):
    """The rows that a drawn row's emoji distance is compared with: those of its claims, and 50 Euler steps."""
    pairs = [pair for claim in CLAIMS.values() if claim.measure == "distance" for pair in claim.pairs]
    found = [base for row, base, _ in pairs if row == name]
    if "finest" in DRAWN[name]:
        found.append(euler_50("text, " if name in OF_TEXT else ""))
    return [base for base in found if base != name]
