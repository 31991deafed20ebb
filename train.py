"""Train PixNerd: one loop, on a laptop or under torchrun on many GPUs (paper section 4.1).

    python train.py                                        # Nano on the embedded emoji, a few minutes on a CPU
    torchrun --nproc_per_node=8 train.py --size XL --data IMAGENET/train --repa 0.5
    python train.py --size XL --data IMAGENET/train --dry-run --world-size 8 --gpu a100     # what that would cost

The same command again resumes. In --out: step-N.pt and last.pt (checkpoints), previews/ (EMA samples of the same
noise), samples.png (the newest of them), metrics.jsonl (numbers, one line per --log-every), and what --tensorboard
and --wandb write. The loop below is the whole story; everything above it prepares, everything it calls is one file
away. Left out: sharding of the model (FSDP), since with 32 images of 256 pixels XL fits an A100 whole (33.9 GB in the
paper).
"""

import argparse
import contextlib
import copy
import dataclasses
import math
import os
import pathlib
import signal
import sys
import textwrap
import time
import traceback

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

import emoji_metric
from checkpoint import (CheckpointError, FORMAT, check_same, checked_config, load_checkpoint, load_model, load_run,
                        load_weights, save_run, go_on_from)  # fmt: skip
from data import BatchNumbers, DataError, from_uint8, open_dataset, training_batches
from device import (PEAKS, DeviceError, autocast, compiler_trouble, keep_memory, peak_flops, pick_device,
                    pick_precision)  # fmt: skip
from dinov2 import TeacherError, load_dinov2
from download import DownloadError
from eval_fid import EvalError, open_pictures
from flow import alignment_loss, flow_matching_loss, interpolate
from inception import InceptionError, load_inception
from logs import Log, LogError, require, save_preview
from model import PRESETS, RECOMPUTE, PixNerd
from optimizers import make_optimizers
from plan import MFU, Elsewhere, by_dinov2, describe, epochs_to_steps, training_flops
from previews import evaluate, preview
from processes import join, place

# The paper's recipe for ImageNet, and what was measured to be good for minutes on a CPU (README, "Sizes").
PAPER = dict(batch_size=256, steps=800_000, optimizer="adamw", lr=1e-4, schedule="constant", warmup=0, ema=0.9999,
             resolution=256, data=None, log_every=100, preview_every=10_000, save_every=5_000)  # fmt: skip
NANO = dict(batch_size=64, steps=1450, optimizer="muon", lr=1e-2, schedule="cosine", warmup=20, ema=0.99,
            resolution=32, data="emoji", log_every=100, preview_every=500, save_every=500)  # fmt: skip
TIME_BINS = 10
STOPPING = (signal.SIGTERM, signal.SIGINT)  # what torchrun, schedulers and people send to end a run


class Student(nn.Module):
    """What is trained, as one module: the model and, for --repa, the projector from its tokens to the teacher's."""

    def __init__(self, model, repa_block, teacher_width):
        super().__init__()
        self.model, self.repa_block = model, repa_block
        D = model.config.hidden_size
        self.projector = nn.Sequential(nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU(),
                                       nn.Linear(D, teacher_width)) if teacher_width else None  # fmt: skip

    def forward(self, x_t, t, y):
        if self.projector is None:
            return self.model(x_t, t, y), None  # (B, C, H, W)
        v, tokens = self.model(x_t, t, y, features_at=self.repa_block)  # (B, C, H, W), (B, L, D)
        return v, self.projector(tokens)  # (B, C, H, W), (B, L, teacher's width)


class TrainingError(RuntimeError):
    """Training cannot go on. One line: what happened, where, and what was saved."""


def number(kind, fits, range_):
    """A type for argparse: int or float, where fits(value); the error names the flag and the range in words."""

    def read(text):
        value = kind(text)
        if not fits(value):
            raise argparse.ArgumentTypeError(f"{text} is not {range_}")
        return value

    read.__name__ = kind.__name__  # for what is no number at all
    return read


# Each asks so that "not a number", which is neither above nor below anything, is refused.
SEED = number(int, lambda value: -(2**63) <= value < 2**63, "a whole number of 64 bits")
COUNT = number(int, lambda value: value >= 1, "at least 1")
FROM_0 = number(int, lambda value: value >= 0, "at least 0")
SHARE = number(float, lambda value: 0 <= value <= 1, "in [0, 1]")
BELOW_1 = number(float, lambda value: 0 <= value < 1, "in [0, 1)")
ABOVE_0 = number(float, lambda value: 0 < value <= 1, "in (0, 1]")
POSITIVE = number(float, lambda value: 0 < value < math.inf, "above 0 and finite")
NOT_NEGATIVE = number(float, lambda value: 0 <= value < math.inf, "at least 0 and finite")


def parse_args(argv=None):
    """The command line. Flags that are left out take the recipe of the size: NANO, or PAPER for all others."""
    parser = argparse.ArgumentParser(description="Train PixNerd. Running the same command again resumes.")
    add = parser.add_argument

    def recipe(name):
        return f"(Nano: {NANO[name]}, others: {PAPER[name]})"

    add("--size", choices=PRESETS, default="Nano", help="model preset (default: Nano)")
    add("--data", help="emoji, a folder of class folders, or an uncompressed tar of one (default: emoji for Nano)")
    add("--classes", help="train on these only: names of classes or, of the emoji, of kinds (assets/README.md); NAME:N "
        "takes its pictures N times per epoch (default: all)")  # fmt: skip
    add("--resolution", type=COUNT, help="side of the training images in pixels " + recipe("resolution"))
    add("--batch-size", type=COUNT, help="images per step over all processes " + recipe("batch_size"))
    add("--micro-batch", type=COUNT, help="images per forward pass and process; gradients add up (default: all)")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=COUNT, help="train until this step " + recipe("steps"))
    length.add_argument("--epochs", type=POSITIVE, help="instead: until every image was seen so many times (of NAME:N, "
                        "N times as many)")  # fmt: skip
    add("--lr", type=POSITIVE, help="learning rate " + recipe("lr"))
    add("--schedule", choices=["constant", "cosine"], help="of the learning rate; cosine falls to 0 at --steps")
    add("--warmup", type=FROM_0, help="steps over which the learning rate rises from 0")
    add("--optimizer", choices=["adamw", "muon"], help="muon: for the matrices of the blocks " + recipe("optimizer"))
    add("--weight-decay", type=NOT_NEGATIVE, default=0.0)
    add("--clip", type=NOT_NEGATIVE, default=0.0, help="largest norm of the gradient (0: no limit, as in the paper)")
    add("--ema", type=BELOW_1, help="decay of the averaged weights per step " + recipe("ema"))
    add("--drop-label", type=SHARE, default=0.1, help="share of samples trained without their class, for guidance")
    add("--shift", type=POSITIVE, default=1.0, help="time shift of the training times")
    add("--repa", type=NOT_NEGATIVE, default=0.0, help="weight of alignment with a teacher (0: none; the paper: 0.5)")
    add("--repa-block", type=COUNT, default=8, help="the block whose output is aligned, counted from 1")
    add("--dino", help="DINOv2 weights (default: ViT-B/14, downloaded once), or the word emoji: the small classifier "
        "of emoji_metric.py teaches in its place")  # fmt: skip
    add("--init", help="start from the weights of this checkpoint, ours or released (fine-tuning)")
    add("--num-classes", type=COUNT, help="refuse data with another number of classes (default: take what is there)")
    add("--augment", action="store_true", help="random crop and flip in place of the centre crop")
    add("--cache-crops", help="a folder for the cropped pictures, so that each is decoded once (252 GB for ImageNet)")
    add("--patch-size", type=int, help="instead of the preset's")
    add("--hidden-size", type=int, help="width of the transformer")
    add("--depth", type=int, help="blocks of the transformer")
    add("--decoder", choices=["field", "linear"], help="linear: the paper's baseline")
    add("--field-norm", choices=["none", "first", "both", "output"], help="which parts of the field are normalised")
    add("--field-width", type=int, help="Dp")
    add("--field-ratio", type=int, help="hidden width of the field's MLPs, as a multiple of Dp")
    add("--field-depth", type=int, help="blocks of the neural field")
    add("--num-freqs", type=int, help="frequencies per axis of the encoding")
    add("--encoding", choices=["dct", "sincos"], help="of a pixel's place in its patch (Eq. 12 or 7)")
    add("--precision", choices=["auto", "bf16", "fp32"], default="auto", help="bf16 where the machine is fast in it")
    add("--compile", nargs="?", const="on", choices=["auto", "on", "off"], default="auto",
        help="torch.compile each repeated block (auto: where it works; on: an error where not)")  # fmt: skip
    add("--recompute", choices=RECOMPUTE, default="none", help="activations made again to save memory")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--workers", type=FROM_0, help="loader processes per process (default: 0 for emoji, else up to 8)")
    add("--timeout", type=POSITIVE, default=1800.0, help="seconds of waiting for another process, as while it saves")
    add("--out", help="folder of the run (default: runs/SIZE)")
    add("--save-every", type=FROM_0, help="steps between checkpoints (0: only at the end)")
    add("--keep", type=COUNT, default=2, help="checkpoints kept, at least 2")
    add("--preview-every", type=FROM_0, help="steps between previews (0: none)")
    add("--eval-every", type=FROM_0, default=0, help="steps between evaluations of EMA samples (0: none)")
    add("--eval-num", type=COUNT, default=1000, help="samples drawn for an evaluation")
    add("--eval-ref", help="what FID compares with: a reference npz, or a file of eval_fid.py --save-stats. "
        "Without it, on the emoji, the emoji distance (emoji_metric.py) is logged instead")  # fmt: skip
    add("--inception", help="weights of the FID network (default: downloaded once)")
    add("--log-every", type=FROM_0, help="steps between metrics (0: only with a checkpoint)")
    add("--tensorboard", action="store_true", help="log to OUT/tensorboard as well (pip install tensorboard)")
    add("--wandb", action="store_true", help="log to Weights & Biases as well (pip install wandb)")
    add("--seed", type=SEED, default=0)
    add("--accept-changed-data", action="store_true", help="resume although pictures were added, removed or renamed")
    add("--dry-run", action="store_true", help="print the configuration and what it costs, and stop")
    planned = parser.add_argument_group("with --dry-run, the cost on another machine")
    planned.add_argument("--world-size", type=COUNT, help="number of GPUs (default: the processes at hand)")
    planned.add_argument("--gpu", choices=PEAKS, help="kind of GPU, for the time that it takes")
    planned.add_argument("--mfu", type=ABOVE_0, help=f"share of its peak that training reaches (default: {MFU})")
    planned.add_argument("--bandwidth", type=POSITIVE, help="GB/s from GPU to GPU (default: NVLink's)")
    args = parser.parse_args(argv)
    for name in ("world_size", "gpu", "mfu", "bandwidth"):
        if getattr(args, name) is not None and not args.dry_run:
            parser.error(f"--{name.replace('_', '-')} is for planning: add --dry-run, or leave it out")
    for name, needed in (("dino", "repa"), ("eval-ref", "eval-every"), ("inception", "eval-ref")):
        if getattr(args, name.replace("-", "_")) is not None and not getattr(args, needed.replace("-", "_")):
            parser.error(f"--{name} does nothing without --{needed}: add it, or leave both out")
    for name, value in (NANO if args.size == "Nano" else PAPER).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.data is None:
        parser.error(f"--size {args.size} needs --data: a folder of class folders like ImageNet's, or a tar of one")
    if args.cache_crops and (args.augment or args.classes or args.data == "emoji"):
        parser.error("--cache-crops keeps centre crops of all files: leave it out with --augment, --classes, and "
                     "--data emoji")  # fmt: skip
    if args.classes and args.eval_ref == "emoji":
        parser.error("--eval-ref emoji has all nine classes: with --classes, give statistics of the same ones")
    args.mfu = MFU if args.mfu is None else args.mfu
    args.out = args.out or f"runs/{args.size}"
    choices = ("resolution", "patch_size", "hidden_size", "depth", "decoder", "field_norm", "field_width",
               "field_ratio", "field_depth", "encoding", "num_freqs")  # fmt: skip
    chosen = {name: getattr(args, name) for name in choices if getattr(args, name) is not None}
    try:
        args.config = dataclasses.replace(PRESETS[args.size], **chosen)
    except ValueError as error:
        parser.error(str(error))
    return args


def start_from(model, path, classes):
    """--init: gives `model` the EMA weights of a checkpoint; what was done, in words. classes: names, for this run.

    Another resolution is fine (positions are interpolated). Other classes (by number or, where the checkpoint knows
    them, by name) make the class embedding anew, and only that. Raises CheckpointError for anything else that differs.
    """
    source = load_model(path)
    alike = ("num_heads", "decoder", "field_norm", "encoding")  # what the shapes of the weights do not tell
    check_same({name: getattr(source.config, name) for name in alike}, dataclasses.asdict(model.config), path)
    weights, note = source.state_dict(), f"starting from {path}"
    if source.config.num_classes != model.config.num_classes:
        weights["class_embed.weight"] = model.class_embed.weight
        note += (f"; its class embedding was for {source.config.num_classes} classes, this run has "
                 f"{model.config.num_classes}: made anew")  # fmt: skip
    elif source.class_names is not None and list(source.class_names) != list(classes):
        weights["class_embed.weight"] = model.class_embed.weight
        note += "; its class embedding was for other classes, or another order: made anew"
    try:
        load_weights(model, weights, path)
    except CheckpointError as error:
        shape = ("patch_size", "hidden_size", "depth", "field_width", "field_ratio", "field_depth", "num_freqs")
        flags = (f"--{name.replace('_', '-')} {getattr(source.config, name)}" for name in shape)
        raise CheckpointError(f"{error}; it was trained with {' '.join(flags)}")
    return note


def learning_rate(args, step):
    """The learning rate of a step: a linear rise over --warmup, then constant or half a cosine down to 0 at --steps."""
    rise = min(1.0, (step + 1) / (args.warmup + 1))
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / args.steps))) if args.schedule == "cosine" else 1.0
    return args.lr * rise * fall


def next_batch(batches, device):
    """The next batch of the loader, on the device."""
    try:
        return {key: value.to(device, non_blocking=True) for key, value in next(batches).items()}
    except Exception:
        # Of a killed loader worker, its broken connection is seen first; within this second torch's handler names it.
        time.sleep(1)
        raise


def main():
    """Reads the flags, prepares, and runs the training loop."""
    args = parse_args()
    keep_memory()

    # -- Processes. torchrun sets these variables; without it this is the only process.
    rank, local_rank, world = place()
    device = pick_device(args.device, local_rank)
    args.precision = "bf16" if args.gpu and args.precision == "auto" else pick_precision(args.precision, device)
    say = print if rank == 0 else (lambda *_: None)
    world = args.world_size or world
    share = args.batch_size // world  # images per step on this rank
    micro = args.micro_batch or share
    if args.batch_size % world:
        raise DataError(f"--batch-size {args.batch_size} cannot be shared equally by {world} processes")
    if share % micro:
        raise DataError(f"--micro-batch {micro} does not divide the {share} images of a process")

    control = None if args.dry_run else join(rank, world, device, args.timeout)  # the group for shared decisions

    # -- Data. Rank 0 goes first and keeps the list of the pictures in the run's folder, where the others then read it.
    if control and rank > 0:
        dist.barrier(group=control)
    only = None if args.classes is None else [name.strip() for name in args.classes.split(",")]
    if args.dry_run and args.data != "emoji" and not os.path.exists(args.data):
        if only:
            raise DataError(f"--classes can be planned only where the data are, and {args.data} is not here")
        dataset = Elsewhere(args.num_classes)
        say(f"{args.data} is not here: assuming ImageNet's {len(dataset)} images and {len(dataset.classes)} classes")
    else:
        crops = None if args.dry_run else args.cache_crops
        try:
            dataset = open_dataset(args.data, args.resolution, args.augment, args.out,
                                   write=rank == 0 and not args.dry_run, crops=crops, only=only)  # fmt: skip
        finally:  # if it failed, the others find out themselves
            if control and rank == 0:
                dist.barrier(group=control)
    if control:
        fingerprints = [None] * world
        dist.all_gather_object(fingerprints, dataset.fingerprint, group=control)
        strangers = [other for other in range(world) if fingerprints[other] != fingerprints[0]]
        if strangers:
            raise DataError(f"rank {strangers[0]} finds other pictures in {args.data} than rank 0: make them the same")
    config, asked = args.config, f"--classes {args.classes}" if only else args.data
    if args.num_classes not in (None, len(dataset.classes)):
        raise DataError(f"{asked} has {len(dataset.classes)} classes, not --num-classes {args.num_classes}")
    config = dataclasses.replace(config, num_classes=len(dataset.classes))
    if args.repa and not 1 <= args.repa_block <= config.depth:
        raise DataError(f"--repa-block {args.repa_block} is not one of this model's {config.depth} blocks")
    if len(dataset) < args.batch_size:
        raise DataError(f"{asked} has {len(dataset)} images per epoch, fewer than --batch-size {args.batch_size}"
                        + (": lower that, or let pictures come more often, as NAME:4" if only else ""))  # fmt: skip
    if only:
        say(f"--classes takes {textwrap.shorten(dataset.summary, 200, placeholder=' ...')}")
    emoji = (args.data, args.resolution) == ("emoji", emoji_metric.SIDE)
    if args.dino == "emoji" and not (emoji and config.patch_size == emoji_metric.PATCH):
        raise DataError(f"--dino emoji knows --data emoji at --resolution {emoji_metric.SIDE} in patches of "
                        f"{emoji_metric.PATCH} only, not {args.data} at {args.resolution} in patches of "
                        f"{config.patch_size}")  # fmt: skip
    if args.eval_every and args.eval_ref is None and not (emoji and only is None):
        raise DataError("--eval-every needs --eval-ref: ADM's reference npz, or a file of eval_fid.py --save-stats"
                        + (". The emoji distance is not for --classes" if emoji else ""))  # fmt: skip
    if args.eval_every and args.eval_ref is None and args.dino == "emoji":
        say("the emoji distance flatters what --dino emoji has taught: compare it only with such runs")
    least = 2 if args.eval_ref else emoji_metric.MINIMUM
    if args.eval_every and args.eval_num < least:
        raise DataError(f"--eval-num must be at least {least} for this evaluation")
    if args.eval_ref and not args.dry_run:  # found out now, not at the first evaluation
        size = open_pictures(args.eval_ref, args.resolution).size
        if tuple(size) != (args.resolution, args.resolution):
            raise DataError(f"--eval-ref {args.eval_ref} has pictures of {size[0]}x{size[1]}, not of --resolution "
                            f"{args.resolution}: blur would count as a difference")  # fmt: skip
        load_inception(args.inception)
    if args.epochs:
        args.steps = epochs_to_steps(args.epochs, len(dataset), args.batch_size)
    if args.dry_run:
        return say(describe(args, config, len(dataset), world))
    workers = args.workers if args.workers is not None else 0 if args.data == "emoji" else min(8, os.cpu_count() or 1)

    # -- Folder. Found out now, not after the first hour.
    out = pathlib.Path(args.out)
    try:
        (out / "previews").mkdir(parents=True, exist_ok=True)
        (out / f".writable-{rank}").touch()
        (out / f".writable-{rank}").unlink()
    except OSError as error:
        raise DataError(f"--out {out} cannot be written ({error.strerror}): choose another folder")
    for package in ("tensorboard", "wandb"):
        if rank == 0 and getattr(args, package):
            require(package)

    # Rank 0 chooses the checkpoint to go on from, so that all take the same one even if another appears meanwhile.
    # For a GPU the file is read straight from the disk's cache, which the processes of a machine share; on a CPU it is
    # copied, or the optimizer would live in a file that is pruned later.
    mmap = device.type != "cpu"
    found = load_run(out, say, mmap) if rank == 0 else None
    choice = [found and str(found[0])]
    if world > 1:
        dist.broadcast_object_list(choice, group=control)

    # -- Is it the same run? What makes it another one is refused; what changes its course (--lr, --steps) is not.
    identity = dataclasses.asdict(config) | {name: getattr(args, name) for name in (
        "seed", "optimizer", "batch_size", "drop_label", "shift", "augment", "repa", "repa_block")}  # fmt: skip
    identity["classes"] = only
    identity["dino"] = ("emoji" if args.dino == "emoji" else "DINOv2") if args.repa else None
    if choice[0]:
        path, state = found or (choice[0], load_checkpoint(choice[0], mmap))
        checked_config(state, path)
        if "identity" not in state or "optimizers" not in state:
            raise CheckpointError(f"{path} holds weights only, not a run: give it to --init, with another --out")
        check_same(state["identity"], identity, path)
        if state["fingerprint"] != dataset.fingerprint and not args.accept_changed_data:
            raise CheckpointError(f"{path}: the pictures in {args.data} are not those of the run so far; restore them, "
                                  "or give --accept-changed-data")  # fmt: skip

    # -- Model, its running average, the frozen teacher of --repa, and the optimizer.
    torch.manual_seed(args.seed)
    model = PixNerd(config)
    if args.init and not choice[0]:
        say(start_from(model, args.init, dataset.classes))
    teacher = None
    if args.repa:
        teacher = (emoji_metric.EmojiTeacher() if args.dino == "emoji" else load_dinov2(args.dino)).to(device)
    student = Student(model, args.repa_block, teacher.width if teacher else 0).to(device)
    model.recompute = args.recompute
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    parameters = list(student.parameters())
    optimizers = make_optimizers(student, args.optimizer, args.lr, args.weight_decay)

    # -- Resume.
    step = 0
    if choice[0]:
        load_weights(model, state["model"], path)
        load_weights(ema, state["ema"], path)
        if student.projector:
            load_weights(student.projector, state["projector"], path)
        for optimizer, part in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)
            for group in optimizer.param_groups:
                group["weight_decay"] = args.weight_decay  # this run's, as --lr
        if rank == 0:
            go_on_from(path)
        step = state["step"]
        say(f"resuming {path} at step {step}")
        del state, found
    if step >= args.steps:
        final = out / "previews" / f"step-{step:08d}.png"
        if rank == 0 and step == args.steps and args.preview_every and not final.exists():  # killed while it was drawn
            save_preview(out, step, preview(ema, args.seed, device, args.precision))
        return say(f"{out} has {step} of {args.steps} steps: nothing to do (more with --steps)")

    # -- Speed.
    if args.compile != "off":
        trouble = compiler_trouble(device)
        if trouble and args.compile == "on":
            raise DeviceError(f"--compile on: {trouble}")
        if trouble:
            say(f"not compiling, which is slower but the same: {trouble}")
        else:
            model.compile_blocks()
    wrapped = DistributedDataParallel(student, [device.index] if device.type == "cuda" else None,
                                      gradient_as_bucket_view=True) if world > 1 else student  # fmt: skip

    # -- Stopping. A signal only raises a flag; the loop below agrees on it over all ranks, saves and leaves.
    stop = {"signal": 0}
    for number in STOPPING:
        signal.signal(number, lambda number, frame: stop.update(signal=number))

    def save():
        if rank == 0:
            save_run(out, {"format": FORMAT, "config": dataclasses.asdict(config), "class_names": dataset.classes,
                           "identity": identity, "fingerprint": dataset.fingerprint, "step": step,
                           "model": model.state_dict(), "ema": ema.state_dict(),
                           "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                           "projector": student.projector.state_dict() if student.projector else None},
                     args.keep)  # fmt: skip
        if world > 1:
            dist.barrier(group=control)

    # Kept on the device and read only at log steps, so that a GPU never waits for the CPU: sums of the loss by bins of
    # t, and where a number first stopped being finite. From then on the optimizers skip every update ("found_inf" is
    # torch's own switch for it, made for gradient scaling), so what is in memory and in the files stays sound.
    bins = torch.zeros(2, TIME_BINS, device=device)
    first_bad = torch.zeros(2, dtype=torch.long, device=device)  # step (0: never), and `culprit` as below
    found_inf = torch.zeros((), device=device)
    norms, aligned = torch.zeros((), device=device), torch.zeros((), device=device)

    settings = {name: value for name, value in vars(args).items() if name != "config"} | dataclasses.asdict(config)
    say(f"training {args.size} on {args.data}: {sum(p.numel() for p in parameters) / 1e6:.1f} M parameters, "
        f"{args.precision} on {world} x {device.type}, {out}/")  # fmt: skip
    peak = peak_flops(device)
    log = Log(out if rank == 0 else None, step, args.steps, args.batch_size, training_flops(config, by_dinov2(args)),
              peak and peak * world, args.tensorboard, args.wandb, settings)  # fmt: skip
    numbers = BatchNumbers(step, args.steps, args.batch_size, micro, rank, world)
    # Loader workers are born deaf to these signals, which go to all processes of a job: one that obeyed would take its
    # rank down with it before the save.
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    batches = training_batches(dataset, numbers, args.seed, args.drop_label, args.shift, workers, device.type == "cuda")
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)

    while step < args.steps:
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = learning_rate(args, step)

        # One step, in micro-batches; gradients travel between the processes during the last one.
        for part in range(share // micro):
            batch = next_batch(batches, device)  # image, noise, t and y of numbered samples: data.TrainingSamples
            x = from_uint8(batch["image"])  # (B, 3, H, W), clean, in [-1, 1]
            x_t = interpolate(x, batch["noise"], batch["t"])  # (B, 3, H, W), Eq. 1
            last = part == share // micro - 1
            with wrapped.no_sync() if world > 1 and not last else contextlib.nullcontext():
                with autocast(device, args.precision):
                    v, tokens = wrapped(x_t, batch["t"], batch["y"])  # (B, 3, H, W), (B, L, teacher's width)
                    loss = flow_matching_loss(v, x, batch["noise"], per_image=True)  # (B)
                    total = loss.mean()  # ()
                    if teacher:
                        seen = teacher(batch["image"] / 255, config.patch_size)  # (B, L, teacher's width)
                        alignment = alignment_loss(tokens, seen)  # ()
                        total = total + args.repa * alignment  # ()
                        aligned += alignment.detach() * micro / share
                (total * micro / share).backward()
            where = (batch["t"] * TIME_BINS).long().clamp(max=TIME_BINS - 1)  # (B)
            bins.index_add_(1, where, torch.stack([loss.detach(), torch.ones_like(loss)]))

        norm = nn.utils.get_total_norm([p.grad for p in parameters])
        if args.clip:
            nn.utils.clip_grads_with_norm_(parameters, args.clip, norm)
        # The sums for the log tell as well whether all losses were finite. One that was not stops the updates on all
        # ranks, and all know whose it was: the lowest such rank has the largest world - rank; 0 is nobody's.
        culprit = torch.where(bins.isfinite().all(), 0, world - rank)
        if world > 1:
            dist.all_reduce(culprit, dist.ReduceOp.MAX)
        bad = (culprit > 0) | ~norm.isfinite()
        first_bad = torch.where(bad & (first_bad[0] == 0), torch.stack([bad * (step + 1), culprit]), first_bad)
        found_inf = (first_bad[0] > 0).float()
        for optimizer in optimizers:
            optimizer.found_inf = found_inf  # read by fused AdamW and by Muon: at 1, step() changes nothing
            optimizer.step()
            optimizer.zero_grad()
        with torch.no_grad():  # else the average would remember, and keep in memory, every step that made it
            torch._foreach_lerp_(list(ema.parameters()), list(model.parameters()), 1 - args.ema)
        norms += norm
        step += 1
        log.bar.update()

        if world > 1:  # does any rank want to stop?
            flag = torch.tensor(stop["signal"])
            dist.all_reduce(flag, dist.ReduceOp.MAX, group=control)
            stop["signal"] = int(flag)
        leaving = stop["signal"] or step == args.steps
        saving = leaving or (args.save_every and step % args.save_every == 0)

        if saving or (args.log_every and step % args.log_every == 0):
            if found_inf.item():
                when, who = first_bad.tolist()
                what = f"loss stopped being finite on rank {world - who}" if who else "gradient was not finite"
                raise TrainingError(f"the {what} at step {when}; nothing after it was kept. "
                                    "Resume with a lower --lr, or with --clip 1")  # fmt: skip
            if world > 1:
                dist.all_reduce(bins)
                dist.all_reduce(aligned.div_(world))
            sums, counts = bins.tolist()
            steps_done = step - log.step
            log.training(
                step,
                loss=sum(sums) / sum(counts),
                loss_by_time=[round(s / n, 5) if n else None for s, n in zip(sums, counts)],
                lr=learning_rate(args, step - 1),
                grad_norm=norms.item() / steps_done,
                **({"alignment": aligned.item() / steps_done} if teacher else {}),
            )
            for gathered in (bins, norms, aligned):
                gathered.zero_()

        with log.pause():
            if saving:
                save()
            if rank == 0 and args.preview_every and (step % args.preview_every == 0 or step == args.steps):
                log.picture(step, preview(ema, args.seed, device, args.precision))
            if args.eval_every and step % args.eval_every == 0:
                scores = evaluate(ema, args, device, rank, world)
                log.numbers(step, scores)
                say(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
        if leaving:
            break

    log.close()
    if stop["signal"]:
        say(f"stopped by {signal.Signals(stop['signal']).name} at step {step}, saved; the same command goes on")
    else:
        say(f"done: {out}/last.pt" + (f", {out}/samples.png" if args.preview_every else ""))
    if world > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        # Python would wait at its end for loader workers that are still wanted: let go of everything that main() held.
        traceback.clear_frames(error.__traceback__)
        line = str(error).strip().splitlines()[-1:] or [""]
        if isinstance(error, dist.DistError) or "/gloo/" in str(error):  # the one that failed shows what happened
            sys.exit(f"train.py: rank {os.environ.get('RANK', 0)} lost touch with another process: {line[0]}")
        # Mistakes and trouble with the machine get one line; anything else is a fault of ours, with its traceback.
        told = (CheckpointError, DataError, DeviceError, DownloadError, LogError, TeacherError, TrainingError,
                OSError, EvalError, InceptionError)  # fmt: skip
        if isinstance(error, told) or str(error).startswith("DataLoader worker"):
            sys.exit(f"train.py: {line[0]}")
        raise
