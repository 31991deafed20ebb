"""What a run shows of itself while it trains: a grid of pictures, and --eval-every's numbers.

All are drawn by the averaged weights (EMA), which are far ahead of the trained ones, from noise that is a function of
the seed: the same picture grows from preview to preview. Few steps of Adams, as for a quick look. FID's samples are
drawn with the paper's guidance, the emoji distance's as emoji_metric.py does. Previews of small pictures are for people
who want to see early what was learned: their noise is a little smaller than that of training (`temperature`).
Left out: previews on several GPUs; rank 0 draws them alone, the others wait.
"""

import torch

import emoji_metric
import eval_fid
import inception
from data import keyed_generator, picture_grid, to_uint8
from device import autocast, full_float32
from samplers import adams, guide, time_grid

PER_CLASS = 8
AT_ONCE = 16  # pictures in a batch, so that the memory of a preview stays far below that of a training step
MEASURED = dict(steps=20, shift=1.0, scale=3.5, interval=(0.1, 1.0), temperature=1.0)  # for FID: the paper's guidance
# By eye, on four whole classes of the emoji after five minutes (the kinds of `make demo` mind less). What a small
# picture will be is decided before t = 0.1, where the paper's interval begins: guided from the second step on, and in
# small steps there, people come out whole. At temperature 1 there are more specks, at 0.65 food fades.
SMALL, SHOWN = 64, dict(steps=30, shift=2.0, scale=2.0, interval=(0.0, 1.0), temperature=0.7)  # up to 64 pixels


def draw(ema, y, keys, device, precision, steps, shift, scale, interval, temperature):
    """EMA samples of the classes y (list of B), the noise of each from its key: uint8 (B, 3, H, W)."""
    size = (3, ema.config.resolution, ema.config.resolution)
    noise = torch.stack([torch.randn(size, generator=keyed_generator(*key)) for key in keys])  # (B, 3, H, W)
    times, images = time_grid(steps, shift), []
    with torch.inference_mode(), autocast(device, precision):
        for some_y, some_noise in zip(torch.tensor(y).split(AT_ONCE), noise.split(AT_ONCE)):
            velocity = guide(ema, some_y.to(device), scale, interval)
            images.append(to_uint8(adams(velocity, temperature * some_noise.to(device), times)))
    return torch.cat(images).cpu()  # (B, 3, H, W)


def preview(ema, seed, device, precision):
    """A grid of EMA samples, one row per class (at most 9), from the same noise every time."""
    y = [i for i in range(min(ema.config.num_classes, 9)) for _ in range(PER_CLASS)]
    how = SHOWN if ema.config.resolution <= SMALL else MEASURED
    images = draw(ema, y, [(seed, 3, i) for i in range(len(y))], device, precision, **how)  # (B, 3, H, W)
    return picture_grid(images, PER_CLASS)


@full_float32()
def evaluate(ema, args, device, rank, world):
    """--eval-every: how good are --eval-num EMA samples? -> numbers for the metrics file. All ranks must call it.

    Few samples and few solver steps: good for comparing one run's checkpoints with each other, not with papers.
    """
    if args.eval_ref is None:
        if rank > 0:
            return {}
        images = emoji_metric.draw_emoji(ema, args.eval_num, seed=args.seed)  # (N, 3, H, W), as emoji_metric.py draws
        return {"emoji_distance": emoji_metric.emoji_distance(images)}

    def batches(size, rank, world):
        for start in range(rank * size, args.eval_num, world * size):
            indices = range(start, min(start + size, args.eval_num))
            y, keys = [i % ema.config.num_classes for i in indices], [(args.seed, 5, i) for i in indices]
            yield draw(ema, y, keys, device, args.precision, **MEASURED)  # (B, 3, H, W)

    network = inception.load_inception(args.inception).to(device)
    reference = eval_fid.open_pictures(args.eval_ref, ema.config.resolution)
    real = reference.stored
    if "mu" not in real:
        real = eval_fid.describe(reference, network, device, rank=rank, world=world)
    size = (ema.config.resolution, ema.config.resolution)
    samples = eval_fid.Pictures("EMA samples", args.eval_num, size, batches, {})
    drawn = eval_fid.describe(samples, network, device, rank=rank, world=world)
    probabilities = network.logits(drawn["features"].to(device)).softmax(1).cpu()
    return {"fid": eval_fid.frechet_distance(real["mu"], real["sigma"], drawn["mu"], drawn["sigma"]),
            "inception_score": eval_fid.inception_score(probabilities)}  # fmt: skip
