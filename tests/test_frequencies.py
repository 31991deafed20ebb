"""The frequency-weighted loss: the plain one for weights of one, and a naive loop for others."""

import math

import pytest
import torch

from flow import flow_matching_loss
from runtime.frequencies import LOSSES, by_frequency, jpeg_weights


def three():
    """v, x and noise (2, 3, 16, 8)."""
    generator = torch.Generator().manual_seed(0)
    return (torch.randn(2, 3, 16, 8, generator=generator) for _ in range(3))


def test_weights_of_one_give_the_plain_loss():
    """The cosines are orthonormal. Catches a wrong scale of the constant term."""
    v, x, noise = three()
    plain = flow_matching_loss(v, x, noise)
    weighted = flow_matching_loss(v, x, noise, weigh=lambda error: by_frequency(error, torch.ones(8, 8)))
    torch.testing.assert_close(weighted, plain)
    assert LOSSES["plain"] is None


def test_the_weighted_loss_is_that_of_a_naive_loop():
    """Every coefficient of every square as JPEG defines it. Catches rows and columns exchanged."""
    v, x, noise = three()
    error, weights, total = (v - (x - noise)).double(), jpeg_weights().double(), 0.0
    scale = lambda k: math.sqrt((1 if k == 0 else 2) / 8)
    place = torch.arange(8, dtype=torch.float64) + 0.5
    for down in range(8):
        for across in range(8):
            waves = torch.cos(math.pi * down * place / 8)[:, None] * torch.cos(math.pi * across * place / 8)
            for top in (0, 8):
                part = (error[:, :, top : top + 8] * waves).sum((2, 3)) * scale(down) * scale(across)  # (2, 3)
                total += weights[down, across] * part.square().sum()
    loss = flow_matching_loss(v, x, noise, weigh=by_frequency)
    torch.testing.assert_close(loss.double(), total / error.numel(), atol=1e-6, rtol=1e-5)


def test_jpeg_weights_have_mean_one_and_are_those_of_the_standard():
    weights = jpeg_weights()
    assert weights.shape == (8, 8) and weights.mean().item() == pytest.approx(1)
    for place, step in {(0, 0): 16, (0, 1): 11, (1, 0): 12, (0, 7): 61, (7, 0): 72, (7, 7): 99}.items():
        assert (weights[place] / weights[0, 0]).item() == pytest.approx(16 / step)
