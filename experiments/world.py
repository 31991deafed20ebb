"""The small world of the study: its model, what all runs share, and the drawings to learn and to be judged on.

python -m experiments.ablations --split     # writes experiments/held_out.txt again
"""

import copy
import dataclasses
import math
import pathlib

import numpy as np
import torch

from data import ASSETS, from_uint8, open_dataset, random_stream
from model import PixNerdConfig
from runtime.files import whole_file

HELD_OUT = pathlib.Path(__file__).parent / "held_out.txt"
NEAR = 0.2  # root mean square difference, of pixels in [-1, 1]: closer drawings are near-duplicates

# The small world. A token has 256 numbers, its patch 3 * 8 * 8 = 192, the ratio of the paper's L/16 (1024 to 768): a
# narrower token could not carry the pixels of its patch to a linear decoder, which is no matter of fields.
SHAPE = dict(num_classes=9, resolution=32, patch_size=8, hidden_size=256, num_heads=4, depth=2)
WORLD = PixNerdConfig(**SHAPE, field_depth=2, field_width=24, field_ratio=1, num_freqs=6)


@dataclasses.dataclass(frozen=True)
class Study:
    """What all runs share. Another value makes other runs, which are not compared with the stored ones."""

    config: PixNerdConfig = WORLD
    steps: int = 600
    batch_size: int = 16
    lr: float = 2e-3
    warmup: int = 20
    ema: float = 0.99
    samples: int = 128
    sampler_pictures: int = 128


def near_duplicates(images, near=NEAR):
    """A number (N) for each picture, uint8 (N, 3, H, W): equal where a chain of near-duplicates joins two of them."""
    x = from_uint8(images).flatten(1)  # (N, pixels)
    joined = torch.cdist(x, x) / math.sqrt(x.shape[1]) < near  # (N, N)
    joined.fill_diagonal_(True)  # cdist is not exact
    groups, before = torch.arange(len(x)), None
    while before is None or not torch.equal(groups, before):
        before, groups = groups, torch.where(joined, groups, len(x)).min(1).values  # (N)
    return groups


def split(images, share=0.1, seed=0):
    """The numbers of the pictures to hold out, sorted: whole groups of near-duplicates in random order, up to `share`.

    A group of more than a tenth of what is wanted stays in training, where it cannot make up the verdict.
    """
    groups, wanted, held = near_duplicates(images), round(share * len(images)), []
    for group in torch.randperm(len(images), generator=random_stream("order", seed, 0)).tolist():
        members = (groups == group).nonzero().flatten().tolist()
        if members and len(members) <= max(1, wanted // 10) and len(held) + len(members) <= wanted:
            held += members
    return sorted(held)


def write_split():
    """Writes experiments/held_out.txt: one held-out drawing a line, its number and its name."""
    with np.load(ASSETS / "noto_emoji_64.npz") as archive:
        names = archive["names"].tolist()
    held = split(open_dataset("emoji", 32).images)
    with whole_file(HELD_OUT) as temporary:
        pathlib.Path(temporary).write_text("".join(f"{i} {names[i]}\n" for i in held), encoding="utf-8")
    print(f"wrote {HELD_OUT.name}: {len(held)} of {len(names)} drawings")


def resized(images, side):
    """Square pictures, uint8 (N, 3, H, H), at another side by averages of areas: uint8 (N, 3, side, side)."""
    common = math.gcd(images.shape[-1], side)
    x = images.float().repeat_interleave(side // common, -1).repeat_interleave(side // common, -2)
    return torch.nn.functional.avg_pool2d(x, images.shape[-1] // common).round().to(torch.uint8)


def some_emoji(numbers, resolution=32):
    """The emoji with these numbers only, at 32 or 64 pixels, as a data set."""
    part = copy.copy(open_dataset("emoji", resolution))
    part.images, part.labels = part.images[numbers], [part.labels[i] for i in numbers]
    part.fingerprint += f", {len(numbers)} of them"
    return part


def training_and_held_out(resolution=32):
    """Two data sets, at 32 or 64 pixels: the drawings to learn, and those of experiments/held_out.txt."""
    held = [int(line.split()[0]) for line in HELD_OUT.read_text(encoding="utf-8").splitlines()]
    rest = sorted(set(range(len(open_dataset("emoji", 32)))) - set(held))
    return some_emoji(rest, resolution), some_emoji(held, resolution)
