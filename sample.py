"""Draw pictures: from the released model, from the small one in assets/, or from your own run.

    python sample.py --class 207                            # released XL/16: golden retrievers
    python sample.py --ckpt emoji --class all               # the emoji model of this repository, every class
    python sample.py --class 207 --upscale 2                # the same tokens, twice the pixels (section 4.5)
    python sample.py --ckpt runs/x/last.pt --class flags,food --num 16 --solver euler,heun --gif path.gif
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --npz samples.npz   # for eval_fid.py; run again to go on

(The "--" keeps torchrun, which completes shortened flags, from taking --num for its own --numa-binding.)

Image i of a run comes from noise that depends on --seed and i alone, so it is the same in any batch.
"""

import argparse
import contextlib
import datetime
import difflib
import fractions
import functools
import hashlib
import json
import math
import os
import pathlib
import re
import shutil
import sys
import zipfile

import numpy as np
import torch
import torch.distributed as dist
from PIL import ExifTags, Image, PngImagePlugin
from tqdm import tqdm

import samplers
from checkpoint import CheckpointError, load_model, sync_folder
from data import ASSETS, DataError, keyed_generator, picture_grid, save_gif, to_uint8
from device import (DeviceError, autocast, available_memory, compiler_trouble, freeze, keep_memory, pick_device,
                    pick_precision)  # fmt: skip
from download import DownloadError, cached_download
from flow import clean_from_velocity
from model import count_flops
from processes import place

RELEASED = "https://huggingface.co/MCG-NJU/PixNerd-XL-P16-C2I/resolve/main/"
RELEASED_FILES = {
    "xl": (RELEASED + "epoch%3D319-step%3D1600000_emainit.ckpt", 256),  # FID 1.93
    "xl-512": (RELEASED + "res512_ft200k_epoch%3D325-step%3D1800000_emainit.ckpt", 512),
}
IMAGENET_CLASSES = (ASSETS / "imagenet_classes.txt").read_text().splitlines()
SOLVERS = ("euler", "heun", "adams", "euler-maruyama")
PICTURES = (".png", ".jpg", ".jpeg", ".webp")
SIDE_LIMITS = {".jpg": 65_500, ".jpeg": 65_500, ".webp": 16_383, ".gif": 65_535}  # pixels
# FLOP from which --compile auto compiles. On CPUs, packed weights (device.freeze) are faster in fp32 and nearly as fast
# in bf16, where compiling saves a fiftieth of the time and costs 10 to 20 s: even at eight images of XL, 200 TFLOP. The
# compiler cannot read them, so it is one or the other. Counted and not timed: the same command does the same.
COMPILE_PAYS = {("cpu", "bf16"): 200e12, ("cpu", "fp32"): float("inf")}


class SampleError(ValueError):
    """A wish that cannot be met. One line: which flag, what is wrong, what would do."""


def parse_args(argv=None):
    """The command line; --solver comes back as a list."""
    parser = argparse.ArgumentParser(description="Draw pictures with PixNerd.")
    add = parser.add_argument
    add("--ckpt", default="xl", help="xl, xl-512 (released, downloaded once), emoji (assets/), or a file (default: xl)")
    add("--weights", choices=["ema", "raw"], default="ema", help="which of a checkpoint's two sets of weights")
    add("--class", dest="classes", help="index or name, several with commas, or all (default: 207; emoji: all)")
    add("--list-classes", action="store_true", help="print the classes that the model knows, and stop")
    add("--num", type=int, help="images per class (default: 4); --npz: in all (default: 50 of each)")
    add("--solver", default="euler", help=f"{', '.join(SOLVERS)}; several with commas are shown side by side")
    add("--order", type=int, default=2, choices=[1, 2, 3, 4], help="of the adams solver")
    add("--steps", type=int, default=50)
    add("--cfg", type=float, default=3.5, help="guidance scale; 1: none (default: 3.5, as in the paper)")
    add("--interval", type=float, nargs=2, default=[0.1, 1.0], metavar=("LOW", "HIGH"), help="times that are guided")
    add("--shift", type=float, default=1.0, help="time shift: above 1, smaller steps near noise")
    add("--temperature", type=float, help="of the noise at the start; below 1: calmer pictures, fewer faults and less "
        "variety (default: 1; 0.8 for pictures of the small model emoji)")  # fmt: skip
    add("--resolution", help="pixels, N or HEIGHTxWIDTH (default: as trained). Alone it changes the number of tokens, "
        "each a patch as trained: for another shape, or a size near the trained one")  # fmt: skip
    add("--upscale", default="1", help="2, 1.5 or HEIGHTxWIDTH factors such as 2x1.5: keeps the tokens of --resolution "
        "and draws each patch with more pixels: for pictures far larger than the trained size. Stripes appear where a "
        "patch has fewer pixels a side than twice the encoding's frequencies (the emoji model)")  # fmt: skip
    add("--seed", type=int, default=0)
    add("--batch-size", type=int, default=32, help="images computed at once")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto")
    add("--compile", choices=["auto", "on", "off"], default="auto", help="torch.compile the repeated blocks; auto: for "
        "at least 200 TFLOP in bf16 on a CPU, 20,000 on a GPU (an image of XL with 50 steps has 27)")  # fmt: skip
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--out", default="samples.png", help="one grid as .png, .jpg or .webp, or a folder for single pictures")
    add("--gif", help="also write an animation: x_t, and the clean image predicted from it, side by side")
    add("--npz", help="instead of pictures, write shuffled arrays for eval_fid.py; an interrupted run goes on")
    add("--labels", choices=["balanced", "random"], default="balanced", help="of --npz: equally many, or by lot")
    args = parser.parse_args(argv)
    args.solver = args.solver.split(",")
    if args.num is not None and args.num < 1 or args.steps < 1 or args.batch_size < 1:
        parser.error("--num, --steps and --batch-size must be at least 1")
    if args.temperature is None:
        args.temperature = 0.8 if args.ckpt == "emoji" and not args.npz else 1.0
    if not 0 < args.shift < math.inf or not 0 < args.temperature < math.inf or not math.isfinite(args.cfg):
        parser.error("--shift and --temperature must be above 0, and --cfg a number")
    if not args.interval[0] < args.interval[1]:
        parser.error("--interval LOW HIGH: LOW must be below HIGH")
    if not -(2**63) <= args.seed < 2**63:
        parser.error("--seed must be a whole number of 64 bits")
    if not set(args.solver) <= set(SOLVERS):
        parser.error(f"--solver {','.join(args.solver)}: choose from {', '.join(SOLVERS)}")
    if args.npz and (args.gif or len(args.solver) > 1):
        parser.error("--npz takes one --solver and no --gif")
    for flag, name, endings in (("--npz", args.npz, (".npz",)), ("--gif", args.gif, (".gif",))):
        if name and not name.lower().endswith(endings):
            parser.error(f"{flag} {name}: the name must end in {endings[0]}")
    if pathlib.Path(args.out).suffix.lower() in set(Image.registered_extensions()) - set(PICTURES):
        parser.error(f"--out {args.out}: a picture's name must end in {', '.join(PICTURES)}; any other is a folder")
    return args


# ---- what to draw ----------------------------------------------------------------------------------------------------


def find_model(args):
    """(model, (height, width)) for --ckpt and --resolution."""
    if args.ckpt in RELEASED_FILES:
        url, resolution = RELEASED_FILES[args.ckpt]
        path = cached_download(url, flag="--ckpt")
        try:
            model = load_model(path, args.weights)
        except CheckpointError as error:
            raise SampleError(f"--ckpt {args.ckpt}: {error} (once it is deleted, the next run downloads it)")
    else:
        model = load_model(ASSETS / "emoji-nano.pt" if args.ckpt == "emoji" else args.ckpt, args.weights)
        resolution = model.config.resolution
    try:
        size = pair(args.resolution or str(resolution), int)
        model.config.token_grid(*size)
    except ValueError:
        raise SampleError(f"--resolution {args.resolution or resolution} is not N or HEIGHTxWIDTH in pixels, both "
                          f"multiples of {model.config.patch_size}, the side of a patch")  # fmt: skip
    if model.class_names is None:
        C = model.config.num_classes
        model.class_names = IMAGENET_CLASSES if C == 1000 else [str(i) for i in range(C)]
    return model, size


def pair(text, number):
    """"A" -> (A, A) and "AxB" -> (A, B), each read by `number`. ValueError for anything else."""
    first, *rest = [number(part) for part in text.lower().split("x")]
    second, = rest or [first]
    return first, second


def enlarge(config, size, upscale):
    """--upscale: the pixels (height, width) of pictures with the token grid of `size` and larger patches."""
    P = config.patch_size
    try:
        down, across = pair(upscale, fractions.Fraction)  # exact, and takes 5/4 too
    except (ValueError, ZeroDivisionError):
        raise SampleError(f"--upscale {upscale} is not a factor such as 1.5, nor HEIGHTxWIDTH factors such as 2x1.5")
    if min(down, across) <= 0 or down * P % 1 or across * P % 1:
        raise SampleError(f"--upscale {upscale} makes patches of {P} pixels {float(down * P):g}x{float(across * P):g}: "
                          f"both sides must be whole, so use multiples of 1/{P}")  # fmt: skip
    if config.decoder == "linear" and (down, across) != (1, 1):
        raise SampleError(f"--upscale {upscale} needs a neural field; this model's linear decoder has one patch size")
    return int(size[0] * down), int(size[1] * across)


def find_classes(wish, names, num_classes):
    """Class indices for --class: "all", or indices and names with commas between. SampleError lists what there is."""
    if wish == "all":
        return list(range(num_classes))
    names = names or [str(i) for i in range(num_classes)]
    found = []
    for item in (item.strip() for item in wish.split(",")):
        if re.fullmatch("-?[0-9]+", item):
            if not 0 <= int(item) < num_classes:
                raise SampleError(f"--class {item} is out of range: this model knows 0 to {num_classes - 1}")
            found.append(int(item))
        elif item.lower() in (lower := [name.lower() for name in names]):
            found.append(lower.index(item.lower()))
        else:
            near = difflib.get_close_matches(item.lower(), lower, n=3, cutoff=0.5) or names[:10]
            raise SampleError(f"--class {item!r} is unknown; did you mean {', '.join(near)}?")
    return found


def check_memory(config, images, grid, size, device):
    """SampleError where a batch plainly does not fit: an estimate of its activations against what is free."""
    tokens, pixels, D, Dp = grid[0] * grid[1], size[0] * size[1], config.hidden_size, config.field_width
    # Alive at once are a few tensors of 4D per token, or the generated weights and some 2Dp per pixel.
    values = max(tokens * 8 * 4 * D, 4 * (tokens * 2 * config.field_ratio * Dp**2 + pixels * 2 * Dp))
    need, free = 2 * images * values * 4, available_memory(device)  # both halves of guidance, in float32
    if free and need > free:
        raise SampleError(f"{images} images of {size[0]}x{size[1]} need about {need / 1e9:.1f} GB, {free / 1e9:.1f} "
                          "GB are free: use a smaller --batch-size, --resolution or --upscale")  # fmt: skip


def pick_compile(args, config, images, size, device):
    """ "on" or "off" for --compile. DeviceError for "on" where nothing compiles."""
    evaluations = images * args.steps * len(args.solver) * (1 if args.cfg == 1 else 2)  # Heun's second ones aside
    pays = evaluations * count_flops(config, *size) >= COMPILE_PAYS.get((device.type, args.precision), 20e15)
    if args.compile == "off" or args.compile == "auto" and not pays:
        return "off"
    trouble = compiler_trouble(device)
    if trouble and args.compile == "on":
        raise DeviceError(f"--compile on: {trouble}")
    if trouble:
        print(f"not compiling, which is slower but the same: {trouble}")
    return "off" if trouble else "on"


def draw(args, solver, model, y, numbers, size, bar):
    """The run's images number `numbers`, of classes y (B) and size (H, W): uint8 (B, 3, H, W), and their film.

    The film (None without --gif) has x_t and the clean image predicted from it at every time of the grid: uint8
    (steps+1, 2, B, 3, H, W). Raises SampleError for an image that is not finite: pixels would hide it.
    """
    noise = torch.stack([torch.randn(3, *size, generator=keyed_generator(args.seed, 3, i)) for i in numbers])
    guided = samplers.guide(model, y, args.cfg, args.interval)
    x_t, film = None, []

    def velocity(x, t):
        v = guided(x, t)
        if args.gif and x is x_t:  # not for the trial point at which Heun asks too
            film.append(torch.stack([to_uint8(x), to_uint8(clean_from_velocity(v, x, t))]).cpu())
        return v

    def callback(step, t, x):
        nonlocal x_t
        x_t = x
        bar.update(step > 0)

    solvers = {
        "euler": samplers.euler,
        "heun": samplers.heun,
        "adams": functools.partial(samplers.adams, order=args.order),
        "euler-maruyama": functools.partial(
            samplers.euler_maruyama, generator=[keyed_generator(args.seed, 4, i) for i in numbers]),
    }  # fmt: skip
    with autocast(y.device, args.precision):
        times = samplers.time_grid(args.steps, args.shift)
        x = solvers[solver](velocity, args.temperature * noise.to(y.device), times, callback=callback)  # (B, 3, H, W)
    if not x.isfinite().all():
        raise SampleError(f"--precision {args.precision}: an image is not finite; try fp32, or an earlier checkpoint")
    images = to_uint8(x).cpu()
    film.append(torch.stack([images, images]))  # at t=1 the prediction is the image
    return images, torch.stack(film) if args.gif else None


# ---- pictures --------------------------------------------------------------------------------------------------------


def check_output(flag, name):
    """SampleError, before anything is computed, where the file or folder that a flag names could not be written."""
    path = pathlib.Path(name)
    folder = path if flag == "--out" and path.suffix.lower() not in PICTURES else path.parent
    probe = folder / f".writable-{os.getpid()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise SampleError(f"{flag} {path} cannot be written ({error.strerror}): choose another place")
    if path != folder and path.is_dir():
        raise SampleError(f"{flag} {path} is a folder: choose another name")


def check_sides(args, rows, size):
    """SampleError, before anything is computed, for a grid of `rows` classes that its file format cannot hold."""
    if rows == 1:  # one class alone is drawn as a square
        return
    height, width = rows * (size[0] + 2), len(args.solver) * args.num * (size[1] + 2)
    for name, side in ((args.out, max(height, width)), (args.gif or "", max(height, 2 * width))):
        limit = SIDE_LIMITS.get(pathlib.Path(name).suffix.lower(), math.inf)
        if side > limit:
            raise SampleError(f"{name} would have a side of over {side} pixels, and its format ends at {limit}: "
                              "use fewer classes, a smaller --num, or a folder for --out")  # fmt: skip


@contextlib.contextmanager
def whole_file(path):
    """`with whole_file(path) as temporary`: what is written there becomes `path` once it is whole, or vanishes."""
    temporary = path.with_name(f".tmp-{path.name}")  # the ending stays: Pillow and numpy go by it
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def save_picture(path, picture, settings):
    """PNG, JPEG or WEBP by the ending; `settings` go in as JSON: PNG's text "settings", or EXIF's UserComment."""
    text, png, exif = json.dumps(settings), PngImagePlugin.PngInfo(), Image.Exif()
    png.add_text("settings", text)
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = b"ASCII\0\0\0" + text.encode()
    with whole_file(path) as temporary:
        picture.save(temporary, quality=95, pnginfo=png, exif=exif)  # each format takes what it knows


def save_pictures(args, model, classes, size, device, settings):
    """--out and --gif: args.num pictures of each class by each solver."""
    y, out = torch.tensor(classes).repeat_interleave(args.num), pathlib.Path(args.out)  # (N)
    batches = torch.arange(len(y)).split(args.batch_size)
    images, films = [], []  # one of each for each solver
    with tqdm(total=len(args.solver) * len(batches) * args.steps, disable=not sys.stderr.isatty()) as bar:
        for solver in args.solver:
            drawn = [draw(args, solver, model, y[i].to(device), i.tolist(), size, bar) for i in batches]
            images.append(torch.cat([part for part, _ in drawn]))  # (N, 3, H, W)
            if args.gif:
                films.append(torch.cat([film for _, film in drawn], dim=2))  # (steps+1, 2, N, 3, H, W)
    names = model.class_names
    columns, titles = (args.num, [names[c] for c in classes]) if len(classes) > 1 else (None, None)
    solvers = [f"adams {args.order}" if solver == "adams" else solver for solver in args.solver]
    if out.suffix.lower() in PICTURES:
        headings = solvers if len(solvers) > 1 else None
        save_picture(out, picture_grid(torch.cat(images), columns, titles, headings), settings)
    else:
        for solver, pictures in zip(solvers, images):
            for i, picture in enumerate(pictures.permute(0, 2, 3, 1).numpy()):
                name = f"{i:05d} {names[y[i]]}" + (f" {solver}" if len(solvers) > 1 else "")
                name = name.replace(" ", "-").replace("/", "-")
                save_picture(out / f"{name}.png", Image.fromarray(picture), settings)
    if args.gif:
        panels = [f"{solver}: {what}" for solver in solvers for what in ("x_t", "predicted")]
        frames = [picture_grid(torch.cat(films).flatten(0, 1), columns, titles, panels) for films in zip(*films)]
        with whole_file(pathlib.Path(args.gif)) as temporary:
            save_gif(temporary, frames, comment=json.dumps(settings))
    print(f"{len(solvers) * len(y)} images of {settings['size']}: {out}" + (f" and {args.gif}" if args.gif else ""))


# ---- many images for eval_fid.py -------------------------------------------------------------------------------------


def save_npz(args, model, classes, size, device, settings, rank, world):
    """--npz: args.num images arr_0 uint8 (N, H, W, 3) and their classes arr_1 = labels (N), in shuffled order.

    Shard s, a batch of consecutive images, is computed by process s % world and kept in a folder beside the npz until
    all are there. What shares a batch thus does not depend on the number of processes, and neither do the bytes; an
    interrupted run loses unfinished shards only. The disk must hold the images twice.
    """
    # Shuffled, since ADM's Inception Score takes consecutive images for a fair sample of all classes.
    generator = keyed_generator(args.seed, 5)
    if args.labels == "random":
        order = torch.randint(len(classes), (args.num,), generator=generator)  # (N)
    elif args.num % len(classes) == 0:
        order = torch.randperm(args.num, generator=generator) % len(classes)  # (N): equally many of each
    else:
        raise SampleError(f"--num {args.num} images cannot be shared equally by {len(classes)} classes: use "
                          f"{args.num + -args.num % len(classes)}, or --labels random")  # fmt: skip
    labels = torch.tensor(classes)[order]  # (N)
    path = pathlib.Path(args.npz)
    folder = path.with_name(path.name + ".shards")
    batches = torch.arange(args.num).split(args.batch_size)
    shards = [folder / f"{s:06d}.npy" for s in range(len(batches))]

    if world > 1:  # only to wait for each other, at the end perhaps for long
        dist.init_process_group("gloo", timeout=datetime.timedelta(days=7))
    if rank == 0:
        open_shards(folder, settings)
    if world > 1:
        dist.barrier()
    todo = [s for s in range(rank, len(shards), world) if not shards[s].exists()]
    with tqdm(total=len(todo) * args.steps, disable=rank > 0 or not sys.stderr.isatty()) as bar:
        for s in todo:
            i = batches[s]
            images, _ = draw(args, args.solver[0], model, labels[i].to(device), i.tolist(), size, bar)
            with whole_file(shards[s]) as temporary:
                np.save(temporary, images.permute(0, 2, 3, 1).numpy())  # (B, H, W, 3)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()
    if rank == 0:
        join_shards(path, shards, (args.num, *size, 3), labels.numpy(), settings)
        shutil.rmtree(folder)
        print(f"{args.num} images of {settings['size']}: {path}")


def open_shards(folder, settings):
    """Begins a folder of shards, or goes on with one. SampleError if it was begun with other settings."""
    record = folder / "settings.json"
    folder.mkdir(exist_ok=True)
    if not record.exists():
        with whole_file(record) as temporary:
            temporary.write_text(json.dumps(settings))
    for name, value in json.loads(record.read_text()).items():
        if settings.get(name) != value:
            raise SampleError(f"{folder} was begun with {name}={value!r}, and this run has {settings.get(name)!r}: "
                              "use the same, delete the folder, or choose another --npz")  # fmt: skip


def join_shards(path, shards, shape, labels, settings):
    """Writes the npz with one shard in memory at a time. SampleError for a shard that is missing or damaged."""
    with whole_file(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        archive.comment = json.dumps(settings).encode()
        with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:  # above 2 GB
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for shard in shards:
                try:
                    file.write(np.load(shard).tobytes())
                except (OSError, ValueError, EOFError) as error:
                    raise SampleError(f"{shard} cannot be read ({error}): delete it and run the same command again, "
                                      "where all processes see this folder")  # fmt: skip
        for name in ("arr_1.npy", "labels.npy"):  # ADM's name, and a telling one
            with archive.open(zipfile.ZipInfo(name), "w") as file:
                np.lib.format.write_array(file, labels)


@torch.inference_mode()
def main():
    """Finds out first all that can be wrong, then draws."""
    args = parse_args()
    if args.list_classes:
        names = IMAGENET_CLASSES if args.ckpt in RELEASED_FILES else find_model(args)[0].class_names
        return print(*(f"{i:4d} {name}" for i, name in enumerate(names)), sep="\n")
    rank, local_rank, world = place()
    if world > 1 and not args.npz:
        raise SampleError("several processes are for --npz: draw pictures without torchrun")
    check_output("--npz" if args.npz else "--out", args.npz or args.out)
    if args.gif:
        check_output("--gif", args.gif)

    keep_memory()
    device = pick_device(args.device, local_rank)
    model, trained_size = find_model(args)
    config, grid = model.config, model.config.token_grid(*trained_size)
    size = enlarge(config, trained_size, args.upscale)
    if size != trained_size:  # `guide` calls model(x, t, y) and need not know of the grid
        model.forward = functools.partial(model.forward, grid=grid)

    # What was left open is decided here, since the settings go into every file.
    args.precision = pick_precision(args.precision, device)
    if args.classes is None:
        args.classes = "all" if args.npz or config.num_classes != 1000 else "207"
    classes = find_classes(args.classes, model.class_names, config.num_classes)
    args.num = args.num or (50 * len(classes) if args.npz else 4)
    images = args.num * (1 if args.npz else len(classes))
    check_memory(config, min(args.batch_size, images), grid, size, device)
    if not args.npz:
        check_sides(args, len(classes), size)
    args.compile = pick_compile(args, config, images, trained_size, device)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "gif", "npz", "list_classes")}
    settings |= {"ckpt": pathlib.Path(args.ckpt).name, "device": device.type, "size": f"{size[0]}x{size[1]}"}
    # A file's name says little about the weights in it; the output layer changes with every step of training.
    settings["model"] = hashlib.sha256(model.decoder.output.weight.numpy()).hexdigest()[:12]

    freeze(model.to(device), args.precision, pack=args.compile == "off")
    if args.compile == "on":
        model.compile_blocks()
    if args.npz:
        save_npz(args, model, classes, size, device, settings, rank, world)
    else:
        save_pictures(args, model, classes, size, device, settings)


if __name__ == "__main__":
    try:
        main()
    except (SampleError, CheckpointError, DataError, DeviceError, DownloadError, OSError) as error:
        sys.exit(f"sample.py: {error}")
    except torch.OutOfMemoryError:
        sys.exit("sample.py: the device's memory is full: use a smaller --batch-size, --resolution or --upscale")
    except KeyboardInterrupt:
        sys.exit("sample.py: interrupted; with --npz the same command goes on from here")
