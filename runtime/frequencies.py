"""`--loss frequency`: an error that counts more where the eye looks, at low frequencies. Off by default.

After DeCo (Ma et al., arXiv 2511.19365), which weighs the frequencies of squares of 8x8 pixels by the steps in which
JPEG stores them. Left out: its change to YCbCr, and its rounding of the steps of one JPEG quality; so with weights of
one this is the plain loss.
"""

import math

import torch

SIDE = 8  # pixels, JPEG's
# The orthonormal DCT of 8 numbers, (frequency, place).
COSINES = torch.cos(math.pi * torch.arange(SIDE)[:, None] * (torch.arange(SIDE) + 0.5) / SIDE) / 2
COSINES[0] /= math.sqrt(2)
# JPEG's steps for brightness, frequencies down by frequencies across (ITU-T T.81, table K.1).
JPEG_STEPS = """
16 11 10 16  24  40  51  61
12 12 14 19  26  58  60  55
14 13 16 24  40  57  69  56
14 17 22 29  51  87  80  62
18 22 37 56  68 109 103  77
24 35 55 64  81 104 113  92
49 64 78 87 103 121 120 101
72 92 95 98 112 100 103  99
"""


def jpeg_weights():
    """One over JPEG's steps, scaled to mean 1: (8, 8)."""
    weights = 1 / torch.tensor([float(step) for step in JPEG_STEPS.split()]).view(SIDE, SIDE)  # (8, 8)
    return weights / weights.mean()


def by_frequency(error, weights=None):
    """error (B, C, H, W), sides multiples of 8 -> its frequencies (B, C, H/8, W/8, 8, 8), scaled.

    The mean of their squares is the frequency-weighted loss. weights (8, 8): jpeg_weights(), if left out.
    """
    weights = jpeg_weights() if weights is None else weights  # (8, 8)
    squares = error.unflatten(-1, (-1, SIDE)).unflatten(-3, (-1, SIDE)).transpose(-3, -2)  # (B, C, H/8, W/8, 8, 8)
    cosines = COSINES.to(error)  # (8, 8)
    return cosines @ squares @ cosines.T * weights.to(error).sqrt()  # (B, C, H/8, W/8, 8, 8)


LOSSES = {"plain": None, "frequency": by_frequency}  # what flow.flow_matching_loss does with the error before squaring
