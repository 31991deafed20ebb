"""What a training run costs, worked out before it starts: FLOPs, memory, traffic, checkpoints, days.

    python train.py --dry-run                                          # this machine
    python train.py --size XL --data IMAGENET/train --repa 0.5 --dry-run --world-size 8 --gpu a100

Everything here is an estimate from a handful of constants. They come from the paper's Table 1 (training on A100s with
32 images each: XL 0.27 s and 33.9 GB, L 0.19 s and 22 GB) and from data sheets. tests/test_plan.py compares it with
that table, and its counts of weights and bytes with real models and files. Left out: reading the data, the time of
saves and previews, networks between nodes (give their speed with --bandwidth).
"""

import dataclasses
import math

import torch

from model import PixNerd
from runtime.files import UserError
from runtime.flops import forward_flops
from runtime.machine import PEAKS
from runtime.recompute import PARTS

# The share of an A100's bf16 peak that Table 1 implies for XL: 32 images x (3 forward passes of 268 GFLOP, 46 of the
# teacher, 5 of the projector) in 0.27 s are 101 TFLOP/s of 312. We take it that alignment (REPA) was on, as in the
# released recipe; without it the share would be 0.31. For an H100 the same share is a guess.
MFU = 0.32
# Bytes/s that one GPU sends over NVLink while it receives as many: half of the data sheets' two-way sums of 600 and
# 900 GB/s. Real all-reduces stay below it.
NVLINK = {"a100": 300e9, "h100": 450e9}
# What stays for the backward pass, in numbers of 2 bytes (bf16) or 4 (fp32): TRUNK times D for each token and block;
# in each field block, FIELD times Dp for each pixel and WRITTEN for each of the 2 r Dp^2 weights that a token writes.
# Fitted to Table 1's memory of L and XL (25 and 5.7 + 1.3 = 7). Bytes of tensors that autograd saves in our own code,
# in bf16: 20 and 8 compiled; 40 and 9 + 2 in plain PyTorch, which therefore needs EAGER times as much.
TRUNK, FIELD, WRITTEN, EAGER = 25, 5.7, 1.3, 1.6
# ViT-B/14, the teacher of --repa: width, blocks, patch, weights.
TEACHER_WIDTH, TEACHER_DEPTH, TEACHER_PATCH, TEACHER_WEIGHTS = 768, 12, 14, 86.6e6
# What to plan with where the data are elsewhere: ImageNet's training set.
IMAGENET_CLASSES, IMAGENET_IMAGES = 1000, 1_281_167


@dataclasses.dataclass
class Cost:
    """Estimates for one GPU (or process) of a run. Times are None without a known GPU."""

    parameters: int  # trained ones: the model and, with --repa, the projector
    flops: float  # of training on one image: what MFU counts
    repeated: float  # FLOPs per image that --recompute does a second time, and that MFU does not count
    weights: float  # bytes of weights, gradients, EMA and the optimizer's averages; the teacher's weights
    kept: float  # bytes of activations at the fullest moment
    checkpoint: float  # bytes of one file
    traffic: float  # bytes that one GPU sends per step, to add up the gradients
    seconds: float = None  # of one step
    exchange: float = None  # seconds of sending `traffic`, most of them hidden behind the backward pass


def projector_size(config):
    """Weights and biases of the projector D -> D -> D -> teacher's width that --repa trains (train.Student)."""
    D = config.hidden_size
    return 2 * (D * D + D) + (D + 1) * TEACHER_WIDTH


def training_flops(config, repa=False):
    """FLOPs of training on one image: three forward passes of the model and, with --repa, of the projector.

    The teacher of --repa has no backward pass and counts once: 46 GFLOP for ViT-B/14 at 224 pixels, 256 tokens.
    """
    if not repa:
        return 3 * forward_flops(config)
    rows, columns = config.token_grid(config.resolution, config.resolution)
    L, D, T = rows * columns, config.hidden_size, TEACHER_WIDTH
    projector = 2 * L * (2 * D * D + D * T)
    patches = 2 * L * 3 * TEACHER_PATCH**2 * T
    blocks = TEACHER_DEPTH * 2 * (L + 1) * (12 * T * T + 2 * (L + 1) * T)  # with the class token
    return 3 * (forward_flops(config) + projector) + patches + blocks


def estimate(
    config,
    batch_size,
    world=1,
    micro_batch=None,
    precision="bf16",
    recompute="none",
    repa=False,
    eager=False,
    gpu=None,
    mfu=MFU,
    bandwidth=None,
    optimizer="adamw",
):
    """The Cost of training `config` with `batch_size` images per step over `world` processes.

    gpu: a name in device.PEAKS, for the times. mfu: share of its peak that a run without --recompute reaches;
    repeated work comes on top. bandwidth: bytes/s between GPUs (default: NVLINK). eager: without torch.compile.
    optimizer: "adamw" keeps two averages of each parameter, "muon" one of nearly all.
    """
    with torch.device("meta"):
        model = sum(p.numel() for p in PixNerd(config).parameters())
    projector = projector_size(config) if repa else 0
    parameters = model + projector

    rows, columns = config.token_grid(config.resolution, config.resolution)
    tokens = (micro_batch or batch_size // world) * rows * columns  # in one forward pass
    width = (2 if precision == "bf16" else 4) * (EAGER if eager else 1)
    Dp = config.field_width
    block = TRUNK * config.hidden_size * tokens * width
    blocks = config.field_depth * (config.decoder == "field")
    written = blocks * 2 * config.field_ratio * Dp**2 * tokens  # numbers, in all blocks of the field
    field = width * (blocks * FIELD * config.patch_size**2 * Dp * tokens + WRITTEN * written)
    # The peak is at the start of the backward pass, which begins with the field. Recomputed, an eighth of it is there
    # at a time (runtime/recompute.py). With "all", of each block only the input stays, and one is there at a time.
    kept = config.depth * block + (field if recompute == "none" else field / PARTS)
    if recompute == "all":
        kept = config.depth * config.hidden_size * tokens * width + max(block, field / PARTS)

    trunk = dataclasses.replace(config, decoder="linear")  # a hundredth of the field's work
    forward = forward_flops(config)
    repeated = {"none": 0, "field": forward - forward_flops(trunk), "all": forward}[recompute]
    averages = {"adamw": 2, "muon": 1}[optimizer]
    cost = Cost(
        parameters=parameters,
        flops=training_flops(config, repa),
        repeated=repeated,
        # An average of the weights is kept of the model, not of the projector.
        weights=4 * ((3 + averages) * model + 4 * projector) + (4 * TEACHER_WEIGHTS if repa else 0),
        kept=kept,
        checkpoint=4 * ((2 + averages) * model + 3 * projector),  # all of that but the gradients
        traffic=4 * parameters * 2 * (world - 1) / world,  # a ring: every piece goes around twice, but for one hop
    )
    if gpu:
        cost.seconds = batch_size / world * (cost.flops + cost.repeated) / (mfu * PEAKS[gpu])
        cost.exchange = cost.traffic / (bandwidth or NVLINK[gpu])
    return cost


class ImageNet:
    """What a plan needs of data that are not on this machine: ImageNet's numbers of images and of classes."""

    fingerprint, classifier = "ImageNet", None

    def __init__(self, num_classes=None):
        self.classes = range(num_classes or IMAGENET_CLASSES)

    def __len__(self):
        return IMAGENET_IMAGES

    def members(self):
        """--classes cannot be planned: how many pictures there are of a name is not known here."""
        raise UserError("--classes can be planned only where the data are, and they are not here")


def epochs_to_steps(epochs, images, batch_size):
    """--epochs as a number of steps: the first step at which all `images` of an epoch were seen `epochs` times."""
    return math.ceil(epochs * images / batch_size)


def describe(
    config,
    images,
    world,
    steps,
    precision,
    *,
    size,
    batch_size,
    micro_batch,
    recompute,
    gpu,
    optimizer,
    keep,
    repa,
    eager,
    mfu,
    bandwidth,
):
    """The text of --dry-run: what the run is, and what `estimate` says that it costs. images: of an epoch."""
    cost = estimate(
        config, batch_size, world, micro_batch, precision, recompute, repa, eager, gpu, mfu, bandwidth, optimizer
    )
    share, memory = batch_size // world, (cost.weights + cost.kept) / 1e9
    lines = [
        f"size {size}: {config}",
        f"parameters          {cost.parameters / 1e6:.1f} M",
        f"forward pass        {forward_flops(config) / 1e9:.2f} GFLOP per image",
        f"training step       {cost.flops * batch_size / 1e9:.0f} GFLOP for {batch_size} images",
        f"data                {images} images per epoch, {config.num_classes} classes",
        f"run                 {steps} steps, {steps * batch_size / images:.1f} epochs",
        f"processes           {world}, with {share} images each, {micro_batch or share} at a time",
        f"precision           {precision}",
        f"optimizer           {optimizer}",
        "Estimates:",
        f"memory per process  {memory:.1f} GB; {cost.weights / 1e9:.1f} GB of it weights and optimizer",
        f"checkpoint          {cost.checkpoint / 1e9:.2f} GB, {keep} are kept",
    ]
    if world > 1:
        lines.append(f"gradients           {cost.traffic / 1e9:.2f} GB sent by each process per step (fp32, ring)")
    if gpu:
        lines += _times(cost, world, steps, batch_size, gpu, mfu, bandwidth, recompute)
    return "\n".join(lines)


def _times(cost, world, steps, batch_size, gpu, mfu, bandwidth, recompute):
    speed, days = batch_size / cost.seconds, cost.seconds * steps / 86400
    yield f"one step            {cost.seconds:.3f} s on {world} x {gpu}: {speed:.0f} images/s"
    yield f"                    at {mfu:.2f} of {PEAKS[gpu] / 1e12:.0f} TFLOP/s (--mfu)"
    if cost.repeated:
        share = cost.repeated / (cost.flops + cost.repeated)
        yield f"                    of it for --recompute {recompute}: {share:.0%}"
    if world > 1:
        # Two thirds of the step are its backward pass, during which the gradients travel.
        hidden = "hidden behind" if cost.exchange < 2 / 3 * cost.seconds else "longer than"
        link = (bandwidth or NVLINK[gpu]) / 1e9
        yield f"                    gradients travel {cost.exchange * 1e3:.0f} ms at {link:g} GB/s (--bandwidth),"
        yield f"                    {hidden} the backward pass"
    yield f"whole run           {days:.1f} days, {days * 24 * world:.0f} GPU-hours"
