"""The flags of sample.py, and what each means where it is left out."""

import argparse
import copy

from runtime.choices import find_classes, find_size
from runtime.files import UserError
from runtime.models import IMAGENET_CLASSES, RELEASED_CONFIGS, SHIPPED_FILES
from runtime.options import COUNT, POSITIVE, QUOTED, SEED, SHIFT, number, whole
from runtime.prompts import LAYOUTS, check_encoder, check_layout, read_prompts
from runtime.shards import SHARES
from samplers import SOLVERS

# What a flag that is left out means: the paper's choice for classes (section 4.1), the released demo's for sentences.
CLASS_DEFAULTS = dict(solver=["euler"], steps=50, cfg=3.5, interval=[0.1, 1.0], shift=1.0)
TEXT_DEFAULTS = dict(solver=["adams"], steps=25, cfg=4.0, interval=[0.0, 1.0], shift=3.0)
# Of text models of small pictures, by eye: with more guidance, colours of invented things run over their outlines.
SMALL_TEXT_DEFAULTS, SMALL_TEXT = TEXT_DEFAULTS | dict(cfg=2.5, shift=2.0), 64  # pixels

STEPS = whole(1, 10_000)  # with these, all times of a grid are different in float32
FINITE = number(float, lambda value: -1e9 <= value <= 1e9, "in [-1e9, 1e9]")


def parse_args(argv=None, parser=argparse.ArgumentParser):
    """The command line; --solver comes back as a list. parser: its class, which decides how a mistake is reported.

    What --solver, --steps, --cfg, --interval, --shift and --temperature mean where they are left out depends on the
    model: they stay None until `suit`.
    """
    parser = parser(usage="sample.py [--FLAG VALUE ...]; --help explains each", description="Draw with PixNerd.")
    add = parser.add_argument
    names = "xl, xl-512, xxl (released, downloaded once), emoji, emoji-text (assets/), or a file"
    add("--ckpt", help=f"{names} (default: xl, or xxl for prompts)")
    add("--weights", choices=["ema", "raw"], default="ema", help="which of a checkpoint's two sets of weights")
    add("--class", dest="classes", help=f"names or indices{QUOTED}, or all (default: 207; other models: all)")
    add("--list-classes", action="store_true", help="print the classes that the model knows, and stop")
    add("--prompt", action="append", help="a sentence for a text model to draw; may be given several times")
    add("--prompts", help="a file of prompts, one a line or as .jsonl, or a folder of .txt files")
    add("--negative", metavar="PROMPT", help="what guidance leads away from, in the place of the empty sentence")
    add("--text-encoder", help="folder of the model's Qwen3, if it is not to be downloaded")
    add("--layout", choices=LAYOUTS, help="of the folder --out: as the evaluator of GenEval or DPG-Bench reads it")
    add("--num", type=COUNT, help="images per class or prompt (default: 4); --npz: in all (default: 50 of each)")
    add("--solver", type=solvers, help=f"{', '.join(SOLVERS)}; several with commas are shown side by side")
    add("--order", type=int, default=2, choices=[1, 2, 3, 4], help="of the adams solver")
    add("--steps", type=STEPS, help="of the solver (default: 50; text: 25)")
    add("--cfg", type=FINITE, help="guidance scale; 1: none (default: 3.5, as in the paper; text: 4, emoji 2.5)")
    add("--interval", type=FINITE, nargs=2, metavar=("LOW", "HIGH"), help="times that are guided (default: 0.1 1; 0 1)")
    add("--shift", type=SHIFT, help="time shift: above 1, smaller steps near noise (default: 1; text: 3, emoji 2)")
    calm = "of the noise; below 1: fewer faults, less variety (default: 1; pictures of emoji: 0.8)"
    add("--temperature", type=POSITIVE, help=calm)
    add("--resolution", help="pixels, N or HEIGHTxWIDTH: other numbers of tokens; text: of pixels per token")
    add("--upscale", default="1", help="factor or HEIGHTxWIDTH factors: more pixels per token, for far larger pictures")
    add("--seed", type=SEED, default=0)
    add("--batch-size", type=COUNT, default=32, help="images computed at once")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    pays = "auto: from 200 TFLOP on in bf16 on a CPU, 20,000 on a GPU (an image of XL with 50 steps has 27)"
    add("--compile", choices=["auto", "on", "off"], default="auto", help=pays)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", default="samples.png", help="one grid as .png, .jpg or .webp, or a folder for single pictures")
    add("--gif", help="also write a film, as .gif, .webp or animated .png: the picture that is predicted at each step")
    add("--gif-noise", action="store_true", help="in the film of --gif, also x_t, beside each picture")
    add("--npz", help="instead of pictures, write shuffled arrays for eval_fid.py; the same command resumes")
    add("--labels", choices=SHARES, default="balanced", help="of --npz: equally many, by chance, or as in the data")
    args = parser.parse_args(argv)
    sentences = (args.prompt, args.prompts, args.negative, args.text_encoder)
    args.ckpt = args.ckpt or ("xl" if sentences == (None,) * 4 else "xxl")
    if args.interval and not args.interval[0] < args.interval[1]:
        parser.error("--interval LOW HIGH: LOW must be below HIGH")
    if args.gif_noise and not args.gif:
        parser.error("--gif-noise does nothing without --gif: add it, or leave both out")
    if args.npz and (args.gif or len(args.solver or "1") > 1):
        parser.error("--npz takes one --solver and no --gif")
    if args.prompt and args.prompts:
        parser.error("--prompt and --prompts both say what to draw: leave one out")
    if args.layout and (not args.prompts or args.npz or args.gif or len(args.solver or "1") > 1):
        parser.error("--layout needs --prompts and an --out folder, and takes one --solver, no --npz and no --gif")
    return args


def flags_for(config, words, parser=argparse.ArgumentParser):
    """{name: value} of every flag of the command line `words`, as suits a model of `config`. UserError."""
    args = parse_args(words, parser)
    suit(args, config)
    return vars(args)


def solvers(text):
    """--solver: names with commas between."""
    if not set(text.split(",")) <= set(SOLVERS):
        raise argparse.ArgumentTypeError(f"{text}: choose from {', '.join(SOLVERS)}")
    return text.split(",")


def suit(args, config):
    """Gives flags that were left out the values that suit a model's configuration; UserError for unsuitable flags."""
    shipped, text = args.ckpt in SHIPPED_FILES and not args.npz, hasattr(config, "text_encoder")
    defaults = (SMALL_TEXT_DEFAULTS if config.resolution <= SMALL_TEXT else TEXT_DEFAULTS) if text else CLASS_DEFAULTS
    for name, value in (defaults | {"temperature": SHIPPED_FILES[args.ckpt][1] if shipped else 1.0}).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if not text and args.classes is None:
        args.classes = "207" if config.num_classes == len(IMAGENET_CLASSES) and not args.npz else "all"
    what, instead = (
        ("reads sentences", "--prompt") if text else ("knows classes", "--class, or --ckpt emoji-text or xxl")
    )
    for name in ("classes", "npz") if text else ("prompt", "prompts", "negative", "text_encoder"):
        if getattr(args, name) is not None:
            flag = "--class" if name == "classes" else f"--{name.replace('_', '-')}"
            raise UserError(f"{flag} is not for --ckpt {args.ckpt}, which {what}: use {instead}")
    if text and not (args.prompt or args.prompts):
        raise UserError(f"--ckpt {args.ckpt} {what}: say what to draw with {instead}")
    if args.negative is not None and args.cfg == 1:
        raise UserError("--negative does nothing without guidance: give a --cfg above 1")


def check_before_download(args):
    """UserError for what is wrong with the flags of a released model, whose file of gigabytes may not be here yet."""
    args, config = copy.copy(args), RELEASED_CONFIGS.get(args.ckpt)
    if config is None:
        return
    suit(args, config)
    find_size(config, args.resolution, args.upscale)
    prompts = read_prompts(args.prompts) if args.prompts else []
    if args.layout:
        check_layout(args.layout, prompts, args.num or 4, args.out)
    if hasattr(config, "text_encoder"):
        check_encoder(config, args.text_encoder, args.ckpt)
    else:
        find_classes(args.classes, IMAGENET_CLASSES)
