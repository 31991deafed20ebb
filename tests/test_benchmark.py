"""benchmark.py as a user starts it. The speeds themselves are the machine's; here, that what is printed is right."""

import os
import re
import subprocess
import sys

import pytest
import torch

from experiments import benchmark
from helpers import ROOT, TINY
from model import PixNerd, PixNerdConfig
from runtime.files import UserError
from runtime.flops import forward_flops
from runtime.recompute import RECOMPUTE


@pytest.fixture
def bench():
    """A Bench on the CPU that takes 1 GFLOP/s and 2 GFLOP/s for the machine's rates and compiles nothing."""
    bench = benchmark.Bench.__new__(benchmark.Bench)
    bench.device, bench.precisions, bench.compile_too = torch.device("cpu"), ["fp32", "bf16"], False
    bench.rates = {"fp32": 1e9, "bf16": 2e9}
    return bench


def test_a_wrong_figure_is_refused_with_the_names_of_the_right_ones():
    command = [sys.executable, "-m", "experiments.benchmark", "--only", "M-forward"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and all(name in done.stderr.splitlines()[-1] for name in benchmark.FIGURES)


def test_a_small_figure_prints_seconds_and_shares_that_fit(monkeypatch, capsys):
    """Speeds and shares are recomputed from the printed seconds, GFLOP and rates. Catches a share of the other rate."""
    rates = {torch.float32: 20e9, torch.bfloat16: 70e9}
    flags = ["--only", "Nano-forward", "--compile", "off", "--device", "cpu", "--precision", "fp32"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    monkeypatch.setattr(benchmark, "matmul_rate", lambda dtype, device: rates[dtype])
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    assert "product 20 GFLOP/s in fp32, 70 in bf16" in lines[1]
    rows = [line.split(", ") for line in lines if line.startswith("forward Nano")]
    assert [(row[1], row[2][:10]) for row in rows] == [("batch 1", "fp32 eager"), ("batch 2", "fp32 eager")]
    for row in rows:
        seconds, gflop, speed, *shares = map(float, row[2].split()[2:])
        assert speed == pytest.approx(gflop / seconds, rel=0.5)  # GFLOP have one decimal, and there are 0.2
        assert shares == [pytest.approx(speed * 1e9 / rate, abs=0.011, rel=0.05) for rate in rates.values()]


def test_the_yardstick_is_the_best_of_some_products(monkeypatch):
    """And a product that would take an hour is not tried: then the rate is that of a smaller one."""
    sizes = []

    def timings(function, device, repeats):
        sizes.append(len(function()))
        return [3.0, seconds, 1.0]

    monkeypatch.setattr(benchmark, "timings", timings)
    seconds = 0.001
    assert benchmark.matmul_rate(torch.float32, size=64) == 2 * 64**3 / seconds and sizes == [8, 64]
    seconds = 0.5
    assert benchmark.matmul_rate(torch.float32, size=512) == 2 * 64**3 / seconds and sizes[2:] == [64]


def test_an_image_counts_the_evaluations_of_each_way(bench, capsys):
    """50 steps: 100 passes in the plain way; with the interval, 44 steps are guided, as in sample.py."""
    calls, forward = [], PixNerd.forward

    def counted(model, x, t, y, **more):
        calls.append(len(x))
        return forward(model, x, t, y, **more)

    PixNerd.forward = counted
    try:
        for precision in bench.precisions:
            bench.draw(TINY, 50, 44, 3.5, precision)
    finally:
        PixNerd.forward = forward
    rows = capsys.readouterr().out.splitlines()
    names = ["plain: two passes each step", "+ both halves in a batch", "+ guided in the interval"]
    names = 2 * [*names, "+ freed memory kept", "+ weights cast, packed"]
    assert len(rows) == len(names) and all(name in row for name, row in zip(names, rows))
    assert set(calls[:12]) == {1} and set(calls[12:18]) == {2}  # 3 calls of each kind, and two passes each
    assert calls[18:24] == [1, 1, 1, 2, 2, 2]
    work = [float(row.split(name)[1].split()[1]) for row, name in zip(rows, names)]  # GFLOP
    assert work == pytest.approx([n * forward_flops(TINY) / 1e9 for n in 2 * [100, 100, 94, 94, 94]], abs=0.06)


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own_and_recomputing_lowers_it():
    """A model whose activations outweigh all else. Catches peaks inherited from this process, which holds 1 GB more."""
    ballast = torch.ones(250_000_000)
    config = PixNerdConfig(
        num_classes=3, resolution=64, patch_size=16, hidden_size=32, num_heads=2, depth=1, field_depth=2, field_width=64
    )
    found = [
        benchmark.in_new_process(benchmark.train_and_look, config, 24, how, "fp32", False) for how in ("none", "field")
    ]
    (whole, plain), (_, recomputed) = found
    assert ballast.sum() > 0 and whole < 1.5 and recomputed < 0.5 * plain
    seconds = benchmark.train_in_turns(config, 2, "fp32", False, rounds=1)
    assert set(seconds) == set(RECOMPUTE) and min(seconds.values()) > 0


def test_the_loaders_parts_add_up_to_the_whole(capsys):
    """Catches a part that is measured per batch where the whole is per image."""
    benchmark.loader(count=4, rounds=1)
    first, second = capsys.readouterr().out.splitlines()
    assert re.match(
        r"loader, one core, 500x375 JPEGs of \d+ kB to 256: \d+ images/s; Pillow's decoding alone \d+", first
    )
    whole, *parts = [float(number) for number in re.findall(r"-?\d+\.\d+", second)]
    assert len(parts) == 4 and sum(parts) == pytest.approx(whole, abs=0.03)


def test_metrics_measures_both_kinds(bench, capsys):
    benchmark.metrics(bench, count=60, width=8)
    rows = capsys.readouterr().out.splitlines()
    assert rows[0].startswith("precision and recall, 60 against 60") and rows[1].startswith(
        "FID from the same features"
    )


@pytest.mark.slow
def test_an_image_in_its_own_process_says_how_many_steps_are_guided(bench, capfd):
    """44 of 50 lie strictly within (0.1, 1.0), as float32. Catches a Bench that cannot travel to another process."""
    bench.precisions = ["fp32"]
    bench.image(TINY)
    header, *rows = capfd.readouterr().out.splitlines()
    assert "50 Euler steps, 44 of them guided" in header and len(rows) == 5


def test_a_process_that_dies_is_one_line():
    with pytest.raises(UserError, match="process for abort died: more memory is needed"):
        benchmark.in_new_process(os.abort)
