"""Train PixNerd: one loop, on a laptop or under torchrun on many GPUs (paper section 4.1).

    python train.py                                        # Nano on the embedded emoji, a few minutes on a CPU
    torchrun --nproc_per_node=8 train.py --size XL --repa 0.5          # on the folder that IMAGENET names
    python train.py --size XL --repa 0.5 --dry-run --world-size 8 --gpu a100     # what that would cost
    python train.py --text-encoder words                   # sentences in the place of classes: the emoji's names

A training step is three pieces, all in this file: `training_loss`, from pixels to the loss; `update`, from gradients to
weights; and the loop at the end of `main`, which calls the two. The same command again resumes. In --out: step-N.pt and
last.pt (checkpoints), previews/ (EMA samples of the same noise), samples.png (the newest of them), metrics.jsonl.
Left out: sharding of the model (FSDP), since with 32 images of 256 pixels XL fits an A100 whole (33.9 GB in the paper).
"""

import contextlib
import copy
import dataclasses
import math
import os
import textwrap

import torch
import torch.nn as nn

import eval_fid
from data import EMBEDDED, from_uint8, open_dataset
from flow import alignment_loss, flow_matching_loss, interpolate
from pretrained.text_encoders import fit_encoder, open_text_encoder
from runtime.auto import with_size_chosen
from runtime.checkpoint import build_model, start_from
from runtime.crops import keep_in_memory
from runtime.distributed import Processes, only_adding_up
from runtime.feature_networks import teacher_named
from runtime.files import UserError, run
from runtime.frequencies import LOSSES
from runtime.gauges import Gauges
from runtime.loader import BatchNumbers, micro_batch_size, training_batches
from runtime.log import Log, is_due
from runtime.machine import autocast, keep_memory, peak_flops, pick_device, pick_precision, will_compile
from runtime.models import model_file
from runtime.optimizers import make_optimizers
from runtime.options import check_run, class_names, data_settings, identity, parse_args, planned
from runtime.picture_sets import open_reference, pictures_of
from runtime.plan import Absent, encoded_share, epochs_to_steps, training_flops
from runtime.previews import ema_samples, preview, preview_conditions
from runtime.recompute import RECOMPUTE
from runtime.run_folder import RunFolder
from runtime.some_classes import HeldOut, SomeClasses
from runtime.stopping import EvaluationStopped, Stopping


class ConvProjector(nn.Conv2d):
    """A 3x3 convolution over the grid of tokens, (B, L, D) -> (B, L, width): keeps their neighbourhood (iREPA)."""

    def __init__(self, width, teacher_width, grid):
        super().__init__(width, teacher_width, kernel_size=3, padding=1)
        self.grid = grid

    def forward(self, tokens):
        image = tokens.transpose(1, 2).unflatten(2, self.grid)  # (B, D, rows, columns)
        return super().forward(image).flatten(2).transpose(1, 2)  # (B, L, teacher's width)


class Student(nn.Module):
    """What is trained, as one module: the model and, for alignment, the projector from its tokens to the teacher's."""

    def __init__(self, model, repa_block=8, teacher_width=0, projector="mlp"):
        super().__init__()
        self.model, self.repa_block, self.projector = model, repa_block, None
        if projector == "conv" and teacher_width:
            grid = model.config.token_grid(model.config.resolution, model.config.resolution)
            self.projector = ConvProjector(model.config.hidden_size, teacher_width, grid)
        elif teacher_width:
            D = model.config.hidden_size
            layers = [nn.Linear(D, D), nn.SiLU(), nn.Linear(D, D), nn.SiLU(), nn.Linear(D, teacher_width)]
            self.projector = nn.Sequential(*layers)

    def forward(self, x_t, t, y, dropped):
        # A dropped label becomes "no class", or no text: so one model learns both velocities that guidance needs.
        y = torch.where(dropped.view(-1, *[1] * (y.ndim - 1)), self.model.null(y), y)  # (B, ...)
        if self.projector is None:
            return self.model(x_t, t, y), None  # (B, C, H, W)
        v, tokens = self.model(x_t, t, y, features_at=self.repa_block)  # (B, C, H, W), (B, L, D)
        return v, self.projector(tokens)  # (B, C, H, W), (B, L, teacher's width)


def training_loss(student, teacher, batch, drop_label=0.1, repa=0.5, patch_size=16, weigh=None, spatial=False):
    """From pixels to the loss: (loss (), flow matching loss of each image (B), alignment () or None).

    batch: image uint8 (B, 3, H, W), noise (B, 3, H, W), t (B), y (B), u (B) in [0, 1): data.TrainingSamples. teacher: a
    frozen network whose tokens (B, L, width) the student's are to resemble (REPA, weight `repa`), or None; it takes
    the student's patch_size, to have its tokens at the same places. weigh, spatial: of the two losses (flow.py).
    """
    x, t = from_uint8(batch["image"]), batch["t"]  # (B, 3, H, W) in [-1, 1], (B)
    x_t = interpolate(x, batch["noise"], t)  # (B, 3, H, W), Eq. 1
    v, tokens = student(x_t, t, batch["y"], batch["u"] < drop_label)  # (B, 3, H, W), (B, L, teacher's width)
    flow_loss = flow_matching_loss(v, x, batch["noise"], per_image=True, weigh=weigh)  # (B)
    if teacher is None:
        return flow_loss.mean(), flow_loss, None
    alignment = alignment_loss(tokens, teacher(batch["image"] / 255, patch_size), spatial)
    return flow_loss.mean() + repa * alignment, flow_loss, alignment


def update(student, ema, optimizers, gauges, step, lr, decay, clip=0.0):
    """From gradients to weights: one step of the optimizers and of the running average `ema`, in place."""
    parameters = list(student.parameters())
    norm = nn.utils.get_total_norm([p.grad for p in parameters])
    if clip:
        nn.utils.clip_grads_with_norm_(parameters, clip, norm)
    broken = gauges.broken(step, norm)  # 1 once a loss or gradient was not finite, on any rank
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.found_inf = broken  # torch's switch for gradient scaling: at 1, step() changes nothing
        optimizer.step()
        optimizer.zero_grad()
    # ema <- decay ema + (1 - decay) weights: a mean over the last 1 / (1 - decay) steps or so, whose samples are far
    # better than those of the weights, which wander. Outside autograd, or it would keep a graph of every step.
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(student.model.parameters()), 1 - decay)


def learning_rate(step, steps, peak, warmup=0, schedule="constant"):
    """The learning rate of a step: a linear rise over `warmup`, then constant or half a cosine down to 0 at `steps`."""
    rise = min(1.0, (step + 1) / (warmup + 1))
    fall = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps))) if schedule == "cosine" else 1.0
    return peak * rise * fall


def open_data(spec, names, num_classes, config, how, held_out, folder, processes, planned):
    """The data set that all ranks see alike, and `config` with its number of classes. Raises UserError, on all ranks.

    names: of --classes. how: what else open_dataset takes. held_out: of --hold-out. folder: of the run, in which rank 0
    leaves the list of the pictures and the others find it. planned: for --dry-run, which writes nothing and needs no
    data.
    """
    with processes.rank_0_first():
        if planned and spec not in EMBEDDED and not os.path.exists(spec):
            dataset = Absent(None if how["captions"] else num_classes or 1000)
            processes.say(f"{spec} is not here: assuming {dataset.fingerprint}")
        else:
            dataset = open_dataset(
                spec, config.resolution, cache=folder, write=not planned and not processes.rank, **how
            )
        if names:
            dataset = SomeClasses(dataset, names)
        if held_out:
            dataset = HeldOut(dataset, held_out)
        if dataset.remark:
            processes.say(textwrap.shorten(dataset.remark, 200, placeholder=" ..."))
    asked = f"--classes {','.join(names)}" if names else f"--data {spec}"
    seen = processes.of_all(dataset.fingerprint)
    if other := next((rank for rank, pictures in enumerate(seen) if pictures != seen[0]), None):
        raise UserError(f"rank {other} finds other pictures in {spec} than rank 0: make them the same")
    if dataset.classes is None:
        return dataset, config
    if num_classes not in (None, len(dataset.classes)):
        raise UserError(f"{asked} has {len(dataset.classes)} classes, not --num-classes {num_classes}")
    return dataset, dataclasses.replace(config, num_classes=len(dataset.classes))


def open_judge(dataset, encode, reference, exif, weights, num, config, seed, device, precision, processes):
    """--eval-every: (EMA model, Stopping, labels of the data) -> {name: score}, or EvaluationStopped.

    Raises UserError now for what would fail then. The labels come with each call: a resumed run may number its classes
    otherwise than the data. Few samples and solver steps: for comparing checkpoints of one run, not with papers.
    """
    if reference is None and dataset.classifier:
        real = pictures_of(dataset, "the training data")
    else:
        real = open_reference(reference, "--eval-ref", config.resolution, config.resolution, exif=exif)
    if tuple(real.size) != (config.resolution, config.resolution):
        size = f"{real.size[0]}x{real.size[1]}, not of --resolution {config.resolution}"
        raise UserError(f"--eval-ref {reference} has pictures of {size}: blur would count as a difference")
    network = eval_fid.open_network("inception" if reference else dataset.classifier, weights).to(device)
    if num < network.least:
        raise UserError(f"--eval-num must be at least {network.least} for this evaluation")

    def judge(ema, stopping, labels):
        samples = ema_samples(ema, labels, num, seed, device, precision, encode or torch.tensor)
        pictures = (stopping.between_batches(side) for side in (real, samples))
        return eval_fid.judge(*pictures, network, device, processes)

    return judge


def main():
    """Reads the flags, prepares what the loop needs, and runs the loop."""
    keep_memory()
    processes = Processes()
    args = parse_args(with_size_chosen(processes))
    device = pick_device(args.device, processes.local_rank)
    precision = "bf16" if args.gpu and args.precision == "auto" else pick_precision(args.precision, device)
    world = args.world_size or processes.world
    micro = micro_batch_size(args.batch_size, args.micro_batch, world)
    if not args.dry_run:
        processes.connect(device, args.timeout)
    opening = (args.config, data_settings(args), args.hold_out, args.out, processes, args.dry_run)
    dataset, config = open_data(args.data, class_names(args.classes), args.num_classes, *opening)
    remark = check_run(args, dataset, config)
    steps = epochs_to_steps(args.epochs, len(dataset), args.batch_size) if args.epochs else args.steps
    encoded = encoded_share(args.cache_text, len(dataset), steps, args.batch_size)
    if args.dry_run:
        plan = planned(args, config, world, precision, encoded)
        return processes.say(plan.report(len(dataset), steps, args.size, args.keep, remark))
    encoder, config = open_text_encoder(config, args.cache_text, device)
    encode = encoder and encoder.encode
    judging = (args.eval_ref, args.exif, args.inception, args.eval_num, config, args.seed, device, precision, processes)
    judge = args.eval_every and open_judge(dataset, encode, *judging)
    folder = RunFolder(args.out, processes, args.keep)
    dataset = folder.find(identity(args, config), dataset, args.accept_changed_data, mmap=device.type != "cpu")

    torch.manual_seed(args.seed)  # for the initial weights; those of the samples come from named streams (data.py)
    model = build_model(config)
    if args.init and folder.checkpoint is None:
        processes.say(start_from(model, model_file(args.init, "--init"), dataset.classes))
    kind = teacher_named(args.dino)
    teacher = kind.load(args.dino).to(device) if args.repa else None
    conv = args.repa_projector == "conv"
    how = (args.drop_label, args.repa, config.patch_size, LOSSES[args.loss], conv)
    student = Student(model, args.repa_block, teacher.width if teacher else 0, args.repa_projector).to(device)
    ema = copy.deepcopy(model).eval().requires_grad_(False)
    optimizers = make_optimizers(student, args.optimizer, args.lr, args.weight_decay, args.beta2)
    step = folder.restore(student, ema, optimizers, args.weight_decay)
    for network in (model, ema) if encoder else ():  # of a resumed run, too: its folder may hold other weights by now
        fit_encoder(network, encoder, folder.checkpoint or args.init or "this run")
    model.call = RECOMPUTE[args.recompute]
    if step < steps and will_compile(args.compile, device, processes.say):
        model.compile_blocks()
    shared = processes.share_gradients(student, device)

    peak = processes.world * peak_flops(device)  # FLOP/s, 0 where it is not known
    flops = training_flops(config, bool(args.repa) and kind.planned, conv, encoded)  # per image
    log = Log(args.out, processes, step, steps, args.batch_size, flops, peak)
    log.send_to(args.tensorboard, args.wandb, vars(args) | dataclasses.asdict(config))
    if step < steps:
        size = f"{args.size}, {sum(p.numel() for p in student.parameters()) / 1e6:.1f} M parameters"
        processes.say(f"training {size}, on {args.data}, in {precision} on {world} x {device.type}: {args.out}/")
        keep_in_memory(dataset, config.resolution, processes.say)
    gauges, stopping = Gauges(processes, device), Stopping(processes)
    numbers = BatchNumbers(step, steps, args.batch_size, micro, processes.rank, processes.world)
    batches = training_batches(dataset, numbers, args.seed, args.shift, args.workers, device, encode)
    shown = preview_conditions(dataset, encode)

    def show(step):  # what a run shows of itself; at its start, what a stop after the last save left undone
        if log.wants_picture(step, args.preview_every):
            log.picture(step, preview(ema, shown, args.seed, device, precision))
        if log.wants_scores(step, args.eval_every):
            with contextlib.suppress(EvaluationStopped):
                log.scores(step, judge(ema, stopping, dataset.labels))

    show(step)
    while step < steps and not stopping.decision:
        for part in range(numbers.parts):
            batch = next(batches)
            with only_adding_up(shared, part < numbers.parts - 1):
                with autocast(device, precision):
                    loss, losses, alignment = training_loss(shared, teacher, batch, *how)
                # All micro-batches are of one size, so the mean over the step is the mean of their means.
                (loss / numbers.parts).backward()
            gauges.add(batch["t"], losses, alignment, 1 / numbers.parts)
        lr = learning_rate(step, steps, args.lr, args.warmup, args.schedule)
        step += 1
        update(student, ema, optimizers, gauges, step, lr, args.ema, args.clip)

        # What is judged is saved first: the evaluation may be stopped, and made up for by the next start.
        saving = stopping.agreed() or step == steps or is_due(step, args.save_every) or is_due(step, args.eval_every)
        if saving or is_due(step, args.log_every):
            log.training(step, gauges.read() | {"lr": lr})
        with log.pause():
            if saving:
                folder.save(step, student, ema, optimizers, dataset)
            show(step)
    log.close(step, stopping.decision)
    processes.close()


if __name__ == "__main__":
    run(main)
