"""Plans against the paper's own measurements, and their counts against real models, files and saved tensors."""

import dataclasses

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from helpers import refuses
from helpers import train as run

import train
from model import PRESETS, PixNerd, PixNerdConfig
from pretrained.dinov2 import DINOv2
from runtime.plan import EAGER, TEACHER_DEPTH, TEACHER_WEIGHTS, TEACHER_WIDTH, Plan, epochs_to_steps, training_flops

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


@pytest.mark.parametrize("repa", [False, True])
def test_weights_are_those_of_a_real_model(repa):
    """Counted on the very modules that train.py trains: model, projector, and the average of the model alone."""
    student = train.Student(PixNerd(SMALL), 2, TEACHER_WIDTH if repa else 0)
    optimizer = torch.optim.AdamW(student.parameters())
    for p in student.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    held = [t for p in student.parameters() for t in (p, p.grad, *optimizer.state[p].values()) if t.numel() > 1]
    held += student.model.parameters()  # as many again in the average
    cost = Plan(SMALL, 8, repa=repa)
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
    settings = [
        f"--{name.replace('_', '-')}={getattr(nano, name)}" for name in ("patch_size", "field_width", "field_depth")
    ]
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


def test_epochs_become_steps_that_show_every_image():
    assert epochs_to_steps(160, 1_281_167, 256) == 800_730  # the paper rounds to 800k
    assert epochs_to_steps(1, 256, 256) == 1 and epochs_to_steps(1, 257, 256) == 2 and epochs_to_steps(0.5, 6, 2) == 2


def test_a_cluster_is_planned_without_the_data(tmp_path):
    """And only planned: the same command without --dry-run stops, and writes nothing."""
    flags = (
        "--size XL --patch-size 16 --field-width 64 --field-depth 4 --batch-size 256 --precision auto --compile auto"
    )
    flags = [*flags.split(), "--data", tmp_path / "train"]
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
