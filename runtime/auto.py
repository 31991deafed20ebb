"""`--size auto`: a model, a size of picture and a length of training for a folder of the user's own pictures.

It looks at the pictures, times a few steps on this machine, prints the whole command and trains by it. The choice is
kept in OUT/auto.json, so that the same line resumes without timing again. Flags that are given stay. Left out: several
processes, captions, compiled steps (which only make a run shorter than planned), models above 6 M parameters.
"""

import dataclasses
import json
import pathlib
import shlex
import sys
import time
from typing import NamedTuple

import torch

from data import EMBEDDED, open_dataset
from flow import flow_matching_loss, interpolate
from runtime.checkpoint import build_model
from runtime.files import UserError, read_image, whole_file
from runtime.log import two_digits
from runtime.machine import autocast, pick_device, pick_precision
from runtime.optimizers import make_optimizers
from runtime.options import all_flags, class_names, flag, given_flags
from runtime.plan import MOST_STEPS
from runtime.run_folder import RunFolder, run_checkpoints
from runtime.some_classes import SomeClasses

# The first row that fits the pictures and that sees enough of them in the time; else the last that fits. 128 x 8 is
# Nano; 192 x 7 the model in assets/, at its rate. Rows of 32 are for pictures below 64 pixels. 90,000 images seen are
# those of the emoji's recipe. After 34,000, patches of 8 had the loss at which those of 16 ended in more time, and
# after 44,000 a lower one (docs/measurements.md, "Photographs").
Row = NamedTuple(
    "Row", [(n, float) for n in ("pictures", "resolution", "tokens", "hidden_size", "depth", "lr", "seen")]
)
SIZE_ROWS = [  # pictures at least, pixels and tokens along a side, width, blocks, learning rate, images seen at least
    Row(2_000, 128, 8, 192, 7, 6e-3, 90_000),
    Row(0, 128, 8, 128, 8, 1e-2, 90_000),
    Row(2_000, 64, 8, 192, 7, 6e-3, 90_000),
    Row(0, 64, 8, 128, 8, 1e-2, 30_000),
    Row(0, 64, 4, 128, 8, 1e-2, 0),
    Row(0, 32, 4, 128, 8, 1e-2, 0),
]
FEWEST = 16  # pictures, and how many of them are looked at for their size
OFTEN = 500  # times that a picture is seen: after as many, the model in assets/ has probably learned its own by heart
TRAINING_SHARE = 0.9  # share of the time; the rest is for previews and checkpoints
NOT_WITH = {"recipe": "the recipe", "init": "a new model", "text_encoder": "a model of classes", "epochs": "--steps"}


def with_size_chosen(processes, argv=None):
    """The command line, by default this program's, with explicit flags in the place of --size auto. UserError."""
    argv = sys.argv[1:] if argv is None else argv
    given = given_flags(argv)
    if given.get("size") != "auto":
        return argv
    if processes.world > 1:
        raise UserError("--size auto is for one process: give torchrun the command that it prints with --dry-run")
    if given.get("data", "emoji") in EMBEDDED:
        raise UserError("--size auto is for your own pictures: give their folder with --data FOLDER")
    for name in NOT_WITH.keys() & given.keys():
        raise UserError(f"--size auto chooses {NOT_WITH[name]}, which {flag(name)} does too: leave one of the two out")
    minutes, given = given.pop("minutes", 20.0), given | {"size": "Nano", "out": given.get("out", "runs/auto")}
    dataset = pictures = open_dataset(given["data"], 64)
    if "classes" in given:
        dataset = SomeClasses(pictures, class_names(given["classes"]))
    path, writes = pathlib.Path(given["out"]) / "auto.json", "dry_run" not in given
    # Kept from other starts until the choice is written: of two at once, each could find another.
    folder = RunFolder(path.parent, processes) if writes else None
    try:
        kept = json.loads(path.read_text()) if path.exists() else None
        same = run_checkpoints(path.parent) or kept is not None and kept["pictures"] == dataset.fingerprint
        chosen, told = same and dict(kept["flags"]), f"as in {path}"
    except (ValueError, TypeError, KeyError):
        remedy = "give the command of its run, or another --out"
        raise UserError(f"{path.parent} has a run, or a file auto.json, that is not of --size auto: {remedy}")
    if not chosen:
        processes.say("--size auto: timing a few steps of each choice, from the largest down")
        chosen, told = _choose(given, pictures.index, len(dataset), len(dataset.classes), minutes)
        if writes:
            with whole_file(path) as temporary:
                temporary.write_text(json.dumps({"pictures": dataset.fingerprint, "flags": chosen}))
    if writes:
        folder.lock.close()
    stay = ", ".join(flag(name) for name in chosen if name in given)
    processes.say(f"--size auto: {told}" + f" (as given: {stay})" * bool(stay))
    flags = chosen | given
    processes.say(f"python train.py {shlex.join(_words({n: v for n, v in flags.items() if n != 'dry_run'}))}")
    return _words(flags)


def _words(values):
    """{name: value} as a command line has them; a switch is True."""
    pairs = [(flag(name), value) for name, value in values.items() if value is not False]
    return [word for name, value in pairs for word in ([name] if value is True else [name, str(value)])]


def _choose(given, index, N, num_classes, minutes):
    """({flag's name: value}, what to tell of it) for N pictures of an index. UserError where they are too few."""
    if N < FEWEST:
        raise UserError(f"--size auto needs {FEWEST} pictures or more, and {given['data']} has {N}: add some")
    places, exif = [i * len(index.labels) // FEWEST for i in range(FEWEST)], given.get("exif", "respect")
    side = sorted(min(read_image(index.where(i), index.read(i), exif).size) for i in places)[FEWEST // 2]
    rows = [row for row in SIZE_ROWS if row.pictures <= N and row.resolution <= max(side, 32)]
    batch = given.get("batch_size", 64 if N >= 64 else 16)
    for row in [row for row in rows if row.resolution >= 64] or rows:
        resolution = given.get("resolution", row.resolution)
        chosen = dict(resolution=resolution, patch_size=max(1, resolution // row.tokens), augment="crop" not in given)
        chosen |= dict(hidden_size=row.hidden_size, depth=row.depth, lr=row.lr, batch_size=batch)
        flags = all_flags(_words(chosen | given))  # flags that contradict each other end here
        config = dataclasses.replace(flags["config"], num_classes=num_classes)
        seconds = seconds_a_step(config, batch, flags["optimizer"], flags["device"], flags["precision"])
        possible = TRAINING_SHARE * 60 * minutes / seconds  # steps
        if possible * batch >= min(row.seen, OFTEN * N):
            break
    most = min(MOST_STEPS, max(1000, OFTEN * N // batch))
    # Two digits, as much as a few timed steps can promise.
    steps = given.get("steps", min(most, max(10, int(float(f"{possible:.2g}")))))
    more, a_minute = min(most, 2 * steps), TRAINING_SHARE * 60 / seconds
    # The average reaches over the last fifteenth of the run, as the emoji's recipe does; a preview for each sixth.
    ema, every = round(min(max(1 - 15 / steps, 0.9), 0.9999), 4), max(50, steps // 6)
    chosen |= dict(steps=steps, ema=ema, log_every=max(1, steps // 100), save_every=every, preview_every=every)
    told = f"{N} pictures, {side} pixels, {two_digits(seconds)} s a step: about {two_digits(steps / a_minute)} min"
    better = f"--steps {more}, about {two_digits(more / a_minute)} min, for better ones"
    return chosen, f"{told}; {better if more > steps else 'more steps would learn them by heart'}"


def seconds_a_step(config, batch, optimizer, device, precision, count=2):
    """How long a training step on `batch` random pictures takes here: the mean of `count`, after a first one."""
    device, side = pick_device(device), config.resolution
    model, precision = build_model(config).to(device), pick_precision(precision, device)
    optimizers = make_optimizers(model, optimizer, 1e-3)
    x, noise = torch.randn(2, batch, 3, side, side, device=device)  # (B, 3, H, W) each
    t, y = torch.rand(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)  # (B)
    for number in range(count + 1):
        with autocast(device, precision):
            loss = flow_matching_loss(model(interpolate(x, noise, t), t, y), x, noise)
        loss.backward()
        for one in optimizers:
            one.step()
            one.zero_grad()
        loss.item()  # waits for the GPU
        if number == 0:
            start = time.perf_counter()
    return (time.perf_counter() - start) / count
