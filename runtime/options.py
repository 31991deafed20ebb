"""The flags of train.py: one table with the type and range of each, its default in each recipe, and its help.

A flag that is left out takes the default of its size's recipe. The settings of the model need no line here: each field
of its configuration is a flag by itself. same_run marks what makes a run another run: a checkpoint is resumed only
where all of these, and the configuration, are as they were.
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
from runtime.plan import MFU, Plan
from runtime.recompute import RECOMPUTE

# Nano's recipe was measured to be good for minutes on a CPU (docs/measurements.md); that of the other sizes is the
# released one of the class-conditional model.
RECIPES = ("Nano", "others")


def number(kind, fits, range_):
    """A type for argparse: int or float, where fits(value); the error names the flag and the range in words."""

    def read(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {range_}")
        return value

    read.__name__ = kind.__name__  # what argparse calls it where the text is no number at all
    return read


# Each comparison is false of NaN. Beyond 2^53, floats skip whole numbers.
SEED = number(int, lambda value: -(2**63) <= value < 2**63, "a whole number of 64 bits")
COUNT = number(int, lambda value: 1 <= value <= 2**53, "at least 1, and at most 2^53")
FROM_0 = number(int, lambda value: 0 <= value <= 2**53, "at least 0, and at most 2^53")
SHARE = number(float, lambda value: 0 <= value <= 1, "in [0, 1]")
BELOW_1 = number(float, lambda value: 0 <= value < 1, "in [0, 1)")
ABOVE_0 = number(float, lambda value: 0 < value <= 1, "in (0, 1]")
POSITIVE = number(float, lambda value: 0 < value < math.inf, "above 0 and finite")
TO_1E9 = number(float, lambda value: 0 < value <= 1e9, "above 0 and at most 1e9")  # for what becomes a whole number
NOT_NEGATIVE = number(float, lambda value: 0 <= value < math.inf, "at least 0 and finite")


@dataclasses.dataclass
class Option:
    """One flag. type: one of the above, str, bool (a switch) or a list of choices. default: one, or one per recipe."""

    name: str
    type: object
    default: object
    help: str
    same_run: bool = False


OPTIONS = [
    Option("data", str, ("emoji", "$IMAGENET"), "emoji, a folder of class folders, or an uncompressed tar of one"),
    Option("classes", str, None, "train on these only (emoji: kinds too); NAME:4: 4 times per epoch", same_run=True),
    Option("num-classes", COUNT, None, "refuse data with another number of classes"),
    Option("augment", bool, False, "random crop and flip in place of the centre crop", same_run=True),
    Option("accept-changed-data", bool, False, "resume although pictures were added, removed or renamed"),
    Option("workers", FROM_0, None, "loader processes per process (default: 0 for emoji, else up to 8)"),
    Option("batch-size", COUNT, (64, 256), "images per step over all processes", same_run=True),
    Option("micro-batch", COUNT, None, "images per forward pass and process; gradients add up (default: all)"),
    Option("steps", COUNT, (1450, 800_000), "train until this step"),
    Option("epochs", TO_1E9, None, "instead: until each image was seen so many times (of NAME:N, N times as many)"),
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
    Option("dino", str, None, "teacher: DINOv2 weights (default: ViT-B/14, downloaded) or emoji, a small classifier"),
    Option("init", str, None, "start from the weights of this checkpoint, ours or released (fine-tuning)"),
    Option("seed", SEED, 0, "of every random number of the run", same_run=True),
    Option("precision", ["auto", "bf16", "fp32"], "auto", "auto: bf16 where the machine is fast in it"),
    Option("compile", ["auto", "on", "off"], "auto", "torch.compile each repeated block (auto: where it works)"),
    Option("recompute", list(RECOMPUTE), "none", "activation checkpointing: memory for time (runtime/recompute.py)"),
    Option("device", str, "auto", "auto (cuda, then mps, then cpu), or its name"),
    Option("timeout", TO_1E9, 1800.0, "seconds to wait for another process, as while it saves"),
    Option("out", str, None, "folder of the run (default: runs/SIZE)"),
    Option("save-every", FROM_0, (500, 5_000), "steps between checkpoints (0: only at the end)"),
    Option("keep", COUNT, 2, "checkpoints kept, at least 2"),
    Option("log-every", FROM_0, 100, "steps between lines of metrics (0: only with a checkpoint)"),
    Option("preview-every", FROM_0, (500, 10_000), "steps between previews (0: none)"),
    Option("eval-every", FROM_0, 0, "steps between evaluations of EMA samples (0: none)"),
    Option("eval-num", COUNT, 1000, "samples drawn for an evaluation"),
    Option("eval-ref", str, None, "reference of its FID, as eval_fid.py takes it (emoji: the data, by emoji distance)"),
    Option("inception", str, None, "weights of the FID network (default: downloaded once)"),
    Option("tensorboard", bool, False, "log to OUT/tensorboard as well"),
    Option("wandb", bool, False, "log to Weights & Biases as well"),
    Option("dry-run", bool, False, "print the configuration and what it costs, and stop"),
    Option("world-size", COUNT, None, "with --dry-run: number of GPUs (default: the processes at hand)"),
    Option("gpu", list(PEAKS), None, "with --dry-run: kind of GPU, for the time that it takes"),
    Option("mfu", ABOVE_0, MFU, "with --dry-run: share of its peak that training reaches"),
    Option("bandwidth", POSITIVE, None, "with --dry-run: GB/s from GPU to GPU (default: NVLink's)"),
]
# A flag without effect is a mistake: each of these needs another one.
NEEDS = {"dino": "repa", "eval-ref": "eval-every", "inception": "eval-ref"}
NEEDS |= dict.fromkeys(("world-size", "gpu", "mfu", "bandwidth"), "dry-run")


def make_parser():
    """The parser of all flags. Each is None where it is not given."""
    parser = argparse.ArgumentParser(description="Train PixNerd. Running the same command again resumes.")
    parser.add_argument("--size", choices=PRESETS, default="Nano", help="model preset (default: Nano)")
    for option in OPTIONS:
        help, default = option.help, option.default
        if isinstance(default, tuple):
            help += f" ({', '.join(f'{recipe}: {value}' for recipe, value in zip(RECIPES, default))})"
        elif default not in (None, False):
            help += f" (default: {default})"
        how = {"type": option.type}
        if option.type is bool:
            how = {"action": "store_true", "default": None}
        elif isinstance(option.type, list):
            how = {"choices": option.type}
        parser.add_argument(f"--{option.name}", help=help, **how)
    for field in settings():
        kind, choices = COUNT if field.type is int else str, field.metadata["choices"]
        help = f"{field.metadata['help']} (default: the size's)"
        parser.add_argument(f"--{field.name.replace('_', '-')}", type=kind, choices=choices, help=help)
    return parser


def settings():
    """The fields of the model's configuration that are flags: all but the number of classes, which the data decide."""
    return [field for field in dataclasses.fields(PRESETS["XL"]) if field.name != "num_classes"]


def parse_args(argv=None):
    """The command line of train.py, every flag with its value; args.config is the configuration of the model."""
    parser = make_parser()
    args = parser.parse_args(argv)
    given = {name.replace("_", "-") for name, value in vars(args).items() if value is not None}
    for name, needed in NEEDS.items():
        if name in given and not getattr(args, needed.replace("-", "_")):  # 0 turns it off
            parser.error(f"--{name} does nothing without --{needed}: add it, or leave both out")
    if {"steps", "epochs"} <= given:
        parser.error("--epochs and --steps both say how long: leave one out")
    chosen = {field.name: getattr(args, field.name) for field in settings()}
    try:
        chosen = {name: value for name, value in chosen.items() if value is not None}
        args.config = dataclasses.replace(PRESETS[args.size], **chosen)
    except ValueError as error:
        parser.error(str(error))
    for option in OPTIONS:
        if option.name not in given:
            default = option.default
            default = default[args.size != "Nano"] if isinstance(default, tuple) else default
            setattr(args, option.name.replace("-", "_"), default)
    if args.data == "$IMAGENET":
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


def planned(args, config, world, precision):
    """The Plan of the run, from its flags."""
    names = ("batch_size", "micro_batch", "recompute", "compile", "optimizer", "gpu", "mfu", "bandwidth")
    # The emoji's small teacher does not count: a tenth of Nano's work and 2 % of its weights.
    repa = bool(args.repa) and args.dino != "emoji"
    return Plan(config, world=world, precision=precision, repa=repa, **{name: getattr(args, name) for name in names})
