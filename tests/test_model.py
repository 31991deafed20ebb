"""The transformer: Eq. 5 and 6, its parts against naive forms, and the released implementation's numbers."""

import dataclasses
import math

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from helpers import TINY, randomised
from model import PRESETS, Attention, PixNerd, SwiGLU, patchify, rotary_table, rotate, unpatchify
from pretrained.released import reference_names
from runtime.flops import forward_flops


def test_eq_5_patches_go_out_and_back():
    """Patch 1 of the row-major grid is right of patch 0, its values channel by channel."""
    x = torch.arange(2 * 3 * 8 * 12.0).view(2, 3, 8, 12)
    patches = patchify(x, 4, 6)
    assert patches.shape == (2, 4, 3, 24)
    assert torch.equal(patches[1, 1], x[1, :, 0:4, 6:12].reshape(3, 24))
    assert torch.equal(patches[1, 2], x[1, :, 4:8, 0:6].reshape(3, 24))
    assert torch.equal(unpatchify(patches, 2, 4, 6), x)


@pytest.mark.parametrize("decoder", ["field", "linear"])
@pytest.mark.parametrize("height,width", [(16, 16), (8, 24), (4, 4)])
def test_eq_6_velocity_has_the_shape_of_the_image_and_starts_at_zero(decoder, height, width):
    model = PixNerd(dataclasses.replace(TINY, decoder=decoder))
    v = model(torch.randn(2, 3, height, width), torch.rand(2), torch.tensor([0, 3]))
    assert v.shape == (2, 3, height, width)
    assert v.count_nonzero() == 0


@pytest.mark.parametrize("decoder", ["field", "linear"])
def test_eq_6_velocity_depends_on_image_time_and_class(decoder):
    """And not on the rest of the batch. Catches conditioning that is computed and never used."""
    model = randomised(dataclasses.replace(TINY, decoder=decoder))
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.6]), torch.tensor([0, 1])
    v = model(x, t, y)
    for changed in (model(x + 0.1, t, y), model(x, t + 0.1, y), model(x, t, y + 1)):
        assert (changed - v).abs().amax() > 1e-4
    torch.testing.assert_close(model(x[1:], t[1:], y[1:]), v[1:], atol=1e-5, rtol=1e-4)


def test_eq_6_linear_decoder_equals_a_loop_over_tokens_and_pixels():
    """The baseline by hand: normalise a token, shift and scale it by the condition, one dot product per number.

    Catches shift and scale exchanged, and velocities that are cut colour last: number c P^2 + i P + j of a token is
    colour c of pixel (i, j) of its patch.
    """
    torch.manual_seed(0)
    model = PixNerd(dataclasses.replace(TINY, decoder="linear")).eval()
    decoder, P, D, seen = model.decoder, 4, 32, {}
    for p in decoder.parameters():
        torch.nn.init.normal_(p, std=0.3)
    decoder.register_forward_pre_hook(lambda module, given: seen.update(h=given[0], c=given[1]))
    v = model(torch.randn(2, 3, 8, 12), torch.rand(2), torch.tensor([0, 3]))  # 2 rows of 3 tokens
    for b in range(2):
        modulation = decoder.modulation.weight @ seen["c"][b, 0] + decoder.modulation.bias  # (2D)
        shift, scale = modulation[:D], modulation[D:]
        for token in range(6):
            h = seen["h"][b, token]
            h = h / (h.square().mean() + 1e-6).sqrt() * decoder.norm.weight * (1 + scale) + shift
            for c in range(3):
                for i in range(P):
                    for j in range(P):
                        number = c * P * P + i * P + j
                        expected = decoder.output.weight[number] @ h + decoder.output.bias[number]
                        got = v[b, c, token // 3 * P + i, token % 3 * P + j]
                        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["c2i_square", "c2i_wide"])
def test_velocity_and_gradients_are_the_released_implementations(golden_model, device, name):
    """The golden numbers pin every formula at once: order of AdaLN, rotary pairs, time frequencies, weight layout."""
    model, file = golden_model(name, device)
    v = model(file["x"], file["t"], file["y"])
    assert (v - file["v"]).abs().max() < 1e-5 * file["v"].abs().max()
    (v * file["cotangent"]).sum().backward()
    names = reference_names(model.config)
    for ours, p in model.named_parameters():
        expected = file["g." + names[ours]]
        got = p.grad if expected.ndim else p.grad.norm()  # large gradients are stored as their norm
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max(), ours


@pytest.mark.parametrize("decoder", ["field", "linear"])
def test_a_model_of_clean_images_gives_the_velocity_towards_what_its_decoder_says(decoder):
    """The same weights read both ways, also at another density. Catches: x where a velocity is promised."""
    config = dataclasses.replace(TINY, decoder=decoder)
    plain, clean = randomised(config), randomised(dataclasses.replace(config, prediction="clean"))
    x, t, y = torch.randn(2, 3, 16, 16), torch.tensor([0.2, 0.97]), torch.tensor([0, 2])
    said = plain(x, t, y)
    torch.testing.assert_close(clean(x, t, y), (said - x) / torch.tensor([0.8, 0.05]).view(2, 1, 1, 1))
    v, tokens = clean(x, t, y, features_at=1)
    assert torch.equal(v, clean(x, t, y)) and torch.equal(tokens, plain(x, t, y, features_at=1)[1])
    if decoder == "field":
        x = torch.randn(2, 3, 32, 32)
        expected = (plain(x, t, y, grid=(4, 4)) - x) / torch.tensor([0.8, 0.05]).view(2, 1, 1, 1)
        torch.testing.assert_close(clean(x, t, y, grid=(4, 4)), expected)


def test_features_are_the_tokens_after_the_named_block():
    model = randomised(TINY)
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])
    seen = []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out))
    v, features = model(*inputs, features_at=1)
    assert features.shape == (2, 16, 32)
    assert torch.equal(features, seen[0])
    assert torch.equal(v, model(*inputs))


def test_features_of_a_block_that_is_not_there_are_refused():
    model, x = PixNerd(TINY), torch.zeros(1, 3, 16, 16)
    for number in (-1, 0, TINY.depth + 1):
        with pytest.raises(ValueError, match=f"features_at is {number}, but the blocks are 1 to {TINY.depth}"):
            model(x, torch.zeros(1), torch.zeros(1, dtype=torch.long), features_at=number)


def test_initialisation_is_the_released_one():
    """Catches: PyTorch's defaults, of which nothing else here would tell."""
    torch.manual_seed(0)
    model = PixNerd(dataclasses.replace(TINY, hidden_size=256, num_heads=4, num_classes=200))
    patch = model.patch_embed
    bound = (6 / sum(patch.weight.shape)) ** 0.5  # Xavier's, uniform
    assert patch.weight.abs().max() <= bound and patch.weight.abs().max() > 0.98 * bound and not patch.bias.any()
    for layer in (model.class_embed, model.time_embed.mlp[0], model.time_embed.mlp[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05)
    assert not model.decoder.output.weight.any() and not model.decoder.output.bias.any()


@pytest.mark.parametrize("rows,columns", [(4, 4), (2, 6)])
def test_rotary_table_is_the_released_one(golden, rows, columns):
    table = rotary_table(rows, columns, 16).permute(1, 2, 0)
    torch.testing.assert_close(table, golden("encoding")[f"rope2d_{rows}x{columns}"], atol=1e-6, rtol=0)


def test_rotary_turns_neighbouring_pairs_by_column_then_row():
    """As complex numbers: pair 2j by x f_j, pair 2j+1 by y f_j. Catches the half-split layout of other code bases."""
    Dh, rows, columns = 8, 2, 3
    x = torch.randn(1, 1, rows * columns, Dh)
    turned = rotate(x, rotary_table(rows, columns, Dh))
    for token in range(rows * columns):
        place_y, place_x = 16 * (token // columns) / (rows - 1), 16 * (token % columns) / (columns - 1)
        for pair in range(Dh // 2):
            frequency = 10000 ** (-(pair // 2) * 4 / Dh)
            angle = (place_y if pair % 2 else place_x) * frequency
            z = complex(*x[0, 0, token, 2 * pair : 2 * pair + 2]) * complex(math.cos(angle), math.sin(angle))
            got = turned[0, 0, token, 2 * pair : 2 * pair + 2].tolist()
            assert got == pytest.approx([z.real, z.imag], abs=1e-4)


def test_attention_equals_softmax_of_normalised_products():
    torch.manual_seed(0)
    layer, h, table = Attention(16, 2), torch.randn(2, 6, 16), rotary_table(2, 3, 8)
    q, k, v = layer.qkv(h).view(2, 6, 3, 2, 8).permute(2, 0, 3, 1, 4)
    q, k = (rotate(a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt(), table) for a in (q, k))
    weights = (q @ k.transpose(-1, -2) / 8**0.5).softmax(-1)
    torch.testing.assert_close(layer(h, table), layer.proj((weights @ v).transpose(1, 2).reshape(2, 6, 16)))


def test_swiglu_is_a_gated_layer_of_two_thirds_of_4d():
    layer, h = SwiGLU(12), torch.randn(2, 5, 12)
    assert layer.w1.weight.shape == layer.w3.weight.shape == (32, 12)
    gate = h @ layer.w1.weight.T
    expected = (gate * torch.sigmoid(gate) * (h @ layer.w3.weight.T)) @ layer.w2.weight.T
    torch.testing.assert_close(layer(h), expected)


def test_time_is_told_by_frequencies_from_1_to_a_tenth():
    """Catches the 1 to 1/10,000 of DiT, whose times count to 1,000."""
    embed, t = PixNerd(TINY).time_embed, torch.tensor([0.0, 0.3, 1.0])
    freqs = torch.tensor([10 ** (-k / 128) for k in range(128)])
    seen = {}
    embed.mlp.register_forward_pre_hook(lambda module, given: seen.update(features=given[0]))
    embed(t)
    expected = torch.cat([(t[:, None] * freqs).cos(), (t[:, None] * freqs).sin()], 1)
    torch.testing.assert_close(seen["features"], expected)


def test_parameter_counts_are_the_papers():
    """L 458 M and XL 700 M in the paper; counting gives 452.1 and 700.6; why L differs is not known to us."""
    with torch.device("meta"):
        counts = {name: sum(p.numel() for p in PixNerd(PRESETS[name]).parameters()) for name in ("L", "XL")}
    assert counts == {"L": 452_113_795, "XL": 700_589_219}


@pytest.mark.parametrize("choices", [{}, {"decoder": "linear"}, {"encoding": "sincos"}, {"field_depth": 3}])
def test_counted_flops_are_those_that_run(choices):
    """Against PyTorch's own counter. Ours leaves out only the rotation and other elementwise work."""
    config = dataclasses.replace(TINY, **choices)
    model, counter = PixNerd(config), FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # products of the fused kernel go uncounted on CPUs
        model(torch.randn(16, 3, 16, 24), torch.rand(16), torch.zeros(16, dtype=torch.long))
    assert counter.get_total_flops() / 16 == pytest.approx(forward_flops(config, 16, 24), rel=0.02)


def test_the_null_condition_has_the_shape_of_the_classes_and_a_row_of_its_own():
    """Catches a null class that is one of the classes, whose pictures guidance would then push away from."""
    model, y = randomised(TINY), torch.tensor([0, 2, 1])
    null = model.null(y)
    assert null.tolist() == [3, 3, 3] and null.dtype == y.dtype
    assert len(model.class_embed.weight) == TINY.num_classes + 1
    x, t = torch.randn(1, 3, 16, 16), torch.tensor([0.5])
    velocities = [model(x, t, torch.tensor([c])) for c in range(4)]
    assert all((velocities[3] - v).abs().max() > 1e-4 for v in velocities[:3])


def test_another_density_at_factor_one_is_the_plain_path():
    model = randomised(TINY)
    inputs = torch.randn(2, 3, 8, 16), torch.rand(2), torch.tensor([0, 1])
    assert torch.equal(model(*inputs, grid=(2, 4)), model(*inputs))


def test_section_4_5_larger_patches_sample_the_same_field():
    """A 4x4-token image drawn with 7 x 5 pixels per patch, against the field evaluated pixel by pixel."""
    model = randomised(TINY)
    x, t, y = torch.randn(1, 3, 28, 20), torch.tensor([0.4]), torch.tensor([2])
    v = model(x, t, y, grid=(4, 4))
    caught = {}
    model.decoder.register_forward_pre_hook(lambda module, args: caught.update(s=args[1]))
    small = torch.nn.functional.interpolate(x, (16, 16), mode="nearest")
    model(small, t, y)  # the trunk must see exactly this image
    places = model.decoder.encode(7, 5)
    for token in range(16):
        top, left = token // 4 * 7, token % 4 * 5
        for i, j in ((0, 0), (3, 1), (6, 4)):
            z = model.decoder.embed(torch.cat([x[0, :, top + i, left + j], places[i * 5 + j]]))[None, None]
            for block in model.decoder.blocks:
                z = block(z, caught["s"][token : token + 1])
            expected = model.decoder.output(model.decoder.norm(z))[0, 0]
            torch.testing.assert_close(v[0, :, top + i, left + j], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "change,message",
    [
        ({"hidden_size": 30}, "hidden_size 30"),
        ({"decoder": "mlp"}, "decoder is 'mlp'"),
        ({"depth": 0}, "depth is 0"),
        ({"resolution": 18}, "18x18 pixels"),
        ({"encoding": "fourier"}, "dct, sincos"),
        ({"field_norm": "all"}, "field_norm"),
    ],
)
def test_impossible_configurations_name_the_field(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(TINY, **change)


def test_an_image_that_patches_do_not_fill_is_an_error():
    with pytest.raises(ValueError, match="18x16 pixels cannot be cut into patches of 4"):
        PixNerd(TINY)(torch.zeros(1, 3, 18, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))


def test_tokens_that_do_not_share_the_image_equally_are_an_error():
    with pytest.raises(ValueError, match="3x4 tokens cannot share an image of 16x16 pixels equally"):
        PixNerd(TINY)(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long), grid=(3, 4))


def test_a_linear_decoder_has_one_density():
    model = PixNerd(dataclasses.replace(TINY, decoder="linear"))
    with pytest.raises(ValueError, match="a linear decoder has one patch size"):
        model(torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.zeros(1, dtype=torch.long), grid=(4, 4))
