"""The flags of train.py: one table, with the range of each, its default in each recipe, and what it means.

A flag that is left out takes the default of the recipe of its size. The settings of the model need no line here: each
field of its configuration is a flag by itself. `same_run` marks what makes a run another run: a checkpoint is resumed
only where all of these, and the configuration, are as they were.
"""

import argparse
import csv
import dataclasses
import math
import os

from model import PRESETS
from pretrained.emoji_classifier import EmojiTeacher
from runtime.files import UserError
from runtime.log import require
from runtime.machine import PEAKS
from runtime.plan import MFU
from runtime.recompute import RECOMPUTE

RECIPES = ("Nano", "ImageNet")  # Nano's was measured to be good for minutes on a CPU (docs/measurements.md), the other
# is the released one of the class-conditional model (all sizes but Nano)


def number(kind, fits, range_):
    """A type for argparse: int or float, where fits(value); the error names the flag and the range in words."""

    def read(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {range_}")
        return value

    read.__name__ = kind.__name__  # argparse's word for what is no number at all
    return read


# Each asks so that "not a number", which is neither above nor below anything, is refused.
LIMIT = 2**53  # beyond it, floats skip whole numbers
SEED = number(int, lambda value: -(2**63) <= value < 2**63, "a whole number of 64 bits")
COUNT = number(int, lambda value: 1 <= value <= LIMIT, "at least 1, and at most 2^53")
FROM_0 = number(int, lambda value: 0 <= value <= LIMIT, "at least 0, and at most 2^53")
SHARE = number(float, lambda value: 0 <= value <= 1, "in [0, 1]")
BELOW_1 = number(float, lambda value: 0 <= value < 1, "in [0, 1)")
ABOVE_0 = number(float, lambda value: 0 < value <= 1, "in (0, 1]")
POSITIVE = number(float, lambda value: 0 < value < math.inf, "above 0 and finite")
NOT_NEGATIVE = number(float, lambda value: 0 <= value < math.inf, "at least 0 and finite")
SECONDS = number(float, lambda value: 0 < value <= 1e8, "above 0 and at most 1e8 seconds")
EPOCHS = number(float, lambda value: 0 < value <= 1e9, "above 0 and at most 1e9")


@dataclasses.dataclass
class Option:
    """One flag. default: a value, or a tuple with one for each of RECIPES. same_run: part of the run's identity."""

    name: str
    type: object  # one of the types above, str, bool (a switch), or a list of choices
    default: object
    help: str
    same_run: bool = False


OPTIONS = [
    Option(
        "data",
        str,
        ("emoji", None),
        "emoji, a folder of class folders, or an uncompressed tar of one; ImageNet's "
        "default is the folder that the variable IMAGENET names, else ./imagenet/train",
    ),
    Option(
        "classes",
        str,
        None,
        "train on these only: names of classes or, of the emoji, of kinds (assets/README.md); "
        "NAME:N takes its pictures N times per epoch; a name with a comma stands in double quotes",
        same_run=True,
    ),
    Option("num-classes", COUNT, None, "refuse data with another number of classes"),
    Option("augment", bool, False, "random crop and flip in place of the centre crop", same_run=True),
    Option("accept-changed-data", bool, False, "resume although pictures were added, removed or renamed"),
    Option("workers", FROM_0, None, "loader processes per process (default: 0 for emoji, else up to 8)"),
    Option("batch-size", COUNT, (64, 256), "images per step over all processes", same_run=True),
    Option("micro-batch", COUNT, None, "images per forward pass and process; gradients add up (default: all)"),
    Option("steps", COUNT, (1450, 800_000), "train until this step"),
    Option("epochs", EPOCHS, None, "instead: until each image was seen so many times (of NAME:N, N times as many)"),
    Option("optimizer", ["adamw", "muon"], ("muon", "adamw"), "muon: for the matrices of the blocks", same_run=True),
    Option("lr", POSITIVE, (1e-2, 1e-4), "learning rate"),
    Option("schedule", ["constant", "cosine"], ("cosine", "constant"), "of the learning rate; cosine: to 0 at --steps"),
    Option("warmup", FROM_0, (20, 0), "steps over which the learning rate rises from 0"),
    Option("weight-decay", NOT_NEGATIVE, 0.0, "of AdamW and Muon"),
    Option("clip", NOT_NEGATIVE, 0.0, "largest norm of the gradient (0: no limit, as released)"),
    Option("ema", BELOW_1, (0.99, 0.9999), "decay of the averaged weights per step"),
    Option("drop-label", SHARE, 0.1, "share of samples trained without their class, for guidance", same_run=True),
    Option("shift", POSITIVE, 1.0, "time shift of the training times", same_run=True),
    Option("repa", NOT_NEGATIVE, 0.0, "weight of alignment with a teacher (0: none; the paper: 0.5)", same_run=True),
    Option("repa-block", COUNT, 8, "the block whose output is aligned, counted from 1", same_run=True),
    Option(
        "dino",
        str,
        None,
        "DINOv2 weights (default: ViT-B/14, downloaded once), or emoji: the small classifier "
        "that knows the embedded emoji",
    ),
    Option("init", str, None, "start from the weights of this checkpoint, ours or released (fine-tuning)"),
    Option("seed", SEED, 0, "of every random number of the run", same_run=True),
    Option("precision", ["auto", "bf16", "fp32"], "auto", "auto: bf16 where the machine is fast in it"),
    Option("compile", ["auto", "on", "off"], "auto", "torch.compile each repeated block (auto: where it works)"),
    Option("recompute", list(RECOMPUTE), "none", "activation checkpointing: memory for time (runtime/recompute.py)"),
    Option("device", str, "auto", "auto (cuda, then mps, then cpu), or its name"),
    Option("timeout", SECONDS, 1800.0, "seconds to wait for another process, as while it saves"),
    Option("out", str, None, "folder of the run (default: runs/SIZE)"),
    Option("save-every", FROM_0, (500, 5_000), "steps between checkpoints (0: only at the end)"),
    Option("keep", COUNT, 2, "checkpoints kept, at least 2"),
    Option("log-every", FROM_0, 100, "steps between lines of metrics (0: only with a checkpoint)"),
    Option("preview-every", FROM_0, (500, 10_000), "steps between previews (0: none)"),
    Option("eval-every", FROM_0, 0, "steps between evaluations of EMA samples (0: none)"),
    Option("eval-num", COUNT, 1000, "samples drawn for an evaluation"),
    Option(
        "eval-ref",
        str,
        None,
        "what they are compared with, by FID: an npz, a folder, a file of eval_fid.py "
        "--save-stats (default on the emoji: the data, by the emoji distance)",
    ),
    Option("inception", str, None, "weights of the FID network (default: downloaded once)"),
    Option("tensorboard", bool, False, "log to OUT/tensorboard as well"),
    Option("wandb", bool, False, "log to Weights & Biases as well"),
    Option("dry-run", bool, False, "print the configuration and what it costs, and stop"),
    Option("world-size", COUNT, None, "with --dry-run: number of GPUs (default: the processes at hand)"),
    Option("gpu", list(PEAKS), None, "with --dry-run: kind of GPU, for the time that it takes"),
    Option("mfu", ABOVE_0, None, f"with --dry-run: share of its peak that training reaches (default: {MFU})"),
    Option("bandwidth", POSITIVE, None, "with --dry-run: GB/s from GPU to GPU (default: NVLink's)"),
]
NEEDS = {"dino": "repa", "eval-ref": "eval-every", "inception": "eval-ref"} | {  # a flag without effect is a mistake
    name: "dry-run" for name in ("world-size", "gpu", "mfu", "bandwidth")
}


def parse_args(argv=None):
    """The command line of train.py, every flag with its value; args.config is the configuration of the model."""
    parser = argparse.ArgumentParser(description="Train PixNerd. Running the same command again resumes.")
    parser.add_argument("--size", choices=PRESETS, default="Nano", help="model preset (default: Nano)")
    for option in OPTIONS:
        how = (
            {"action": "store_true"}
            if option.type is bool
            else ({"choices": option.type} if isinstance(option.type, list) else {"type": option.type})
        )
        shown = (
            f" ({RECIPES[0]}: {option.default[0]}, others: {option.default[1]})"
            if (isinstance(option.default, tuple))
            else f" (default: {option.default})" * (option.default not in (None, False))
        )
        parser.add_argument(
            f"--{option.name}", help=option.help + shown, default=None if option.type != bool else False, **how
        )
    settings = dataclasses.fields(PRESETS["XL"])
    for field in settings:
        if field.name != "num_classes":  # which the data decide
            parser.add_argument(
                f"--{field.name.replace('_', '-')}",
                type=COUNT if field.type is int else str,
                choices=field.metadata["choices"],
                help=f"{field.metadata['help']} (default: the size's)",
            )
    args = parser.parse_args(argv)

    def given(name):
        value = getattr(args, name.replace("-", "_"))
        return value is not None and value is not False

    for name, needed in NEEDS.items():
        if given(name) and not getattr(args, needed.replace("-", "_")):
            parser.error(f"--{name} does nothing without --{needed}: add it, or leave both out")
    if given("steps") and given("epochs"):
        parser.error("--epochs and --steps both say how long: leave one out")
    chosen = {field.name: getattr(args, field.name) for field in settings if field.name != "num_classes"}
    try:
        chosen = {name: value for name, value in chosen.items() if value is not None}
        args.config = dataclasses.replace(PRESETS[args.size], **chosen)
    except ValueError as error:
        parser.error(str(error))
    for option in OPTIONS:
        if not given(option.name):
            default = option.default
            default = default[args.size != "Nano"] if isinstance(default, tuple) else default
            setattr(args, option.name.replace("-", "_"), default)
    if args.data is None:
        args.data = os.environ.get("IMAGENET") or "imagenet/train"
        if not os.path.exists(args.data) and not args.dry_run:
            parser.error(
                f"--size {args.size} learns ImageNet, and {args.data} is not here: give --data FOLDER with one "
                "folder of pictures per class, or set the variable IMAGENET to that folder"
            )
    args.out = args.out or f"runs/{args.size}"
    return args


def identity(args, config):
    """What makes the run of `args` and `config` this run and no other: {name: plain value}."""
    names = [option.name.replace("-", "_") for option in OPTIONS if option.same_run]
    found = dataclasses.asdict(config) | {name: getattr(args, name) for name in names}
    found["classes"] = class_names(args.classes)
    found["dino"] = ("emoji" if args.dino == "emoji" else "DINOv2") if args.repa else None
    return found


def class_names(text):
    """--classes as a list of names, or None for all. A name that holds a comma stands in double quotes."""
    if text is None:
        return None
    line = " ".join(text.splitlines())  # csv refuses line breaks
    return [name.strip() for name in next(csv.reader([line], skipinitialspace=True), []) or [""]]


def check_run(args, dataset, config):
    """UserError for what can only be told now that the data are known."""
    if len(dataset) < args.batch_size:
        asked = f"--classes {args.classes}" if args.classes else args.data
        remedy = "lower that" + (", or let pictures come more often, as in NAME:4" if args.classes else "")
        raise UserError(
            f"{asked} has {len(dataset)} images per epoch, fewer than --batch-size {args.batch_size}: {remedy}"
        )
    if args.repa and args.repa_block > config.depth:
        raise UserError(f"--repa-block {args.repa_block} is not one of this model's {config.depth} blocks")
    if args.repa and args.dino == "emoji":
        EmojiTeacher.check(args.data, config.resolution, config.patch_size)
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and not args.dry_run:
            require(package)


def plan_settings(args):
    """What runtime.plan.describe needs of the flags, by name."""
    names = ("size", "batch_size", "micro_batch", "recompute", "gpu", "optimizer", "keep")
    settings = {name: getattr(args, name) for name in names}
    # The emoji's small teacher does not count: a tenth of Nano's work and 2 % of its weights.
    settings |= {"repa": bool(args.repa) and args.dino != "emoji", "eager": args.compile == "off"}
    return settings | {"mfu": args.mfu or MFU, "bandwidth": args.bandwidth and args.bandwidth * 1e9}
