"""Activation checkpointing: less memory for more arithmetic (`train.py --recompute`). The gradients stay the same.

What the backward pass needs of a block is not kept but computed again when the backward pass gets there. The model
calls its blocks and its decoder through `model.call`; the functions here take its place.

    none    keep all activations
    field   compute the neural field again, an eighth of the patches at a time
    all     that, and each transformer block

The activations of the pixels are the largest of all, and the backward pass begins with them, while all others are still
kept. Recomputed whole, they would reach the same peak again: hence the eighths.
"""

import torch
from torch.utils.checkpoint import checkpoint

from model import plainly
from neural_field import NeuralField

PARTS = 8


def _all(module, *inputs):
    if not isinstance(module, NeuralField):
        return checkpoint(module, *inputs, use_reentrant=False)
    rgb, s, *size = inputs  # (N, P2, C), (N, D), height and width
    parts = zip(rgb.chunk(PARTS), s.chunk(PARTS))
    return torch.cat([checkpoint(module, *part, *size, use_reentrant=False) for part in parts])  # (N, P2, C)


def _field(module, *inputs):
    return _all(module, *inputs) if isinstance(module, NeuralField) else module(*inputs)


RECOMPUTE = {"none": plainly, "field": _field, "all": _all}  # for model.call
