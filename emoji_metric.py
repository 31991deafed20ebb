"""The emoji distance: does a model of the embedded emoji get better? Offline and small, where FID is neither.

It is the Frechet distance (eval_fid.py) on 64 features of a small classifier, which this file trains on the very
same emoji. It is NOT FID and not comparable to it, nor to numbers of papers or of other data: only to other emoji
distances with the same features file, --num, --steps and --cfg. Lower is better.

    python emoji_metric.py runs/x/step-*.pt --num 1000 --steps 20    # a table: step, distance
    python emoji_metric.py train                                     # makes assets/emoji-features.pt anew: a minute

The scale: each feature has a variance of about 1 over the real pictures, so a model that always draws the average
one is at about 64. The floor is what two halves of the real pictures are apart; it stands below the table.
The same classifier serves as a small teacher of representation alignment (train.py --repa 0.5 --repa-block 4 --dino
emoji). A model that was taught by it is flattered by this distance: compare it only with others that were.
Left out: scores for each class, and any way to tell copies of the training pictures from new drawings.
"""

import argparse
import sys

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

from checkpoint import CheckpointError, load_checkpoint, load_model, load_weights, save_checkpoint
from data import ASSETS, EMOJI_CLASSES, from_uint8, keyed_generator, open_dataset, to_uint8
from device import DeviceError, autocast, pick_device, pick_precision
from eval_fid import EvalError, frechet_distance
from samplers import adams, guide, time_grid

FEATURES_FILE = ASSETS / "emoji-features.pt"
SIDE, KINDS = 32, 98
PATCH = 8  # pixels per place of the classifier's last map: the patch of Nano
WIDTH = 64  # few, so that hundreds of pictures settle the 64 x 64 covariance; Inception's 2,048 need 50,000
MINIMUM = 2 * WIDTH  # pictures; of fewer, the covariance is mostly chance


class EmojiFeatures(nn.Module):
    """A convolutional classifier of emoji at 32 pixels, 0.3 M parameters, with a bottleneck of 64 features."""

    def __init__(self):
        super().__init__()

        def stage(C, D):  # halves the side
            return nn.Sequential(nn.Conv2d(C, D, 3, 2, 1, bias=False), nn.BatchNorm2d(D), nn.ReLU(),
                                 nn.Conv2d(D, D, 3, 1, 1, bias=False), nn.BatchNorm2d(D), nn.ReLU())  # fmt: skip

        self.stage1, self.stage2, self.stage3 = stage(3, 32), stage(32, 64), stage(64, 128)
        self.project = nn.Linear(128, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH, affine=False)  # variance 1, so that all features weigh the same
        self.classify = nn.Linear(WIDTH, KINDS)

    def last_map(self, x):
        """x (B, 3, 32, 32) in [-1, 1] -> what is seen around the upper left of each 8x8 pixels: (B, 128, 4, 4)."""
        h = self.stage1(x)  # (B, 32, 16, 16)
        h = self.stage2(h)  # (B, 64, 8, 8)
        return self.stage3(h)  # (B, 128, 4, 4)

    def forward(self, x):
        """x (B, 3, 32, 32) in [-1, 1] -> features (B, 64), logits (B, 98)."""
        h = self.last_map(x).mean((2, 3))  # (B, 128)
        features = self.norm(self.project(h))  # (B, 64)
        return features, self.classify(F.relu(features))  # (B, 64), (B, 98)


class EmojiTeacher(nn.Module):
    """The trained classifier in the place of dinov2.DINOv2: alignment in miniature, at hand without a network."""

    def __init__(self):
        super().__init__()
        self.classifier, self.width = load_features(), 128
        self.requires_grad_(False)

    @torch.no_grad()
    def forward(self, images, student_patch=PATCH):
        """images (B, 3, 32, 32), RGB in [0, 1] -> tokens (B, 16, 128), row by row. ValueError for other patches."""
        if images.shape[-2:] != (SIDE, SIDE) or student_patch != PATCH:
            raise ValueError(f"the emoji teacher sees {SIDE}x{SIDE} pixels in patches of {PATCH}, not "
                             f"{tuple(images.shape[-2:])} in patches of {student_patch}")  # fmt: skip
        return self.classifier.last_map(images * 2 - 1).flatten(2).transpose(1, 2)  # (B, 16, 128)


def load_features():
    """The trained classifier of the repository, in eval mode. CheckpointError if its file is missing or damaged."""
    model = EmojiFeatures().eval()
    load_weights(model, load_checkpoint(FEATURES_FILE).get("features", {}), FEATURES_FILE)
    return model


def labelled_emoji():
    """All pictures, uint8 (1906, 3, 32, 32), their kinds (1906) as numbers, and bool (1906): is it one to train on?"""
    emoji = open_dataset("emoji", SIDE)
    targets = np.unique(emoji.kinds, return_inverse=True)[1]  # (1906): "animal-bird", "drink", finer than classes
    # Every tenth picture is kept from training: it shows whether the features hold for pictures that are new.
    return emoji.images, torch.from_numpy(targets), torch.arange(len(targets)) % 10 != 0


def augment(x, generator):
    """Moves, mirrors, tints and roughens x (B, 3, 32, 32), since 1,700 pictures are few to learn from."""
    top, left = torch.randint(0, 7, (2,), generator=generator).tolist()
    x = F.pad(x, (3, 3, 3, 3), value=1)[:, :, top : top + SIDE, left : left + SIDE]  # (B, 3, 32, 32)
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)  # (B, 3, 32, 32)
    x = x * (1 + 0.1 * torch.randn(len(x), 3, 1, 1, generator=generator))  # (B, 3, 32, 32)
    # Little noise: features that learn to overlook much of it would overlook it in generated pictures, too.
    return x + 0.03 * torch.randn(x.shape, generator=generator)  # (B, 3, 32, 32)


def train_features(images, targets, epochs=20, batch_size=64, seed=0):
    """uint8 (N, 3, 32, 32) and kinds (N) -> a trained EmojiFeatures, the same for the same seed.

    With more epochs it knows them by heart, and new ones seem far: by 40, the held-out tenth's distance doubles.
    """
    torch.manual_seed(seed)  # for the initial weights
    generator, model = torch.Generator().manual_seed(seed), EmojiFeatures()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * batches)
    for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=None):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size)[:batches]:
            logits = model(augment(from_uint8(images[rows]), generator))[1]  # (B, 98)
            F.cross_entropy(logits, targets[rows], label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


@torch.inference_mode()
def emoji_features(images):
    """uint8 (N, 3, 32, 32), N >= 128 -> float64 (N, 64), on the CPU. EvalError for anything else."""
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE) or len(images) < MINIMUM:
        raise EvalError(f"the emoji distance takes at least {MINIMUM} pictures, uint8 (N, 3, {SIDE}, {SIDE}), "
                        f"not {images.dtype} {tuple(images.shape)}")  # fmt: skip
    model = load_features()
    return torch.cat([model(from_uint8(part))[0] for part in images.cpu().split(256)]).double()  # (N, 64)


def emoji_distance(images, reference=None):
    """From some pictures to others, or to the real ones, each uint8 (N, 3, 32, 32), N >= 128. -> float >= 0."""
    reference = open_dataset("emoji", SIDE).images if reference is None else reference  # (M, 3, 32, 32)
    ours, theirs = emoji_features(images), emoji_features(reference)  # (N, 64), (M, 64)
    return frechet_distance(ours.mean(0), ours.T.cov(), theirs.mean(0), theirs.T.cov())


@torch.inference_mode()
def draw_emoji(model, num, steps=20, cfg=2.5, seed=0):
    """By a PixNerd, uint8 (num, 3, 32, 32), classes as often as in the data. EvalError for NaN and other models."""
    labels, device = sorted(open_dataset("emoji", SIDE).labels), next(model.parameters()).device
    if (model.config.resolution, model.config.num_classes) != (SIDE, labels[-1] + 1):
        raise EvalError(f"the emoji distance is for models of {labels[-1] + 1} classes at {SIDE} pixels, not "
                        f"{model.config.num_classes} at {model.config.resolution}")  # fmt: skip
    if model.class_names and list(model.class_names) != EMOJI_CLASSES:
        raise EvalError("the emoji distance is for the nine classes in their order, not "
                        + ", ".join(model.class_names))  # fmt: skip
    y = torch.tensor([labels[i * len(labels) // num] for i in range(num)], device=device)  # (num)
    noise = torch.stack([torch.randn(3, SIDE, SIDE, generator=keyed_generator(seed, 3, i)) for i in range(num)])
    images = []
    for rows in tqdm(torch.arange(num).split(100), desc="sampling", leave=False, disable=None):
        with autocast(device, pick_precision("auto", device)):
            x = adams(guide(model, y[rows], cfg), noise[rows].to(device), time_grid(steps))  # (B, 3, 32, 32)
        if not x.isfinite().all():
            raise EvalError("the model draws NaN or Inf, to which there is no distance")
        images.append(to_uint8(x).cpu())
    return torch.cat(images)  # (num, 3, 32, 32)


def main():
    """Trains the features, or prints the table of the checkpoints."""
    parser = argparse.ArgumentParser(description="The emoji distance of checkpoints. Not comparable to FID.",
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    add("checkpoints", nargs="+", help='files of training runs; or the word "train", to make the features file')
    add("--num", type=int, default=1000, help="pictures drawn from each")
    add("--steps", type=int, default=20, help="of the Adams solver")
    add("--cfg", type=float, default=2.5, help="guidance scale")
    add("--seeds", type=int, nargs="+", default=[0], help="one column each: shows how noisy the number is")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    args = parser.parse_args()
    if args.num < MINIMUM or args.steps < 1:
        raise EvalError(f"--num must be at least {MINIMUM} and --steps at least 1")

    images, targets, known = labelled_emoji()
    if args.checkpoints == ["train"]:
        model = train_features(images[known], targets[known])
        right = model(from_uint8(images[~known]))[1].argmax(1) == targets[~known]  # (191)
        save_checkpoint(FEATURES_FILE, {"features": model.state_dict()})
        return print(f"{right.float().mean():.0%} of {len(right)} held-out pictures right; wrote {FEATURES_FILE}")

    print(f"{'step':>8}" + "".join(f"{f'seed {seed}':>10}" for seed in args.seeds) + "   emoji distance (not FID)")
    for path in args.checkpoints:
        model, step = load_model(path).to(pick_device(args.device)), load_checkpoint(path).get("step", "-")
        draws = (draw_emoji(model, args.num, args.steps, args.cfg, seed) for seed in args.seeds)
        print(f"{step:>8}" + "".join(f"{emoji_distance(drawn):10.2f}" for drawn in draws), flush=True)
    halves = images[torch.randperm(len(images), generator=keyed_generator(0))].chunk(2)
    print(f"{'floor':>8}{emoji_distance(*halves):10.2f}   two halves of the real pictures")


if __name__ == "__main__":
    try:
        main()
    except (CheckpointError, DeviceError, EvalError, OSError) as error:
        sys.exit(f"emoji_metric.py: {error}")
