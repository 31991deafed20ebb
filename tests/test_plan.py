"""Plans against the paper's own measurements, and their counts against real models, files and saved tensors."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import complaint, refuses, run_script
from helpers import train as run

import train
from model import PRESETS, PixNerd, PixNerdConfig
from pretrained.dinov2 import DINOv2
from runtime.flops import forward_flops
from runtime.plan import (
    EAGER,
    GPUS,
    TEACHER_DEPTH,
    TEACHER_WEIGHTS,
    TEACHER_WIDTH,
    Plan,
    epochs_to_steps,
    training_flops,
)
from text_model import PRESETS as TEXT_PRESETS

BASELINE_L = dataclasses.replace(PRESETS["L"], depth=24, decoder="linear")
SMALL = PixNerdConfig(
    num_classes=3, resolution=64, patch_size=16, hidden_size=128, num_heads=4, depth=6, field_depth=2, field_width=16
)


TABLE_1 = [(PRESETS["XL"], 0.27, 33.9), (PRESETS["L"], 0.19, 22), (BASELINE_L, 0.18, 18)]


@pytest.mark.parametrize("config, seconds, gigabytes", TABLE_1, ids=["XL", "L", "baseline"])
def test_table_1_of_the_paper_is_planned_within_a_tenth(config, seconds, gigabytes):
    """256 images on eight A100. Fitted to it: XL's time, XL's and L's memory. The other three are predictions."""
    cost = Plan(config, 256, world=8, repa=True, gpu="a100")
    assert cost.seconds == pytest.approx(seconds, rel=0.1)
    assert (cost.weights + cost.kept) / 1e9 == pytest.approx(gigabytes, rel=0.1)


@pytest.mark.parametrize("repa, projector", [(False, "mlp"), (True, "mlp"), (True, "conv")])
def test_weights_are_those_of_a_real_model(repa, projector):
    """Counted on the very modules that train.py trains: model, projector, and the average of the model alone."""
    student = train.Student(PixNerd(SMALL), 2, TEACHER_WIDTH if repa else 0, projector)
    optimizer = torch.optim.AdamW(student.parameters())
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = [t for p in student.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.numel() > 1]
    held += student.model.parameters()  # as many again in the average
    cost = Plan(SMALL, 8, repa=repa, conv=projector == "conv")
    assert cost.parameters == sum(p.numel() for p in student.parameters())
    assert cost.weights == sum(4 * t.numel() for t in held) + (4 * TEACHER_WEIGHTS if repa else 0)


def test_the_teacher_is_vit_b():
    with torch.device("meta"):
        teacher = DINOv2(518, 14, TEACHER_WIDTH, TEACHER_DEPTH, 12)
    assert sum(p.numel() for p in teacher.parameters()) == pytest.approx(TEACHER_WEIGHTS, rel=1e-3)


def test_a_training_step_costs_what_pytorch_counts():
    """FLOPs of forward and backward pass of a real model. Catches: a product that the formula forgets."""
    model = PixNerd(SMALL)
    x, t, y = torch.randn(2, 3, 64, 64), torch.rand(2), torch.zeros(2, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        model(x, t, y).square().mean().backward()
    # Less than the three forward passes of MFU: the first layer's input needs no gradient, attention counts as 2.5.
    assert 0.9 < counter.get_total_flops() / (2 * training_flops(SMALL)) < 1.1
    assert training_flops(PRESETS["XL"], repa=True) - training_flops(PRESETS["XL"]) == pytest.approx(52e9, rel=0.05)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_checkpoint_has_the_planned_size(tmp_path, optimizer):
    nano = PRESETS["Nano"]
    names = ("hidden_size", "depth", "num_heads", "patch_size", "field_width", "field_depth")
    settings = [f"--{name.replace('_', '-')}={getattr(nano, name)}" for name in names]
    status, _, stderr = run(tmp_path / "run", "--steps", 1, *settings, "--optimizer", optimizer)
    assert status == 0, stderr
    size = (tmp_path / "run" / "last.pt").stat().st_size
    assert size == pytest.approx(Plan(nano, 4, optimizer=optimizer).checkpoint, rel=0.03)


def saved_bytes(config, images):
    """What autograd really keeps of a forward pass in bf16 and plain PyTorch, weights apart."""
    model, kept = PixNerd(config), {}
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}

    def keep(x):
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage
        return x

    x, t = torch.randn(images, 3, config.resolution, config.resolution), torch.rand(images)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x), torch.autocast("cpu", torch.bfloat16):
        v = model(x, t, torch.zeros(images, dtype=torch.long))
    assert v.requires_grad
    return sum(storage.nbytes() for storage in kept.values())


@pytest.mark.parametrize(
    "change", [dict(depth=10), dict(field_depth=6), dict(hidden_size=256), dict(patch_size=8)], ids=str
)
def test_activations_follow_what_autograd_keeps(change):
    """More blocks, field blocks, width or tokens: one more image keeps what is planned, to a quarter."""
    config = dataclasses.replace(SMALL, **{"field_width": 64, **change})
    planned = Plan(config, 1, compile="off").kept
    assert planned == pytest.approx(EAGER * Plan(config, 1).kept)
    assert saved_bytes(config, 3) - saved_bytes(config, 2) == pytest.approx(planned, rel=0.25)


def test_memory_falls_with_micro_batch_and_recompute():
    xl = PRESETS["XL"]
    plain = Plan(xl, 256, world=8, gpu="a100")
    assert Plan(xl, 256, world=8, micro_batch=8).kept == pytest.approx(plain.kept / 4)
    assert Plan(xl, 256, world=8, precision="fp32").kept == 2 * plain.kept
    kept, seconds = plain.kept, plain.seconds
    for recompute in ("field", "all"):  # what is done twice takes time but is no useful work
        again = Plan(xl, 256, world=8, recompute=recompute, gpu="a100")
        assert again.kept < 0.75 * kept and again.seconds > seconds and again.flops == plain.flops
        kept, seconds = again.kept, again.seconds


def test_a_ring_sends_each_gradient_twice_but_for_one_hop():
    for world, share in ((1, 0), (2, 1), (8, 7 / 4)):
        cost = Plan(SMALL, 8, world=world, gpu="h100", bandwidth=1)
        assert cost.traffic == 4 * cost.parameters * share and cost.exchange == cost.traffic / 1e9


def test_what_does_not_fit_the_card_is_said_and_what_fits_beside_it():
    """Each proposal is planned to fit. Catches silence about 94 GB on a card of 80, and proposals that do not fit."""
    xl_512 = dataclasses.replace(PRESETS["XL"], resolution=512)
    for plan in (Plan(xl_512, 256, world=8, gpu="a100"), Plan(TEXT_PRESETS["XXL"], 1536, world=16, gpu="a100-40")):
        text, proposals = plan.report(1000, 10, "it", 2), plan.fitting()
        assert f"MORE THAN the {plan.memory / 1e9:.0f} GB" in text and proposals
        for flags, fitting in proposals:
            words = dict(zip(flags.split()[::2], flags.split()[1::2]))
            changed = {"micro_batch": int(words.get("--micro-batch", 0)) or None}
            again = dataclasses.replace(plan, **changed, recompute=words.get("--recompute", plan.recompute))
            assert again.need == fitting.need < plan.memory and f"fits with {flags}" in text
    close = Plan(PRESETS["XL"], 8 * 40, world=8, gpu="a100-40")
    assert close.need < close.memory and "may not fit the 40 GB" in close.report(1000, 10, "it", 2)
    assert "fit" not in Plan(PRESETS["XL"], 256, world=8, gpu="a100").report(1000, 10, "it", 2)
    hopeless = Plan(dataclasses.replace(TEXT_PRESETS["XXL"], depth=64), 8, gpu="a100-40")
    assert hopeless.fitting() == [] and "nothing makes it fit" in hopeless.report(1000, 10, "it", 2)


@pytest.mark.parametrize("gpu", GPUS)
def test_every_kind_of_gpu_can_be_planned(gpu):
    text = Plan(SMALL, 8, world=2, gpu=gpu).report(1000, 10, "it", 2)
    assert f"on 2 x {gpu}" in text and "(--bandwidth)" in text


def test_projector_teacher_and_text_encoder_are_named_with_their_share():
    """The shares are those of the step's FLOPs. Catches a projector that hides in the number of parameters."""
    plain = Plan(TEXT_PRESETS["XXL"], 1536, world=16)
    plan = Plan(TEXT_PRESETS["XXL"], 1536, world=16, repa=True)
    text = plan.report(1000, 10, "XXL", 2)
    assert f"{(plan.parameters - plain.parameters) / 1e6:.1f} M of them in the projector" in text
    encoder = (plain.flops - 3 * forward_flops(plain.config)) / plan.flops
    assert f"Qwen3-1.7B, frozen: 3.4 GB, {encoder:.0%} of the step" in text and "ViT-B/14, frozen: 0.3 GB" in text
    small = Plan(SMALL, 8).report(1000, 10, "it", 2)
    assert "projector" not in small and "frozen" not in small


@pytest.mark.parametrize(
    "flags, words",
    [
        ("--size XL --resolution 512 --init xl", None),
        ("--size L --init xl", "xl was trained with hidden_size=1152, but this run asks for 1024"),
        ("--size XL --init xxl", "xxl draws from text, and this run is to draw from classes"),
        ("--recipe text-512 --init xxl", None),
        ("--recipe text-256 --init xxl --depth 10", "xxl was trained with depth=16, but this run asks for 10"),
        ("--size XL --init xll", "--init xll is neither a file nor a name: the names are xl, xl-512, xxl, emoji"),
        ("--size XL --init emoji", "emoji-nano.pt was trained with patch_size=8, but this run asks for 16"),
    ],
)
def test_a_plan_checks_what_the_run_starts_from_without_a_download(flags, words, monkeypatch):
    monkeypatch.setattr("runtime.models.cached_download", None)
    if words:
        assert words in complaint("train.py", *flags.split(), "--dry-run")
    else:
        assert run_script("train.py", *flags.split(), "--dry-run")[0] == 0


def test_a_plan_says_which_file_it_could_not_check(tmp_path):
    status, stdout, _ = run_script("train.py", "--size", "XL", "--init", tmp_path / "last.pt", "--dry-run")
    assert status == 0 and "last.pt is not here: whether it fits is not checked" in stdout


def test_epochs_become_steps_that_show_every_image():
    assert epochs_to_steps(160, 1_281_167, 256) == 800_730  # the paper rounds to 800k
    assert epochs_to_steps(1, 256, 256) == 1 and epochs_to_steps(1, 257, 256) == 2 and epochs_to_steps(0.5, 6, 2) == 2


def test_a_cluster_is_planned_without_the_data(tmp_path):
    """And only planned: the same command without --dry-run stops, and writes nothing."""
    model = "--size XL --hidden-size 1152 --depth 26 --num-heads 16 --patch-size 16 --field-width 64 --field-depth 4"
    flags = [
        *model.split(),
        "--batch-size",
        256,
        "--precision",
        "auto",
        "--compile",
        "auto",
        "--data",
        tmp_path / "train",
    ]
    cluster = ("--dry-run", "--world-size", 8, "--gpu", "a100")
    status, stdout, stderr = run(tmp_path / "run", *flags, *cluster, "--repa", 0.5)
    assert status == 0, stderr
    assert "not here: assuming 1281167 images and 1000 classes" in stdout.splitlines()[0]
    for words in ("Estimates:", "memory per process", "GPU-hours", "GB sent", "are kept", "hidden behind"):
        assert words in stdout, words
    _, halved, _ = run(tmp_path / "run", *flags, *cluster, "--mfu", 0.16, "--bandwidth", 25)
    assert "0.16 of 312" in halved and "at 25 GB/s" in halved
    assert "train" in refuses(tmp_path / "run", *flags)
    assert not (tmp_path / "run").exists()


def test_planning_flags_without_dry_run_are_mistakes(tmp_path):
    for flags in (("--world-size", 8), ("--gpu", "a100"), ("--mfu", 0.5), ("--bandwidth", 25)):
        assert f"{flags[0]} does nothing without --dry-run" in refuses(tmp_path / "run", *flags)
    assert "--mfu: 40 is not in (0, 1]" in refuses(tmp_path / "run", "--dry-run", "--mfu", 40)
    assert "3 processes" in refuses(tmp_path / "run", "--dry-run", "--world-size", 3)
