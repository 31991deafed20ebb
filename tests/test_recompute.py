"""Activation checkpointing: the same gradients from less memory (`train.py --recompute`)."""

import dataclasses

import pytest
import torch

from helpers import TINY, randomised
from runtime.recompute import PARTS, RECOMPUTE


def gradients(recompute, config=TINY):
    model = randomised(config)
    model.call = RECOMPUTE[recompute]
    model(torch.ones(2, 3, 16, 16), torch.tensor([0.2, 0.7]), torch.tensor([0, 1])).square().sum().backward()
    return [p.grad for p in model.parameters()]


@pytest.mark.parametrize("decoder", ["field", "linear"])
@pytest.mark.parametrize("recompute", ["field", "all"])
def test_computing_activations_again_changes_no_gradient(recompute, decoder):
    """Catches patches in another order after the field was computed again part by part."""
    config = dataclasses.replace(TINY, decoder=decoder)
    for plain, again in zip(gradients("none", config), gradients(recompute, config), strict=True):
        # Sums over patches are taken in parts, so their last bits may differ.
        assert (plain - again).abs().max() <= 1e-5 * plain.abs().max()


def test_the_field_is_computed_again_an_eighth_of_the_patches_at_a_time():
    """Catches computing all of it again at once, with which nothing would be saved."""
    model, seen = randomised(TINY), []
    model.decoder.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    for recompute in ("none", "field", "all"):
        model.call = RECOMPUTE[recompute]
        model(torch.ones(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])).sum().backward()
    parts = 2 * PARTS * [32 // PARTS]  # each part forward and, in the backward pass, again
    assert PARTS == 8 and seen == [32] + parts + parts


def test_fewer_patches_than_parts_are_no_mistake():
    """One image of one token. Catches a cut into eighths that leaves empty parts."""
    model = randomised(TINY)
    inputs = torch.ones(1, 3, 4, 4), torch.tensor([0.5]), torch.tensor([1])
    plain = model(*inputs)
    model.call = RECOMPUTE["all"]
    assert torch.equal(model(*inputs), plain)


@pytest.mark.parametrize("recompute, kept", [("field", 0.6), ("all", 0.25)])
def test_less_is_kept_for_the_backward_pass(recompute, kept):
    """Bytes of all that autograd keeps, as a share of those without. Catches a flag that changes nothing."""

    def bytes_kept(recompute):
        model, found = randomised(dataclasses.replace(TINY, depth=4)), {}
        own = {p.data_ptr() for p in model.parameters()}
        model.call = RECOMPUTE[recompute]

        def keep(tensor):
            if tensor.data_ptr() not in own:
                found[tensor.data_ptr()] = max(found.get(tensor.data_ptr(), 0), tensor.numel() * tensor.element_size())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            v = model(torch.ones(8, 3, 16, 16), torch.rand(8), torch.zeros(8, dtype=torch.long))
        assert v.requires_grad
        return sum(found.values())

    assert bytes_kept(recompute) < kept * bytes_kept("none")
