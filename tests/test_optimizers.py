"""Muon against torch.optim.Muon and a singular value decomposition, and who trains which parameter."""

import pytest
import torch

from model import PRESETS, PixNerd
from runtime.optimizers import Muon, make_optimizers, orthogonalise

SHAPES = [(24, 16), (16, 24), (16, 16), (24, 16), (200, 16)]


def matrices(seed):
    torch.manual_seed(seed)
    return [torch.nn.Parameter(torch.randn(shape)) for shape in SHAPES]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_equals_torchs_muon(weight_decay):
    """Ten steps with the same gradients end where torch's own ends; bfloat16 rounds the stacked products alike."""
    ours, theirs = matrices(0), matrices(0)
    optimizer = Muon(ours, 0.02, weight_decay=weight_decay)
    reference = torch.optim.Muon(theirs, 0.02, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")
    start = [p.detach().clone() for p in ours]
    for _ in range(10):
        for a, b in zip(ours, theirs):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        optimizer.step()
        reference.step()
    for a, b, before in zip(ours, theirs, start):
        moved = (b - before).norm()
        assert (a - b).norm() < 0.02 * moved, "bfloat16 has 8 bits: 0.4 % a rounding"


@pytest.mark.parametrize("shape", [(3, 20, 50), (2, 50, 20)])
def test_orthogonalise_keeps_directions_and_drops_magnitudes(shape):
    torch.manual_seed(1)
    M = torch.randn(shape)
    X = orthogonalise(M)
    U, _, Vh = torch.linalg.svd(M, full_matrices=False)
    aligned = U.mT @ X @ Vh.mT  # (N, r, r): the singular values, if U and V are M's
    values = aligned.diagonal(dim1=-2, dim2=-1)
    assert X.shape == M.shape and X.dtype == M.dtype
    assert values.min() > 0.6 and values.max() < 1.3
    assert (aligned - torch.diag_embed(values)).abs().max() < 0.05


def test_found_inf_leaves_the_parameters_as_they_are():
    parameters = matrices(2)
    optimizer = Muon(parameters, 0.1, weight_decay=0.1)
    optimizer.found_inf = torch.ones(())
    before = [p.detach().clone() for p in parameters]
    for p in parameters:
        p.grad = torch.full_like(p, float("nan"))
    optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before))


def test_state_is_saved_and_loaded():
    """Two steps, with the state carried over to new objects in between, equal two steps without."""
    ours, copies = matrices(3), matrices(3)
    gradients = [[torch.randn(shape) for shape in SHAPES] for _ in range(2)]
    optimizer, other = Muon(ours, 0.02), Muon(copies, 0.02)
    for step, grads in enumerate(gradients):
        for p, q, g in zip(ours, copies, grads):
            p.grad, q.grad = g.clone(), g.clone()
        optimizer.step()
        if step == 1:
            fresh = Muon(copies, 0.02)
            fresh.load_state_dict(other.state_dict())
            other = fresh
        other.step()
    assert all(torch.equal(a, b) for a, b in zip(ours, copies))


def test_zero_gradient_is_harmless():
    p = torch.nn.Parameter(torch.ones(4, 4))
    p.grad = torch.zeros_like(p)
    Muon([p], 0.1).step()
    assert torch.equal(p, torch.ones(4, 4))


@pytest.mark.parametrize("name, count", [("adamw", 1), ("muon", 2)])
def test_every_parameter_has_exactly_one_optimizer(name, count):
    model = PixNerd(PRESETS["Nano"])
    optimizers = make_optimizers(model, name, 1e-3)
    held = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert len(optimizers) == count
    assert len(held) == len({id(p) for p in held}) == len(list(model.parameters()))
    by_muon = sum(p.numel() for optimizer in optimizers[1:] for p in optimizer.param_groups[0]["params"])
    assert by_muon > 0.9 * sum(p.numel() for p in model.parameters()) or name == "adamw"
