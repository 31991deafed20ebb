"""What a training run costs, worked out before it starts: FLOPs, memory, traffic, checkpoints, days.

    python train.py --dry-run                                          # this machine
    python train.py --size XL --data IMAGENET/train --repa 0.5 --dry-run --world-size 8 --gpu a100

Everything here is an estimate from a handful of constants. They come from the paper's Table 1 (training on A100s with
32 images each: XL 0.27 s and 33.9 GB, L 0.19 s and 22 GB) and from data sheets. tests/test_plan.py compares it with
that table, and its counts of weights and bytes with real models and files. Left out: reading the data, the time of
saves and previews, networks between nodes (give their speed with --bandwidth).
"""

import dataclasses
import functools
import math

import torch

from data import Pictures
from runtime.checkpoint import build_model
from runtime.files import UserError
from runtime.flops import decoder_flops, forward_flops
from runtime.machine import PEAKS
from runtime.recompute import PARTS, RECOMPUTE

# The share of an A100's bf16 peak that Table 1 implies for XL: 32 images x (3 forward passes of 268 GFLOP, 46 of the
# teacher, 5 of the projector) in 0.27 s are 101 TFLOP/s of 312. We take it that alignment (REPA) was on, as in the
# released recipe; without it the share would be 0.31. For an H100 the same share is a guess.
MFU = 0.32
# Kinds of GPU: the name in PEAKS; bytes of memory; GB/s that one sends while it receives as many, half of the data
# sheets' two-way sums (NVLink 600 and 900, PCIe 5 128). Real all-reduces stay below it. Of memory, the cards report 5 %
# more than they are called by, 85 GB for 80: that is left to CUDA, NCCL and gaps between tensors.
GPUS = {
    "a100": ("a100", 80e9, 300),
    "a100-40": ("a100", 40e9, 300),
    "h100": ("h100", 80e9, 450),
    "h100-pcie": ("h100 pcie", 80e9, 64),
    "h100-nvl": ("h100 nvl", 94e9, 64),
    "h200": ("h200", 141e9, 450),
}
MOST_STEPS = 10**8 - 1  # the names of checkpoints have eight digits
CLOSE = 0.9  # of the memory: above this share a plan, which is good to a tenth, may not fit
# What stays for the backward pass, in numbers of 2 bytes (bf16) or 4 (fp32): TRUNK times D for each token and block;
# in each field block, FIELD times Dp for each pixel and WRITTEN for each of the 2 r Dp^2 weights that a token writes.
# Fitted to Table 1's memory of L and XL (25 and 5.7 + 1.3 = 7). Bytes of tensors that autograd saves in our own code,
# in bf16: 20 and 8 compiled; 40 and 9 + 2 in plain PyTorch, which therefore needs EAGER times as much.
TRUNK, FIELD, WRITTEN, EAGER = 25, 5.7, 1.3, 1.6
# ViT-B/14, the teacher of --repa: width, blocks, patch, weights.
TEACHER_WIDTH, TEACHER_DEPTH, TEACHER_PATCH, TEACHER_WEIGHTS = 768, 12, 14, 86.6e6
# Qwen3-1.7B, the text encoder of XXL: all weights, which it keeps in bf16, and those in the matrices of its blocks.
ENCODER_WEIGHTS, ENCODER_MATRICES = 1.72e9, 1.41e9


class Absent(Pictures):
    """Data that are not on this machine, for a plan: as many pictures as ImageNet's, and none to read."""

    classifier, remark, in_memory, images = None, None, False, 1_281_167

    def __init__(self, num_classes):
        self.classes = num_classes and range(num_classes)  # None: captions
        self.fingerprint = f"{self.images} images and {f'{num_classes} classes' if num_classes else 'captions'}"

    def __len__(self):
        return self.images

    def picture(self, *_):
        """Raises UserError, as .labels and .members(): how many pictures there are of a name is not known here."""
        raise UserError("--classes and --hold-out can be planned only where the data are, and they are not here")

    members, labels = picture, property(picture)


def epochs_to_steps(epochs, images, batch_size):
    """--epochs as a number of steps: the first step at which all `images` of an epoch were seen `epochs` times.

    UserError for more than MOST_STEPS.
    """
    steps = math.ceil(epochs * images / batch_size)
    if steps > MOST_STEPS:
        raise UserError(f"--epochs {epochs:g} would be {steps:,} steps, and {MOST_STEPS:,} are the limit: give fewer")
    return steps


def reads_qwen3(config):
    """Whether sentences have to pass a language model first. That of another folder counts as Qwen3-1.7B."""
    return getattr(config, "text_encoder", "words") != "words"


def encoded_share(cached, images, steps, batch_size):
    """The share of a run's samples whose caption the text encoder has to read: all, or with --cache-text, its first."""
    return min(1.0, images / (steps * batch_size)) if cached else 1.0


def frozen_flops(config, repa=False, encoded=1.0):
    """(teacher's, text encoder's) FLOPs for one image, one forward pass each: neither has a backward pass.

    46 GFLOP for ViT-B/14 at 224 pixels, 256 tokens, and 361 for 128 text tokens of Qwen3, of which the share `encoded`
    counts; 0 where there is none.
    """
    rows, columns = config.token_grid(config.resolution, config.resolution)
    L, T = rows * columns, TEACHER_WIDTH
    patches = 2 * L * 3 * TEACHER_PATCH**2 * T
    blocks = TEACHER_DEPTH * 2 * (L + 1) * (12 * T * T + 2 * (L + 1) * T)  # with the class token
    encoder = 2 * ENCODER_MATRICES * config.text_length * encoded if reads_qwen3(config) else 0
    return (patches + blocks) * repa, encoder


def projector_size(config, conv=False):
    """(weights, FLOPs for one image and forward pass) of the projector of --repa: train.Student's layers."""
    rows, columns = config.token_grid(config.resolution, config.resolution)
    D, T = config.hidden_size, TEACHER_WIDTH
    weights, biases = (9 * D * T, T) if conv else (2 * D * D + D * T, 2 * D + T)
    return weights + biases, 2 * rows * columns * weights


def training_flops(config, repa=False, conv=False, encoded=1.0):
    """FLOPs of training on one image: three forward passes of the model and, with --repa, of the projector.

    conv: of --repa-projector. encoded: of `encoded_share`. What is frozen counts once (`frozen_flops`).
    """
    projector = projector_size(config, conv)[1] * repa
    return 3 * (forward_flops(config) + projector) + sum(frozen_flops(config, repa, encoded))


@functools.cache
def number_of_weights(config):
    """Of the model of a configuration, counted in the model itself, without memory for them."""
    with torch.device("meta"):
        return sum(p.numel() for p in build_model(config).parameters())


@dataclasses.dataclass
class Plan:
    """A run, by its flags (bandwidth in GB/s; encoded: of `encoded_share`), and its cost for a process; sizes in bytes.

    parameters: trained ones, `projector` of them in that of --repa. flops: of training on one image, what MFU counts.
    repeated: FLOPs per image that --recompute does a second time. weights: with gradients, EMA, the optimizer's
    averages, the teacher and the text encoder. kept: activations at the fullest moment. checkpoint: one file. traffic:
    sent per step, to add up the gradients. seconds, exchange, memory: of a step, of its traffic, of the card; None
    without a gpu.
    """

    config: object
    batch_size: int
    world: int = 1
    micro_batch: int = None
    precision: str = "bf16"
    recompute: str = "none"
    compile: str = "auto"
    optimizer: str = "adamw"
    repa: bool = False
    conv: bool = False
    gpu: str = None
    mfu: float = MFU
    bandwidth: float = None
    encoded: float = 1.0

    def __post_init__(self):
        config, world = self.config, self.world
        model = number_of_weights(config)
        self.projector = projector_size(config, self.conv)[0] * self.repa
        averages = {"adamw": 2, "muon": 1}[self.optimizer]  # of nearly every parameter
        self.parameters = model + self.projector
        # An average of the weights is kept of the model, not of the projector.
        self.weights = 4 * ((3 + averages) * model + 4 * self.projector)
        self.weights += 4 * TEACHER_WEIGHTS * self.repa + 2 * ENCODER_WEIGHTS * reads_qwen3(config)
        self.checkpoint = 4 * ((2 + averages) * model + 3 * self.projector)  # all of that but gradients and teacher
        self.traffic = 8 * self.parameters * (world - 1) / world  # a ring: every piece goes twice around, less a hop
        self.kept = self._activations()
        forward = forward_flops(config)
        self.flops = training_flops(config, self.repa, self.conv, self.encoded)
        self.repeated = {"none": 0, "field": decoder_flops(config), "all": forward}[self.recompute]
        self.need = self.weights + self.kept
        self.seconds = self.exchange = self.memory = None
        if self.gpu:
            card, self.memory, link = GPUS[self.gpu]
            self.peak, self.bandwidth = PEAKS[card], self.bandwidth or link
            self.seconds = self.batch_size / world * (self.flops + self.repeated) / (self.mfu * self.peak)
            self.exchange = self.traffic / (self.bandwidth * 1e9)

    def _activations(self):
        """What one forward pass leaves for the backward pass, in bytes.

        The peak is at the start of the backward pass, which begins with the field. Recomputed, an eighth of it is there
        at a time (runtime/recompute.py). With "all", of each block only the input stays, and one is there at a time.
        """
        config, D, Dp = self.config, self.config.hidden_size, self.config.field_width
        rows, columns = config.token_grid(config.resolution, config.resolution)
        images = self.micro_batch or self.batch_size // self.world
        tokens, width = images * rows * columns, 2 if self.precision == "bf16" else 4
        text = images * getattr(config, "text_length", 0) * getattr(config, "text_depth", 0)
        in_blocks = config.depth * tokens + text  # tokens, counted in each block that they pass
        pixels, written = config.patch_size**2, 2 * config.field_ratio * Dp**2  # of a token
        field = config.field_depth * tokens * (FIELD * pixels * Dp + WRITTEN * written) * (config.decoder == "field")
        if self.compile == "off":
            width *= EAGER
        if self.recompute == "all":
            return width * (in_blocks * D + max(TRUNK * D * tokens, field / PARTS))
        return width * (TRUNK * D * in_blocks + (field if self.recompute == "none" else field / PARTS))

    def fitting(self):
        """[(flags, plan)] that fit the card: fewer images at a time, recomputing, and else both; [] where none does."""
        share = self.batch_size // self.world
        counts = [n for n in range(self.micro_batch or share, 0, -1) if share % n == 0]
        hows = [how for how in ("field", "all") if list(RECOMPUTE).index(how) > list(RECOMPUTE).index(self.recompute)]

        def first(kinds):
            for count, how in kinds:
                plan = dataclasses.replace(self, micro_batch=count, recompute=how)
                if plan.need <= CLOSE * self.memory:
                    flags = f"--micro-batch {count}" * (count != counts[0]), f"--recompute {how}" * (how in hows)
                    return [(" ".join(filter(None, flags)), plan)]
            return []

        fewer, again = [(n, self.recompute) for n in counts[1:]], [(counts[0], how) for how in hows]
        return first(fewer) + first(again) or first((n, how) for how in hows for n in counts[1:])

    def _fit(self):
        """Whether it fits the card, in lines."""
        if self.need <= CLOSE * self.memory:
            return []
        card = f"the {self.memory / 1e9:.0f} GB of --gpu {self.gpu}"
        verdict = f"MORE THAN {card}" if self.need > self.memory else f"may not fit {card}: the plan is good to a tenth"
        lines = [f"                    {verdict}"]
        for flags, plan in self.fitting():
            cost = f"{plan.need / 1e9:.1f} GB, {plan.seconds:.3f} s a step"
            lines.append(f"                    fits with {flags}: {cost}")
        if len(lines) == 1:
            lines.append("                    and nothing makes it fit: weights are not sharded here")
        return lines

    def _frozen(self, images):
        """The networks that are asked and not trained, in lines."""
        teacher, encoder = (flops / self.flops for flops in frozen_flops(self.config, self.repa, self.encoded))
        size, lines = 4 * TEACHER_WEIGHTS / 1e9, []
        if teacher:
            lines.append(f"teacher             ViT-B/14, frozen: {size:.1f} GB, {teacher:.0%} of the step")
        if encoder:
            size = 2 * ENCODER_WEIGHTS / 1e9
            lines.append(f"text encoder        Qwen3-1.7B, frozen: {size:.1f} GB, {encoder:.0%} of the step")
            kept = 2 * self.config.text_length * self.config.text_width * images / 1e9
            note = f"keeps {kept:.3g} GB of features" if self.encoded < 1 else "FOLDER encodes each caption once"
            lines.append(f"                    (--cache-text {note})")
        return lines

    def report(self, images, steps, size, keep, remark=None):
        """The text of --dry-run. images: of an epoch; size: the preset's name; keep: checkpoints that stay.

        remark: a last line, of what could not be checked.
        """
        share = self.batch_size // self.world
        projector = f", {self.projector / 1e6:.1f} M of them in the projector of --repa" if self.repa else ""
        lines = [
            f"size {size}: {self.config}",
            f"parameters          {self.parameters / 1e6:.1f} M{projector}",
            f"forward pass        {forward_flops(self.config) / 1e9:.2f} GFLOP per image",
            f"training step       {self.flops * self.batch_size / 1e9:.0f} GFLOP for {self.batch_size} images",
            *self._frozen(images),
            f"data                {images} images per epoch",
            f"run                 {steps} steps, {steps * self.batch_size / images:.1f} epochs",
            f"processes           {self.world}, with {share} images each, {self.micro_batch or share} at a time",
            f"precision           {self.precision}",
            f"optimizer           {self.optimizer}",
            "Estimates:",
            f"memory per process  {self.need / 1e9:.1f} GB; {self.weights / 1e9:.1f} GB of it weights and optimizer",
            *(self._fit() if self.gpu else []),
            f"checkpoint          {self.checkpoint / 1e9:.2f} GB, {keep} are kept",
        ]
        if self.world > 1:
            lines.append(f"gradients           {self.traffic / 1e9:.2f} GB sent by each process per step (fp32, ring)")
        if self.gpu:
            speed, days = self.batch_size / self.seconds, self.seconds * steps / 86400
            lines.append(f"one step            {self.seconds:.3f} s on {self.world} x {self.gpu}: {speed:.0f} images/s")
            lines.append(f"                    at {self.mfu:.2f} of {self.peak / 1e12:.0f} TFLOP/s (--mfu)")
            if self.repeated:
                again = self.repeated / (self.flops + self.repeated)
                lines.append(f"                    of it for --recompute {self.recompute}: {again:.0%}")
            if self.world > 1:
                # Two thirds of the step are its backward pass, during which the gradients travel.
                hidden = "hidden behind" if self.exchange < 2 / 3 * self.seconds else "longer than"
                link = f"{self.exchange * 1e3:.0f} ms at {self.bandwidth:g} GB/s (--bandwidth)"
                lines.append(f"{'':19} gradients travel {link},\n{'':19} {hidden} the backward pass")
            lines.append(f"whole run           {days:.1f} days, {days * 24 * self.world:.0f} GPU-hours")
        return "\n".join([*lines, remark] if remark else lines)
