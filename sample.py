"""Draw pictures: from the released model, from the small one in assets/, or from your own run.

    python sample.py --class 207                            # released XL/16: golden retrievers
    python sample.py --ckpt emoji --class all               # the emoji model of this repository, every class
    python sample.py --ckpt runs/x/last.pt --class flags,food --num 16 --gif path.gif

Image i of a run comes from noise that depends on --seed and i alone, so it is the same in any batch.
"""

import argparse
import difflib
import math
import pathlib
import sys

import torch
from PIL import Image
from tqdm import tqdm

import samplers
from checkpoint import CheckpointError, load_model
from data import ASSETS, DataError, keyed_generator, picture_grid, save_gif, to_uint8
from device import DeviceError, autocast, available_memory, pick_device, pick_precision
from download import DownloadError, cached_download

RELEASED = "https://huggingface.co/MCG-NJU/PixNerd-XL-P16-C2I/resolve/main/"
RELEASED_FILES = {
    "xl": (RELEASED + "epoch%3D319-step%3D1600000_emainit.ckpt", 256),  # FID 1.93
    "xl-512": (RELEASED + "res512_ft200k_epoch%3D325-step%3D1800000_emainit.ckpt", 512),
}


class SampleError(ValueError):
    """A wish that cannot be met. One line: which flag, what is wrong, what would do."""


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(description="Draw pictures with PixNerd.")
    add = parser.add_argument
    add("--ckpt", default="xl", help="xl or xl-512 (released, downloaded once), emoji (assets/), or a file (default: xl)")
    add("--weights", choices=["ema", "raw"], default="ema", help="which of a checkpoint's two sets of weights")
    add("--class", dest="classes", default="207", help="index or name, several with commas between, or all (default: 207)")
    add("--num", type=int, help="images per class (default: 8 with several classes, else 4)")
    add("--solver", choices=["euler", "heun", "adams", "euler-maruyama"], default="euler")
    add("--order", type=int, default=2, choices=[1, 2, 3, 4], help="of the adams solver")
    add("--steps", type=int, default=50)
    add("--cfg", type=float, help="guidance scale; 1: none (default: 3.5; 2.5 for emoji)")
    add("--interval", type=float, nargs=2, default=(0.1, 1.0), metavar=("LOW", "HIGH"), help="times that are guided")
    add("--shift", type=float, default=1.0, help="time shift: above 1, smaller steps near noise")
    add("--resolution", help="pixels, N or HEIGHTxWIDTH (default: as trained)")
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=32, help="images computed at once")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", default="samples.png", help="one grid as .png, .jpg or .webp, or a folder for single pictures")
    add("--gif", help="also write the way from noise to pictures as an animation")
    args = parser.parse_args(argv)
    if args.num is not None and args.num < 1 or args.steps < 1 or args.batch_size < 1:
        parser.error("--num, --steps and --batch-size must be at least 1")
    if args.shift <= 0:
        parser.error("--shift must be above 0")
    return args


def find_model(args):
    """(model, (height, width)) for --ckpt and --resolution."""
    if args.ckpt in RELEASED_FILES:
        url, resolution = RELEASED_FILES[args.ckpt]
        model = load_model(cached_download(url, flag="--ckpt"), args.weights)
    else:
        model = load_model(ASSETS / "emoji-nano.pt" if args.ckpt == "emoji" else args.ckpt, args.weights)
        resolution = model.config.resolution
    try:
        sides = [int(side) for side in (args.resolution or str(resolution)).lower().split("x")]
        height, width = sides * 2 if len(sides) == 1 else sides
    except ValueError:
        raise SampleError(f"--resolution {args.resolution} is not N or HEIGHTxWIDTH")
    try:
        model.config.token_grid(height, width)
    except ValueError as error:
        raise SampleError(f"--resolution: {error}")
    if model.class_names is None and model.config.num_classes == 1000:
        model.class_names = (ASSETS / "imagenet_classes.txt").read_text().splitlines()
    return model, (height, width)


def find_classes(wish, names, num_classes):
    """Class indices for --class: "all", or indices and names with commas between. SampleError lists what there is."""
    if wish == "all":
        return list(range(num_classes))
    names = names or [str(i) for i in range(num_classes)]
    found = []
    for item in (item.strip() for item in wish.split(",")):
        if item.lstrip("-").isdigit():
            if not 0 <= int(item) < num_classes:
                raise SampleError(f"--class {item} is out of range: this model knows 0 to {num_classes - 1}")
            found.append(int(item))
        elif item.lower() in (lower := [name.lower() for name in names]):
            found.append(lower.index(item.lower()))
        else:
            near = difflib.get_close_matches(item.lower(), lower, n=3, cutoff=0.5) or names[:10]
            raise SampleError(f"--class {item!r} is unknown; did you mean {', '.join(near)}?")
    return found


def solve(args, velocity, noise, seeds, callback):
    """Runs the solver that the flags name, from noise (B, C, H, W) to images."""
    times = samplers.time_grid(args.steps, args.shift)
    if args.solver == "adams":
        return samplers.adams(velocity, noise, times, args.order, callback)
    if args.solver == "euler-maruyama":
        generators = [keyed_generator(args.seed, 4, i) for i in seeds]
        return samplers.euler_maruyama(velocity, noise, times, generators, callback)
    return {"euler": samplers.euler, "heun": samplers.heun}[args.solver](velocity, noise, times, callback)


def check_memory(model, images, height, width, device):
    """SampleError where a batch plainly does not fit: an estimate of its activations against what is free."""
    rows, columns = model.config.token_grid(height, width)
    D, Dp, P2 = model.config.hidden_size, model.config.field_width, model.config.patch_size**2
    # With both halves of guidance; alive at once are a few tensors of 4D per token, or of 2Dp and the generated weights.
    per_token = max(8 * 4 * D, 4 * (2 * model.config.field_ratio * Dp**2 + P2 * 2 * Dp))
    need, free = 2 * images * rows * columns * per_token * 4, available_memory(device)
    if free and need > free:
        raise SampleError(f"{images} images of {height}x{width} need about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free: "
                          "use a smaller --batch-size or --resolution")  # fmt: skip


@torch.inference_mode()
def main():
    """Loads, samples in batches, writes."""
    args = parse_args()
    out = pathlib.Path(args.out)
    single = out.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp")
    for path in (out if single else out.parent, pathlib.Path(args.gif or "x.gif").parent):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise SampleError(f"{path} is not a folder that can be written ({error.strerror})")

    device = pick_device(args.device)
    precision = pick_precision(args.precision, device)
    model, (height, width) = find_model(args)
    model.to(device)
    classes = find_classes(args.classes, model.class_names, model.config.num_classes)
    num = args.num or (8 if len(classes) > 1 else 4)
    cfg = args.cfg if args.cfg is not None else 3.5 if model.config.num_classes == 1000 else 2.5
    check_memory(model, min(args.batch_size, num * len(classes)), height, width, device)

    y = torch.tensor(classes).repeat_interleave(num)  # (N)
    images, films = [], []
    evaluations = math.ceil(len(y) / args.batch_size) * args.steps
    with tqdm(total=evaluations, desc="sampling", unit="step", disable=not sys.stderr.isatty()) as bar:
        for start in range(0, len(y), args.batch_size):
            seeds = range(start, min(start + args.batch_size, len(y)))
            noise = torch.stack([torch.randn(3, height, width, generator=keyed_generator(args.seed, 3, i)) for i in seeds])
            velocity = samplers.guide(model, y[start : seeds.stop].to(device), cfg, args.interval)
            film = []

            def callback(step, t, x):
                bar.update(step > 0)
                if args.gif:
                    film.append(to_uint8(x).cpu())

            with autocast(device, precision):
                images.append(to_uint8(solve(args, velocity, noise.to(device), seeds, callback)).cpu())
            films.append(film)

    images = torch.cat(images)  # (N, 3, H, W)
    columns = num if len(classes) > 1 else None
    names = model.class_names or [str(i) for i in range(model.config.num_classes)]
    if single:
        for i, image in enumerate(images):
            path = out / f"{i:05d}-{names[y[i]].replace(' ', '-').replace('/', '-')}.png"
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    else:
        titles = [names[c] for c in classes] if len(classes) > 1 else None
        picture_grid(images, columns, titles).save(out)
    if args.gif:
        frames = [picture_grid(torch.cat(parts), columns) for parts in zip(*films)]
        save_gif(args.gif, frames)
    print(f"{len(images)} images of {height}x{width}: {out}" + (f" and {args.gif}" if args.gif else ""))


if __name__ == "__main__":
    try:
        main()
    except (SampleError, CheckpointError, DataError, DeviceError, DownloadError, OSError) as error:
        sys.exit(f"sample.py: {error}")
