"""What a run shows of itself while it trains: grids of pictures, and the samples that --eval-every judges.

All are drawn by the averaged weights (EMA), which are far ahead of the trained ones, from noise that is a function of
the seed: the same picture grows from preview to preview. Left out: previews on several GPUs; rank 0 draws them alone.
"""

import torch

from runtime.picture_sets import PictureSet
from runtime.pictures import picture_grid
from samplers import generate, image_noise, time_grid

PER_CLASS, MOST_CLASSES = 8, 9
AT_ONCE = 16  # pictures in a batch, so that the memory of a preview stays far below that of a training step
SMALL = 64  # pixels: up to this side, a picture is decided before t = 0.1, where the paper's guidance begins
# Few steps of Adams, as for a quick look.
AS_THE_PAPER = dict(steps=20, shift=1.0, scale=3.5, interval=(0.1, 1.0), temperature=1.0)
JUDGED_SMALL = AS_THE_PAPER | dict(scale=2.5)
# By eye, on four classes of the emoji after five minutes: guided from the second step on, and in small steps there,
# people come out whole; at temperature 1 there are more specks, at 0.65 food fades.
FOR_SMALL = dict(steps=30, shift=2.0, scale=2.0, interval=(0.0, 1.0), temperature=0.7)


def draw_ema(ema, y, numbers, seed, device, precision, steps, shift, scale, interval, temperature):
    """EMA samples number `numbers` (B) of the conditions y (B, ...): uint8 (B, 3, H, W), on the CPU."""
    times, images = time_grid(steps, shift), []
    size = (ema.config.resolution, ema.config.resolution)
    for some_y, some in zip(y.split(AT_ONCE), torch.as_tensor(numbers).split(AT_ONCE)):
        noise = temperature * image_noise(seed, some.tolist(), size).to(device)  # (B, 3, H, W)
        images.append(generate(ema, some_y.to(device), noise, times, scale, interval, "adams", precision=precision))
    return torch.cat(images).cpu()  # (B, 3, H, W)


def preview_conditions(dataset, encode=None):
    """What previews show, y (N, ...): eight of each class (of the first 9), or 72 captions from all over the data.

    encode: turns captions into features; None for classes.
    """
    if encode is None:
        return torch.arange(min(len(dataset.classes), MOST_CLASSES)).repeat_interleave(PER_CLASS)  # (N)
    captions, N = dataset.labels, PER_CLASS * MOST_CLASSES
    return encode([captions[i * len(captions) // N] for i in range(N)]).cpu()  # (N, M, E)


def preview(ema, y, seed, device, precision):
    """A grid of EMA samples of the conditions y (N, ...), eight a row, from the same noise every time."""
    how = FOR_SMALL if ema.config.resolution <= SMALL else AS_THE_PAPER
    return picture_grid(draw_ema(ema, y, range(len(y)), seed, device, precision, **how), PER_CLASS)


def ema_samples(ema, labels, num, seed, device, precision, encode=torch.tensor):
    """`num` EMA samples as a PictureSet for eval_fid.py, of classes or captions as often as in `labels`, the data's.

    encode: turns some of the labels into the condition y (B, ...).
    """
    labels = sorted(labels)
    labels = [labels[i * len(labels) // num] for i in range(num)]
    how = JUDGED_SMALL if ema.config.resolution <= SMALL else AS_THE_PAPER

    def batches(batch_size, rank=0, world=1):
        for start in range(rank * batch_size, num, world * batch_size):
            numbers = range(start, min(start + batch_size, num))
            y = encode(labels[numbers.start : numbers.stop])  # (B, ...)
            yield draw_ema(ema, y, numbers, seed, device, precision, **how)  # (B, 3, H, W)

    return PictureSet("EMA samples", num, (ema.config.resolution, ema.config.resolution), batches, {})
