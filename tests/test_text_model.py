"""The text-to-image transformer: the released implementation's numbers, its parts against naive forms, its files."""

import dataclasses
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from flow import alignment_loss, flow_matching_loss, interpolate, shift_time
from helpers import ROOT, TINY as CLASS_TINY, randomised as class_randomised
from model import unpatchify
from pretrained.released import export_reference, import_reference, reference_names
from runtime import checkpoint
from runtime.checkpoint import FORMAT, load_checkpoint, load_model, save_checkpoint, start_from
from runtime.files import UserError
from runtime.prompts import shared_noise
from runtime.machine import autocast, compiler_trouble, freeze
from runtime.flops import decoder_flops, forward_flops
from runtime.recompute import RECOMPUTE
from samplers import SOLVERS, guide, time_grid
from text_model import PRESETS, JointAttention, TextPixNerd, TextPixNerdConfig, cosine_encoding

TINY = TextPixNerdConfig(
    text_encoder="words",
    text_width=12,
    text_length=5,
    resolution=16,
    patch_size=4,
    hidden_size=32,
    num_heads=2,
    text_depth=1,
    depth=2,
    field_depth=1,
    field_width=8,
    num_freqs=4,
)


def randomised(config=TINY, seed=0):
    """A model with a non-zero output layer and null features, so that the output depends on everything before it."""
    torch.manual_seed(seed)
    model = TextPixNerd(config)
    torch.nn.init.normal_(model.decoder.output.weight, std=0.5)
    torch.nn.init.normal_(model.null_features)
    return model.eval()


def inputs(batch=2, height=16, width=16, seed=1):
    """x (B, 3, H, W), t (B) and text features y (B, 5, 12)."""
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(batch, 3, height, width, generator=generator), torch.randn(batch, 5, 12, generator=generator)
    return x, torch.linspace(0.3, 0.6, batch), y


def error(got, expected):
    """norm(got - expected) / norm(expected), in which the tolerances of the golden files are given."""
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


@pytest.fixture
def released(golden):
    """(model, file) of t2i_plain, whose weights all golden files of the text model share."""
    file = golden("t2i_plain")
    config, state_dict = import_reference({key[2:]: value for key, value in file.items() if key.startswith("w.")})
    model = TextPixNerd(config)
    model.load_state_dict(state_dict)
    return model.eval(), file


@pytest.fixture
def placed(released, device):
    """The same on the CPU and on a GPU, for what is computed with it."""
    model, file = released
    return model.to(device), {key: value.to(device) for key, value in file.items()}


def assert_golden_gradients(model, file):
    """Of every parameter for which the file has one: whole, or its norm where it is large."""
    checked = 0
    names = reference_names(model.config)
    for ours, p in model.named_parameters():
        expected = file.get("g." + names[ours])
        if expected is not None:
            assert error(p.grad if expected.ndim else p.grad.norm(), expected) < 1e-4, ours
            checked += 1
    return checked


# ---- the released implementation's numbers ---------------------------------------------------------------------------


def test_xxl_has_the_released_number_of_parameters():
    """And its parts those that REFERENCE counts: image blocks 906.2 M, text blocks 207.7 M, field 50.4 M."""
    with torch.device("meta"):
        model = TextPixNerd(PRESETS["XXL"])
    parameters = list(model.parameters())
    assert (sum(p.numel() for p in parameters), len(parameters)) == (1_171_518_019, 256)
    parts = {name: sum(p.numel() for p in part.parameters()) / 1e6 for name, part in model.named_children()}
    assert (round(parts["blocks"], 1), round(parts["text_blocks"], 1), round(parts["decoder"], 1)) == (
        906.2,
        207.7,
        50.4,
    )
    assert len(reference_names(PRESETS["XXL"])) == 256


def test_nano_fits_the_repository():
    """In float16, as trained models are shipped, with room for the file's own structure: below 12 MB."""
    with torch.device("meta"):
        assert 2 * sum(p.numel() for p in TextPixNerd(PRESETS["Nano"]).parameters()) < 11.5e6


def test_velocity_and_gradients_are_the_released_implementations(placed):
    model, file = placed
    v = model(file["x"], file["t"], file["y"])
    assert error(v, file["v"]) < 1e-5
    wide = model(file["x_wide"], file["t"][:1], file["y"][:1])  # one row of four: the row itself has no length
    assert error(wide, file["v_wide"]) < 1e-5
    (v * file["cotangent"]).sum().backward()
    assert assert_golden_gradients(model, file) == len(list(model.parameters()))


def test_every_stage_is_the_released_implementations(placed):
    """Where a velocity is wrong, this test says from which stage on."""
    model, file = placed
    seen = {}

    def keep(name, module, what="out"):
        def before(_, args):
            seen[name] = args

        def after(_, args, out):
            seen[name] = out

        module.register_forward_pre_hook(before) if what == "in" else module.register_forward_hook(after)

    keep("t_emb", model.time_embed)
    keep("y_in", model.text_blocks[0], "in")
    keep("y_refine1", model.text_blocks[0])
    keep("y_refined", model.text_blocks[1])
    keep("tokens", model.patch_embed)
    keep("image_block", model.blocks[0], "in")
    keep("block1", model.blocks[0])
    keep("block2", model.blocks[1])
    keep("decoder", model.decoder, "in")
    keep("field_in", model.decoder.embed)
    keep("field1", model.decoder.blocks[0])
    keep("field2", model.decoder.blocks[1])
    model(file["x"], file["t"], file["y"])
    seen["y_in"] = seen["y_in"][0]
    seen["s"] = seen["decoder"][1].view(2, 6, -1)
    seen["rotary"] = seen["image_block"][3].permute(1, 2, 0)
    for name in ("field_in", "field1", "field2"):
        seen[name] = seen[name][:6]  # the file has image 0 only
    seen["encoding"] = model.decoder.encode(16, 16)
    stages = [key[2:] for key in file if key.startswith("i.")]
    assert len(stages) == 13
    for name in stages:
        assert error(seen[name], file[f"i.{name}"]) < 1e-5, name


def test_any_resolution_is_the_released_implementations(placed, golden, device):
    """Catches another resampling of what the trunk sees, and rotary places that follow the image's size."""
    model, plain = placed
    file = golden("t2i_resolution", device)
    t, y = plain["t"][:1], plain["y"][:1]
    trunk = {}
    model.patch_embed.register_forward_pre_hook(lambda _, args: trunk.update(x=args[0]))
    for down, across in file["scales"].tolist():
        name = f"{down}x{across}"
        v = model(file[f"x_{name}"], t, y, grid=(2, 3))
        assert error(v, file[f"v_{name}"]) < 1e-5, name
        assert torch.equal(unpatchify(trunk["x"].view(1, 6, 3, 256), 2, 16, 16), file[f"trunk_{name}"]), name
        height, width = int(16 * down), int(16 * across)
        if (height, width) != (16, 16):
            assert error(model.decoder.encode(height, width), file[f"encoding_{height}x{width}"]) < 1e-5, name
        if name == "2.0x2.0":
            (v * file["cotangent"]).sum().backward()
            assert assert_golden_gradients(model, file) == 3
    assert torch.equal(
        model(plain["x"], plain["t"], plain["y"], grid=(2, 3)), model(plain["x"], plain["t"], plain["y"])
    )


@pytest.mark.parametrize("side", [4, 8])
def test_encoding_of_the_released_training_code_ends_at_the_patchs_side(golden, side):
    """Ours always ends at 16, as the any-resolution code: the two are one encoding for patches of 16 pixels only."""
    expected = golden("t2i_resolution")[f"encoding_plain_{side}"]
    assert error(cosine_encoding(side, side, end=side), expected) < 1e-5
    assert error(cosine_encoding(side, side), expected) > 1e-2


def test_the_configuration_is_read_off_the_released_weights(released):
    """cfg.NAME: the arguments of the released constructor."""
    model, file = released
    ours = {
        "patch_size": "patch_size",
        "num_groups": "num_heads",
        "hidden_size": "hidden_size",
        "decoder_hidden_size": "field_width",
        "num_encoder_blocks": "depth",
        "num_decoder_blocks": "field_depth",
        "num_text_blocks": "text_depth",
        "txt_embed_dim": "text_width",
        "txt_max_length": "text_length",
    }
    theirs = {key[4:]: int(value) for key, value in file.items() if key.startswith("cfg.")}
    assert theirs.pop("in_channels") == 3
    assert theirs == {name: getattr(model.config, field) for name, field in ours.items()}


def test_the_noise_of_the_released_trajectories_is_that_of_seeds_0_and_1(golden):
    file = golden("t2i_samplers")
    assert torch.equal(shared_noise(0, range(2), (32, 48)), file["noise"])
    assert torch.equal(shared_noise(5, [0], tuple(file["noise_anyres"].shape[2:])), file["noise_anyres"])


@pytest.mark.parametrize("name", ["adams2_25_shift3", "euler_20", "adams2_10_shift3_anyres"])
def test_trajectories_are_the_released_implementations(placed, golden, device, name):
    """Guidance 4 from the second step on: the first, at t = 0, is not guided, which `x_1` shows."""
    model, _ = placed
    file = golden("t2i_samplers", device)
    solver, steps, *rest = name.split("_")
    steps, rows = int(steps), 1 if "anyres" in rest else 2
    noise, options = (file["noise_anyres"], {"grid": (2, 3)}) if "anyres" in rest else (file["noise"], {})
    model.null_features.copy_(file["null"][0])
    times = time_grid(steps, 3.0 if "shift3" in rest else 1.0)
    torch.testing.assert_close(times, file[f"{name}.t"].cpu(), atol=1e-6, rtol=0)
    states, used = {}, []
    with torch.no_grad():
        guided = guide(model, file["cond"][:rows], 4.0, (0.0, 1.0), **options)
        how = {"order": 2} if solver == "adams2" else {}
        x = SOLVERS["adams" if how else solver](
            lambda x, t: used.append(t) or guided(x, t),
            noise,
            times,
            callback=lambda step, t, x: states.update({step: x}),
            **how,
        )
    torch.testing.assert_close(torch.stack(used).cpu(), file[f"{name}.t_used"].cpu(), atol=1e-6, rtol=0)
    for got, expected in ((states[1], "x_1"), (states[(steps + 1) // 2], "x_half")):
        assert error(got, file[f"{name}.{expected}"]) < 1e-4, expected
    assert error(x, file[name]) < 1e-4


def test_training_step_with_alignment_is_the_released_implementations(placed, golden, device):
    """Dropped captions, shifted times, both losses and the gradients of the projector and of what the text reaches."""
    model, _ = placed
    file = golden("t2i_repa", device)
    with np.load(ROOT / "tests" / "golden" / "t2i_repa.npz") as archive:
        drop = torch.from_numpy(archive["drop"]).to(device)  # (3)
    assert all(torch.equal(row, file["null"][0]) for row in file["null"])
    model.null_features.copy_(file["null"][0])
    layers = [torch.nn.Linear(*size) for size in ((48, 20), (20, 20), (20, 12))]
    for number, layer in zip((0, 2, 4), layers):
        for kind in ("weight", "bias"):
            getattr(layer, kind).data = file[f"w.diffusion_trainer.proj.0.{number}.{kind}"]
    projector = torch.nn.Sequential(layers[0], torch.nn.SiLU(), layers[1], torch.nn.SiLU(), layers[2])

    t = shift_time(torch.sigmoid(file["n"]), 4.0)
    torch.testing.assert_close(t, file["t"], atol=1e-6, rtol=0)
    x_t = interpolate(file["image"], file["eps"], t)
    y = torch.where(drop.view(3, 1, 1), model.null(file["cond"]), file["cond"])
    v, features = model(x_t, t, y, features_at=2)
    projected = projector(features)
    flow_loss = flow_matching_loss(v, file["image"], file["eps"])
    alignment = alignment_loss(projected, file["teacher"])
    loss = flow_loss + 0.5 * alignment
    loss.backward()
    for got, name in ((features, "feature"), (projected, "projected"), (flow_loss, "fm_loss"), (loss, "loss")):
        assert error(got, file[name]) < 1e-5, name
    assert error(alignment, file["cos_loss"]) < 1e-5
    assert assert_golden_gradients(model, file) == 12
    for number, layer in zip((0, 2, 4), layers):
        for kind in ("weight", "bias"):
            assert error(getattr(layer, kind).grad, file[f"g.diffusion_trainer.proj.0.{number}.{kind}"]) < 1e-4


# ---- parts against naive forms ---------------------------------------------------------------------------------------


def naive_norm(a, weight):
    return a / (a.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight


def naive_turn(a, angles):
    """a (Dh) as Dh/2 complex numbers, each turned by its angle."""
    turned = torch.view_as_complex(a.reshape(-1, 2).contiguous()) * torch.polar(torch.ones_like(angles), angles)
    return torch.view_as_real(turned).flatten()


def test_joint_attention_equals_a_loop_over_queries():
    """One softmax over image keys and then text keys; rotary places on the former alone; one norm for both."""
    torch.manual_seed(0)
    B, L, M, Nh, Dh = 2, 6, 3, 2, 8
    layer = JointAttention(Nh * Dh, Nh)
    for norm in (layer.q_norm, layer.k_norm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2)
    h, y = torch.randn(B, L, Nh * Dh), torch.randn(B, M, Nh * Dh)
    angles = torch.randn(L, Dh // 2)
    out = torch.zeros(B, L, Nh, Dh)
    for b in range(B):
        q, k, v = (layer.qkv.weight @ h[b].T).T.view(L, 3, Nh, Dh).unbind(1)  # (L, Nh, Dh) each
        text_k, text_v = (layer.text_kv.weight @ y[b].T).T.view(M, 2, Nh, Dh).unbind(1)  # (M, Nh, Dh) each
        for head in range(Nh):
            image_keys = [naive_turn(naive_norm(k[j, head], layer.k_norm.weight), angles[j]) for j in range(L)]
            text_keys = [naive_norm(text_k[j, head], layer.k_norm.weight) for j in range(M)]
            values = torch.cat([v[:, head], text_v[:, head]])  # (L+M, Dh)
            for i in range(L):
                query = naive_turn(naive_norm(q[i, head], layer.q_norm.weight), angles[i])
                logits = torch.stack([query @ key / Dh**0.5 for key in image_keys + text_keys])  # (L+M)
                out[b, i, head] = logits.softmax(0) @ values
    got = layer(h, y, torch.stack([angles.cos(), angles.sin()]))
    torch.testing.assert_close(got, layer.proj(out.flatten(2)), atol=1e-5, rtol=1e-4)


def test_refining_block_equals_a_loop_over_words():
    """AdaLN from the time alone, attention without places or mask, SwiGLU of width 4D."""
    torch.manual_seed(0)
    model = randomised()
    block, y, c = model.text_blocks[0], torch.randn(1, 5, 32), torch.randn(1, 1, 32)
    shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = block.modulation(c[0, 0]).view(6, 32)
    attended = [naive_norm(word, block.norm1.weight) * (1 + scale_a) + shift_a for word in y[0]]
    q, k, v = (torch.stack([block.attn.qkv.weight @ word for word in attended]).view(5, 3, 2, 16)).unbind(1)
    expected = []
    for i in range(5):
        heads = []
        for head in range(2):
            query = naive_norm(q[i, head], block.attn.q_norm.weight)
            logits = torch.stack([query @ naive_norm(k[j, head], block.attn.k_norm.weight) / 4 for j in range(5)])
            heads.append(logits.softmax(0) @ v[:, head])
        word = y[0, i] + gate_a * block.attn.proj(torch.cat(heads))
        inner = block.mlp.w12.weight @ (naive_norm(word, block.norm2.weight) * (1 + scale_m) + shift_m)
        assert inner.shape == (2 * 128,)
        expected.append(word + gate_m * (block.mlp.w3.weight @ (F.silu(inner[:128]) * inner[128:])))
    torch.testing.assert_close(block(y, c)[0], torch.stack(expected), atol=1e-5, rtol=1e-4)


def test_encoding_is_a_cosine_of_each_axis():
    encoding = cosine_encoding(3, 5, num_freqs=4)
    for i in range(3):
        for j in range(5):
            y, x = torch.tensor(16 * i / 2), torch.tensor(16 * j / 4)
            for k in range(4):
                expected = torch.stack([(x * 10000 ** (-k / 4)).cos(), (y * 10000 ** (-k / 4)).cos()])
                torch.testing.assert_close(encoding[i * 5 + j, 2 * k : 2 * k + 2], expected, atol=1e-5, rtol=0)


# ---- promises of the forward pass ------------------------------------------------------------------------------------


def test_velocity_depends_on_image_time_each_word_and_their_order():
    """Catches conditioning that is computed and never used, and words without places."""
    model, (x, t, y) = randomised(), inputs()
    v = model(x, t, y)
    assert v.shape == x.shape
    changed = [model(x + 0.1, t, y), model(x, t + 0.1, y), model(x, t, y.flip(1))]
    for word in range(TINY.text_length):
        other = y.clone()
        other[:, word] += 1
        changed.append(model(x, t, other))
    assert all((other - v).abs().amax() > 1e-4 for other in changed)


def test_a_batch_of_one_equals_a_row_of_a_batch():
    model, (x, t, y) = randomised(), inputs(batch=3)
    torch.testing.assert_close(model(x[1:2], t[1:2], y[1:2]), model(x, t, y)[1:2], atol=1e-5, rtol=1e-4)


def test_a_null_prompt_is_not_guided():
    """Guidance pushes away from the null condition: from itself it cannot."""
    model, (x, _, y) = randomised(), inputs()
    null = model.null(y)
    assert null.shape == y.shape and torch.equal(null[1], model.null_features)
    v = guide(model, null, 4.0, (0.0, 1.0))(x, torch.tensor(0.5))
    torch.testing.assert_close(v, model(x, torch.full((2,), 0.5), null), atol=1e-5, rtol=1e-4)
    assert (guide(model, y, 4.0, (0.0, 1.0))(x, torch.tensor(0.5)) - v).abs().amax() > 1e-3


def test_features_are_the_tokens_after_the_named_block():
    model, seen = randomised(), []
    model.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out))
    v, features = model(*inputs(), features_at=1)
    assert features.shape == (2, 16, 32) and torch.equal(features, seen[0])
    assert torch.equal(v, model(*inputs()))


def test_impossible_inputs_and_configurations_are_named():
    model, (x, t, y) = randomised(), inputs()
    for number in (0, 3):
        with pytest.raises(ValueError, match=f"features_at is {number}, but the blocks are 1 to 2"):
            model(x, t, y, features_at=number)
    for wrong in (y[:, :4], y[..., :11], y[:1]):
        with pytest.raises(ValueError, match=r"text features have shape .*, not \(2, 5, 12\)"):
            model(x, t, wrong)
    with pytest.raises(ValueError, match="18x16 pixels cannot be cut into patches of 4"):
        model(torch.zeros(2, 3, 18, 16), t, y)
    with pytest.raises(ValueError, match="3x4 tokens cannot share an image of 16x16"):
        model(x, t, y, grid=(3, 4))
    for change, message in (({"text_depth": 0}, "text_depth is 0"), ({"num_heads": 3}, "hidden_size 32")):
        with pytest.raises(ValueError, match=message):
            dataclasses.replace(TINY, **change)


def test_initialisation_is_the_released_one():
    """Positions N(0, 1), time N(0, 0.02), Xavier's patches, a last layer of zeros; PyTorch's default for the rest."""
    torch.manual_seed(0)
    model = TextPixNerd(dataclasses.replace(TINY, hidden_size=256, text_width=300, text_length=64))
    patch = model.patch_embed
    bound = (6 / sum(patch.weight.shape)) ** 0.5
    assert 0.98 * bound < patch.weight.abs().max() <= bound and not patch.bias.any()
    assert model.text_positions.std().item() == pytest.approx(1, rel=0.05)
    for layer in (model.time_embed.mlp[0], model.time_embed.mlp[2]):
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.05) and layer.bias.any()
    for layer in (model.text_embed, model.blocks[0].modulation, model.decoder.blocks[0].to_weights):
        bound = layer.in_features**-0.5  # PyTorch's default, uniform
        assert 0.98 * bound < layer.weight.abs().max() <= bound and 0.9 * bound < layer.bias.abs().max() <= bound
    assert not model.decoder.output.weight.any() and not model.decoder.output.bias.any()
    assert not model.null_features.any()  # until the encoder is asked


@pytest.mark.parametrize("recompute", ["field", "all"])
def test_recomputing_activations_changes_no_gradient(recompute):
    gradients = []
    for mode in ("none", recompute):
        model = randomised()
        model.call = RECOMPUTE[mode]
        model(*inputs()).square().sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, again in zip(*gradients):
        assert (plain - again).abs().max() <= 1e-5 * plain.abs().max()


def test_forward_flops_counts_what_runs():
    """Against PyTorch's own counter. Ours leaves out only the rotation and other elementwise work."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    model, counter = randomised(), FlopCounterMode(display=False)
    with counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):  # products of the fused kernel go uncounted on CPUs
        model(*inputs(16, 16, 24))
    assert counter.get_total_flops() / 16 == pytest.approx(forward_flops(TINY, 16, 24), rel=0.02)
    assert 0.2 < decoder_flops(TINY, 16, 24) / forward_flops(TINY, 16, 24) < 0.6


def test_frozen_weights_give_the_numbers_of_autocast_to_the_last_bit():
    """Catches casting what is not a linear layer: norms, positions, null features, the encoding."""
    model = randomised()
    with torch.inference_mode(), autocast(torch.device("cpu"), "bf16"):
        plain = model(*inputs())
        freeze(model, "bf16")
        assert torch.equal(model(*inputs()), plain)
    kept = {name for name, value in model.state_dict().items() if value.dtype == torch.float32}
    assert all("norm" in name or name in ("text_positions", "null_features") for name in kept)


@pytest.mark.slow
def test_blocks_compile_without_a_graph_break():
    """fullgraph=True raises at a graph break; velocities and gradients must not change either."""
    if compiler_trouble():
        pytest.skip("no working compiler")
    model, gradients = randomised(), []
    for compiled in (False, True):
        if compiled:
            model.compile_blocks()
        v = model(*inputs())
        gradients.append([v, *torch.autograd.grad(v.square().sum(), list(model.parameters()))])
    for plain, compiled in zip(*gradients):
        assert error(compiled, plain) < 1e-4


# ---- files -----------------------------------------------------------------------------------------------------------


def text_state(model):
    """What a checkpoint of a text model holds at least."""
    return {"format": FORMAT, "config": dataclasses.asdict(model.config), "ema": model.state_dict()}


def test_a_checkpoint_brings_model_configuration_and_null_features_back(tmp_path):
    """load_model tells the kind of a model by its configuration, and class models are read as ever."""
    model = randomised()
    save_checkpoint(tmp_path / "text.pt", text_state(model))
    loaded = load_model(tmp_path / "text.pt")
    assert type(loaded) is TextPixNerd and loaded.config == TINY
    assert torch.equal(loaded.null_features, model.null_features)
    torch.testing.assert_close(loaded(*inputs()), model(*inputs()), atol=0, rtol=0)
    with pytest.raises(UserError, match="has no raw weights; use --weights ema"):
        load_model(tmp_path / "text.pt", "raw")
    state = text_state(class_randomised(CLASS_TINY))
    save_checkpoint(tmp_path / "class.pt", state)
    assert load_model(tmp_path / "class.pt").config == CLASS_TINY
    save_checkpoint(tmp_path / "class.pt", state | {"config": state["config"] | {"text_width": 3}})
    with pytest.raises(UserError, match="configuration fields unknown to this version: decoder, encoding"):
        load_model(tmp_path / "class.pt")


@pytest.mark.parametrize("layout", ["bare", "stripped", "as trained"])
def test_released_files_are_read_by_the_same_function(released, tmp_path, layout):
    """Names alone, the averaged weights alone, or all that the training code saves: it is unknown which it is."""
    _, file = released
    weights = {key[2:]: value for key, value in file.items() if key.startswith("w.")}
    state = {"ema_denoiser." + key: value for key, value in weights.items()} if layout != "bare" else weights
    if layout == "as trained":
        state |= {f"denoiser.{key}": (value + 1).bfloat16() for key, value in weights.items()}
        state |= {"diffusion_trainer.proj.0.0.weight": torch.ones(2, 2)}
    lightning = {"state_dict": state, "epoch": 3, "optimizer_states": [{"state": {0: {"exp_avg": torch.ones(2)}}}]}
    save_checkpoint(tmp_path / "model.ckpt", state if layout == "bare" else lightning)
    model = load_model(tmp_path / "model.ckpt")
    assert error(model(file["x"], file["t"], file["y"]), file["v"]) < 1e-5
    assert (model.config.text_encoder, model.config.text_length, model.config.text_width) == ("qwen3", 10, 40)
    assert model.config.resolution == 512 and not model.null_features.any()
    if layout == "as trained":
        raw = load_model(tmp_path / "model.ckpt", "raw")
        assert torch.equal(raw.patch_embed.bias, (model.patch_embed.bias + 1).bfloat16().float())
    if layout == "stripped":
        with pytest.raises(UserError, match="has no raw weights; use --weights ema"):
            load_model(tmp_path / "model.ckpt", "raw")


def test_export_under_released_names_is_the_inverse_of_import(released):
    model, file = released
    exported = export_reference(model)
    assert exported.keys() == {key[2:] for key in file if key.startswith("w.")}
    assert all(torch.equal(value, file[f"w.{key}"]) for key, value in exported.items())
    assert import_reference(exported)[0] == model.config
    with pytest.raises(ValueError, match="only num_freqs=32, not 4"):
        export_reference(randomised(dataclasses.replace(TINY, text_encoder="qwen3")))


def test_missing_and_superfluous_released_weights_are_named(released):
    exported = export_reference(released[0])
    lacking = {key: value for key, value in exported.items() if key != "blocks.1.attn.kv_y.weight"}
    with pytest.raises(UserError, match="lacks the weight blocks.1.attn.kv_y.weight"):
        import_reference(lacking)
    with pytest.raises(UserError, match="has the weight extra, which a released PixNerd does not"):
        import_reference(exported | {"extra": torch.ones(1)})
    with pytest.raises(UserError, match="not a PixNerd checkpoint"):
        import_reference({"y_pos_embedding": torch.ones(1, 2, 3)})


def test_export_command_keeps_weights_and_null_features(tmp_path, monkeypatch, capsys):
    config = dataclasses.replace(TINY, text_encoder="qwen3", num_freqs=32, resolution=32)
    model = randomised(config)
    save_checkpoint(tmp_path / "x.pt", text_state(model) | {"step": 7})
    for flags, tolerance in (([], 0), (["--half"], 2e-3), (["--reference"], 0)):
        command = ["checkpoint.py", "export", str(tmp_path / "x.pt"), str(tmp_path / "out.pt"), *flags]
        monkeypatch.setattr(sys, "argv", command)
        checkpoint.main()
        assert "step" not in load_checkpoint(tmp_path / "out.pt")
        loaded = load_model(tmp_path / "out.pt").state_dict()
        if flags == ["--reference"]:  # released files have none
            assert not loaded.pop("null_features").any()
        else:
            assert loaded["null_features"].any()
        assert all((loaded[key] - model.state_dict()[key]).abs().max() <= tolerance for key in loaded)
    assert "draw with --resolution 32" in capsys.readouterr().out


def test_init_takes_the_weights_of_a_text_model_at_another_resolution_and_of_no_class_model(tmp_path):
    source = randomised()
    save_checkpoint(tmp_path / "text.pt", text_state(source))
    save_checkpoint(tmp_path / "class.pt", text_state(class_randomised(CLASS_TINY)))
    model = TextPixNerd(dataclasses.replace(TINY, resolution=32))
    assert start_from(model, tmp_path / "text.pt", None) == f"starting from {tmp_path / 'text.pt'}"
    assert all(torch.equal(value, source.state_dict()[key]) for key, value in model.state_dict().items())
    with pytest.raises(UserError, match="draws from classes, and this run is to draw from text"):
        start_from(model, tmp_path / "class.pt", None)
    with pytest.raises(UserError, match="draws from text, and this run is to draw from classes"):
        start_from(class_randomised(CLASS_TINY), tmp_path / "text.pt", ["a", "b", "c"])
    with pytest.raises(UserError, match="text_encoder='words', but this run asks for 'qwen3'"):
        start_from(TextPixNerd(dataclasses.replace(TINY, text_encoder="qwen3")), tmp_path / "text.pt", None)


def test_init_from_a_released_file_keeps_the_null_features_of_the_encoder(released, tmp_path):
    """A released file has none, and zeros in their place would be another condition."""
    source, _ = released
    save_checkpoint(tmp_path / "model.ckpt", {"state_dict": export_reference(source)})
    model = TextPixNerd(dataclasses.replace(source.config, resolution=32))
    model.null_features.fill_(0.5)
    start_from(model, tmp_path / "model.ckpt", None)
    assert (model.null_features == 0.5).all() and torch.equal(model.text_positions, source.text_positions)
