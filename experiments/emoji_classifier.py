"""Train the small classifier of the emoji (pretrained/emoji_classifier.py) and write assets/emoji-features.pt.

    python -m experiments.emoji_classifier          # a minute on a CPU

The targets are Unicode's 98 kinds, which are finer than the nine classes. Every tenth picture is held out, to measure
accuracy on pictures that were not trained on.
"""

import argparse

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from data import from_uint8, open_dataset
from pretrained.emoji_classifier import EMOJI_SIDE, WEIGHTS_FILE, EmojiClassifier
from runtime.checkpoint import save_checkpoint
from runtime.files import run


def labelled_emoji():
    """All pictures, uint8 (1906, 3, 32, 32), their kinds (1906) as numbers, and bool (1906): is it one to train on?"""
    emoji = open_dataset("emoji", EMOJI_SIDE)
    targets = np.unique(emoji.kinds, return_inverse=True)[1]  # (1906)
    return emoji.images, torch.from_numpy(targets), torch.arange(len(targets)) % 10 != 0


def distort(x, generator):
    """x (B, 3, 32, 32) moved, mirrored, tinted, with noise: 1,700 pictures are few to learn from. The same shape."""
    top, left = torch.randint(0, 7, (2,), generator=generator).tolist()
    x = F.pad(x, (3, 3, 3, 3), value=1)[:, :, top : top + EMOJI_SIDE, left : left + EMOJI_SIDE]
    x = torch.where(torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5, x.flip(-1), x)
    x = x * (1 + 0.1 * torch.randn(len(x), 3, 1, 1, generator=generator))
    # Little noise: features that learn to overlook much of it would overlook it in generated pictures, too.
    return x + 0.03 * torch.randn(x.shape, generator=generator)


def train_classifier(images, targets, epochs=20, batch_size=64, seed=0):
    """uint8 (N, 3, 32, 32) and kinds (N) -> a trained EmojiClassifier, the same for the same seed.

    With more epochs it overfits, and new pictures seem far: by 40, the distance of the held-out tenth doubles.
    """
    torch.manual_seed(seed)  # for the initial weights
    generator, model = torch.Generator().manual_seed(seed), EmojiClassifier()
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.05)
    batches = len(images) // batch_size
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=4e-3, total_steps=epochs * batches)
    for _ in tqdm(range(epochs), desc="training", unit="epoch", disable=None):
        for rows in torch.randperm(len(images), generator=generator).split(batch_size)[:batches]:
            features = model.features(distort(from_uint8(images[rows]), generator))  # (B, 64)
            F.cross_entropy(model.logits(features), targets[rows], label_smoothing=0.1).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
    return model.eval()


def main():
    """Trains, counts the held-out pictures that are right, and writes the file."""
    parser = argparse.ArgumentParser(description="Train the small classifier of the emoji.")
    parser.add_argument("--out", default=WEIGHTS_FILE, help="the file to write (default: assets/emoji-features.pt)")
    args = parser.parse_args()
    images, targets, training = labelled_emoji()
    model = train_classifier(images[training], targets[training])
    right = model(images[~training])[2].argmax(1) == targets[~training]  # (191)
    save_checkpoint(args.out, {"features": model.state_dict()})
    print(f"{right.float().mean():.0%} of {len(right)} held-out pictures right; wrote {args.out}")


if __name__ == "__main__":
    run(main)
