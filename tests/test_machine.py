"""Devices, precisions, frozen and packed weights, attention, compilation: what changes speed changes no number."""

import dataclasses

import pytest
import torch

from helpers import TINY, randomised, run_script, train
from model import PixNerd
from runtime import machine
from runtime.files import UserError
from runtime.machine import PackedLinear, attention, autocast, compiler_trouble, freeze, pick_device, pick_precision
from runtime.recompute import RECOMPUTE

CPU = torch.device("cpu")


def test_a_device_that_is_not_there_is_one_line():
    assert pick_device("cpu") == CPU and pick_device().type in ("cuda", "mps", "cpu")
    for name in ("abacus", "xpu:7"):
        with pytest.raises(UserError, match=f"--device {name} cannot be used here") as error:
            pick_device(name)
        assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "found, precision",
    [({"amx_bf16": True}, "bf16"), ({"avx512_bf16": True}, "bf16"), ({"avx512_bf16": False}, "fp32"), ({}, "fp32")],
)
def test_auto_takes_bf16_where_the_processor_multiplies_in_it(monkeypatch, found, precision):
    """Catches minutes of emulated bf16 on a laptop."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: found)
    assert pick_precision("auto", CPU) == precision
    assert (
        pick_precision("auto", torch.device("cuda")) == "bf16" and pick_precision("auto", torch.device("mps")) == "fp32"
    )
    assert pick_precision("fp32", CPU) == "fp32" and pick_precision("bf16", CPU) == "bf16"


def test_autocast_multiplies_in_bf16_only_when_told_to():
    layer, x = torch.nn.Linear(4, 4), torch.randn(2, 4)
    for precision, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
        with autocast(CPU, precision):
            assert layer(x).dtype == dtype


def test_attention_on_a_cpu_is_computed_in_float32_and_given_back_in_its_type():
    """Also inside autocast, which would send it to a slow kernel; and the gradient comes back as bf16."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 3, 5, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    expected = (q.float() @ k.float().transpose(-1, -2) / 8**0.5).softmax(-1) @ v.float()
    with autocast(CPU, "bf16"):
        out = attention(q, k, v)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, expected.bfloat16())
    out.sum().backward()
    assert q.grad.dtype == torch.bfloat16 and q.grad.isfinite().all()


def test_frozen_weights_give_the_numbers_of_autocast_to_the_last_bit():
    """And nothing but linear layers is cast. Catches casting the norms, the class embedding or the encoding too."""
    model = randomised(TINY)
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])
    with torch.inference_mode(), autocast(CPU, "bf16"):
        plain = model(*inputs)
        freeze(model, "fp32")
        assert {p.dtype for p in model.parameters()} == {torch.float32}
        freeze(model, "bf16")
        frozen = model(*inputs)
    assert torch.equal(plain, frozen)
    kept = {name for name, p in model.named_parameters() if p.dtype == torch.float32}
    assert all("norm" in name or name == "class_embed.weight" for name in kept) and "class_embed.weight" in kept


@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-5), ("bf16", 1e-2)])
def test_packed_weights_give_the_same_numbers(precision, tolerance):
    """Of large linear layers only. The tolerances are for the order of sums."""
    model = randomised(dataclasses.replace(TINY, hidden_size=512, num_heads=8))
    inputs = torch.randn(3, 3, 16, 16), torch.rand(3), torch.tensor([0, 1, 2])
    with torch.inference_mode(), autocast(CPU, precision):
        plain = model(*inputs)
        freeze(model, precision)
        packed = model(*inputs)
    able = precision == "fp32" or torch.ops.mkldnn._is_mkldnn_bf16_supported()  # else nothing is packed
    assert isinstance(model.blocks[0].attn.qkv, PackedLinear) == able
    assert not isinstance(model.decoder.embed, PackedLinear)
    assert (packed - plain).norm() < tolerance * plain.norm()


def test_without_packing_the_layers_stay_and_can_be_compiled():
    model = randomised(dataclasses.replace(TINY, hidden_size=512, num_heads=8))
    freeze(model, "fp32", pack=False)
    assert not any(isinstance(module, PackedLinear) for module in model.modules())


def test_a_wide_field_with_many_frequencies_can_be_drawn_from():
    """Its first layer is large enough to be packed. Catches code that reads a weight that is packed by then."""
    model = randomised(dataclasses.replace(TINY, field_width=64, num_freqs=64))
    inputs = torch.randn(1, 3, 16, 16), torch.full((1,), 0.5), torch.zeros(1, dtype=torch.long)
    with torch.inference_mode():
        expected = model(*inputs)
        freeze(model, "fp32")
        assert isinstance(model.decoder.embed, PackedLinear)
        assert (model(*inputs) - expected).norm() < 1e-5 * expected.norm()


@pytest.mark.slow
def test_compiled_blocks_give_the_same_numbers_without_a_graph_break():
    """fullgraph=True raises at a graph break."""
    if compiler_trouble():
        pytest.skip("no working compiler")
    model = randomised(TINY)
    inputs = torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])
    with torch.inference_mode():
        plain = model(*inputs)
        model.compile_blocks()
        torch.testing.assert_close(model(*inputs), plain, atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_gradients_with_and_without_activation_checkpointing():
    if compiler_trouble():
        pytest.skip("no working compiler")
    model = randomised(TINY)
    inputs, gradients = (torch.randn(2, 3, 16, 16), torch.rand(2), torch.tensor([0, 1])), []
    for recompute, compiled in (("none", False), ("none", True), ("all", True)):
        model.call = RECOMPUTE[recompute]
        if compiled:
            model.compile_blocks()
        gradients.append(torch.autograd.grad(model(*inputs).square().sum(), list(model.parameters())))
    for plain, kept, again in zip(*gradients):
        assert (kept - plain).abs().max() <= 1e-4 * plain.abs().max()
        assert (kept - again).abs().max() <= 1e-5 * kept.abs().max()


def test_a_model_made_without_storage_has_its_tables():
    """Under torch.device("meta"), as when a checkpoint is loaded. Catches an encoding of uninitialised memory."""
    with torch.device("meta"):
        model = PixNerd(TINY)
    assert torch.equal(model.decoder.trained_encoding, PixNerd(TINY).decoder.trained_encoding)
    assert torch.equal(model.time_embed.freqs, PixNerd(TINY).time_embed.freqs)


def test_a_compiler_that_fails_without_a_word_is_named_by_its_error(monkeypatch):
    def fail(function):
        raise AssertionError

    monkeypatch.setattr(torch, "compile", fail)
    assert compiler_trouble() == "AssertionError"


def test_a_missing_compiler_is_named_and_decided_by_the_flag(monkeypatch):
    said = []
    monkeypatch.setattr(machine, "compiler_trouble", lambda device="cpu": "no g++ here")
    assert not machine.will_compile("off", CPU, said.append) and not said
    assert not machine.will_compile("auto", CPU, said.append) and "no g++ here" in said[0]
    with pytest.raises(UserError, match="--compile on: no g\\+\\+ here"):
        machine.will_compile("on", CPU)
    monkeypatch.setattr(machine, "compiler_trouble", lambda device="cpu": None)
    assert [machine.will_compile(choice, CPU) for choice in ("on", "auto", "off")] == [True, True, False]


def test_trouble_of_the_compiler_is_a_few_words(monkeypatch):
    def broken(function):
        raise RuntimeError("no g++ here\nand a page of details")

    monkeypatch.setattr(torch, "compile", broken)
    assert compiler_trouble() == "no g++ here"


def test_a_gpu_by_its_number_is_refused_where_several_processes_would_share_it(monkeypatch):
    """`torchrun train.py --device cuda:1`. Catches: all ranks on one card, eight times slower, without a word."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "8")
    with pytest.raises(UserError, match="--device cuda:1 names one GPU for several processes: use --device cuda"):
        machine.pick_device("cuda:1", 3)
    assert machine.pick_device("cpu", 3) == CPU


def test_the_peak_of_a_gpu_is_found_by_its_name(monkeypatch):
    """The slower kinds of H100 too. Catches: the first key that fits, and an MFU a quarter too small."""
    peaks = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989e12,
        "NVIDIA H100 PCIe": 756e12,
        "NVIDIA H100 NVL": 835e12,
        "NVIDIA RTX A1000": 0,
    }
    for name, peak in peaks.items():
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert machine.peak_flops(torch.device("cuda")) == peak
    assert machine.peak_flops(CPU) == 0


def test_free_memory_is_some_of_the_machines():
    free = machine.available_memory(CPU)
    assert free is None or 1e6 < free < 1e14


# ---- Apple's GPUs ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="needs a GPU of Apple's (mps)")
def test_mps_computes_what_the_cpu_does_and_trains_and_draws(tmp_path):
    """Has never run where this was written. Catches an operation or a type (float64) that mps lacks."""
    model, x, t, y = randomised(TINY), torch.randn(2, 3, 16, 16), torch.tensor([0.3, 0.6]), torch.tensor([0, 2])
    found = []
    for device in ("cpu", "mps"):
        model = model.to(device)
        model.zero_grad()
        v = model(x.to(device), t.to(device), y.to(device))
        v.square().mean().backward()
        found.append([v.detach().cpu(), *(p.grad.cpu() for p in model.parameters() if p.grad is not None)])
    for got, expected in zip(*reversed(found), strict=True):
        assert (got - expected).norm() <= 1e-3 * expected.norm() + 1e-6
    status, _, stderr = train(tmp_path / "run", "--steps", 3, "--device", "mps", "--optimizer", "muon")
    assert status == 0, stderr
    flags = ("--ckpt", tmp_path / "run" / "last.pt", "--steps", 3, "--num", 1, "--device", "mps")
    status, _, stderr = run_script("sample.py", *flags, "--class", "0", "--out", tmp_path / "x.png")
    assert status == 0 and (tmp_path / "x.png").exists(), stderr
