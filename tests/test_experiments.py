"""Programs of experiments/ that docs/ uses: one step by hand, runs in one picture, neighbours of samples."""

import json

import pytest
import torch
from helpers import complaint, noise_picture, run_script
from PIL import Image

from data import EMOJI_CLASSES, Emoji, from_uint8
from experiments.nearest import nearest
from experiments.one_step import step_by_hand
from experiments.plot import loss_by_time, read_run
from flow import flow_matching_loss, interpolate
from runtime.models import find_model

# ---- one step --------------------------------------------------------------------------------------------------------


def test_a_step_by_hand_is_the_models_own_velocity_and_the_loss_of_training():
    """Catches a page whose step is no longer the one that train.py takes."""
    model = find_model("emoji").eval()
    assert model.class_names == EMOJI_CLASSES  # or labels would mean other classes
    x, y = Emoji(32)[555]
    x, y, t = from_uint8(x)[None], torch.tensor([y]), torch.tensor([0.4])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        panels, v, loss = step_by_hand(model, x, y, t, noise, token=10)
        expected = model(interpolate(x, noise, t), t, y)
    assert len(panels) == 8
    torch.testing.assert_close(v, expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(loss, flow_matching_loss(expected, x, noise), rtol=1e-4, atol=1e-5)
    patch, field = panels[2][2], panels[3][2]  # of token 10: row 3, column 3 of 4 x 4
    assert torch.equal(patch, interpolate(x, noise, t)[0, :, 16:24, 16:24])
    torch.testing.assert_close(field, expected[0, :, 16:24, 16:24] / 2, rtol=1e-4, atol=1e-4)


def test_the_picture_of_a_step_is_drawn_and_mistakes_are_one_line(tmp_path):
    status, stdout, stderr = run_script("experiments/one_step.py", "--out", tmp_path / "step.png")
    assert status == 0 and "(1, 3, 32, 32)" in stdout, stderr
    with Image.open(tmp_path / "step.png") as picture:
        assert picture.width > 900 and len(picture.convert("RGB").getcolors(10**6)) > 1000
    assert "--token must be below 16" in complaint("experiments/one_step.py", "--token", 16)


# ---- runs in one picture ---------------------------------------------------------------------------------------------


def write_run(folder, lines, preview=True):
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if preview:
        noise_picture(40, 40).save(folder / "samples.png")
    return folder


def line(step, loss, bins=(2.0, None)):
    return {"step": step, "loss": loss, "loss_by_time": list(bins), "images_per_second": 10.0}


def test_a_run_is_read_in_the_order_of_its_own_steps_without_scores(tmp_path):
    """Catches a resumed run that starts at 0 again, and scores of an evaluation taken for training."""
    run = write_run(tmp_path / "a", [line(10, 2.0), {"step": 10, "fid": 3.0}, line(20, 1.0), line(30, 0.5)])
    assert [(found["step"], found["loss"]) for found in read_run(run)] == [(10, 2.0), (20, 1.0), (30, 0.5)]


def test_loss_by_time_is_the_mean_of_the_last_quarter_without_empty_bins():
    lines = [line(i, 1.0, bins) for i, bins in enumerate([(9, 9, 9)] * 6 + [(1, None, None), (3, None, 4)])]
    times, losses = loss_by_time(lines)
    assert times == pytest.approx([1 / 6, 5 / 6]) and losses == [2, 4]


def test_runs_that_are_none_are_told_in_one_line(tmp_path):
    assert "is no folder of a run" in complaint("experiments/plot.py", tmp_path / "no")
    bad = write_run(tmp_path / "bad", [])
    assert "no line of training yet" in complaint("experiments/plot.py", bad)
    (bad / "metrics.jsonl").write_text("{")
    assert "not metrics" in complaint("experiments/plot.py", bad)


def test_several_runs_are_drawn_in_one_picture(tmp_path):
    pytest.importorskip("matplotlib")
    first = {name: value for name, value in line(1, 3.0).items() if name != "images_per_second"}  # it compiled
    runs = [write_run(tmp_path / name, [first, line(10, 2.0), line(20, 1.0)], name == "a") for name in "ab"]
    status, stdout, stderr = run_script("experiments/plot.py", *runs, "--out", tmp_path / "plot.png")
    assert (status, stdout) == (0, f"2 runs: {tmp_path}/plot.png\n"), stderr
    with Image.open(tmp_path / "plot.png") as picture:
        assert picture.width > 900


# ---- neighbours of samples -------------------------------------------------------------------------------------------


def test_the_nearest_picture_is_found_mirrored_or_not_and_by_itself_is_another_one():
    """Catches a copy that is missed because it is mirrored, and a yardstick of zeros."""
    pictures = torch.randint(0, 256, (6, 3, 16, 16), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    samples = torch.stack([pictures[4], pictures[2].flip(-1), pictures[1] // 2 + pictures[5] // 4])
    which, distance = nearest(samples, pictures)
    assert which.tolist()[:2] == [4, 2] and distance[:2].max() < 1e-3 < distance[2]
    which, distance = nearest(pictures, pictures, itself=True)
    assert all(found != i for i, found in enumerate(which.tolist())) and distance.min() > 0.01


def test_distances_are_root_mean_squares_of_colours():
    black, gray = torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.full((1, 3, 16, 16), 51, dtype=torch.uint8)
    assert nearest(black, gray)[1].item() == pytest.approx(0.2, abs=1e-6)
