"""Has a model learned its pictures by heart? Each sample beside the training picture that is nearest to it.

    python -m experiments.nearest --ckpt runs/mine/last.pt --data PHOTOS --num 16 --out nearest.png

Nearest in colour, on pictures shrunk to 8 x 8, as they are or mirrored: small shifts and textures do not count. One
number says little, so it is compared with the distance from each training picture to the nearest other one: a sample
that is nearer than almost all of these is a copy. Left out: copies of a part of a picture, which only the eye finds.
"""

import argparse

import torch
import torch.nn.functional as F

from data import open_dataset
from runtime.files import UserError, run
from runtime.machine import pick_device, pick_precision
from runtime.models import find_model
from runtime.options import SEED, whole
from runtime.pictures import enlarge, picture_grid, save_picture
from runtime.previews import AS_THE_PAPER, FOR_SMALL, SMALL, draw_ema

SIDE = 8  # pixels of the pictures that are compared
MOST = 20_000  # training pictures that are looked at
COPY = 0.05  # quantile of the distances among training pictures below which a sample counts as a copy


def small(images):
    """uint8 (N, 3, H, W) -> (N, 3*SIDE*SIDE) in [0, 1]: shrunk by averaging."""
    return F.interpolate(images.float() / 255, (SIDE, SIDE), mode="area").flatten(1)  # (N, 3*SIDE*SIDE)


def nearest(samples, pictures, itself=False):
    """For each of `samples` the number of the nearest of `pictures`, mirrored or not, and its distance: two (N).

    uint8 (N, 3, H, W) and (M, 3, H, W). Distances are root mean squares of differences in [0, 1]. itself: samples are
    the pictures, and picture i is not compared with picture i.
    """
    some = small(samples)  # (N, features)
    distances = [torch.cdist(some, small(kind)) for kind in (pictures, pictures.flip(-1))]  # (N, M) each
    distance = torch.minimum(*distances) / some.shape[1] ** 0.5  # (N, M)
    if itself:
        distance.fill_diagonal_(torch.inf)
    found = distance.min(dim=1)
    return found.indices, found.values


def main():
    """Draws, looks for neighbours, prints how near they are, saves the sheet."""
    parser = argparse.ArgumentParser(description="Each sample of a model beside the training picture nearest to it.")
    parser.add_argument("--ckpt", required=True, help="a checkpoint of train.py")
    parser.add_argument("--data", required=True, help="what it was trained on: emoji, a folder, or a tar")
    parser.add_argument("--exif", choices=["respect", "ignore"], default="respect", help="as in training")
    parser.add_argument("--num", type=whole(1, 10_000), default=16, help="samples, shared by the classes")
    parser.add_argument("--seed", type=SEED, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="nearest.png")
    args = parser.parse_args()
    device, model = pick_device(args.device), find_model(args.ckpt)
    if model.class_names is None:
        raise UserError(f"--ckpt {args.ckpt} reads sentences: this sheet is for models of classes")
    side = model.config.resolution
    dataset = open_dataset(args.data, side, exif=args.exif)
    if len(dataset) < 2:
        raise UserError(f"--data {args.data} has one picture only: nothing to compare it with")
    numbers = [i * len(dataset) // min(MOST, len(dataset)) for i in range(min(MOST, len(dataset)))]
    pictures = torch.stack([dataset.picture(i) for i in numbers])  # (M, 3, H, W)
    y = torch.arange(args.num) % len(model.class_names)  # (N)
    how = FOR_SMALL if side <= SMALL else AS_THE_PAPER
    precision = pick_precision("auto", device)
    samples = draw_ema(model.to(device), y, range(args.num), args.seed, device, precision, **how)  # (N, 3, H, W)

    which, distance = nearest(samples, pictures)
    among = nearest(pictures, pictures, itself=True)[1].sort().values  # (M)
    limit = among[int(COPY * (len(among) - 1))]
    copies = int((distance < limit).sum())
    print(f"samples to their nearest training picture: {distance.median():.3f} (median, root mean square in 0 to 1)")
    print(f"training pictures to their nearest other:  {among.median():.3f}, {COPY:.0%} of them below {limit:.3f}")
    print(f"{copies} of {args.num} samples are below that, as copies would be: see {args.out}")
    pairs = torch.stack([samples, pictures[which]], dim=1).flatten(0, 1)  # (2N, 3, H, W): sample, neighbour, sample
    save_picture(args.out, picture_grid(enlarge(pairs, 96), columns=8))


if __name__ == "__main__":
    run(main)
