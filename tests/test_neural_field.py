"""The neural field: Eq. 7 to 12, each against a loop that a reader can check with a finger."""

import itertools
import math

import pytest
import torch

from neural_field import FIELD_NORMS, FieldBlock, NeuralField, RMSNorm, dct_encoding, sincos_encoding


def random_field(**choices):
    """A field with every parameter random (the output layer starts at zero, which would hide all mistakes)."""
    torch.manual_seed(0)
    field = NeuralField(hidden_size=12, patch_size=3, width=4, ratio=2, depth=2, **choices)
    for p in field.parameters():
        torch.nn.init.normal_(p, std=0.5)
    return field


def test_eq_7_sincos_encoding_equals_a_loop():
    """Catches swapped axes, and octaves that start at 2^1."""
    height, width, F = 3, 4, 5
    encoding = sincos_encoding(height, width, F)
    assert encoding.shape == (height * width, 4 * F)
    for i in range(height):
        for j in range(width):
            x, y = j / (width - 1), i / (height - 1)
            expected = [f(2**k * math.pi * u) for u in (x, y) for f in (math.sin, math.cos) for k in range(F)]
            torch.testing.assert_close(encoding[i * width + j], torch.tensor(expected), atol=1e-4, rtol=0)


def test_eq_12_dct_encoding_equals_a_loop():
    """Catches x and y swapped, feature index iy * F + ix, and whole-number frequencies (Eq. 12 as printed)."""
    height, width, F = 3, 5, 8
    encoding = dct_encoding(height, width, F)
    assert encoding.shape == (height * width, F * F)
    for i in range(height):
        for j in range(width):
            x, y = j / (width - 1), i / (height - 1)
            for ix in range(F):
                for iy in range(F):
                    fx, fy = ix * F / (F - 1), iy * F / (F - 1)  # linspace(0, 8, 8): 0, 8/7, ..., 8
                    expected = math.cos(math.pi * x * fx) * math.cos(math.pi * y * fy) / (1 + fx * fy)
                    assert encoding[i * width + j, ix * F + iy].item() == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("patch", [4, 8, 16])
def test_eq_12_dct_encoding_is_the_released_one(golden, patch):
    torch.testing.assert_close(dct_encoding(patch, patch), golden("encoding")[f"dct_{patch}"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("encode", [dct_encoding, sincos_encoding])
def test_eq_12_another_density_samples_the_same_function(encode):
    """Every second pixel of a 5x9 patch is a pixel of a 3x5 patch: coordinates span the patch, both ends included."""
    dense = encode(5, 9).view(5, 9, -1)
    torch.testing.assert_close(dense[::2, ::2].reshape(15, -1), encode(3, 5), atol=1e-4, rtol=0)


@pytest.mark.parametrize("encoding", ["dct", "sincos"])
@pytest.mark.parametrize("norm", FIELD_NORMS)
def test_eq_8_to_11_field_equals_a_loop_over_patches_and_pixels(norm, encoding):
    """The whole decoder by hand: one patch, one pixel, one weight row at a time.

    Catches transposed weights, a norm over the wrong dimension, W1 and W2 cut from the generated vector in the wrong
    order, and misplaced pixels.
    """
    field = random_field(norm=norm, encoding=encoding)
    N, P2, Dp, inner = 2, 9, 4, 8
    rgb, s = torch.randn(N, P2, 3), torch.randn(N, 12)
    places = {"dct": dct_encoding, "sincos": sincos_encoding}[encoding](3, 3)

    def rms(vector, weight):
        return vector / (vector.square().mean() + 1e-6).sqrt() * weight

    def unit(vector):
        return vector / vector.norm()

    expected = torch.empty(N, P2, 3)
    for n in range(N):
        for pixel in range(P2):
            z = field.embed(torch.cat([rgb[n, pixel], places[pixel]]))  # Eq. 8, as released: one linear layer
            for block in field.blocks:
                generated = block.to_weights(s[n])  # Eq. 9
                w1, w2 = generated[: Dp * inner].view(Dp, inner), generated[Dp * inner :].view(inner, Dp)
                normed, hidden, out = rms(z, block.norm.weight), torch.empty(inner), torch.empty(Dp)
                for unit_index in range(inner):  # Eq. 10: each output unit's weights have norm 1
                    row = w1[:, unit_index] if norm == "none" else unit(w1[:, unit_index])
                    hidden[unit_index] = torch.nn.functional.silu(normed @ row)
                for unit_index in range(Dp):
                    row = unit(w2[:, unit_index]) if norm in ("both", "output") else w2[:, unit_index]
                    out[unit_index] = hidden @ row
                z = z + out
            z = rms(z, field.norm.weight) if norm == "output" else z
            expected[n, pixel] = field.output(z)  # Eq. 11
    torch.testing.assert_close(field(rgb, s, 3, 3), expected, atol=2e-5, rtol=2e-5)


def test_eq_9_each_token_writes_two_matrices_per_block():
    """From s (N, D) by one linear layer: W1 (N, Dp, r*Dp) from its first half, W2 (N, r*Dp, Dp) from its second."""
    block, s = FieldBlock(hidden_size=12, width=5, ratio=3, norm="none"), torch.randn(7, 12)
    mlps = s @ block.to_weights.weight.T + block.to_weights.bias  # (7, 2*5*15)
    w1, w2 = block.weights(s)
    torch.testing.assert_close(w1, mlps[:, :75].view(7, 5, 15))
    torch.testing.assert_close(w2, mlps[:, 75:].view(7, 15, 5))


@pytest.mark.parametrize(
    "norm, unit", [("none", (False, False)), ("first", (True, False)), ("both", (True, True)), ("output", (True, True))]
)
def test_eq_10_the_weights_into_each_unit_have_norm_one_where_the_choice_says_so(norm, unit):
    """Also when the token is huge or tiny: it chooses directions only."""
    torch.manual_seed(0)
    block = FieldBlock(12, 4, 2, norm)
    for magnitude in (1e-2, 1.0, 1e3):
        for w, normed in zip(block.weights(magnitude * torch.randn(5, 12)), unit):
            norms = w.norm(dim=1)  # over the inputs of each output unit
            assert torch.allclose(norms, torch.ones_like(norms), atol=1e-5) == normed, magnitude


def test_only_the_papers_choice_normalises_the_last_features():
    """Section 4.2: "output" is "both" and a norm before the last layer. Catches a choice that changes nothing."""
    rgb, s = torch.randn(2, 9, 3), torch.randn(2, 12)
    outputs = {}
    for norm in FIELD_NORMS:
        field = random_field(norm=norm)
        outputs[norm] = field(rgb, s, 3, 3)
        assert isinstance(field.norm, RMSNorm) == (norm == "output")
    for one, other in itertools.combinations(FIELD_NORMS, 2):
        assert (outputs[one] - outputs[other]).abs().max() > 1e-3, (one, other)


def test_section_4_5_a_denser_patch_holds_the_same_function():
    """Every second pixel of a patch drawn with 5 x 9 is a pixel of 3 x 5: the field knows places, not sizes."""
    field, s = random_field(), torch.randn(2, 12)
    dense = torch.randn(2, 5, 9, 3)
    v = field(dense.flatten(1, 2), s, 5, 9).view(2, 5, 9, 3)
    coarse = field(dense[:, ::2, ::2].reshape(2, 15, 3), s, 3, 5)
    torch.testing.assert_close(v[:, ::2, ::2].reshape(2, 15, 3), coarse, atol=1e-4, rtol=1e-4)


def test_eq_11_untrained_field_predicts_zero():
    """The mean of the target: the first loss of any run is the variance of the data plus that of the noise."""
    field = NeuralField(12, 3, 4)
    assert field(torch.randn(2, 9, 3), torch.randn(2, 12), 3, 3).count_nonzero() == 0


def test_rms_norm_works_in_float32_and_gives_back_the_input_type():
    """Catches squares that overflow or drown in half precision."""
    x = torch.full((1, 8), 3e4, dtype=torch.float16)
    out = RMSNorm(8)(x)
    assert out.dtype == torch.float16
    torch.testing.assert_close(out.float(), torch.ones(1, 8), atol=1e-3, rtol=0)
