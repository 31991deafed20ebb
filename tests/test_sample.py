"""sample.py as a user starts it: pictures of every kind, the same ones every time, and one line for a mistake."""

import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

import sample
from checkpoint import save_checkpoint
from sample import SampleError, find_classes
from test_checkpoint import run_state

ROOT = pathlib.Path(__file__).parent.parent


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A tiny untrained checkpoint with three classes, a, b and c."""
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pt"
    save_checkpoint(path, run_state(1))
    return path


def draw(monkeypatch, *flags):
    """Runs sample.py's main in this process."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()


def pixels(path):
    """The picture at `path` as an array."""
    return np.asarray(Image.open(path))


@pytest.mark.parametrize("flags", [
    ["--solver", "euler"], ["--solver", "heun"], ["--solver", "euler-maruyama"], ["--cfg", 1], ["--shift", 2],
    ["--solver", "adams", "--order", 4], ["--interval", 0.2, 0.6], ["--resolution", "8x24"], ["--precision", "bf16"],
], ids=lambda flags: "=".join(map(str, flags)))  # fmt: skip
def test_every_flag_draws(ckpt, tmp_path, monkeypatch, flags):
    draw(monkeypatch, "--ckpt", ckpt, "--class", "a,2", "--num", 2, "--steps", 5, "--out", tmp_path / "x.png", *flags)
    height, width = (8, 24) if "--resolution" in flags else (16, 16)
    sheet = pixels(tmp_path / "x.png")
    assert sheet.shape[0] == 2 * (height + 2) + 2 and sheet.shape[1] >= 2 * (width + 2) + 2


def test_an_image_depends_on_its_seed_and_not_on_its_batch(ckpt, tmp_path, monkeypatch):
    for solver in ("euler", "euler-maruyama"):
        for name, batch in (("one", 1), ("five", 5)):
            draw(monkeypatch, "--ckpt", ckpt, "--class", "b", "--num", 5, "--steps", 4, "--solver", solver,
                 "--batch-size", batch, "--precision", "fp32", "--out", tmp_path / f"{name}.png")  # fmt: skip
        # Another batch size may round the last bit of a float differently, so one gray level is allowed.
        difference = pixels(tmp_path / "one.png").astype(int) - pixels(tmp_path / "five.png")
        assert abs(difference).max() <= 1
    draw(monkeypatch, "--ckpt", ckpt, "--class", "b", "--num", 5, "--steps", 4, "--seed", 1, "--out", tmp_path / "other.png")
    assert not np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "other.png"))


def test_single_files_and_gif(ckpt, tmp_path, monkeypatch):
    draw(monkeypatch, "--ckpt", ckpt, "--class", "all", "--num", 1, "--steps", 3, "--out", tmp_path / "singles",
         "--gif", tmp_path / "path.gif")  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "singles").iterdir()) == ["00000-a.png", "00001-b.png", "00002-c.png"]
    with Image.open(tmp_path / "path.gif") as film:
        assert film.n_frames == 4  # the noise and three steps


def test_row_23_classes_by_index_and_name_and_their_mistakes():
    names = (ROOT / "assets" / "imagenet_classes.txt").read_text().splitlines()
    assert find_classes("207", names, 1000) == [207] == find_classes("Golden Retriever", names, 1000)
    assert find_classes("0, tench,999", names, 1000) == [0, 0, 999]
    assert find_classes("all", None, 3) == [0, 1, 2] and find_classes("2", None, 3) == [2]
    for wrong in ("-1", "1000", "1001"):
        with pytest.raises(SampleError, match=f"{wrong} is out of range: this model knows 0 to 999"):
            find_classes(wrong, names, 1000)
    with pytest.raises(SampleError, match="did you mean golden retriever"):
        find_classes("golden retreiver", names, 1000)


@pytest.mark.parametrize("flags,message", [
    (["--class", "nine"], "did you mean"), (["--class", "3"], "0 to 2"), (["--resolution", "18"], "multiples of 4"),
    (["--resolution", "big"], "not N or HEIGHTxWIDTH"), (["--num", "0"], "at least 1"), (["--shift", "0"], "above 0"),
    (["--resolution", "400000", "--batch-size", "64"], "GB are free"), (["--ckpt", "nowhere.pt"], "no checkpoint nowhere.pt"),
    (["--device", "nonsense"], "--device nonsense"),
])  # fmt: skip
def test_mistakes_get_one_line(ckpt, tmp_path, flags, message):
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--class", "a", "--out", tmp_path / "x.png",
                           *flags], capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode in (1, 2) and message in done.stderr.splitlines()[-1], done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "x.png").exists()


def test_an_output_that_cannot_be_written_gets_one_line(ckpt, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--class", "a",
                           "--out", tmp_path / "file" / "x.png"], capture_output=True, text=True, timeout=60)  # fmt: skip
    assert done.returncode == 1 and done.stderr.count("\n") == 1 and "file" in done.stderr


def test_the_shipped_model_draws_every_class_quickly(tmp_path):
    """Under 20 s on two cores, start-up included, and not nothing: every class has colour."""
    start = time.monotonic()
    done = subprocess.run([sys.executable, ROOT / "sample.py", "--ckpt", "emoji", "--class", "all", "--num", "8",
                           "--out", tmp_path / "x.png"], capture_output=True, text=True, timeout=100)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert time.monotonic() - start < 20
    assert (ROOT / "assets" / "emoji-nano.pt").stat().st_size < 12e6
    sheet = pixels(tmp_path / "x.png")
    assert all(sheet[2 + 34 * row : 34 + 34 * row, -200:].std() > 20 for row in range(9))
