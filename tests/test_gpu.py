"""What only a GPU can show: `make test-gpu`, planned to take at most ten minutes on one card; elsewhere it is skipped.

It ends in a table with the card and the versions, to be pasted into docs/gpus.md. Speeds are reported there and never
asserted. The part marked slow measures XL/16; the rest are golden numbers and promises that hold on CPUs already.
"""

import contextlib
import gc
import time

import numpy as np
import pytest
import torch
import torch.distributed as dist
from helpers import (
    ROOT,
    TINY,
    TINY_TEXT,
    assert_same_run,
    inception_recipe,
    last,
    make_class_folder,
    randomised,
    run_script,
)
from helpers import train as run_training

import train
from data import open_dataset
from eval_fid import frechet_distance, precision_recall
from experiments import benchmark
from flow import alignment_loss, flow_matching_loss, interpolate
from model import PRESETS
from pretrained.dinov2 import DINOv2
from pretrained.inception import InceptionV3
from pretrained.released import import_reference, reference_names
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
from samplers import SOLVERS, generate, guide, image_noise, time_grid
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


@pytest.fixture(scope="module")
def report(request):
    """report(what, number, unit): a row of the table that is printed at the end."""
    rows = []
    yield lambda *row: rows.append(row)
    if rows:
        card = torch.cuda.get_device_properties(0)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
        lines = ["", "", f"{card.name}, {card.total_memory / 1e9:.1f} GB; {versions}, NCCL {nccl}", ""]
        lines += ["| what | measured | beside it |", "|---|---|---|"]
        lines += [f"| {what} | {measured} | {beside} |" for what, measured, beside in rows]
        with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
            print("\n".join(lines))


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
    y = torch.arange(8) % 3
    if config is TINY_TEXT:
        torch.nn.init.normal_(model.null_features)
        y = torch.randn(8, config.text_length, config.text_width)  # (B, M, E)
    x, t = torch.randn(8, 3, 16, 16), torch.linspace(0.1, 0.9, 8)
    return model.to(device), x.to(device), t.to(device), y.to(device)


def gradients(model, x, t, y, precision):
    """{name: gradient} of a loss of the velocities."""
    model.zero_grad()
    with autocast(x.device, precision):
        loss = flow_matching_loss(model(x, t, y), x, torch.ones_like(x))
    loss.backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


# ---- golden numbers, in float32 without TF32 -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["c2i_square", "c2i_wide"])
def test_class_models_compute_the_golden_velocities_and_gradients(golden_model, gpu, report, name):
    model, file = golden_model(name)
    model, file, names, worst = model.to(gpu), moved(file, gpu), reference_names(model.config), 0.0
    with full_float32():
        v = model(file["x"], file["t"], file["y"])
        (v * file["cotangent"]).sum().backward()
    assert (v - file["v"]).abs().max() < 1e-5 * file["v"].abs().max()
    for ours, p in model.named_parameters():
        expected = file["g." + names[ours]]
        got = p.grad if expected.ndim else p.grad.norm()
        worst = max(worst, ((got - expected).abs().max() / expected.abs().max()).item())
        assert (got - expected).abs().max() < 1e-4 * expected.abs().max(), ours
    report(f"golden {name}, velocity", f"{error(v, file['v']):.1e}", "below 1e-5")
    report(f"golden {name}, worst gradient", f"{worst:.1e}", "below 1e-4")


@pytest.mark.parametrize("name", ["euler_50", "adams2_25_shift3", "adams3_20", "adams4_20_shift2"])
def test_guided_trajectories_of_classes_are_the_golden_ones(golden_model, golden, gpu, name):
    model, file = golden_model("c2i_square")[0].to(gpu), moved(golden("samplers"), gpu)
    solver, steps, *shift = name.split("_")
    times = time_grid(int(steps), float(shift[0][5:]) if shift else 1.0)
    how = {} if solver == "euler" else {"order": int(solver[-1])}
    with torch.no_grad(), full_float32():
        x = SOLVERS[solver.rstrip("234")](guide(model, file["y"], 3.5), file["noise"], times, **how)
    tolerance = {"adams3": 2e-4, "adams4": 2e-3}.get(solver, 1e-4)
    assert (x - file[name]).abs().max() < tolerance * file[name].abs().max()


def test_the_loss_with_alignment_is_the_golden_one(golden_model, golden, gpu):
    model, file = golden_model("c2i_square")[0].to(gpu), moved(golden("repa_loss"), gpu)
    x, noise, t = file["x"], file["eps"], file["t"]
    with full_float32():
        v, tokens = model(interpolate(x, noise, t), t, file["y"], features_at=int(file["align_layer"]))
        for i in (0, 2, 4):
            tokens = torch.nn.functional.linear(tokens, file[f"proj.0.{i}.weight"], file[f"proj.0.{i}.bias"])
            tokens = torch.nn.functional.silu(tokens) if i < 4 else tokens
        loss = flow_matching_loss(v, x, noise) + float(file["weight"]) * alignment_loss(tokens, file["teacher"])
    torch.testing.assert_close(loss, file["loss"], rtol=1e-5, atol=0)


def test_the_text_model_computes_the_golden_numbers_at_every_resolution(golden, gpu, report):
    plain, scaled, sampled = (moved(golden(f"t2i_{name}"), gpu) for name in ("plain", "resolution", "samplers"))
    weights = {key[2:]: value.cpu() for key, value in plain.items() if key.startswith("w.")}
    config, state = import_reference(weights)
    model = build_model(config)
    model.load_state_dict(state)
    model, names = model.eval().to(gpu), reference_names(config)
    with full_float32():
        v = model(plain["x"], plain["t"], plain["y"])
        (v * plain["cotangent"]).sum().backward()
        assert error(v, plain["v"]) < 1e-5
        for ours, p in model.named_parameters():
            expected = plain["g." + names[ours]]
            assert error(p.grad if expected.ndim else p.grad.norm(), expected) < 1e-4, ours
        with torch.no_grad():
            for down, across in scaled["scales"].tolist():
                name = f"{down}x{across}"
                drawn = model(scaled[f"x_{name}"], plain["t"][:1], plain["y"][:1], grid=(2, 3))
                assert error(drawn, scaled[f"v_{name}"]) < 1e-5, name
            model.null_features.copy_(sampled["null"][0])
            for name, shift, how in (("adams2_25_shift3", 3.0, {"order": 2}), ("euler_20", 1.0, {})):
                velocity = guide(model, sampled["cond"][:2], 4.0, (0.0, 1.0))
                times = time_grid(int(name.split("_")[1]), shift)
                x = SOLVERS["adams" if how else "euler"](velocity, sampled["noise"], times, **how)
                assert error(x, sampled[name]) < 1e-4, name
    report("golden t2i_plain, velocity", f"{error(v, plain['v']):.1e}", "below 1e-5")


def test_the_teacher_computes_the_golden_tokens(golden, gpu):
    file = golden("dinov2")
    model = DINOv2(int(file["img_size"]), 14, 24, int(file["depth"]), int(file["num_heads"]))
    model.load_state_dict({name[2:]: tensor for name, tensor in file.items() if name.startswith("w.")})
    for shape in ("", "_wide"):
        with full_float32():
            tokens = model.to(gpu)(file["raw" + shape].to(gpu))
        torch.testing.assert_close(tokens.cpu(), file["tokens" + shape], atol=1e-5, rtol=0)


def test_the_fid_network_computes_the_golden_features(golden, gpu):
    network, file = InceptionV3(), golden("inception")
    network.load_state_dict(inception_recipe({name: value.shape for name, value in network.state_dict().items()}))
    for pixels in (64, 256):
        images = file[f"img_{pixels}"].permute(0, 3, 1, 2).to(gpu)  # uint8 (2, 3, S, S)
        with full_float32():
            found = network.to(gpu)(images)
        for got, name in zip(found, ("pool", "spatial", "logits_unbiased"), strict=True):
            expected = file[f"{name}_{pixels}"]
            assert (got.cpu() - expected).abs().max() < 1e-4 * expected.abs().max(), name


def test_metrics_in_float64_are_the_golden_ones(gpu):
    with np.load(ROOT / "tests" / "golden" / "metrics.npz") as file:
        reference, samples = (torch.from_numpy(file[name]).to(gpu) for name in ("ref", "sample"))
        r, s = reference.double(), samples.double()
        assert precision_recall(reference, samples) == (file["precision"], file["recall"])
        fid = frechet_distance(r.mean(0), r.T.cov(), s.mean(0), s.T.cov())
        assert fid == pytest.approx(float(file["fid"]), rel=1e-9)


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
    report(f"bf16 against fp32, {type(config).__name__}", f"{error(rough, exact):.1e}", "below 5e-2")
    assert error(rough, exact) < 5e-2 and error(*whole) < 1e-1


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
    assert error(*whole) < 5e-2


@BOTH
def test_sampling_is_the_same_compiled_frozen_and_on_the_cpu(config, gpu):
    """From one noise, against the CPU's in fp32: in fp32 within half a level of 255 on the mean, in bf16 within 8."""
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
    for drawn, limit in ((exact, 0.5), (rough, 8), (compiled, 8)):
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
        torch.cuda.reset_peak_memory_stats()
        found.append(torch.cat([grad.flatten() for grad in gradients(model, x, t, y, "bf16").values()]))
        peaks.append(torch.cuda.max_memory_allocated())
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


def test_a_run_moves_from_the_cpu_to_the_gpu_and_back(tmp_path, gpu):
    """Two steps on the GPU from a CPU's checkpoint, in fp32 and then compiled in bf16, and a last one on the CPU."""
    out = tmp_path / "run"
    for steps, flags in (
        (1, ["--device", "cpu"]),
        (3, ["--device", "cuda"]),
        (5, ["--device", "cuda", "--precision", "bf16", "--compile", "on"]),
        (6, ["--device", "cpu"]),
    ):
        status, stdout, stderr = run_training(out, "--steps", steps, "--log-every", 1, *flags)
        assert status == 0, stderr
        assert last(out)["step"] == steps
    status, _, stderr = run_training(tmp_path / "cpu", "--steps", 6)
    assert status == 0, stderr
    assert_close_runs(last(out), last(tmp_path / "cpu"))
    drawn = run_script(
        *("sample.py", "--ckpt", out / "last.pt", "--class", "0", "--steps", "3", "--device", "cuda"),
        *("--out", tmp_path / "x.png"),
    )
    assert drawn[0] == 0 and (tmp_path / "x.png").exists(), drawn[2]


def assert_close_runs(a, b):
    """Weights after the same steps on two devices: rounding, which AdamW's division magnifies, and nothing more."""
    whole = [torch.cat([tensor.flatten() for tensor in state["model"].values()]) for state in (a, b)]
    assert a["step"] == b["step"] and error(*whole) < 1e-1


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
def test_the_training_loop_runs_with_the_real_teachers_shape(gpu, report):
    """training_loss and update of train.py on XL with --repa: the step of the paper's Table 1, 0.27 s on an A100."""
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

    def step():
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
def test_the_loader_feeds_the_gpu(tmp_path, gpu, report):
    """JPEGs of ImageNet's typical size through train.py's loader, to the GPU; to be compared with the training step."""
    benchmark.noise_jpegs(tmp_path / "noise", 256)
    dataset, batch, steps = open_dataset(tmp_path, 256), 64, 40
    numbers = BatchNumbers(0, steps, batch, batch)
    with contextlib.closing(training_batches(dataset, numbers, 0, 1.0, None, gpu)) as batches:
        for _ in range(8):  # the workers start, and fill what they prepare ahead
            first = next(batches)
        torch.cuda.synchronize()
        start = time.perf_counter()
        rest = sum(len(part["image"]) for part in batches)
        torch.cuda.synchronize()
        speed = rest / (time.perf_counter() - start)
    assert first["image"].device == gpu and first["image"].shape == (batch, 3, 256, 256)
    assert rest == (steps - 8) * batch
    report("loader, JPEGs of 500x375, up to 8 workers", f"{speed:.0f} images/s", "more than a training step takes")


def test_pictures_of_a_folder_train_a_model_through_the_gpus_loader(tmp_path, gpu):
    """Workers and pinned memory, which a CPU run has not. Catches a batch that is read before it has arrived."""
    make_class_folder(tmp_path / "data", height=40)
    flags = ["--data", tmp_path / "data", "--steps", 3, "--resolution", 32, "--workers", 2, "--log-every", 1]
    losses = []
    for device in ("cpu", "cuda"):
        status, stdout, stderr = run_training(tmp_path / device, *flags, "--device", device)
        assert status == 0, stderr
        losses.append(last(tmp_path / device))
    assert_close_runs(*losses)
