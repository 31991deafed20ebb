"""The claims of the paper, and three ideas since, repeated on a laptop: paired runs, error bars, docs/evidence.md.

    python -m experiments.ablations --list                      # claims, their rows, and what is done
    python -m experiments.ablations --claim decoder             # one claim
    python -m experiments.ablations --claim decoder --seeds 3   # with a fourth seed
    python -m experiments.ablations --all                       # everything; what is finished is not repeated
    python -m experiments.ablations --page                      # docs/evidence.md and its plots, from what is stored

A finished run is one line of docs/evidence/runs.jsonl. At the end the page is written anew from all of them
(experiments/evidence.py), so no number in it is typed by hand. Two runs of one seed see the same pictures, noise, times
and dropped labels, since these depend on the seed and the number of the sample only (data.py): their difference is of
what was changed. All runs learn the same drawings and are judged on those that experiments/held_out.txt lists.

Left out: what laptops cannot do (the paper's sizes and FID), and resuming in the middle of a run, which takes minutes.
"""

import argparse
import copy
import dataclasses
import importlib.util
import json
import math
import pathlib
import platform
import subprocess
import time

import numpy as np
import torch

from data import ASSETS, from_uint8, open_dataset, random_stream
from eval_fid import Statistics, frechet_distance
from experiments.evidence import EVIDENCE, PAGE, write_page
from flow import flow_matching_loss, interpolate
from model import PixNerd, PixNerdConfig
from pretrained.emoji_classifier import EmojiTeacher, load_emoji_classifier
from runtime.checkpoint import load_model
from runtime.distributed import Processes
from runtime.files import UserError, run, whole_file
from runtime.flops import forward_flops
from runtime.frequencies import LOSSES
from runtime.gauges import TIME_BINS, Gauges
from runtime.loader import BatchNumbers, training_batches
from runtime.optimizers import make_optimizers
from runtime.pictures import picture_grid
from runtime.previews import ema_samples
from samplers import generate, image_noise, time_grid
from train import Student, learning_rate, training_loss, update

HELD_OUT = pathlib.Path(__file__).parent / "held_out.txt"
NEAR = 0.2  # root mean square difference, of pixels in [-1, 1]: closer drawings are near-duplicates
CPU = torch.device("cpu")

# The small world. A token has 256 numbers, its patch 3 * 8 * 8 = 192, the ratio of the paper's L/16 (1024 to 768): a
# narrower token could not carry the pixels of its patch to a linear decoder, which is no matter of fields.
WORLD = PixNerdConfig(
    num_classes=9,
    resolution=32,
    patch_size=8,
    hidden_size=256,
    num_heads=4,
    depth=2,
    field_depth=2,
    field_width=24,
    field_ratio=1,
    num_freqs=6,
)


@dataclasses.dataclass(frozen=True)
class Study:
    """What all runs share. Another value makes other runs, which are not compared with the stored ones."""

    config: PixNerdConfig = WORLD
    steps: int = 600
    batch_size: int = 16
    lr: float = 2e-3
    warmup: int = 20
    ema: float = 0.99
    samples: int = 128
    sampler_pictures: int = 128


# Settings of the model, or: repa, projector, loss, steps_times. "field" is what the others are compared with: depth 2
# and two blocks of field cost what depth 3 and a linear decoder do, 22 + 2 against 24 in the paper.
ROWS = {
    "field": {},
    "linear": {"decoder": "linear", "depth": 3},
    "field, clean": {"prediction": "clean"},
    "linear, clean": {"decoder": "linear", "depth": 3, "prediction": "clean"},
    "norm none": {"field_norm": "none"},
    "norm first": {"field_norm": "first"},
    "norm both": {"field_norm": "both"},
    "sincos": {"encoding": "sincos"},
    "repa": {"repa": 0.5},
    "repa, conv": {"repa": 0.5, "projector": "conv"},
    "frequency loss": {"loss": "frequency"},
    "width 14": {"field_width": 14},
    "width 27": {"field_width": 27},
    "field depth 1": {"field_depth": 1},
    "field depth 4": {"field_depth": 4},
    "field, twice as long": {"steps_times": 2},
    "linear, twice as long": {"decoder": "linear", "depth": 3, "steps_times": 2},
}
# One solver and its evaluations, or one guidance, on the model in assets/.
SOLVERS = {"euler": 1, "heun": 2, "adams2": 1, "adams3": 1, "adams4": 1}  # evaluations a step
DRAWN = {"finest": {"solver": "adams2", "evaluations": 200}}
DRAWN |= {
    f"{solver} {n}": {"solver": solver, "evaluations": n}
    for n, solvers in {50: ("euler", "heun", "adams2"), 20: SOLVERS, 10: SOLVERS, 6: SOLVERS}.items()
    for solver in solvers
}
GUIDED = {
    f"scale {scale:g} in {low:g} to 1": {"scale": scale, "low": low, "solver": "adams2", "evaluations": 20}
    for scale, low in ((1.0, 0.1), (1.5, 0.1), (2.5, 0.1), (3.5, 0.1), (2.5, 0.0), (2.5, 0.3))
}


@dataclasses.dataclass(frozen=True)
class Claim:
    """A claim: what the paper (or a later one) says, and (row, base, sign) of each comparison.

    sign: -1 where the row's held-out loss should be below that of the base, 1 where above, 0 where nobody has said.
    kind: "train", or "draw" for the model in assets/.
    """

    title: str
    says: str
    pairs: tuple
    kind: str = "train"

    def rows(self):
        """All of its rows, each once, the base first."""
        return list(dict.fromkeys(name for row, base, _ in self.pairs for name in (base, row)))


CLAIMS = {
    "decoder": Claim(
        "Fig. 4 and 5: the field against the linear baseline of equal cost",
        "the field is better at equal cost",
        (("field", "linear", -1),),
    ),
    "prediction": Claim(
        "JiT (arXiv 2511.13720): predict the clean image or the velocity, for both decoders",
        "JiT: a linear decoder needs the clean image where a patch has more numbers than a token; here it has fewer, "
        "so nothing is said of this world, nor of fields",
        (("linear, clean", "linear", 0), ("field, clean", "field", 0), ("field, clean", "linear, clean", 0)),
    ),
    "normalisation": Claim(
        "Fig. 6a: what of the field is normalised",
        "normalising both matrices and the output was chosen",
        (("norm none", "field", 1), ("norm first", "field", 1), ("norm both", "field", 1)),
    ),
    "encoding": Claim(
        "Fig. 6d: the DCT basis against sines and cosines", "the DCT basis was chosen", (("sincos", "field", 1),)
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
    "frequency": Claim(
        "DeCo (arXiv 2511.19365): a loss weighted by JPEG's table",
        "DeCo: better pictures; of the plain loss, which is compared here, it says nothing",
        (("frequency loss", "field", 0),),
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
    "length": Claim(
        "Does the order of the decoders hold at twice the length?",
        "the paper trains for 800,000 steps",
        (("field, twice as long", "linear, twice as long", -1),),
    ),
    "solvers": Claim(
        "Fig. 6f, and what a picture costs: solvers by evaluations, on the model in assets/",
        "Adams of order 2 is best in few steps",
        tuple((name, "finest", 0) for name in DRAWN if name != "finest"),
        "draw",
    ),
    "guidance": Claim(
        "Fig. 6e: scale and interval of the guidance, on the model in assets/",
        "a scale of 3.5 from t = 0.1 on was chosen",
        tuple((name, "scale 2.5 in 0.1 to 1", 0) for name in GUIDED if name != "scale 2.5 in 0.1 to 1"),
        "draw",
    ),
}
NOT_HERE = (
    "The released frequencies of the encoding against the paper's whole numbers (no switch for it).",
    "Section 4.5, any resolution, and the two rows of 64 pixels in patches of 16.",
    "XL/16: its time per evaluation is in measurements.md; its pictures need the released weights.",
)

# ---- the data --------------------------------------------------------------------------------------------------------


def near_duplicates(images, near=NEAR):
    """A number (N) for each picture, uint8 (N, 3, H, W): equal where a chain of near-duplicates joins two of them."""
    x = from_uint8(images).flatten(1)  # (N, pixels)
    joined = torch.cdist(x, x) / math.sqrt(x.shape[1]) < near  # (N, N)
    joined.fill_diagonal_(True)  # cdist is not exact
    groups, before = torch.arange(len(x)), None
    while before is None or not torch.equal(groups, before):
        before, groups = groups, torch.where(joined, groups, len(x)).min(1).values  # (N)
    return groups


def split(images, share=0.1, seed=0):
    """The numbers of the pictures to hold out, sorted: whole groups of near-duplicates in random order, up to `share`.

    A group of more than a tenth of what is wanted stays in training, where it cannot make up the verdict.
    """
    groups, wanted, held = near_duplicates(images), round(share * len(images)), []
    for group in torch.randperm(len(images), generator=random_stream("order", seed, 0)).tolist():
        members = (groups == group).nonzero().flatten().tolist()
        if members and len(members) <= max(1, wanted // 10) and len(held) + len(members) <= wanted:
            held += members
    return sorted(held)


def write_split():
    """Writes experiments/held_out.txt: one held-out drawing a line, its number and its name."""
    with np.load(ASSETS / "noto_emoji_64.npz") as archive:
        names = archive["names"].tolist()
    held = split(open_dataset("emoji", 32).images)
    with whole_file(HELD_OUT) as temporary:
        pathlib.Path(temporary).write_text("".join(f"{i} {names[i]}\n" for i in held), encoding="utf-8")
    print(f"wrote {HELD_OUT.name}: {len(held)} of {len(names)} drawings")


def some_emoji(numbers):
    """The emoji at 32 pixels with these numbers only, as a data set."""
    part = copy.copy(open_dataset("emoji", 32))
    part.images, part.labels = part.images[numbers], [part.labels[i] for i in numbers]
    part.fingerprint += f", {len(numbers)} of them"
    return part


def training_and_held_out():
    """Two data sets: the drawings to learn, and those of experiments/held_out.txt."""
    held = [int(line.split()[0]) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    rest = sorted(set(range(len(open_dataset("emoji", 32)))) - set(held))
    return some_emoji(rest), some_emoji(held)


# ---- what is measured ------------------------------------------------------------------------------------------------


def time_mass(bins=TIME_BINS):
    """How often training times (flow.sample_time) fall into each of the equal bins of [0, 1]: (bins), sum 1."""
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins  # (bins + 1)
    below = 0.5 * (1 + torch.special.erf(torch.logit(edges) / math.sqrt(2)))  # of a standard normal at logit(t)
    return below.diff().tolist()


@torch.no_grad()
def held_out_loss(model, pictures):
    """Losses by tenths of t (10 numbers): every picture once in each, with the same time and noise for all models."""
    x, y, losses = from_uint8(pictures.images), torch.tensor(pictures.labels), []  # (N, 3, H, W), (N)
    for number in range(TIME_BINS):
        rng = random_stream("sample", -1, number)  # a seed that no run has
        t = (number + torch.rand(len(x), generator=rng)) / TIME_BINS  # (N)
        noise = torch.randn(x.shape, generator=rng)
        found = []
        for some in torch.arange(len(x)).split(32):
            v = model(interpolate(x[some], noise[some], t[some]), t[some], y[some])
            found.append(flow_matching_loss(v, x[some], noise[some], per_image=True))  # (B)
        losses.append(torch.cat(found).mean().item())
    return losses


def border_ratio(images, patch=8):
    """Mean difference of neighbours across patch borders over that within patches. uint8 (N, 3, H, W) -> float.

    1 where borders do not show; real pictures have their own value.
    """
    across, within = [], []
    for axis in (-1, -2):
        steps = images.float().diff(dim=axis).abs().movedim(axis, -1)  # (N, 3, sides, H - 1)
        border = torch.arange(1, steps.shape[-1] + 1) % patch == 0  # (H - 1)
        across.append(steps[..., border].flatten())
        within.append(steps[..., ~border].flatten())
    return (torch.cat(across).mean() / torch.cat(within).mean()).item()


def features(images):
    """What the emoji distance sees of pictures, uint8 (N, 3, 32, 32): (N, 64)."""
    network = load_emoji_classifier()
    return torch.cat([network(some)[0] for some in images.split(256)])


def emoji_distance(seen, real):
    """The emoji distance of features (N, 64) and (M, 64)."""
    moments = []
    for rows in (seen, real):
        statistics = Statistics(rows.shape[1])
        statistics.update(rows)
        moments += statistics.mean_cov()
    return frechet_distance(*moments)


def machine():
    """The processor, and what computes on it."""
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    capabilities = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capabilities}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def code_version():
    """The commit of the code, with -dirty where code was changed since, or "unknown"."""

    def git(*words):
        here = pathlib.Path(__file__).parent.parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    # The runs themselves, which are kept in docs/, are no change of the code.
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!docs").returncode
    return f"{commit}{'-dirty' if changed else ''}" if commit else "unknown"


# ---- runs ------------------------------------------------------------------------------------------------------------


def train_row(name, seed, study, data, folder=None):
    """One training run of ROWS: {measurement: value}. folder: where a strip of samples is left, for seed 0."""
    settings, (pictures, held_out) = dict(ROWS[name]), data
    repa, projector = settings.pop("repa", 0.0), settings.pop("projector", "mlp")
    weigh, steps = LOSSES[settings.pop("loss", "plain")], study.steps * settings.pop("steps_times", 1)
    config = dataclasses.replace(study.config, **settings)
    teacher = EmojiTeacher() if repa else None
    torch.manual_seed(seed)  # for the initial weights
    student = Student(PixNerd(config), max(1, config.depth // 2), teacher.width if teacher else 0, projector)
    ema = copy.deepcopy(student.model).eval().requires_grad_(False)
    optimizers = make_optimizers(student, "adamw", study.lr)
    gauges, curve = Gauges(Processes(), CPU), []
    numbers = BatchNumbers(0, steps, study.batch_size, study.batch_size)
    start = time.process_time()
    for step, batch in enumerate(training_batches(pictures, numbers, seed, 1.0, 0, CPU), start=1):
        loss, losses, aligned = training_loss(
            student, teacher, batch, 0.1, repa, config.patch_size, weigh, projector == "conv"
        )
        loss.backward()
        gauges.add(batch["t"], losses, aligned, 1)
        lr = learning_rate(step - 1, steps, study.lr, study.warmup, "cosine")
        update(student, ema, optimizers, gauges, step, lr, study.ema)
        if step % max(1, steps // 20) == 0:
            curve.append([step, round(gauges.read()["loss"], 5)])
    seconds = time.process_time() - start
    bins = held_out_loss(ema, held_out)
    drawn = torch.cat(list(ema_samples(ema, pictures.labels, study.samples, seed, CPU, "fp32").batches(64)))
    if folder and seed == 0:
        show_strip(drawn, folder / f"{name.replace(', ', '-').replace(' ', '-')}.png")
    return {
        "loss": sum(mass * loss for mass, loss in zip(time_mass(), bins)),
        "loss_by_time": bins,
        "emoji_distance": emoji_distance(features(drawn), features(open_dataset("emoji", 32).images)),
        "border_ratio": border_ratio(drawn, config.patch_size),
        "curve": curve,
        "cpu_seconds": seconds,
        "gflop_per_step": 3 * study.batch_size * forward_flops(config) / 1e9,
        "parameters": sum(p.numel() for p in student.parameters()),
        "steps": steps,
    }


def show_strip(images, path, count=12):
    """Writes `count` of the pictures, evenly chosen and so of all classes, in one row."""
    chosen = images[torch.linspace(0, len(images) - 1, count).long()]
    with whole_file(path) as temporary:
        picture_grid(chosen, count).save(temporary, "png", optimize=True)


def draw(name, seed, study, model, cache):
    """One way of drawing, of DRAWN or GUIDED: (pictures uint8 (N, 3, 32, 32), features (N, 64), CPU seconds).

    Guidance 2.5 from t = 0.1, where the row says nothing else. cache: {name: what was drawn before}.
    """
    if name in cache:
        return cache[name]
    how, count = {"scale": 2.5, "low": 0.1} | (DRAWN | GUIDED)[name], study.sampler_pictures
    solver, start, images = how["solver"], time.process_time(), []
    labels = sorted(open_dataset("emoji", 32).labels)
    y = torch.tensor([labels[i * len(labels) // count] for i in range(count)])
    times, order = time_grid(how["evaluations"] // SOLVERS[solver]), int("".join(filter(str.isdigit, solver)) or 2)
    for some in torch.arange(count).split(32):
        noise = image_noise(seed, some.tolist(), (32, 32))  # (B, 3, H, W)
        guidance = how["scale"], (how["low"], 1.0)
        images.append(generate(model, y[some], noise, times, *guidance, solver.rstrip("234"), order))
    images, seconds = torch.cat(images), time.process_time() - start
    cache[name] = images, features(images), seconds
    return cache[name]


def draw_row(name, seed, study, model, cache):
    """What is measured of one way of drawing: {measurement: value}.

    Errors are against 200 evaluations, root mean squares in steps of 1/255; differences of the emoji distance against
    50 steps of Euler or, of guidance, against the usual one.
    """
    images, seen, seconds = draw(name, seed, study, model, cache)
    real = features(open_dataset("emoji", 32).images)
    found = {"cpu_seconds_per_picture": seconds / len(images), "evaluations": (DRAWN | GUIDED)[name]["evaluations"]}
    found |= {"emoji_distance": emoji_distance(seen, real), "border_ratio": border_ratio(images)}
    base = "euler 50" if name in DRAWN else "scale 2.5 in 0.1 to 1"
    if name in DRAWN and name != "finest":
        error = images.float() - draw("finest", seed, study, model, cache)[0].float()  # (N, 3, H, W)
        error = error.square().flatten(1).mean(1).sqrt()  # (N)
        found["error"], found["error_se"] = error.mean().item(), (error.std() / math.sqrt(len(error))).item()
    if name != base:
        found |= paired_bootstrap(seen, draw(base, seed, study, model, cache)[1], real)
    return found


def paired_bootstrap(seen, base, real, rounds=50):
    """The difference of two emoji distances; its standard error is over random choices of the same pictures of both."""
    rng, differences = torch.Generator().manual_seed(0), []
    for _ in range(rounds):
        rows = torch.randint(len(seen), (len(seen),), generator=rng)
        differences.append(emoji_distance(seen[rows], real) - emoji_distance(base[rows], real))
    return {
        "distance_difference": emoji_distance(seen, real) - emoji_distance(base, real),
        "distance_difference_se": torch.tensor(differences).std().item(),
    }


class Runs:
    """The finished runs, a JSON line each, in `folder`/runs.jsonl."""

    def __init__(self, folder=EVIDENCE):
        self.path = pathlib.Path(folder) / "runs.jsonl"
        self.records = []
        if self.path.exists():
            self.records = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def find(self, name, seed, study):
        """The record of a finished run, or None."""
        return next((r for r in self.of(study) if (r["row"], r["seed"]) == (name, seed)), None)

    def of(self, study):
        """The records of a study."""
        return [record for record in self.records if record["study"] == dataclasses.asdict(study)]

    def add(self, record):
        """Appends it to the file, which is replaced whole."""
        self.records.append(record)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(self.path) as temporary:
            lines = "".join(json.dumps(record) + "\n" for record in self.records)
            pathlib.Path(temporary).write_text(lines, encoding="utf-8")


def rounded(value):
    """Floats, also in lists, to six digits that count."""
    if isinstance(value, list):
        return [rounded(each) for each in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def run_row(name, seed, study, kind, runs, cache):
    """Does a run that is not finished, and keeps its record. cache: what runs of one start share."""
    if runs.find(name, seed, study):
        return
    begin = time.time()
    if kind == "train":
        if "data" not in cache:
            cache["data"] = training_and_held_out()
        found = train_row(name, seed, study, cache["data"], runs.path.parent)
    else:
        if "model" not in cache:
            cache["model"] = load_model(ASSETS / "emoji-nano.pt")
        found = draw_row(name, seed, study, cache["model"], cache.setdefault(f"drawn {seed}", {}))
    record = {"row": name, "seed": seed, "kind": kind, "study": dataclasses.asdict(study)}
    record |= {key: rounded(value) for key, value in found.items()}
    command = f'python -m experiments.ablations --rows "{name}" --seeds {seed}'
    record |= {"command": command, "machine": machine(), "code": code_version()}
    runs.add(record | {"wall_seconds": round(time.time() - begin, 1), "date": time.strftime("%Y-%m-%d")})
    print(f"{name}, seed {seed}: {record.get('loss', record['emoji_distance']):.4f}", flush=True)


def do(claims, seeds, study, runs):
    """The runs of some claims, all rows of a seed before the next seed, so that what is done can be compared."""
    cache = {}
    for seed in seeds:
        for claim in claims:
            if claim.kind == "train" or seed == 0:  # a solver is deterministic; its pictures give its error bars
                order = [*DRAWN] if "finest" in claim.rows() else claim.rows()
                for name in order:
                    run_row(name, seed, study, claim.kind, runs, cache)


def listing(runs, study, seeds):
    """Each claim with its rows, and of each the seeds that are finished."""
    for key, claim in CLAIMS.items():
        print(f"{key}: {claim.title}")
        for name in claim.rows():
            done = [seed for seed in range(max(seeds) + 1) if runs.find(name, seed, study)]
            print(f"    {name}: seeds done {done or 'none'}")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description="Repeat the claims of the paper on a laptop.")
    parser.add_argument("--list", action="store_true", help="what there is, and what is done")
    parser.add_argument("--claim", nargs="+", choices=CLAIMS, default=[], help="do these")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *DRAWN, *GUIDED], default=[], help="do these runs")
    parser.add_argument("--all", action="store_true", help="do everything")
    parser.add_argument("--page", action="store_true", help="write the page and its plots from what is stored")
    parser.add_argument("--split", action="store_true", help="write experiments/held_out.txt again")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--out", default=PAGE.parent, help="folder of evidence.md and evidence/ (default: docs)")
    args = parser.parse_args()
    runs, study = Runs(pathlib.Path(args.out) / "evidence"), Study()
    if min(args.seeds) < 0:
        raise UserError(f"--seeds {min(args.seeds)}: seeds are 0 or more")
    if args.list:
        return listing(runs, study, args.seeds)
    if args.split:
        return write_split()
    if not (args.claim or args.rows or args.all or args.page):
        parser.error("say what to do: --all, --claim, --rows, --page or --list")
    cache = {}
    for seed, name in ((seed, name) for seed in args.seeds for name in args.rows):
        run_row(name, seed, study, "train" if name in ROWS else "draw", runs, cache)
    do(list(CLAIMS.values()) if args.all else [CLAIMS[key] for key in args.claim], args.seeds, study, runs)
    real = border_ratio(open_dataset("emoji", 32).images)
    plots = importlib.util.find_spec("matplotlib") is not None
    write_page(CLAIMS, runs.of(study), study, NOT_HERE, args.out, real, plots)
    left = "" if plots else "; the plots are as before, for want of matplotlib: pip install -r requirements-plots.txt"
    print(f"wrote {pathlib.Path(args.out) / PAGE.name}{left}")


if __name__ == "__main__":
    run(main)
