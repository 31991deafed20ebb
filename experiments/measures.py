"""What the study measures of a model and of its pictures: held-out loss, emoji distance, border ratio."""

import math

import torch

from data import from_uint8, random_stream
from eval_fid import Statistics, frechet_distance
from experiments.world import resized
from flow import flow_matching_loss, interpolate
from pretrained.emoji_classifier import EMOJI_SIDE, load_emoji_classifier
from runtime.gauges import TIME_BINS

# Not the seed of any run of the study, which are 0 or more. Another one would change every loss in docs/evidence.
HELD_OUT_SEED = -1


def time_mass(bins=TIME_BINS):
    """How often training times (flow.sample_time) fall into each of the equal bins of [0, 1]: (bins), sum 1."""
    edges = torch.arange(bins + 1, dtype=torch.float64) / bins  # (bins + 1)
    below = 0.5 * (1 + torch.special.erf(torch.logit(edges) / math.sqrt(2)))  # of a standard normal at logit(t)
    return below.diff().tolist()


@torch.no_grad()
def held_out_loss(model, pictures):
    """Losses by tenths of t (10 numbers): every picture once in each, with the same time and noise for all models."""
    x, y, losses = from_uint8(pictures.images), torch.tensor(pictures.labels), []  # (N, 3, H, W), (N)
    for number in range(TIME_BINS):
        rng = random_stream("sample", HELD_OUT_SEED, number)
        t = (number + torch.rand(len(x), generator=rng)) / TIME_BINS  # (N)
        noise = torch.randn(x.shape, generator=rng)
        found = []
        for some in torch.arange(len(x)).split(32):
            v = model(interpolate(x[some], noise[some], t[some]), t[some], y[some])
            found.append(flow_matching_loss(v, x[some], noise[some], per_image=True))  # (B)
        losses.append(torch.cat(found).mean().item())
    return losses


def border_ratio(images, patch=8):
    """Mean difference of neighbours across patch borders over that within patches. uint8 (N, 3, H, W) -> float.

    1 where borders do not show; real pictures have their own value.
    """
    across, within = [], []
    for axis in (-1, -2):
        steps = images.float().diff(dim=axis).abs().movedim(axis, -1)  # (N, 3, sides, H - 1)
        border = torch.arange(1, steps.shape[-1] + 1) % patch == 0  # (H - 1)
        across.append(steps[..., border].flatten())
        within.append(steps[..., ~border].flatten())
    return (torch.cat(across).mean() / torch.cat(within).mean()).item()


def features(images):
    """What the emoji distance sees of square pictures, uint8 (N, 3, H, H), shrunk to 32 pixels: (N, 64)."""
    network = load_emoji_classifier()
    return torch.cat([network(resized(some, EMOJI_SIDE))[0] for some in images.split(256)])


def emoji_distance(seen, real):
    """The emoji distance of features (N, 64) and (M, 64)."""
    moments = []
    for rows in (seen, real):
        statistics = Statistics(rows.shape[1])
        statistics.update(rows)
        moments += statistics.mean_cov()
    return frechet_distance(*moments)


def paired_bootstrap(seen, base, real, rounds=50):
    """(difference, standard error) of two emoji distances, of features (N, 64) each and of the real pictures (M, 64).

    The error is over random choices of the same pictures of both.
    """
    rng, differences = torch.Generator().manual_seed(0), []
    for _ in range(rounds):
        rows = torch.randint(len(seen), (len(seen),), generator=rng)
        differences.append(emoji_distance(seen[rows], real) - emoji_distance(base[rows], real))
    return emoji_distance(seen, real) - emoji_distance(base, real), torch.tensor(differences).std().item()
