"""What a run of sample.py costs is said before it starts."""

import pytest
import torch
from helpers import TINY

from model import PRESETS
from runtime import machine, sampling_cost
from runtime.files import UserError
from runtime.sampling_cost import check_memory, pick_compile

CPU = torch.device("cpu")


def test_what_plainly_does_not_fit_into_memory_is_refused(monkeypatch):
    """By batch, by tokens, by pixels of each token, and by all the finished pictures together."""
    monkeypatch.setattr(sampling_cost, "available_memory", lambda device: 8e9)
    check_memory(PRESETS["XL"], 8, (256, 256), None, CPU)
    check_memory(TINY, 32, (16, 16), None, CPU, kept=1000, frames=51)
    for images, size, grid, kept, frames, words in (
        (64, (400_000, 400_000), None, 0, 0, "64 images of 400000x400000 .*--batch-size"),
        (64, (36_000, 36_000), (4, 4), 0, 0, "64 images of 36000x36000"),
        (1, (10**19, 10**19), None, 0, 0, "1 images"),
        (32, (16, 16), None, 10**12, 0, "all the pictures together .*--num"),
        (32, (16, 16), None, 100_000, 1001, "all the pictures together"),
    ):
        with pytest.raises(UserError, match=f"{words}"):
            check_memory(TINY, images, size, grid, CPU, kept, frames)


def test_nothing_is_refused_where_the_system_does_not_tell_its_memory(monkeypatch):
    monkeypatch.setattr(sampling_cost, "available_memory", lambda device: None)
    check_memory(TINY, 10**9, (16, 16), None, CPU)


def test_compile_auto_counts_the_operations_of_the_run(monkeypatch):
    """200 TFLOP on a CPU: eight XL images of 50 steps, but no sheet of emoji. The same command decides the same."""
    monkeypatch.setattr(machine, "compiler_trouble", lambda device="cpu": None)

    def choice(config, images, steps=50, guided=2, choice="auto", precision="bf16"):
        size = (config.resolution, config.resolution)
        return pick_compile(choice, config, size, None, images * steps * guided, precision, CPU, print)

    XL, Nano = PRESETS["XL"], PRESETS["Nano"]
    assert choice(XL, 8) and not choice(XL, 8, steps=30) and not choice(XL, 1)
    assert choice(XL, 16, guided=1) and not choice(XL, 8, guided=1)
    assert not choice(Nano, 9 * 12) and choice(Nano, 1, choice="on") and not choice(XL, 100, choice="off")
    assert not choice(XL, 100, precision="fp32")  # packed weights are faster there
    assert not pick_compile("auto", XL, (256, 256), None, 20_000, "bf16", torch.device("cuda"), print)
    assert pick_compile(
        "auto", XL, (1024, 1024), (16, 16), 800, "bf16", CPU, print
    )  # pixels add little: the tokens count


def test_without_a_compiler_auto_says_so_and_on_is_refused(monkeypatch):
    monkeypatch.setattr(machine, "compiler_trouble", lambda device="cpu": "no g++ here")
    said = []
    assert not pick_compile("auto", PRESETS["XL"], (256, 256), None, 800, "bf16", CPU, said.append)
    assert said == ["not compiling, which is slower but the same: no g++ here"]
    with pytest.raises(UserError, match="--compile on: no g++ here".replace("+", r"\+")):
        pick_compile("on", TINY, (16, 16), None, 1, "bf16", CPU, said.append)
