"""What only a GPU can show: `make test-gpu`, planned to take at most ten minutes on one card; elsewhere it is skipped.

It ends in a table with the card and the versions, to be pasted into docs/gpus.md. Speeds are reported there and never
asserted. The part marked slow measures XL/16; the rest are promises that hold on CPUs already. The golden numbers are
computed on the GPU by the tests that compute them on the CPU, whose fixture `device` names both.
"""

import contextlib
import gc
import os
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import TINY, TINY_TEXT, assert_same_run, last, make_class_folder, randomised, run_script
from helpers import train as run_training

import train
from data import open_dataset
from experiments import benchmark
from flow import flow_matching_loss
from model import PRESETS
from pretrained.dinov2 import DINOv2
from runtime.checkpoint import build_model
from runtime.distributed import Processes, only_adding_up
from runtime.files import UserError
from runtime.flops import forward_flops
from runtime.gauges import Gauges
from runtime.loader import BatchNumbers, training_batches
from runtime.machine import autocast, available_memory, freeze, full_float32, peak_flops, pick_device
from runtime.optimizers import make_optimizers
from runtime.plan import CLOSE, ENCODER_WEIGHTS, Plan, reads_qwen3, training_flops
from runtime.recompute import RECOMPUTE
from samplers import generate, image_noise, time_grid
from text_model import PRESETS as TEXT_PRESETS

pytestmark = pytest.mark.gpu
BOTH = pytest.mark.parametrize("config", [TINY, TINY_TEXT], ids=["classes", "text"])


@pytest.fixture(autouse=True)
def gpu():
    """The GPU, as the scripts prepare it, TF32 included, its memory as free as may be."""
    torch.compiler.reset()  # or the tests together would reach dynamo's limit of recompilations
    gc.collect()
    torch.cuda.empty_cache()
    return pick_device("cuda")


def moved(values, device):
    """{name: tensor} on the device."""
    return {name: value.to(device) for name, value in values.items()}


def error(got, expected):
    """norm(got - expected) / norm(expected)."""
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    assert got.shape == expected.shape
    return ((got - expected).norm() / expected.norm()).item()


def build(config, device):
    """A model whose output depends on everything before it, and a batch of 8: (model, x, t, y)."""
    torch.manual_seed(0)
    model = build_model(config)
    torch.nn.init.normal_(model.decoder.output.weight, std=0.5)
    if config is TINY_TEXT:
        torch.nn.init.normal_(model.null_features)
        y = torch.randn(8, config.text_length, config.text_width)  # (B, M, E)
    else:
        torch.nn.init.normal_(model.class_embed.weight)  # with the usual 0.02 the class would hardly matter
        y = torch.arange(8) % 3
    x, t = torch.randn(8, 3, 16, 16), torch.linspace(0.1, 0.9, 8)
    return model.to(device), x.to(device), t.to(device), y.to(device)


def gradients(model, x, t, y, precision):
    """{name: gradient} of a loss of the velocities."""
    model.zero_grad()
    with autocast(x.device, precision):
        loss = flow_matching_loss(model(x, t, y), x, torch.ones_like(x))
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- bf16, compiled, recomputed --------------------------------------------------------------------------------------


@BOTH
def test_bf16_is_close_to_fp32_in_velocities_and_gradients(config, gpu, report):
    """Catches a sum or a norm that is taken in bf16."""
    model, x, t, y = build(config, gpu)
    with torch.no_grad(), full_float32():
        exact = model(x, t, y)
    with torch.no_grad(), autocast(gpu, "bf16"):
        rough = model(x, t, y)
    with full_float32():
        wanted = gradients(model, x, t, y, "fp32")
    got = gradients(model, x, t, y, "bf16")
    whole = [torch.cat([side[name].flatten() for name in wanted]) for side in (got, wanted)]
    # A CPU's bf16 is off by 8e-3 to 1.1e-2 in velocities and by 7e-3 to 9e-3 in gradients: rounding to 8 bits.
    far = f"{error(rough, exact):.1e} in velocities, {error(*whole):.1e} in gradients"
    report(f"bf16 against fp32, {type(config).__name__}", far, "below 3e-2")
    assert error(rough, exact) < 3e-2 and error(*whole) < 3e-2


@BOTH
@pytest.mark.parametrize("recompute", RECOMPUTE)
def test_a_compiled_training_step_is_the_eager_one(config, recompute, gpu):
    """compile_blocks asks for fullgraph: a graph break is an error. Activation checkpointing is told before it."""
    model, x, t, y = build(config, gpu)
    eager = gradients(model, x, t, y, "bf16")
    model.call = RECOMPUTE[recompute]
    model.compile_blocks()
    compiled = gradients(model, x, t, y, "bf16")
    assert eager.keys() == compiled.keys()
    whole = [torch.cat([side[name].flatten() for name in eager]) for side in (compiled, eager)]
    assert error(*whole) < 3e-2  # compiled code rounds elsewhere, by no more than bf16 itself


@BOTH
def test_sampling_is_the_same_compiled_frozen_and_on_the_cpu(config, gpu):
    """From one noise, against the CPU's in fp32, in levels of 255 on the mean. Another class would be 25 away."""
    model, _, _, y = build(config, torch.device("cpu"))
    noise, times = image_noise(0, range(8), (16, 16)), time_grid(10)
    on_cpu = generate(model.eval(), y, noise, times, 2.0)
    how = dict(times=times, scale=2.0)
    model.to(gpu)
    with full_float32():
        exact = generate(model, y.to(gpu), noise.to(gpu), **how)
    rough = generate(model, y.to(gpu), noise.to(gpu), **how, precision="bf16")
    model.compile_blocks()
    freeze(model, "bf16", pack=False)
    compiled = generate(model, y.to(gpu), noise.to(gpu), **how, precision="bf16")
    # In fp32 a rare pixel is rounded to the level beside it. A CPU's bf16 is off by 0.4 to 0.6.
    for drawn, limit in ((exact, 0.05), (rough, 2), (compiled, 2)):
        assert (drawn.cpu().float() - on_cpu.float()).abs().mean() < limit


@pytest.mark.parametrize("recompute", ["field", "all"])
def test_recomputing_gives_the_same_gradients_from_less_memory(recompute, gpu):
    peaks, found = [], []
    for how in ("none", recompute):
        torch.manual_seed(0)
        model = build_model(PRESETS["S"]).to(gpu)
        torch.nn.init.normal_(model.decoder.output.weight, std=0.5)
        model.call = RECOMPUTE[how]
        x, t, y = torch.randn(8, 3, 256, 256, device=gpu), torch.rand(8, device=gpu), torch.arange(8, device=gpu)
        benchmark.peak_memory(gpu)  # forgets what was needed to prepare
        found.append(torch.cat([grad.flatten() for grad in gradients(model, x, t, y, "bf16").values()]))
        peaks.append(benchmark.peak_memory(gpu))
    assert error(found[1], found[0]) < 2e-2 and peaks[1] < 0.8 * peaks[0]


# ---- the training script ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gradient_that_is_not_finite_changes_no_weight(optimizer, gpu):
    """The fused optimizers are told by a tensor on the GPU, so nothing waits. Catches weights that became NaN."""
    student = train.Student(randomised(TINY)).to(gpu)
    ema = randomised(TINY).to(gpu)
    optimizers, gauges = make_optimizers(student, optimizer, 1e-2), Gauges(Processes(), gpu)
    gauges.add(torch.tensor([0.5], device=gpu), torch.tensor([1.0], device=gpu), None, 1.0)

    def step(number, value):
        before = [p.detach().clone() for p in student.parameters()]
        for p in student.parameters():
            p.grad = torch.full_like(p, value)
        train.update(student, ema, optimizers, gauges, number, 1e-2, 0.99)
        return [not torch.equal(a, b) for a, b in zip(before, student.parameters())]

    assert all(step(1, 0.1))
    assert not any(step(2, float("nan"))) and not any(step(3, 0.1))
    with pytest.raises(UserError, match="gradient was not finite at step 2"):
        gauges.read()


@pytest.fixture
def without_tf32(monkeypatch):
    """The scripts in full float32, where --precision fp32 allows TF32 on a GPU: 10 bits would hide small mistakes."""

    def pick(*args):
        device = pick_device(*args)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        return device

    monkeypatch.setattr("runtime.machine.pick_device", pick)


def assert_close_runs(a, b, start, limit):
    """What the steps since the checkpoint `start` changed on two devices, in weights and in EMA.

    Of the change and not of the weights, of which six steps are a hundredth: a rate that is 10 % higher would pass.
    """
    assert a["step"] == b["step"] > start["step"]
    for part in ("model", "ema"):
        begun, *ended = (torch.cat([value.flatten() for value in run[part].values()]) for run in (start, a, b))
        assert error(*(side - begun for side in ended)) < limit, part


def test_a_run_moves_from_the_cpu_to_the_gpu_and_back(tmp_path, gpu, without_tf32):
    """A checkpoint of a CPU, steps on the GPU, in fp32 and then compiled in bf16, and after each a step on the CPU."""
    out, start = tmp_path / "run", None
    for steps, limit, flags in (
        (1, None, ["--device", "cpu"]),
        (3, None, ["--device", "cuda"]),
        (4, 1e-3, ["--device", "cpu"]),  # other orders of sums make 1e-5
        (6, None, ["--device", "cuda", "--precision", "bf16", "--compile", "on"]),
        (7, 5e-2, ["--device", "cpu"]),  # a CPU's bf16, not compiled, makes 1e-2
    ):
        status, stdout, stderr = run_training(out, "--steps", steps, "--log-every", 1, *flags)
        assert status == 0, stderr
        start = start or last(out)
        assert last(out)["step"] == steps
        if limit:
            status, _, stderr = run_training(tmp_path / "cpu", "--steps", steps)
            assert status == 0, stderr
            assert_close_runs(last(out), last(tmp_path / "cpu"), start, limit)
    drawn = run_script(
        *("sample.py", "--ckpt", out / "last.pt", "--class", "0", "--steps", "3", "--device", "cuda"),
        *("--out", tmp_path / "x.png"),
    )
    assert drawn[0] == 0 and (tmp_path / "x.png").exists(), drawn[2]


def test_a_run_on_the_gpu_resumes(tmp_path, gpu):
    """In eager fp32, with deterministic sums, to the bit as on a CPU. Catches state that a checkpoint lacks."""
    flags = ["--device", "cuda", "--steps"]
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for out, steps in (("whole", 4), ("parts", 2), ("parts", 4)):
            status, _, stderr = run_training(tmp_path / out, *flags, steps)
            assert status == 0, stderr
    finally:
        torch.use_deterministic_algorithms(before)
    assert_same_run(last(tmp_path / "whole"), last(tmp_path / "parts"))


def test_nccl_shares_gradients_also_in_a_group_of_one(gpu):
    """DistributedDataParallel, with a micro-batch that only adds up: twice the gradient of one backward pass."""
    model, x, t, y = build(TINY, gpu)
    with full_float32():
        alone = gradients(model, x, t, y, "fp32")
        model.zero_grad()
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=gpu)
        try:
            processes = Processes()
            processes.world = 2  # or the model would be left alone; the group itself has one process
            shared = processes.share_gradients(model, gpu)
            for wanted in (True, False):
                with only_adding_up(shared, wanted):
                    flow_matching_loss(shared(x, t, y), x, torch.ones_like(x)).backward()
            total = torch.ones(3, device=gpu)
            processes.sum(total)
        finally:
            dist.destroy_process_group()
    assert total.tolist() == [1, 1, 1]
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, 2 * alone[name], rtol=1e-3, atol=1e-6)


# ---- speed and memory, for the table ---------------------------------------------------------------------------------


def fitting_batch(config, device):
    """The most images of 32, 16, ... whose training step is planned to fit the free memory, or None."""
    free = available_memory(device)
    return next((n for n in (32, 16, 8, 4, 2, 1) if Plan(config, n, compile="off").need < CLOSE * free), None)


JPEGS = f"JPEGs of 500x375, {min(8, os.cpu_count())} workers on {os.cpu_count()} cores"


def feed(folder, batch, device, use, steps=24):
    """images/s of JPEGs of ImageNet's typical size through train.py's loader and use(batch), after 8 batches."""
    benchmark.noise_jpegs(folder / "noise", 256)
    numbers, waiting = BatchNumbers(0, steps, batch, batch), 8  # the workers start, and fill what they prepare ahead
    batches = training_batches(open_dataset(folder, 256), numbers, 0, 1.0, None, device)
    with contextlib.closing(batches):
        for number, samples in enumerate(batches, start=1):
            assert samples["image"].device == device and samples["image"].shape == (batch, 3, 256, 256)
            use(samples)
            if number == waiting:
                torch.cuda.synchronize()
                start = time.perf_counter()
        torch.cuda.synchronize()
    assert number == steps
    return (steps - waiting) * batch / (time.perf_counter() - start)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", ["L", "XL", "XXL"])
def test_a_training_step_needs_the_planned_memory(name, compiled, gpu, report):
    """Within a quarter. Its speed and MFU go into the table."""
    config = (PRESETS | TEXT_PRESETS)[name]
    what = f"training step {name}/16 at 256, bf16, {'compiled' if compiled else 'eager'}"
    batch = fitting_batch(config, gpu)
    if batch is None:
        report(what, "not measured", "does not fit this card")
        pytest.skip(f"{name} does not fit this card")
    seconds, gigabytes = benchmark.measure(config, benchmark.training, batch, "bf16", compiled, gpu)
    plan = Plan(config, batch, compile="auto" if compiled else "off")
    mfu = 3 * forward_flops(config) * batch / seconds / peak if (peak := peak_flops(gpu)) else float("nan")
    speed = f"{seconds:.3f} s, {batch / seconds:.0f} images/s, MFU {mfu:.2f}, {gigabytes:.1f} GB"
    need = plan.need - 2 * ENCODER_WEIGHTS * reads_qwen3(config)  # whose features are given here
    report(f"{what}, {batch} images", speed, f"planned {need / 1e9:.1f} GB")
    assert gigabytes * 1e9 == pytest.approx(need, rel=0.25)


@pytest.mark.slow
def test_the_training_loop_runs_with_the_real_teachers_shape(tmp_path, gpu, report):
    """training_loss and update of train.py on XL with --repa: the step of the paper's Table 1, 0.27 s on an A100.

    Within a quarter of the planned memory. The same step is timed on one batch that stays, and fed by the loader.
    """
    config, batch = PRESETS["XL"], fitting_batch(PRESETS["XL"], gpu)
    if batch is None:
        pytest.skip("XL does not fit this card")
    torch.manual_seed(0)
    model, teacher = build_model(config), DINOv2(518, 14, 768, 12, 12).to(gpu)
    model.compile_blocks()
    student, ema = train.Student(model, 8, teacher.width).to(gpu), build_model(config).to(gpu).requires_grad_(False)
    optimizers, gauges = make_optimizers(student, "adamw", 1e-4), Gauges(Processes(), gpu)
    pixels = (batch, 3, 256, 256)
    samples = {"image": torch.randint(0, 256, pixels, dtype=torch.uint8), "noise": torch.randn(pixels)}
    samples |= {"t": torch.rand(batch), "u": torch.rand(batch), "y": torch.arange(batch)}
    samples = moved(samples, gpu)

    def step(samples=samples):
        with autocast(gpu, "bf16"):
            loss, losses, alignment = train.training_loss(student, teacher, samples)
        loss.backward()
        gauges.add(samples["t"], losses, alignment, 1.0)
        train.update(student, ema, optimizers, gauges, 1, 1e-4, 0.9999)

    step()
    benchmark.peak_memory(gpu)  # forgets what was needed to prepare
    seconds = np.median(benchmark.timings(step, gpu))
    gigabytes, plan = benchmark.peak_memory(gpu), Plan(config, batch, repa=True)
    assert np.isfinite(gauges.read()["loss"])
    mfu = training_flops(config, True) * batch / seconds / peak if (peak := peak_flops(gpu)) else float("nan")
    speed = f"{seconds:.3f} s, {batch / seconds:.0f} images/s, MFU {mfu:.2f}, {gigabytes:.1f} GB"
    report(f"step of train.py, XL/16 with --repa, {batch} images", speed, "the paper: 0.27 s and 33.9 GB for 32, A100")
    report("the same, planned", f"{plan.need / 1e9:.1f} GB", "")
    fed = feed(tmp_path, batch, gpu, step)
    report(f"the same, fed by the loader with {JPEGS}", f"{batch / fed:.3f} s, {fed:.0f} images/s", f"{seconds:.3f} s")
    assert gigabytes * 1e9 == pytest.approx(plan.need, rel=0.25)


@pytest.mark.slow
def test_an_image_of_xl_is_drawn_and_timed(gpu, report):
    """50 guided Euler steps, frozen in bf16, eager and compiled. The paper: 0.65 s on an A100, compiled."""
    torch.manual_seed(0)
    model = build_model(PRESETS["XL"]).eval().to(gpu)
    noise, y = image_noise(0, [0], (256, 256)).to(gpu), torch.tensor([207], device=gpu)
    freeze(model, "bf16", pack=False)
    for kind in ("eager", "compiled"):
        if kind == "compiled":
            model.compile_blocks()
        torch.cuda.reset_peak_memory_stats()

        def draw():
            return generate(model, y, noise, time_grid(50), 3.5, precision="bf16")

        seconds = min(benchmark.timings(draw, gpu, 3))
        memory = f"{torch.cuda.max_memory_allocated() / 1e9:.1f} GB"
        report(f"image of XL/16, 50 steps, {kind}", f"{seconds:.2f} s, {memory}", "the paper: 0.65 s, 3.1 GB, A100")
        assert draw().shape == (1, 3, 256, 256)


@pytest.mark.slow
def test_the_loader_alone_brings_pictures_to_the_gpu(tmp_path, gpu, report):
    """Nothing is trained meanwhile: the most that the loader gives, to be compared with the steps above."""
    speed = feed(tmp_path, 64, gpu, lambda samples: None)
    report(f"the loader alone, {JPEGS}", f"{speed:.0f} images/s", "at least as many as a training step takes")


def test_pictures_of_a_folder_train_a_model_through_the_gpus_loader(tmp_path, gpu, without_tf32):
    """Workers and pinned memory, which a CPU run has not. Catches a batch that is read before it has arrived."""
    make_class_folder(tmp_path / "data", height=40)
    flags = ["--data", tmp_path / "data", "--resolution", 32, "--workers", 2, "--log-every", 1]
    ends = []
    for device in ("cpu", "cuda"):
        for steps, on in ((1, "cpu"), (4, device)):
            status, _, stderr = run_training(tmp_path / device, *flags, "--steps", steps, "--device", on)
            assert status == 0, stderr
            ends.append(last(tmp_path / device))
    assert_close_runs(ends[3], ends[1], ends[0], 1e-3)
