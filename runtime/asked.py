"""What the controls of app.py's page ask for, checked, and what they show when a model is chosen."""

import dataclasses
import shlex
import time
from fractions import Fraction

import torch

from runtime.choices import find_size, smallest_patch
from runtime.controls import LABELS, SLIDERS, TEXT_SIZES, Parser, a_number, a_text, one_of
from runtime.files import UserError
from runtime.flops import forward_flops
from runtime.inside import DENSITIES
from runtime.machine import freeze, pick_precision
from runtime.models import RELEASED_CONFIGS, find_model, weights_hash
from runtime.prompts import check_encoder, open_encoder, title_of
from runtime.sample_options import flags_for
from runtime.sampling_cost import check_memory, velocity_flops
from samplers import SOLVERS, generate, image_noise, time_grid


class Served:
    """A model that the page offers, ready to draw. speed: the FLOP/s that were measured with it, 0 before `measure`.

    text_encoder: of --text-encoder. Raises FileNotFoundError and UserError.
    """

    def __init__(self, name, text_encoder, device):
        if hasattr(released := RELEASED_CONFIGS.get(name), "text_encoder"):  # before gigabytes of it are downloaded
            check_encoder(released, text_encoder, name)
        self.name, self.model, self.device = name, find_model(name), device
        self.text = self.model.class_names is None
        self.encoder = open_encoder(self.model, text_encoder, None, name, device) if self.text else None
        self.hash, self.precision = weights_hash(self.model), pick_precision("auto", device)
        freeze(self.model.to(device), self.precision)
        self.speed = 0.0

    def measure(self, runs=5, seconds=3.0):
        """Draws so often in one step, or for so long; the fastest counts, since the first run warms up."""
        side, y = self.model.config.resolution, torch.zeros(2, dtype=torch.long, device=self.device)  # (2)
        if self.text:
            y = self.encoder.encode(["", ""])  # (2, M, E)
        noise = image_noise(0, range(2), (side, side)).to(self.device)  # (2, 3, H, W)
        end = time.perf_counter() + seconds
        for _ in range(runs):
            start = time.perf_counter()
            generate(self.model, y, noise, time_grid(1), scale=1.0, precision=self.precision).cpu()
            self.speed = max(self.speed, 2 * forward_flops(self.model.config) / (time.perf_counter() - start))
            if time.perf_counter() > end:
                break


@dataclasses.dataclass
class Asked:
    """A job, checked: what `draw` and `generate` take, and what its files say."""

    served: Served
    title: str  # of its pictures
    flags: dict  # of sample.py
    command: str  # of sample.py for the same pictures
    y: torch.Tensor  # (N) or (N, M, E)
    size: tuple  # (H, W)
    grid: tuple  # (rows, columns)
    how: dict  # of `generate`, but for the solver
    solvers: list
    seconds: float


def read(models, values, limit, film=False, inside=False):
    """`Asked` of the controls, values in the order of LABELS. UserError for what is wrong or too large.

    models: {name: Served}; limit: seconds that a job may take; film: whether all steps are kept; inside: whether it is
    one picture at all DENSITIES.
    """
    given = dict(zip(LABELS, values, strict=True))
    served = models[one_of("ckpt", given["ckpt"], list(models))]
    config, P = served.model.config, served.model.config.patch_size
    given |= {name: a_number(name, given[name], *SLIDERS[name][1:]) for name in SLIDERS}
    a_number("seed", given["seed"], -(2**63), 2**63 - 1)
    one_of("solver", given["solver"], list(SOLVERS))
    for name, control in sizes_of(config).items():
        if control["visible"]:
            given[name] = a_number(name, given[name], control["minimum"], control["maximum"], control["step"])
    title, what, y = _condition(served, given)
    if served.text:
        given |= what | {"resolution": f"{given['height']}x{given['width']}", "upscale": "1"}
    else:
        given |= what | {"resolution": f"{given['rows'] * P}x{given['columns'] * P}"}
        given["upscale"] = str(Fraction(given["pixels"], P))
    flags = ("ckpt", *what, "num", "seed", "solver", "order", "steps", "cfg", "shift", "temperature")
    # "--flag=value" is one word, so that no value can be taken for a flag.
    words = [f"--{flag}={given[flag]}" for flag in (*flags, "resolution", "upscale")]
    words += ["--interval", str(given["low"]), str(given["high"])]
    flags = flags_for(config, words, Parser)
    others = given["others"] if type(given["others"]) is list else [given["others"]]
    others = [one_of("others", other, list(SOLVERS)) for other in others if film]
    solvers = list(dict.fromkeys([flags["solver"][0], *others]))
    flags |= {"precision": served.precision, "compile": "off", "solver": solvers}

    size, grid = find_size(config, flags["resolution"], flags["upscale"])
    if film and (len(solvers) > 3 or flags["num"] > 4):
        raise UserError("a film has at most 3 solvers and 4 pictures: lower --num, or take --others away")
    how = dict(times=time_grid(flags["steps"], flags["shift"]), scale=flags["cfg"], interval=flags["interval"])
    how |= dict(order=flags["order"], grid=grid, precision=served.precision)
    count, densities = (1, DENSITIES[1:]) if inside else (flags["num"], ())
    y = y.expand(count, *y.shape[1:])  # (N, ...)
    grid = config.token_grid(*size, grid)
    largest = [side * max(densities, default=1) for side in size]
    check_memory(config, count, largest, grid, served.device, count * len(solvers), (flags["steps"] + 1) * film)
    velocities = count * flags["steps"] * sum(2 if solver == "heun" else 1 for solver in solvers)
    flops = velocity_flops(config, size, grid, densities) * velocities * (1 if flags["cfg"] == 1 else 2)
    if flops > limit * served.speed:
        served.measure()  # for the first time, or the machine was busy before
    if flops > limit * served.speed:
        line = f"about {flops / served.speed:,.0f} s, and a job may take {limit:,.0f} s: lower --steps, --num or"
        raise UserError(f"this would take {line} --{'resolution' if served.text else 'upscale'}")
    command = shlex.join(["python", "sample.py", *words])
    return Asked(served, title, flags, command, y, size, grid, how, solvers, flops / served.speed)


def _condition(served, given):
    """What is to be drawn: (title, {flag of sample.py: value}, y (1, ...)). A negative prompt goes into the model."""
    if served.text:
        prompt, negative = a_text("prompt", given["prompt"]), a_text("negative", given["negative"], empty=True)
        served.model.null_features.copy_(served.encoder.encode([negative])[0])  # (M, E)
        what = {"prompt": prompt} | ({"negative": negative} if negative else {})
        return title_of(prompt), what, served.encoder.encode([prompt])  # (1, M, E)
    names = served.model.class_names
    index = one_of("class", given["class"], range(len(names)))
    name = names[index] if names.index(names[index]) == index else index  # a name may be that of several
    return names[index], {"class": name}, torch.tensor([index], device=served.device)  # (1)


def sizes_of(config):
    """The controls of the size: {control: properties}, those of the other kind of model invisible.

    A model of classes draws up to twice the tokens that it was trained with, and any number of pixels for each. A model
    of sentences keeps its tokens, and its patches need not be square: from a quarter of the trained height and width to
    twice as much, in steps of one pixel of each patch. For XXL these are the 128 to 1024 of the authors' demo.
    """
    P, R, text = config.patch_size, config.resolution, hasattr(config, "text_encoder")
    tokens = R // P
    low, high = (P, P) if config.decoder == "linear" else (smallest_patch(config), 4 * P)
    ranges = {"rows": (1, 2 * tokens, tokens, 1), "columns": (1, 2 * tokens, tokens, 1), "pixels": (low, high, P, 1)}
    ranges |= dict.fromkeys(TEXT_SIZES, (tokens * -(-P // 4), 2 * R, R, tokens))
    names = ("minimum", "maximum", "value", "step")
    return {name: dict(zip(names, row)) | {"visible": (name in TEXT_SIZES) == text} for name, row in ranges.items()}


def controls_of(served):
    """What the controls show when a model is chosen: {control: properties}."""
    config, names = served.model.config, served.model.class_names or []
    defaults = flags_for(config, [f"--ckpt={served.name}", *(["--prompt=x"] if served.text else [])])
    values = {name: defaults[name] for name in ("steps", "cfg", "shift", "temperature", "order")}
    values |= dict(zip(("low", "high"), defaults["interval"]))
    shown = {name: {"value": value} for name, value in values.items()} | sizes_of(config)
    choices = [(f"{index} {name}", index) for index, name in enumerate(names)]
    shown |= {"class": {"choices": choices, "value": None if served.text else 0, "visible": not served.text}}
    shown |= {name: {"visible": served.text} for name in ("prompt", "negative")}
    return shown | {"solver": {"value": defaults["solver"][0]}}
