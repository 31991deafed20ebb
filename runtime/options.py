"""The flags of train.py: one table with the type, range, default and help of each, and the recipes.

A flag that is left out takes the value of the recipe, or else its default. The settings of the model need no line here:
each field of its configuration is a flag by itself. same_run marks what makes a run another run: a checkpoint is
resumed only where all of these, and the configuration, are as they were.
"""

import argparse
import csv
import dataclasses
import os

import text_model
from data import CROPS, EMBEDDED
from model import PRESETS, PixNerdConfig
from runtime.feature_networks import teacher_named
from runtime.files import UserError
from runtime.files.picture_index import FLAT
from runtime.frequencies import LOSSES
from runtime.log import require
from runtime.models import check_init
from runtime.picture_sets import MAX_COUNT
from runtime.plan import GPUS, MFU, MOST_STEPS, Plan
from runtime.recompute import RECOMPUTE
from text_model import TextPixNerdConfig

# What a recipe changes of the flags' defaults, which are the released class-conditional model's. The emoji's were
# measured to be good for minutes on a CPU (docs/measurements.md, docs/text.md). text-N are the three stages of the
# released text-to-image model; batch and steps are the paper's where it has them.
EMOJI = dict(data="emoji", steps=1450, batch_size=64, optimizer="muon", lr=1e-2, schedule="cosine", warmup=20, ema=0.99)
EMOJI |= dict(save_every=500, preview_every=500)
TEXT = dict(data="captions", clip=1.0, beta2=0.95, repa=0.5, repa_block=6, save_every=2_000)
RECIPES = {
    "imagenet": dict(exif="ignore"),  # ADM's preparation
    "emoji": EMOJI,
    "emoji-text": EMOJI | dict(steps=3260, batch_size=96, ema=0.995),
    "text-256": TEXT | dict(steps=200_000, batch_size=1536, lr=2e-4, shift=2.0),
    "text-512": TEXT | dict(steps=80_000, batch_size=512, lr=1e-4, shift=4.0, resolution=512),
    "text-sft": TEXT | dict(steps=60_000, batch_size=192, lr=1e-5, shift=4.0, resolution=512, beta2=0.999),
}
# (size, whether it reads text) -> the recipe where none is given. A recipe without a size takes the first that fits.
DEFAULTS = {("Nano", False): "emoji", ("Nano", True): "emoji-text", ("XXL", True): "text-256"}
DEFAULTS |= {(size, False): "imagenet" for size in ("XL", "L", "B", "S")}
TEXT_ONLY, CLASSES_ONLY = ("cache_text", "skip_uncaptioned", "hold_out"), ("classes", "num_classes")


def number(kind, fits, range_):
    """A type for argparse: int or float, where fits(value); the error names the flag and the range in words."""

    def read(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {range_}")
        return value

    read.__name__ = kind.__name__  # what argparse calls it where the text is no number at all
    return read


def whole(least, most):
    """A type for argparse: a whole number from `least` to `most`."""
    return number(int, lambda value: least <= value <= most, f"at least {least}, and at most {most:,}")


# Each comparison is false of NaN, and each range ends: a value beyond it is a slip of the hand, not a wish.
SEED = number(int, lambda value: -(2**63) <= value < 2**63, "a whole number of 64 bits")
COUNT, FROM_0 = whole(1, 2**53), whole(0, 2**53)  # beyond 2^53, floats skip whole numbers
WORKERS = 1024  # processes or threads: more than any machine that loads pictures has cores for
SHARE = number(float, lambda value: 0 <= value <= 1, "in [0, 1]")
BELOW_1 = number(float, lambda value: 0 <= value < 1, "in [0, 1)")
ABOVE_0 = number(float, lambda value: 0 < value <= 1, "in (0, 1]")
POSITIVE = number(float, lambda value: 0 < value <= 1e9, "above 0 and at most 1e9")
NOT_NEGATIVE = number(float, lambda value: 0 <= value <= 1e9, "at least 0 and at most 1e9")
# Within these limits, all times of a solver's grid are different in float32.
SHIFT = number(float, lambda value: 0.01 <= value <= 100, "in [0.01, 100]")


@dataclasses.dataclass
class Option:
    """One flag. type: one of the above, str, bool (a switch) or a list of choices. default: if no recipe has one.

    before: what runs of before the flag were, where that is not its default.
    """

    name: str
    type: object
    default: object
    help: str
    same_run: bool = False
    before: object = None

    @property
    def key(self):
        """The name of its value among the parsed arguments."""
        return self.name.replace("-", "_")


QUOTED = """, as A,B or, with a comma in a name, '"A, B",C'"""

OPTIONS = [
    Option("data", str, "ImageNet", "emoji, a folder or an uncompressed tar: of class folders or with captions"),
    Option(
        "classes", str, None, f"train on these only (emoji: kinds too){QUOTED}; A:4: 4 times per epoch", same_run=True
    ),
    Option("num-classes", whole(1, 1_000_000), None, "refuse data with another number of classes"),
    Option("skip-uncaptioned", bool, False, "leave out pictures without a caption, and captions without a picture"),
    Option("hold-out", str, None, "a file of captions, one a line, whose pictures are left out"),
    Option("cache-text", str, None, "folder for the features of each caption, so that each is encoded once"),
    Option("crop", list(CROPS), "adm", "how a picture is scaled; released: of the text-to-image model", same_run=True),
    Option("augment", bool, False, "random crop and flip in place of the centre crop", same_run=True),
    Option("exif", ["respect", "ignore"], "respect", "whether a photograph's orientation turns it", True, "ignore"),
    Option("accept-changed-data", bool, False, "resume although pictures were added, removed or renamed"),
    Option("workers", whole(0, WORKERS), None, "loader processes per process (default: 0 for emoji, else up to 8)"),
    Option("batch-size", COUNT, 256, "images per step over all processes", same_run=True),
    Option("micro-batch", COUNT, None, "images per forward pass and process; gradients add up (default: all)"),
    Option("steps", whole(1, MOST_STEPS), 800_000, "train until this step"),
    Option("minutes", POSITIVE, None, "of training, for which --size auto chooses (default: 20)"),
    Option("epochs", POSITIVE, None, "instead: until each image was seen so many times (of NAME:N, N times as many)"),
    Option("optimizer", ["adamw", "muon"], "adamw", "muon: for the matrices of the blocks", same_run=True),
    Option("lr", POSITIVE, 1e-4, "learning rate"),
    Option("schedule", ["constant", "cosine"], "constant", "of the learning rate; cosine: to 0 at --steps"),
    Option("warmup", FROM_0, 0, "steps over which the learning rate rises from 0"),
    Option("beta2", BELOW_1, 0.999, "of AdamW"),
    Option("weight-decay", NOT_NEGATIVE, 0.0, "of AdamW and Muon"),
    Option("clip", NOT_NEGATIVE, 0.0, "largest norm of the gradient (0: no limit, as released)"),
    Option("ema", BELOW_1, 0.9999, "decay of the averaged weights per step"),
    Option("drop-label", SHARE, 0.1, "share of samples trained without their class, for guidance", same_run=True),
    Option("shift", SHIFT, 1.0, "time shift of the training times", same_run=True),
    Option("repa", NOT_NEGATIVE, 0.0, "weight of alignment with a teacher (0: none; the paper: 0.5)", same_run=True),
    Option("repa-block", COUNT, 8, "the block whose output is aligned, counted from 1", same_run=True),
    Option("repa-projector", ["mlp", "conv"], "mlp", "conv: 3x3 and normalised teacher, as in iREPA", same_run=True),
    Option("dino", str, None, "teacher: DINOv2 weights (default: ViT-B/14, downloaded) or emoji, a small classifier"),
    Option("loss", list(LOSSES), "plain", "frequency: JPEG's weights of frequencies, as in DeCo", same_run=True),
    Option("init", str, None, "start from the weights of xl, xl-512, xxl or a checkpoint (fine-tuning)"),
    Option("seed", SEED, 0, "of every random number of the run", same_run=True),
    Option("precision", ["auto", "bf16", "fp32"], "auto", "auto: bf16 where the machine is fast in it"),
    Option("compile", ["auto", "on", "off"], "auto", "torch.compile each repeated block (auto: where it works)"),
    Option("recompute", list(RECOMPUTE), "none", "activation checkpointing: memory for time (runtime/recompute.py)"),
    Option("device", str, "auto", "auto (cuda, then mps, then cpu), or its name"),
    Option("timeout", POSITIVE, 1800.0, "seconds to wait for another process, as while it saves"),
    Option("out", str, None, "folder of the run (default: runs/SIZE)"),
    Option("save-every", FROM_0, 5_000, "steps between checkpoints (0: only at the end)"),
    Option("keep", COUNT, 2, "checkpoints kept, at least 2"),
    Option("log-every", FROM_0, 100, "steps between lines of metrics (0: only with a checkpoint)"),
    Option("preview-every", FROM_0, 10_000, "steps between previews (0: none)"),
    Option("eval-every", FROM_0, 0, "steps between evaluations of EMA samples (0: none)"),
    Option("eval-num", whole(1, MAX_COUNT), 1000, "samples drawn for an evaluation"),
    Option("eval-ref", str, None, "reference of its FID, as eval_fid.py takes it (emoji: the data, by emoji distance)"),
    Option("inception", str, None, "weights of the FID network (default: downloaded once)"),
    Option("tensorboard", bool, False, "log to OUT/tensorboard as well"),
    Option("wandb", bool, False, "log to Weights & Biases as well"),
    Option("dry-run", bool, False, "print the configuration and what it costs, and stop"),
    Option("world-size", COUNT, None, "with --dry-run: number of GPUs (default: the processes at hand)"),
    Option("gpu", list(GPUS), None, "with --dry-run: kind of GPU, for time and memory (a100: of 80 GB)"),
    Option("mfu", ABOVE_0, MFU, "with --dry-run: share of its peak that training reaches"),
    Option("bandwidth", POSITIVE, None, "with --dry-run: GB/s from GPU to GPU (default: NVLink's)"),
]
# What a run was whose checkpoint does not say, since it is older than the flag.
BEFORE = {option.key: option.before or option.default for option in OPTIONS if option.same_run}
# A flag without effect is a mistake: each of these needs another one.
NEEDS = {"dino": "repa", "repa_projector": "repa", "eval_ref": "eval_every", "inception": "eval_ref"}
NEEDS |= dict.fromkeys(("world_size", "gpu", "mfu", "bandwidth"), "dry_run")
# {name: field} of both models' configurations: the flags that shape a model. The data decide the number of classes.
SETTINGS = {field.name: field for kind in (TextPixNerdConfig, PixNerdConfig) for field in dataclasses.fields(kind)}
del SETTINGS["num_classes"]


def flag(name):
    """As it is typed: "batch_size" -> "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def make_parser():
    """The parser of all flags. Each is None where it is not given."""
    about = "Train PixNerd. Running the same command again resumes."
    parser = argparse.ArgumentParser(usage="train.py [--FLAG VALUE ...]; --help explains each", description=about)
    sizes = [*PRESETS, *text_model.PRESETS, "auto"]
    parser.add_argument("--size", choices=sizes, help="model preset (default: Nano); auto: for your own pictures")
    parser.add_argument("--recipe", choices=RECIPES, help="of the flags below (default: the size's)")
    for option in OPTIONS:
        shown = [] if option.default in (None, False) else [f"default: {option.default}"]
        shown += [f"{name}: {recipe[option.key]}" for name, recipe in RECIPES.items() if option.key in recipe]
        how = {"type": option.type}
        if option.type is bool:
            how = {"action": "store_true", "default": None}
        elif isinstance(option.type, list):
            how = {"choices": option.type}
        parser.add_argument(f"--{option.name}", help=option.help + f" ({'; '.join(shown)})" * bool(shown), **how)
    for name, field in SETTINGS.items():
        kind = whole(1, field.metadata["most"]) if field.type is int else str
        how = {"type": kind, "choices": field.metadata["choices"]}
        parser.add_argument(flag(name), help=f"{field.metadata['help']} (default: the size's)", **how)
    return parser


def given_flags(argv):
    """{name: value} of the flags that the command line `argv` gives, with no value for what is left out."""
    return {name: value for name, value in vars(make_parser().parse_args(argv)).items() if value is not None}


def all_flags(argv):
    """{name: value} of every flag, given or not, and "config", the configuration of the model."""
    return vars(parse_args(argv))


def parse_args(argv=None):
    """The command line of train.py, every flag with its value; args.config is the configuration of the model."""
    parser, given = make_parser(), given_flags(argv)
    args = parser.parse_args(argv)
    text = args.size == "XXL" or "text_encoder" in given or "text" in (args.recipe or "")
    if args.size is None:
        fitting = [key for key, recipe in DEFAULTS.items() if recipe == args.recipe]
        args.size = fitting[0][0] if fitting else ("XXL" if args.recipe else "Nano")
    args.recipe = args.recipe or DEFAULTS.get((args.size, text))
    presets = text_model.PRESETS if text else PRESETS
    if args.size not in presets or not args.recipe:
        parser.error(f"--size {args.size} reads no text: choose {' or '.join(presets)}, and change its settings")
    recipe = RECIPES[args.recipe]
    args.config = _configuration(parser, presets[args.size], recipe | given)
    for option in OPTIONS:
        setattr(args, option.key, (recipe | given).get(option.key, option.default))
    for name, needed in NEEDS.items():
        if name in given and not getattr(args, needed):  # 0 turns it off
            parser.error(f"{flag(name)} does nothing without {flag(needed)}: add it, or leave both out")
    for name in CLASSES_ONLY if text else TEXT_ONLY:
        if name in given:
            kinds = ("classes", "text") if text else ("text", "classes")
            parser.error(f"{flag(name)} is for models of {kinds[0]}, and this one is of {kinds[1]}: leave it out")
    if "minutes" in given:
        parser.error("--minutes does nothing without --size auto: add it, or say --steps")
    if {"steps", "epochs"} <= given.keys():
        parser.error("--epochs and --steps both say how long: leave one out")
    if {"crop", "augment"} <= given.keys() or ("crop" in given and args.data in EMBEDDED):
        parser.error("--crop is for pictures of a folder or a tar that are not augmented: leave it out")
    if args.data == "ImageNet":
        args.data = os.environ.get("IMAGENET") or "imagenet/train"
        if not os.path.exists(args.data) and not args.dry_run:
            parser.error(
                f"--size {args.size} learns ImageNet, and {args.data} is not here: give --data FOLDER with one "
                "folder of pictures per class, or set the variable IMAGENET to that folder"
            )
    if args.data == "captions" and not args.dry_run:
        parser.error(f"--recipe {args.recipe} learns from captions: give --data FOLDER, with x.txt beside each x.jpg")
    args.out = args.out or f"runs/{args.recipe if text else args.size}"
    return args


def _configuration(parser, preset, given):
    """The preset with the settings that the recipe and the flags change."""
    chosen = {name: value for name, value in given.items() if name in SETTINGS}
    encoder = chosen.get("text_encoder", getattr(preset, "text_encoder", None))
    if encoder != getattr(preset, "text_encoder", None):  # the shape of its features, not of the preset's
        width, length = (64, 16) if encoder == "words" else (2048, 128)
        chosen = {"text_width": width, "text_length": length} | chosen
    for name in chosen:
        if name not in dataclasses.asdict(preset):
            parser.error(f"{flag(name)} is not a setting of this kind of model: leave it out")
    try:
        return dataclasses.replace(preset, **chosen)
    except ValueError as error:
        parser.error(str(error))


def identity(args, config):
    """What makes the run of `args` and `config` this run and no other: {name: plain value}."""
    found = {option.key: getattr(args, option.key) for option in OPTIONS if option.same_run}
    found |= dataclasses.asdict(config)
    found["classes"] = class_names(args.classes)
    found["dino"] = teacher_named(args.dino).name if args.repa else None
    return found


def class_names(text):
    """--classes as a list of names, or None for all. A name that holds a comma stands in double quotes."""
    if text is None:
        return None
    line = " ".join(text.splitlines())  # csv refuses line breaks
    return [name.strip() for name in next(csv.reader([line], skipinitialspace=True), []) or [""]]


def data_settings(args):
    """What data.open_dataset needs of the flags, by name."""
    captions = hasattr(args.config, "text_encoder")
    return dict(augment=args.augment, captions=captions, skip=args.skip_uncaptioned, crop=args.crop, exif=args.exif)


def check_run(args, dataset, config):
    """UserError for what can only be told now that the data are known. Returns a remark for the user, or None."""
    if len(dataset) < args.batch_size:
        N, asked = len(dataset), f"--classes {args.classes}" if args.classes else args.data
        name = dataset.classes and dataset.classes[0]  # of a folder without class folders: not one that a user knows
        often = f", or let them come more often, as in --classes {name}:4"
        remedy = f"use --batch-size {N} or less, add pictures" + often * bool(args.classes or name and name != FLAT)
        raise UserError(f"{asked} has {N} images per epoch, fewer than --batch-size {args.batch_size}: {remedy}")
    if args.repa and args.repa_block > config.depth:
        raise UserError(f"--repa-block {args.repa_block} is not one of this model's {config.depth} blocks")
    if args.repa:
        teacher_named(args.dino).check(args.data, config.resolution, config.patch_size)
    for package in ("tensorboard", "wandb"):
        if getattr(args, package) and not args.dry_run:
            require(package)
    return args.init and check_init(args.init, config, args.dry_run)


def planned(args, config, world, precision, encoded):
    """The Plan of the run, from its flags. encoded: of plan.encoded_share."""
    names = ("batch_size", "micro_batch", "recompute", "compile", "optimizer", "gpu", "mfu", "bandwidth")
    repa = bool(args.repa) and teacher_named(args.dino).planned
    how = {name: getattr(args, name) for name in names}
    how |= dict(repa=repa, conv=args.repa_projector == "conv", encoded=encoded)
    return Plan(config, world=world, precision=precision, **how)
