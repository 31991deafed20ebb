"""benchmark.py as a user starts it. The speeds themselves are the machine's; here, that what is printed is right."""

import functools
import os
import pathlib
import re
import subprocess
import sys

import pytest
import torch

import benchmark
from device import DeviceError
from model import PixNerd, PixNerdConfig, count_flops
from test_model import TINY, randomised

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture
def bench():
    """A Bench on the CPU that takes 1 GFLOP/s and 2 GFLOP/s for the machine's rates and compiles nothing."""
    bench = benchmark.Bench.__new__(benchmark.Bench)
    bench.device, bench.precisions, bench.compile_too = torch.device("cpu"), ["fp32", "bf16"], False
    bench.rates = {"fp32": 1e9, "bf16": 2e9}
    return bench


def test_list_names_the_figures_and_a_wrong_one_is_refused_with_the_right_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", "--list"])
    benchmark.main()
    assert capsys.readouterr().out.split() == list(benchmark.FIGURES)
    command = [sys.executable, ROOT / "benchmark.py", "--only", "M-forward"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and "Nano-train" in done.stderr.splitlines()[-1]


def test_a_small_figure_prints_seconds_and_shares_that_fit(monkeypatch, capsys):
    """Speeds and shares are recomputed from the printed seconds, GFLOP and rates. Catches a share of the other rate."""
    flags = ["--only", "Nano-forward", "--compile", "off", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags])
    monkeypatch.setattr(benchmark, "matmul_rate", functools.partial(benchmark.matmul_rate, size=1024))  # not minutes
    benchmark.main()
    lines = capsys.readouterr().out.splitlines()
    rates = [float(rate) for rate in re.search(r"product (\d+) GFLOP/s in fp32, (\d+) in bf16", lines[1]).groups()]
    rows = [line.split(", ") for line in lines if line.startswith("forward Nano")]
    expected = [(batch, f"{precision} eager") for precision in ("fp32", "bf16") for batch in ("batch 1", "batch 2")]
    assert [(row[1], row[2][:10]) for row in rows] == expected
    for row in rows:
        seconds, gflop, speed, *shares = map(float, row[2].split()[2:])
        assert speed == pytest.approx(gflop / seconds, rel=0.5)  # GFLOP have one decimal, and there are 0.2
        assert shares == [pytest.approx(speed / rate, abs=0.011, rel=0.05) for rate in rates]
    assert lines[-1].startswith("the defaults of train.py here")


def test_the_plain_field_is_the_same_function():
    """What `image` compares with must do the same work. Catches an encoding joined on the wrong side."""
    model = randomised(TINY)
    rgb, s = torch.randn(6, 16, 3), torch.randn(6, 32)
    torch.testing.assert_close(benchmark.plain_field(model.decoder, rgb, s, (4, 4)), model.decoder(rgb, s),
                               atol=1e-5, rtol=1e-4)  # fmt: skip


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
    names = ["plain: two passes each step", "+ encoding embedded once", "+ both halves in a batch",
             "+ guided in the interval"]  # fmt: skip
    names = 2 * [*names, "+ freed memory kept", "+ weights cast, packed"]
    assert len(rows) == len(names) and all(name in row for name, row in zip(names, rows))
    assert set(calls[:24]) == {1} and set(calls[24:30]) == {2}  # 3 calls of each kind, and two passes each
    assert calls[30:36] == [1, 1, 1, 2, 2, 2]
    work = [float(row.split(name)[1].split()[1]) for row, name in zip(rows, names)]  # GFLOP
    assert work == pytest.approx([n * count_flops(TINY) / 1e9 for n in 2 * [100, 100, 100, 94, 94, 94]],
                                 abs=0.06)  # fmt: skip


@pytest.mark.slow
def test_memory_is_measured_in_a_process_of_its_own_and_recomputing_lowers_it(bench, capsys):
    """A model whose activations outweigh all else. Catches peaks inherited from this process, which holds 1 GB more."""
    ballast = torch.ones(250_000_000)
    config = PixNerdConfig(num_classes=3, resolution=64, patch_size=16, hidden_size=32, num_heads=2, depth=1,
                           field_depth=2, field_width=64)  # fmt: skip
    found = {recompute: benchmark.in_new_process(benchmark.train_and_look, config, 24, recompute, False)
             for recompute in ("none", "field")}  # fmt: skip
    step = {recompute: numbers["of the step", "GB"] for recompute, numbers in found.items()}
    assert ballast.sum() > 0 and found["none"]["whole", "GB"] < 1.5
    assert step["field"] < 0.5 * step["none"]
    seconds = benchmark.train_in_turns(config, 2, False, rounds=1)
    assert set(seconds) == set(found) | {"all"} and min(seconds.values()) > 0


@pytest.mark.slow
def test_an_image_in_its_own_process_says_how_many_steps_are_guided(bench, capfd):
    """44 of 50 lie strictly within (0.1, 1.0), as float32. Catches a Bench that cannot travel to another process."""
    bench.precisions = ["fp32"]
    bench.image(TINY)
    header, *rows = capfd.readouterr().out.splitlines()
    assert "50 Euler steps, 44 of them guided" in header and len(rows) == 6


def test_a_process_that_dies_is_one_line():
    with pytest.raises(DeviceError, match="process for abort died: more memory is needed"):
        benchmark.in_new_process(os.abort)
