"""Draw pictures: from the released model, from the small one in assets/, or from your own run (paper section 4).

    python sample.py --class 207                            # released XL/16: golden retrievers
    python sample.py --ckpt emoji --class all               # the emoji model of this repository, every class
    python sample.py --class 207 --upscale 2                # the same tokens, twice the pixels (section 4.5)
    python sample.py --ckpt runs/x/last.pt --class flags,food --num 16 --solver euler,heun --gif path.gif
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --npz samples.npz   # for eval_fid.py; run again to resume

(The "--" keeps torchrun, which completes shortened flags, from taking --num for its own --numa-binding.)

Image i of a run starts from noise that depends on --seed and i alone, whatever batch it is in. In batches of another
size, sums round differently and the finished image may differ by 1 of 255 in a few pixels (measured in float32). --npz
keeps its batches, so its bytes are the same for any number of processes.
"""

import argparse
import dataclasses
import hashlib
import math
import pathlib

import torch

from data import ASSETS, random_stream
from runtime.checkpoint import load_model
from runtime.choices import find_classes, find_size
from runtime.distributed import Processes
from runtime.files import UserError, cached_download, run
from runtime.machine import freeze, keep_memory, pick_device, pick_precision
from runtime.options import COUNT, POSITIVE, SEED, number
from runtime.pictures import check_outputs, check_sides, draw_all, save_all
from runtime.sampling_cost import check_memory, pick_compile
from runtime.shards import LABELS, Shards, check_disk, choose_labels, one_complaint
from samplers import SOLVERS, generate, image_noise, time_grid

# The models that --ckpt knows by name. Released ones: address and side of their pictures in pixels. Shipped ones: file
# and temperature for people, at which a small model makes fewer faults, with less variety.
RELEASED = "https://huggingface.co/MCG-NJU/PixNerd-XL-P16-C2I/resolve/main/"
RELEASED_FILES = {
    "xl": (RELEASED + "epoch%3D319-step%3D1600000_emainit.ckpt", 256),  # FID 1.93
    "xl-512": (RELEASED + "res512_ft200k_epoch%3D325-step%3D1800000_emainit.ckpt", 512),
}
SHIPPED_FILES = {"emoji": (ASSETS / "emoji-nano.pt", 0.8)}
IMAGENET_CLASSES = (ASSETS / "imagenet_classes.txt").read_text().splitlines()  # in index order
NO_SETTINGS = ("out", "gif", "npz", "list_classes")  # flags that change nothing in an image
A_WEEK = 7 * 24 * 3600.0  # seconds that a process waits for the others, at the end perhaps for long

# ---- flags -----------------------------------------------------------------------------------------------------------

# Within these limits of --steps and --shift, all times of a grid are different in float32.
STEPS = number(int, lambda value: 1 <= value <= 10_000, "at least 1, and at most 10,000")
SHIFT = number(float, lambda value: 0.01 <= value <= 100, "in [0.01, 100]")
FINITE = number(float, math.isfinite, "a finite number")


def parse_args(argv=None, parser=argparse.ArgumentParser):
    """The command line; --solver comes back as a list. parser: its class, which decides how a mistake is told."""
    parser = parser(description="Draw pictures with PixNerd.")
    add = parser.add_argument
    add("--ckpt", default="xl", help="xl, xl-512 (released, downloaded once), emoji (assets/), or a file (default: xl)")
    add("--weights", choices=["ema", "raw"], default="ema", help="which of a checkpoint's two sets of weights")
    add("--class", dest="classes", help="name or index, several with commas, or all (default: 207; other models: all)")
    add("--list-classes", action="store_true", help="print the classes that the model knows, and stop")
    add("--num", type=COUNT, help="images per class (default: 4); --npz: in all (default: 50 of each)")
    add("--solver", default="euler", help=f"{', '.join(SOLVERS)}; several with commas are shown side by side")
    add("--order", type=int, default=2, choices=[1, 2, 3, 4], help="of the adams solver")
    add("--steps", type=STEPS, default=50, help="of the solver (default: 50)")
    add("--cfg", type=FINITE, default=3.5, help="guidance scale; 1: none (default: 3.5, as in the paper)")
    add("--interval", type=float, nargs=2, default=[0.1, 1.0], metavar=("LOW", "HIGH"), help="times that are guided")
    add("--shift", type=SHIFT, default=1.0, help="time shift: above 1, smaller steps near noise")
    calm = "of the noise; below 1: fewer faults, less variety (default: 1; pictures of emoji: 0.8)"
    add("--temperature", type=POSITIVE, help=calm)
    add("--resolution", help="pixels, N or HEIGHTxWIDTH: another number of tokens, of patches as trained")
    add("--upscale", default="1", help="factor or HEIGHTxWIDTH factors: more pixels per token, for far larger pictures")
    add("--seed", type=SEED, default=0)
    add("--batch-size", type=COUNT, default=32, help="images computed at once")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    pays = "auto: from 200 TFLOP on in bf16 on a CPU, 20,000 on a GPU (an image of XL with 50 steps has 27)"
    add("--compile", choices=["auto", "on", "off"], default="auto", help=pays)
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", default="samples.png", help="one grid as .png, .jpg or .webp, or a folder for single pictures")
    add("--gif", help="also write an animation: x_t, and the clean image predicted from it, side by side")
    add("--npz", help="instead of pictures, write shuffled arrays for eval_fid.py; the same command resumes")
    add("--labels", choices=LABELS, default="balanced", help="of --npz: equally many, by chance, or as in the data")
    args = parser.parse_args(argv)
    args.solver = args.solver.split(",")
    if args.temperature is None:
        args.temperature = 1.0 if args.npz or args.ckpt not in SHIPPED_FILES else SHIPPED_FILES[args.ckpt][1]
    if not args.interval[0] < args.interval[1]:
        parser.error("--interval LOW HIGH: LOW must be below HIGH")
    if not set(args.solver) <= set(SOLVERS):
        parser.error(f"--solver {','.join(args.solver)}: choose from {', '.join(SOLVERS)}")
    if args.npz and (args.gif or len(args.solver) > 1):
        parser.error("--npz takes one --solver and no --gif")
    return args


# ---- model and classes: what is to be drawn --------------------------------------------------------------------------


def find_model(ckpt, weights="ema"):
    """The model of --ckpt, on the CPU in float32; its config has the resolution, class_names a name for each class.

    class_names is None for a model of sentences. Raises FileNotFoundError and UserError.
    """
    address, resolution = RELEASED_FILES.get(ckpt, (None, None))
    path = cached_download(address, flag="--ckpt") if address else SHIPPED_FILES.get(ckpt, [ckpt])[0]
    try:
        model = load_model(path, weights)
    except UserError as error:
        raise UserError(f"--ckpt {ckpt}: {error} (once deleted, it is downloaded anew)") if address else error
    if address:
        model.config = dataclasses.replace(model.config, resolution=resolution)  # which released files do not say
    C = getattr(model.config, "num_classes", 0)
    if model.class_names is None and C:
        model.class_names = IMAGENET_CLASSES if C == len(IMAGENET_CLASSES) else [str(i) for i in range(C)]
    return model


def weights_hash(model):
    """A text that tells models apart, as the names of their files may not: every training step changes it."""
    return hashlib.sha256(model.decoder.output.weight.detach().numpy()).hexdigest()[:12]


def settings_of(flags, model, device, size):
    """What every file says of its pictures: {name: value} of all `flags` that change them; model: its weights_hash."""
    kept = {name: value for name, value in flags.items() if name not in NO_SETTINGS}
    size = f"{size[0]}x{size[1]}"
    return kept | {"ckpt": pathlib.Path(flags["ckpt"]).name, "device": device.type, "size": size, "model": model}


# ---- pictures --------------------------------------------------------------------------------------------------------


def draw(model, y, numbers, size, seed=0, temperature=1.0, **how):
    """Images number `numbers` of a seed, of conditions y (B, ...) and size (H, W): uint8 (B, 3, H, W), on the CPU.

    temperature: scales the noise that they start from. how: times, scale and all else that `generate` takes.
    """
    noise = temperature * image_noise(seed, numbers, size).to(y.device)  # (B, 3, H, W)
    generators = [random_stream("solver", seed, i) for i in numbers]
    return generate(model, y, noise, generators=generators, **how).cpu()  # (B, 3, H, W)


def main():
    """Finds out first all that can be wrong, then draws."""
    args = parse_args()
    if args.list_classes:
        names = IMAGENET_CLASSES if args.ckpt in RELEASED_FILES else find_model(args.ckpt, args.weights).class_names
        return print(*(f"{i:4d} {name}" for i, name in enumerate(names)), sep="\n")
    keep_memory()
    processes = Processes()
    processes.connect(torch.device("cpu"), A_WEEK)  # on the CPU, since all they do is wait for each other
    with one_complaint(processes):
        if processes.world > 1 and not args.npz:
            raise UserError("several processes are for --npz: draw pictures without torchrun")
        check_outputs(args.out, args.gif, args.npz)
        device = pick_device(args.device, processes.local_rank)
        model = find_model(args.ckpt, args.weights)
        config, names = model.config, model.class_names
        if names is None:
            raise UserError(f"--ckpt {args.ckpt} was trained on sentences and knows no classes: choose another")
        size, grid = find_size(config, args.resolution, args.upscale)
        times = time_grid(args.steps, args.shift)

        # What was left open is decided here, since the settings go into every file.
        args.precision = pick_precision(args.precision, device)
        if args.classes is None:
            args.classes = "207" if len(names) == len(IMAGENET_CLASSES) and not args.npz else "all"
        classes, remarks = find_classes(args.classes, names)
        args.num = args.num or (50 * len(classes) if args.npz else 4)
        total = args.num if args.npz else args.num * len(classes)  # images by each solver
        frames = (args.steps + 1) * bool(args.gif)
        kept = 0 if args.npz else total * len(args.solver)
        check_memory(config, min(args.batch_size, total), size, grid, device, kept, frames)
        if args.npz:
            check_disk(args.npz, total, size)
            y = choose_labels(classes, total, args.labels, args.seed, model.class_counts)  # (N)
        else:
            check_sides(args.out, args.gif, size, len(classes), args.num, len(args.solver))
            y = torch.tensor(classes).repeat_interleave(args.num)  # (N)
        evaluations = total * args.steps * len(args.solver) * (1 if args.cfg == 1 else 2)  # Heun's second ones aside
        compiled = pick_compile(args.compile, config, size, grid, evaluations, args.precision, device, processes.say)
        args.compile = "on" if compiled else "off"
        settings = settings_of(vars(args), weights_hash(model), device, size)
        store = Shards(args.npz, total, size, args.batch_size, settings, processes) if args.npz else None
    for remark in remarks:
        processes.say(remark)

    freeze(model.to(device), args.precision, pack=not compiled)
    if compiled:
        model.compile_blocks()
    how = dict(seed=args.seed, temperature=args.temperature, times=times, scale=args.cfg, interval=args.interval)
    how |= dict(order=args.order, grid=grid, precision=args.precision)

    def draw_batch(numbers, watch, solver=args.solver[0]):
        return draw(model, y[numbers].to(device), numbers, size, solver=solver, watch=watch, **how)  # (B, 3, H, W)

    if args.npz:
        store.draw(draw_batch, args.steps)
        store.join(y.numpy())
    else:
        images, films = draw_all(draw_batch, total, args.batch_size, args.solver, args.steps, film=bool(args.gif))
        solvers = [f"adams {args.order}" if solver == "adams" else solver for solver in args.solver]
        save_all(args.out, args.gif, images, films, [names[c] for c in classes], args.num, solvers, settings)
    files = args.npz or (f"{args.out} and {args.gif}" if args.gif else args.out)
    processes.say(f"{len(args.solver) * total} images of {settings['size']}: {files}")
    processes.close()


if __name__ == "__main__":
    run(main)
