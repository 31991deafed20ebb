"""benchmark.py as a user starts it. The speeds themselves are the machine's; here, that what is printed is right."""

import os
import re
import sys

import pytest
import torch

from experiments import benchmark
from helpers import TINY, randomised
from model import PixNerdConfig
from runtime.files import UserError
from text_model import PRESETS as TEXT_PRESETS

CPU = torch.device("cpu")


def test_a_wrong_figure_is_refused_with_the_names_of_the_right_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "M-forward"])
    with pytest.raises(SystemExit) as ended:
        benchmark.main()
    line = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and all(name in line for name in [*benchmark.MODELS, "loader", "metrics"])


def test_a_small_figure_prints_seconds_and_shares_that_fit(monkeypatch, capsys):
    """Speeds and shares are recomputed from the printed seconds, GFLOP and rates. Catches a share of the other rate."""
    rates = {torch.float32: 20e9, torch.bfloat16: 70e9}
    flags = ["--only", "Nano-forward", "--compile", "off", "--device", "cpu", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    monkeypatch.setattr(benchmark, "matmul_rate", lambda dtype, device: rates[dtype])
    monkeypatch.setattr(benchmark, "in_new_process", lambda function, *args: function(*args))
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert "product 20 GFLOP/s in fp32, 70 in bf16" in lines[0]
    rows = [line.split(", ") for line in lines if line.startswith("forward Nano")]
    assert [(row[1], row[2][:10]) for row in rows] == [("batch 1", "fp32 eager"), ("batch 2", "fp32 eager")]
    for row in rows:
        seconds, gflop, speed, *shares, peak = map(float, row[2].split()[2:])
        assert speed == pytest.approx(gflop / seconds, rel=0.5)  # GFLOP have one decimal, and there are 0.2
        assert shares == [pytest.approx(speed * 1e9 / rate, abs=0.011, rel=0.05) for rate in rates.values()]
        assert peak > 0.1


def test_the_yardstick_is_the_best_of_some_products(monkeypatch):
    """And a product that would take an hour is not tried: then the rate is that of a smaller one."""
    sizes = []

    def timings(function, device):
        sizes.append(len(function()))
        return [3.0, seconds, 1.0]

    monkeypatch.setattr(benchmark, "timings", timings)
    seconds = 0.001
    assert benchmark.matmul_rate(torch.float32, CPU, size=64) == 2 * 64**3 / seconds and sizes == [8, 64]
    seconds = 0.5
    assert benchmark.matmul_rate(torch.float32, CPU, size=512) == 2 * 64**3 / seconds and sizes[2:] == [64]


@pytest.mark.parametrize(
    "figure", ["Nano-train", "XXL-forward", "XXL-train", "L-forward", "guided", "image", "memory", "cost"]
)
def test_every_line_of_a_figure_can_be_measured(figure):
    """On a tiny model in the place of its own. Catches a setting that no function takes."""
    for _, _, _, prepare, _ in benchmark.MODELS[figure]:
        text = figure.startswith("XXL")
        seconds, peak = benchmark.measure(TEXT_PRESETS["Nano"] if text else TINY, prepare, 1, "fp32", False, CPU)
        assert seconds > 0 and peak > 0.1


@pytest.mark.parametrize("figure, images", [("L-forward", [1]), ("guided", [2]), ("image", [1, 1, 2])])
def test_a_figure_counts_the_passes_that_the_model_makes(figure, images):
    """Images that go through the model in each pass. Catches a share of twice the true speed."""
    seen = []
    model = randomised(TINY)
    model.register_forward_pre_hook(lambda module, given: seen.append(len(given[0])))
    lines = [line for line in benchmark.MODELS[figure] if line[2] == 1]
    for _, _, _, prepare, _ in lines:
        prepare(model, torch.randn(1, 3, 16, 16), torch.tensor([0]), "fp32", False)()
    assert seen == images and sum(images) == sum(passes for *_, passes in lines)


def test_what_does_not_fit_into_memory_is_said_and_left_out(monkeypatch, capsys):
    """A training step of XXL holds five times its 4.7 GB. Catches a figure that kills the run or says nothing."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "XXL-train", "--compile", "off", "--device", "cpu"])
    monkeypatch.setattr(benchmark, "matmul_rate", lambda dtype, device: 1e9)
    monkeypatch.setattr(benchmark, "available_memory", lambda device: 20e9)
    monkeypatch.setattr(benchmark, "in_new_process", None)
    benchmark.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("training step XXL/16 at 256")]
    assert len(rows) == 2 and all("not measured: its weights need 23.4 GB, 20.0 GB are free" in row for row in rows)
    benchmark.check_weights_fit(TEXT_PRESETS["XXL"], 1, CPU)  # a forward pass fits


def test_a_measurement_that_is_killed_is_said_and_the_others_follow(monkeypatch, capsys):
    """As for want of memory, which is only known by trying. Catches: one large figure that takes the rest along."""
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--only", "XXL-forward", "--compile", "off", "--device", "cpu"])
    monkeypatch.setattr(benchmark, "matmul_rate", lambda dtype, device: 1e9)
    new_process = benchmark.in_new_process
    monkeypatch.setattr(benchmark, "in_new_process", lambda *_: new_process(os._exit, 9))
    benchmark.main()
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith("forward XXL/16 at 512")]
    assert len(rows) == 2 and all("not measured: the process for _exit died" in row for row in rows)


def test_a_model_of_sentences_is_measured_like_one_of_classes():
    for prepare in (benchmark.sampling, benchmark.guided, benchmark.training):
        seconds, _ = benchmark.measure(TEXT_PRESETS["Nano"], prepare, 1, "fp32", False, CPU)
        assert seconds > 0


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own_and_recomputing_lowers_it():
    """A model whose activations outweigh all else. Catches peaks inherited from this process, which holds 1 GB more."""
    ballast = torch.ones(250_000_000)
    config = PixNerdConfig(
        num_classes=3, resolution=64, patch_size=16, hidden_size=32, num_heads=2, depth=1, field_depth=2, field_width=64
    )
    peaks = []
    for name, _, _, prepare, _ in benchmark.MODELS["memory"]:
        peaks.append(benchmark.in_new_process(benchmark.measure, config, prepare, 24, "fp32", False, CPU)[1])
    assert ballast.sum() > 0 and peaks[0] < 1.7 and peaks[1] < peaks[0] - 0.1


def test_the_loader_is_measured_by_the_image(monkeypatch, capsys):
    """Each part of it handles all four pictures in the two seconds of this clock. Catches a time of the whole batch."""
    sizes = []

    def timings(function, clock):
        sizes.append(len(function()))
        return [3.0, 2.0]

    monkeypatch.setattr(benchmark, "timings", timings)
    benchmark.loader(count=4)
    lines = capsys.readouterr().out.splitlines()
    assert sizes == [4] * 4 and len(lines) == 4
    assert all(line.endswith("500.00 ms an image,    2 images/s") for line in lines)


def test_metrics_measures_both_kinds(capsys):
    benchmark.metrics(CPU, count=60, width=8)
    pattern = r"precision and recall of 60 and 60: [\d.]+ s; FID from their moments: [\d.]+ s\n"
    assert re.fullmatch(pattern, capsys.readouterr().out)


def test_a_process_that_dies_is_one_line():
    with pytest.raises(UserError, match="process for abort died: more memory is needed"):
        benchmark.in_new_process(os.abort)
