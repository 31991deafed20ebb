"""Draw pictures: from the released model, from the small one in assets/, or from your own run (paper section 4).

    python sample.py --class 207                            # released XL/16: golden retrievers
    python sample.py --ckpt emoji --class all               # the emoji model of this repository, every class
    python sample.py --class 207 --upscale 2                # the same tokens, twice the pixels (section 4.5)
    python sample.py --ckpt runs/x/last.pt --class flags,food --num 16 --solver euler,heun --gif path.gif
    python sample.py --ckpt emoji-text --prompt "blue apple"         # sentences; of the released models, xxl reads them
    torchrun --nproc_per_node=8 -- sample.py --num 50000 --npz samples.npz   # for eval_fid.py; run again to resume

(The "--" keeps torchrun, which completes shortened flags, from taking --num for its own --numa-binding.)

Image i of a run starts from noise that depends on --seed and i alone, whatever batch it is in. In batches of another
size, sums round differently and the finished image may differ by 1 of 255 in a few pixels (measured in float32). --npz
keeps its batches, so its bytes are the same for any number of processes.
"""

import pathlib

import torch

from data import random_stream
from runtime.choices import far_from_training, find_classes, find_size
from runtime.distributed import Processes
from runtime.files import UserError, run
from runtime.machine import freeze, keep_memory, pick_device, pick_precision
from runtime.models import IMAGENET_CLASSES, find_model, weights_hash
from runtime.pictures import check_outputs, check_sides, draw_all, save_all
from runtime.prompts import check_layout, draw_layout, open_encoder, read_prompts, shared_noise, title_of
from runtime.sample_options import check_before_download, parse_args, suit
from runtime.sampling_cost import check_memory, pick_compile
from runtime.shards import Shards, check_disk, choose_labels, one_complaint
from samplers import generate, image_noise, time_grid

NO_SETTINGS = ("out", "gif", "gif_noise", "npz", "list_classes")  # flags that change nothing in an image
A_WEEK = 7 * 24 * 3600.0  # seconds that a process waits for the others, at the end perhaps for long


def settings_of(flags, model, device, size):
    """What every file says of its pictures: {name: value} of all `flags` that change them; model: its weights_hash."""
    kept = {name: value for name, value in flags.items() if name not in NO_SETTINGS and value is not None}
    kept |= {name: pathlib.Path(kept[name]).name for name in ("ckpt", "prompts", "text_encoder") if name in kept}
    return kept | {"device": device.type, "size": f"{size[0]}x{size[1]}", "model": model}


def draw(model, y, numbers, size, seed=0, temperature=1.0, noise_of=image_noise, **how):
    """Images number `numbers` of a seed, of conditions y (B, ...) and size (H, W): uint8 (B, 3, H, W), on the CPU.

    temperature: scales the noise that they start from, noise_of(seed, numbers, size). how: times, scale and all else
    that `generate` takes.
    """
    noise = temperature * noise_of(seed, numbers, size).to(y.device)  # (B, 3, H, W)
    generators = [random_stream("solver", seed, i) for i in numbers]
    return generate(model, y, noise, generators=generators, **how).cpu()  # (B, 3, H, W)


def main():
    """Finds out first all that can be wrong, then draws."""
    args = parse_args()
    if args.list_classes:
        return list_classes(args.ckpt, args.weights)
    keep_memory()
    processes = Processes()
    processes.connect(torch.device("cpu"), A_WEEK)  # on the CPU, since all they do is wait for each other
    with one_complaint(processes):
        if processes.world > 1 and not (args.npz or args.layout):
            raise UserError("several processes are for --npz and --layout: draw pictures without torchrun")
        if not args.layout:
            check_outputs(args.out, args.gif, args.npz)
        device = pick_device(args.device, processes.local_rank)
        check_before_download(args)
        model = find_model(args.ckpt, args.weights)
        config, names = model.config, model.class_names
        suit(args, config)
        size, grid = find_size(config, args.resolution, args.upscale)
        args.precision = pick_precision(args.precision, device)  # decided here, since the settings go into every file

        if names is None:  # what is to be drawn, T classes or prompts: their titles, and y (T, ...)
            prompts, remarks = read_prompts(args.prompts) if args.prompts else [], []
            titles = [prompt.text for prompt in prompts] or args.prompt
            encoder = open_encoder(model, args.text_encoder, args.negative, args.ckpt, device)
            y = None if args.layout else encoder.encode(titles).cpu()  # (T, M, E)
        else:
            classes, remarks = find_classes(args.classes, names)
            titles, y = [names[c] for c in classes], torch.tensor(classes)  # (T)
        for remark in remarks + far_from_training(config, size, grid):
            processes.say(remark)
        args.num = args.num or (50 * len(titles) if args.npz else 4)
        total = args.num if args.npz else args.num * len(titles)  # images by each solver
        batch = args.num if args.layout else min(args.batch_size, total)
        frames, kept = (args.steps + 1) * bool(args.gif), 0 if args.npz or args.layout else total * len(args.solver)
        check_memory(config, batch, size, grid, device, kept, frames)
        if args.layout:
            check_layout(args.layout, prompts, args.num, args.out)
        elif args.npz:
            check_disk(args.npz, total, size)
            y = choose_labels(classes, total, args.labels, args.seed, model.class_counts)  # (N)
            which = torch.arange(total)  # (N): image i is of y[which[i]]
        else:
            check_sides(args.out, args.gif, size, len(titles), args.num, len(args.solver), args.gif_noise)
            which = torch.arange(len(titles)).repeat_interleave(args.num)  # (N)
        evaluations = total * args.steps * len(args.solver) * (1 if args.cfg == 1 else 2)  # Heun's second ones aside
        compiled = pick_compile(args.compile, config, size, grid, evaluations, args.precision, device, processes.say)
        args.compile = "on" if compiled else "off"
        settings = settings_of(vars(args), weights_hash(model), device, size)
        store = Shards(args.npz, total, size, args.batch_size, settings, processes) if args.npz else None

    freeze(model.to(device), args.precision, pack=not compiled)
    if compiled:
        model.compile_blocks()
    how = dict(size=size, seed=args.seed, temperature=args.temperature, times=time_grid(args.steps, args.shift))
    how |= dict(scale=args.cfg, interval=args.interval, order=args.order, grid=grid, precision=args.precision)

    def draw_batch(numbers, watch, solver=args.solver[0]):  # uint8 (B, 3, H, W)
        return draw(model, y[which[numbers]].to(device), numbers, solver=solver, watch=watch, **how)

    def draw_prompt(text, watch):  # uint8 (num, 3, H, W)
        some, numbers = encoder.encode([text]).expand(args.num, -1, -1), range(args.num)  # (num, M, E), (num)
        return draw(model, some, numbers, solver=args.solver[0], watch=watch, noise_of=shared_noise, **how)

    if args.layout:
        with one_complaint(processes):
            draw_layout(args.layout, prompts, args.num, args.out, draw_prompt, settings, args.steps, processes)
    elif args.npz:
        store.draw(draw_batch, args.steps)
        store.join(y.numpy())
    else:
        images, films = draw_all(draw_batch, total, args.batch_size, args.solver, args.steps, film=bool(args.gif))
        solvers = [f"adams {args.order}" if solver == "adams" else solver for solver in args.solver]
        names = [title_of(title) for title in titles]
        save_all(args.out, args.gif, images, films, names, args.num, solvers, settings, args.gif_noise)
    files = args.npz or (f"{args.out} and {args.gif}" if args.gif else args.out)
    processes.say(f"{len(args.solver) * total} images of {settings['size']}: {files}")
    processes.close()


def list_classes(ckpt, weights):
    """Prints what --class takes: index and name of each class. Raises UserError for a model that knows none."""
    names = IMAGENET_CLASSES if ckpt in ("xl", "xl-512") else find_model(ckpt, weights).class_names
    if names is None:
        raise UserError(f"--ckpt {ckpt} reads sentences and knows no classes: use --prompt")
    print(*(f"{i:4d} {name}" for i, name in enumerate(names)), sep="\n")


if __name__ == "__main__":
    run(main)
