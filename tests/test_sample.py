"""sample.py as a user starts it, on a tiny checkpoint: the effect of each flag, and one line for each mistake."""

import contextlib
import dataclasses
import io
import json
import os
import pathlib
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, TINY, complaint, run_script, run_state
from PIL import Image

import sample
import samplers
from data import random_stream, to_uint8
from model import PixNerd
from runtime import machine, models
from runtime.checkpoint import FORMAT, load_model, save_checkpoint
from runtime.files import UserError
from runtime.machine import compiler_trouble


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A tiny untrained checkpoint with three classes, a, b and c, that were trained on 1, 2 and 5 pictures."""
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pt"
    save_checkpoint(path, run_state(1) | {"class_counts": [1, 2, 5]})
    return path


def draw(*flags):
    """Runs sample.py to its end, which must be a good one; returns what it printed."""
    status, stdout, stderr = run_script("sample.py", *flags)
    assert status == 0, stderr
    return stdout


def flags_of(*flags):
    """The flags of sample.py for a model of classes, each with its value."""
    args = sample.parse_args(flags)
    sample.suit(args, TINY)
    return args


def pixels(path):
    """The picture at `path` as an array of int (H, W, 3)."""
    return np.asarray(Image.open(path)).astype(int)


def images(folder):
    """The single pictures in a folder, in order: int (N, H, W, 3)."""
    return np.stack([pixels(path) for path in sorted(folder.iterdir())])


# ---- flags -----------------------------------------------------------------------------------------------------------

SETTINGS = dict(solver="euler", order=2, steps=5, cfg=3.5, interval=(0.1, 1.0), shift=1.0, temperature=1.0)
SETTINGS |= dict(size=(16, 16), grid=None, seed=0, weights="ema", y=[1, 1])


@pytest.fixture(scope="module")
def plain(ckpt):
    """The picture of the settings above, by hand."""
    return by_hand(ckpt, **SETTINGS)


def by_hand(ckpt, solver, order, steps, cfg, interval, shift, temperature, size, grid, seed, weights, y):
    """What sample.py should draw, by the solvers alone: int (N, H, W, 3)."""
    model, numbers = load_model(ckpt, weights), range(len(y))
    noise = torch.stack([torch.randn(3, *size, generator=random_stream("noise", seed, i)) for i in numbers])
    options = {"grid": grid} if grid else {}
    velocity = samplers.guide(model, torch.tensor(y), cfg, interval, **options)
    extra = {"adams": {"order": order}}.get(solver, {})
    if solver == "euler-maruyama":
        extra = {"generator": [random_stream("solver", seed, i) for i in numbers]}
    with torch.inference_mode():
        times = samplers.time_grid(steps, shift)
        x = samplers.SOLVERS[solver](velocity, temperature * noise, times, **extra)  # (N, 3, H, W)
    return to_uint8(x).permute(0, 2, 3, 1).int().numpy()


@pytest.mark.parametrize(
    "flags,settings",
    [
        ([], {}),
        (["--solver", "heun"], {"solver": "heun"}),
        (["--solver", "adams"], {"solver": "adams"}),
        (["--solver", "adams", "--order", 4], {"solver": "adams", "order": 4}),
        (["--solver", "euler-maruyama"], {"solver": "euler-maruyama"}),
        (["--solver", "euler-maruyama", "--seed", -3], {"solver": "euler-maruyama", "seed": -3}),
        (["--steps", 7], {"steps": 7}),
        (["--cfg", 1], {"cfg": 1.0}),
        (["--cfg", -60], {"cfg": -60.0}),
        (["--cfg", 60, "--interval", 0.3, 0.7], {"cfg": 60.0, "interval": (0.3, 0.7)}),
        (["--shift", 2.5], {"shift": 2.5}),
        (["--temperature", 0.5], {"temperature": 0.5}),
        (["--seed", 7], {"seed": 7}),
        (["--weights", "raw"], {"weights": "raw"}),
        (["--class", "0,c"], {"y": [0, 0, 2, 2]}),
        (["--num", 3], {"y": [1, 1, 1]}),
        (["--resolution", "8x24"], {"size": (8, 24)}),
        (["--upscale", "2x1.25"], {"size": (32, 20), "grid": (4, 4)}),
        (["--resolution", "8x24", "--upscale", "1.5"], {"size": (12, 36), "grid": (2, 6)}),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_each_flag_has_the_effect_of_its_setting_in_the_solver(ckpt, plain, tmp_path, flags, settings):
    """The picture that the solvers give by hand, which is not the one of the defaults.

    Catches: a flag that is read and forgotten, or a grid that is lost on its way through the guidance.
    """
    default = ["--class", "b", "--num", 2, "--steps", 5, "--precision", "fp32", "--device", "cpu"]
    draw("--ckpt", ckpt, *default, "--out", tmp_path / "x", *flags)
    got, expected = images(tmp_path / "x"), by_hand(ckpt, **(SETTINGS | settings))
    assert got.shape == expected.shape and abs(got - expected).max() <= 1
    assert not settings or got.shape != plain.shape or abs(got - plain).max() > 1


def test_bf16_draws_nearly_the_picture_of_fp32(ckpt, tmp_path):
    for precision in ("fp32", "bf16"):
        how = ["--precision", precision, "--out", tmp_path / precision]
        draw("--ckpt", ckpt, "--class", "b", "--num", 2, "--steps", 5, *how)
    difference = abs(images(tmp_path / "fp32") - images(tmp_path / "bf16"))
    assert 0 < difference.max() and difference.mean() < 5


def test_the_shipped_model_draws_in_bf16_on_any_cpu(tmp_path):
    """Its layers are large enough to be packed, for which some CPUs lack the bf16 instructions."""
    flags = ["--ckpt", "emoji", "--class", "flags", "--num", 1, "--steps", 4]
    for precision in ("fp32", "bf16"):
        draw(*flags, "--precision", precision, "--out", tmp_path / precision)
    assert abs(images(tmp_path / "fp32") - images(tmp_path / "bf16")).mean() < 5


def test_an_image_depends_on_its_seed_and_number_and_not_on_its_batch(ckpt, tmp_path):
    """Up to the last bit: sums of a batch of another size may round differently, by one gray level."""
    for solver in ("euler", "euler-maruyama"):
        for batch in (1, 2, 5):
            how = ["--solver", solver, "--batch-size", batch, "--precision", "fp32", "--out", tmp_path / f"{batch}"]
            draw("--ckpt", ckpt, "--class", "b", "--num", 5, "--steps", 4, *how)
        for batch in (2, 5):
            assert abs(images(tmp_path / "1") - images(tmp_path / f"{batch}")).max() <= 1


def test_temperature_scales_the_noise_that_a_picture_grows_from(tmp_path):
    """An untrained model has velocity 0, so what it draws is what it started from."""
    save_checkpoint(tmp_path / "untrained.pt", run_state(1) | {"ema": PixNerd(TINY).state_dict()})
    for temperature in (1, 0.25):
        how = ["--steps", 2, "--temperature", temperature, "--out", tmp_path / "one"]
        draw("--ckpt", tmp_path / "untrained.pt", "--class", "a", "--num", 1, *how)
        noise = torch.randn(3, 16, 16, generator=random_stream("noise", 0, 0))
        expected = to_uint8(temperature * noise).permute(1, 2, 0).numpy()
        assert np.array_equal(pixels(tmp_path / "one" / "00000-a.png"), expected)


def test_only_pictures_of_the_shipped_model_are_calmer_unless_asked():
    def temperature(*flags):
        return flags_of(*flags).temperature

    assert temperature() == 1 and temperature("--ckpt", "x.pt") == 1
    assert temperature("--ckpt", "emoji") == 0.8 and temperature("--ckpt", "emoji", "--temperature", "1") == 1
    assert temperature("--ckpt", "emoji", "--npz", "x.npz") == 1  # to be measured


def test_all_times_of_a_grid_are_different_within_the_limits_of_steps_and_shift():
    """Equal ones would make a step of no length, on which the coefficients of Adams do not exist."""
    for shift in ("0.01", "1", "100"):
        args = flags_of("--steps", "10000", "--shift", shift)
        assert (samplers.time_grid(args.steps, args.shift).diff() > 0).all()
    for flags in (["--steps", "10001"], ["--shift", "0.009"], ["--shift", "101"]):
        with pytest.raises(SystemExit), contextlib.redirect_stderr(io.StringIO()):
            sample.parse_args(flags)


def test_frozen_weights_draw_the_picture_of_autocast(ckpt, tmp_path, monkeypatch):
    """Bit for bit, so nothing is lost by casting the weights once. Catches norms or embeddings cast along."""
    flags = ["--ckpt", ckpt, "--class", "all", "--num", 2, "--steps", 6, "--precision", "bf16"]
    draw(*flags, "--out", tmp_path / "frozen.png")
    monkeypatch.setattr(machine, "freeze", lambda model, precision, pack: None)
    draw(*flags, "--out", tmp_path / "autocast.png")
    assert np.array_equal(pixels(tmp_path / "frozen.png"), pixels(tmp_path / "autocast.png"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_sampling_draws_the_same_picture(ckpt, tmp_path, precision):
    """Five images in batches of 2: guided and not, whole batches and the rest. The tiny model, but the real path.

    In fp32 one gray level is allowed. In bf16 both round, at other places: the compiled one may not be farther from
    the fp32 picture than the eager one is, by a quarter.
    """
    if compiler_trouble():
        pytest.skip("no working compiler")
    flags = ["--ckpt", ckpt, "--class", "b", "--num", 5, "--batch-size", 2, "--steps", 6]
    for choice in ("on", "off"):
        draw(*flags, "--precision", precision, "--compile", choice, "--out", tmp_path / f"{choice}.png")
    draw(*flags, "--precision", "fp32", "--compile", "off", "--out", tmp_path / "exact.png")
    exact, on, off = (pixels(tmp_path / f"{name}.png") for name in ("exact", "on", "off"))
    if precision == "fp32":
        assert abs(on - off).max() <= 1
    else:
        assert 0 < abs(on - exact).mean() <= 1.25 * abs(off - exact).mean()


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_single_files_are_named_by_class_and_solver(ckpt, tmp_path):
    flags = ["--ckpt", ckpt, "--num", 1, "--steps", 3, "--out", tmp_path]
    said = draw(*flags)  # a model of few classes draws them all
    assert sorted(os.listdir(tmp_path)) == ["00000-a.png", "00001-b.png", "00002-c.png"]
    assert said == f"3 images of 16x16: {tmp_path}\n"
    draw(*flags, "--class", "b", "--solver", "heun,adams")
    assert sorted(os.listdir(tmp_path))[1:3] == ["00000-b-adams-2.png", "00000-b-heun.png"]


def test_several_solvers_stand_side_by_side(ckpt, tmp_path):
    """Each panel is what its solver draws alone. Catches panels in another order than their headings."""
    flags = ["--ckpt", ckpt, "--class", "a", "--num", 1, "--steps", 4, "--precision", "fp32"]
    draw(*flags, "--out", tmp_path / "all.png", "--solver", "euler,heun,adams")
    together = pixels(tmp_path / "all.png")
    step = (together.shape[1] - 2) // 3
    for i, solver in enumerate(("euler", "heun", "adams")):
        draw(*flags, "--out", tmp_path / "x.png", "--solver", solver)
        alone = pixels(tmp_path / "x.png")  # 2 white pixels around 16x16
        assert np.array_equal(together[16:32, 2 + i * step :][:, :16], alone[2:18, 2:18]), solver
        assert together[:14, 2 + i * step :][:, :step].min() < 128  # a heading


def test_gif_plays_every_solver_from_noise_to_picture(ckpt, tmp_path):
    """The last frame is the picture of --out, enlarged, and the first is the noise, the same for both solvers."""
    flags = ["--ckpt", ckpt, "--class", "a", "--num", 1, "--steps", 3, "--solver", "euler,heun", "--precision", "fp32"]
    said = draw(*flags, "--out", tmp_path / "x.png", "--gif", tmp_path / "path.gif", "--gif-noise")
    assert said == f"2 images of 16x16: {tmp_path / 'x.png'} and {tmp_path / 'path.gif'}\n"
    with Image.open(tmp_path / "path.gif") as film:
        assert film.n_frames == 4  # the noise and three steps
        assert json.loads(film.info["comment"])["solver"] == ["euler", "heun"]
        first = np.asarray(film.convert("RGB")).astype(int)
        film.seek(3)
        final = np.asarray(film.convert("RGB")).astype(int)

    def panel(frame, i):
        return frame[16:144, 2 + i * step :][:, :128][::8, ::8]  # 16 pixels across became 128

    step, sheet = (final.shape[1] - 2) // 4, pixels(tmp_path / "x.png")
    half = (sheet.shape[1] - 2) // 2
    for solver in range(2):
        picture = sheet[16:32, 2 + solver * half :][:, :16]
        assert abs(panel(final, 2 * solver) - picture).mean() < 12  # of 255 colours in a palette
        assert np.array_equal(panel(final, 2 * solver), panel(final, 2 * solver + 1))  # at t=1 both are the picture
    assert np.array_equal(panel(first, 0), panel(first, 2)) and not np.array_equal(panel(first, 0), panel(first, 1))


def test_settings_and_seed_can_be_read_back_from_the_picture(ckpt, tmp_path):
    draw("--ckpt", ckpt, "--class", "c", "--steps", 3, "--seed", 17, "--out", tmp_path / "x.png")
    with Image.open(tmp_path / "x.png") as image:
        text = image.text["settings"]
    settings = json.loads(text)
    expected = {"seed": 17, "classes": "c", "steps": 3, "ckpt": "tiny.pt", "solver": ["euler"], "cfg": 3.5, "num": 4}
    expected |= {"size": "16x16", "compile": "off", "temperature": 1.0, "interval": [0.1, 1.0]}
    assert expected.items() <= settings.items() and settings["precision"] in ("fp32", "bf16")  # not "auto"
    assert str(ckpt.parent) not in text  # a shared picture tells nothing about its maker's disk


# ---- --npz -----------------------------------------------------------------------------------------------------------


def arrays(path):
    """Images int (N, H, W, 3) and labels (N) of an npz."""
    with np.load(path) as archive:
        assert sorted(archive.files) == ["arr_0", "arr_1", "labels"] and archive["arr_0"].dtype == np.uint8
        return archive["arr_0"].astype(int), archive["labels"]


def test_npz_holds_the_images_of_its_labels(ckpt, tmp_path):
    """Image i has the noise of image i and its own label, in any batch. Catches: labels of other images."""
    flags = ["--ckpt", ckpt, "--steps", 5, "--precision", "fp32", "--num", 21]
    for batch in (5, 8):
        draw(*flags, "--batch-size", batch, "--npz", tmp_path / f"{batch}.npz")
    (five, labels), (eight, others) = arrays(tmp_path / "5.npz"), arrays(tmp_path / "8.npz")
    assert np.bincount(labels).tolist() == [7, 7, 7] and np.array_equal(labels, others)
    expected = by_hand(ckpt, **(SETTINGS | {"y": labels.tolist()}))
    assert abs(five - expected).max() <= 1 and abs(eight - expected).max() <= 1
    assert sorted(os.listdir(tmp_path)) == ["5.npz", "8.npz"]  # no shards are left


def test_labels_of_an_npz_are_balanced_by_chance_or_as_in_the_training_data(ckpt, tmp_path):
    """The counts are those that the checkpoint was saved with: 1, 2 and 5 pictures."""
    flags = ["--ckpt", ckpt, "--steps", 1, "--cfg", 1, "--npz", tmp_path / "x.npz"]
    for more, expected in (
        ([], [50, 50, 50]),  # 50 of each by default
        (["--labels", "data", "--num", 24], [3, 6, 15]),
        (["--labels", "data", "--num", 24, "--class", "a,c"], [4, 0, 20]),
        (["--labels", "balanced", "--num", 4, "--class", "a,c"], [2, 0, 2]),
    ):
        draw(*flags, *more)
        assert np.bincount(arrays(tmp_path / "x.npz")[1], minlength=3).tolist() == expected
    draw(*flags, "--labels", "random", "--num", 20)
    assert np.bincount(arrays(tmp_path / "x.npz")[1]).sum() == 20


def test_labels_of_the_data_need_a_checkpoint_that_counted_them(tmp_path):
    save_checkpoint(tmp_path / "old.pt", run_state(1))
    how = ["--labels", "data", "--npz", tmp_path / "x.npz"]
    assert "--labels data: the checkpoint does not say" in complaint("sample.py", "--ckpt", tmp_path / "old.pt", *how)
    assert os.listdir(tmp_path) == ["old.pt"]


def test_npz_resumes_with_the_same_settings_and_the_same_model_only(ckpt, tmp_path, monkeypatch):
    """The disk fills up after two shards. Catches: starting from zero, and half a file of other pictures."""
    flags = ["--ckpt", ckpt, "--steps", 2, "--num", 12, "--batch-size", 2, "--npz", tmp_path / "x.npz"]
    write, shards = pathlib.Path.write_bytes, tmp_path / "x.npz.shards"

    def full(path, content):
        if len(list(shards.glob("0*.rgb"))) == 2:
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(pathlib.Path, "write_bytes", full)
    assert "No space left" in complaint("sample.py", *flags)
    monkeypatch.undo()
    kept = {path: path.stat().st_mtime_ns for path in shards.glob("0*.rgb")}
    assert len(kept) == 2 and os.listdir(tmp_path) == ["x.npz.shards"]
    other = tmp_path / "tiny.pt"  # the same name and flags, and yet another model
    save_checkpoint(other, run_state(1, seed=9))
    for wrong, words in (
        (["--steps", 3], "steps=2, and this run has 3"),
        (["--batch-size", 3], "batch_size=2"),
        (["--seed", 1], "seed=0"),
        (["--weights", "raw"], "weights='ema'"),
        (["--ckpt", other], "model="),
    ):
        assert f"begun with {words}" in complaint("sample.py", *flags, *wrong)
    assert {path: path.stat().st_mtime_ns for path in shards.glob("0*.rgb")} == kept
    written = []
    monkeypatch.setattr(pathlib.Path, "write_bytes", lambda path, b: written.append(path.name) or write(path, b))
    draw(*flags)
    assert len(written) == 4 and sorted(os.listdir(tmp_path)) == ["tiny.pt", "x.npz"]
    draw(*flags[:-1], tmp_path / "y.npz")
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "y.npz").read_bytes()


# ---- the released model ----------------------------------------------------------------------------------------------


@pytest.fixture
def released(server, golden, tmp_path, monkeypatch):
    """A server of this machine has a small file of the released structure, which is --ckpt xl: the server."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    weights = {key[2:]: tensor for key, tensor in golden("c2i_square").items() if key.startswith("w.")}
    state = {f"ema_denoiser.{key}": tensor for key, tensor in weights.items()}
    state |= {f"denoiser.{key}": torch.zeros_like(tensor) for key, tensor in weights.items()}
    state |= {"diffusion_trainer.proj.0.weight": torch.zeros(3)}
    file = io.BytesIO()
    torch.save({"epoch": 1, "global_step": 2, "state_dict": state}, file)
    server.body = file.getvalue()
    address = server.url.replace("weights.pth", "epoch%3D1-emainit.ckpt")
    monkeypatch.setattr(models, "RELEASED_FILES", {"xl": (address, 8)})
    return server


def run_main(monkeypatch, *flags):
    """sample.py's main() by this module's own tables, some of which a test has changed."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    sample.main()


def test_the_released_file_gives_the_released_implementations_numbers(released, golden):
    """End to end by sample.py's own functions: download, import of names and weights, guidance, solver."""
    model, file, args = sample.find_model("xl"), golden("c2i_square"), flags_of()
    assert model.config.resolution == 8  # of the table: the file does not say it
    with torch.inference_mode():
        v = model(file["x"], file["t"], file["y"])
        assert (v - file["v"]).abs().max() < 1e-5 * file["v"].abs().max()
        file = golden("samplers")
        velocity = samplers.guide(model, file["y"], args.cfg, args.interval)
        x = samplers.euler(velocity, file["noise"], samplers.time_grid(args.steps, args.shift))
    assert (x - file["euler_50"]).abs().max() < 1e-4 * file["euler_50"].abs().max()


def test_the_downloaded_file_draws_and_a_damaged_one_says_what_to_delete(released, tmp_path, monkeypatch):
    flags = ["--class", "1", "--num", 1, "--steps", 2, "--out", tmp_path / "x.png"]
    run_main(monkeypatch, *flags)
    assert pixels(tmp_path / "x.png").shape == (12, 12, 3)  # as large as the table says
    kept = tmp_path / "cache" / "hub" / "checkpoints" / "epoch=1-emainit.ckpt"
    whole = kept.read_bytes()
    half, rest = whole[: len(whole) // 2], whole[len(whole) // 2 + 3 :]
    for content in (half, half + b"\xff\x00\xff" + rest):  # a cut, and three wrong bytes
        kept.write_bytes(content)
        with pytest.raises(UserError, match=f"--ckpt xl: {kept} .*once deleted, it is downloaded anew"):
            run_main(monkeypatch, *flags)
    kept.unlink()
    run_main(monkeypatch, *flags)


def test_without_a_network_one_line_names_the_address_and_the_place(released, tmp_path, monkeypatch):
    address = released.url.replace("127.0.0.1:", "127.0.0.1:1/")  # nothing listens on port 1
    monkeypatch.setattr(models, "RELEASED_FILES", {"xl": (address, 16)})
    with pytest.raises(UserError) as caught:
        run_main(monkeypatch, "--out", tmp_path / "x.png")
    message, place = str(caught.value), tmp_path / "cache" / "hub" / "checkpoints" / "weights.pth"
    assert address in message and f"put it at {place}" in message and "--ckpt" in message and "\n" not in message


def test_an_imagenet_model_draws_golden_retrievers_unless_asked(tmp_path):
    """A thousand classes get their names from the table, and class 207 is the default; for --npz it is all."""
    config = dataclasses.replace(TINY, num_classes=1000, resolution=8, hidden_size=16, depth=1)
    state = {"format": FORMAT, "config": dataclasses.asdict(config), "ema": PixNerd(config).state_dict()}
    save_checkpoint(tmp_path / "imagenet.pt", state)
    how = ["--ckpt", tmp_path / "imagenet.pt", "--steps", 1]
    draw(*how, "--num", 1, "--out", tmp_path / "x")
    assert os.listdir(tmp_path / "x") == ["00000-golden-retriever.png"]
    draw(*how, "--num", 1000, "--cfg", 1, "--npz", tmp_path / "x.npz")
    assert sorted(arrays(tmp_path / "x.npz")[1]) == list(range(1000))


# ---- classes and mistakes --------------------------------------------------------------------------------------------


def test_list_classes_needs_no_download(ckpt, tmp_path, monkeypatch):
    assert draw("--ckpt", ckpt, "--list-classes") == "   0 a\n   1 b\n   2 c\n"
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    lines = draw("--list-classes").splitlines()
    assert len(lines) == 1000 and lines[207] == " 207 golden retriever" and os.listdir(tmp_path) == []


def test_a_wrong_class_of_a_released_model_is_told_before_the_download(tmp_path, monkeypatch):
    """Catches gigabytes that are fetched to say that a sentence is no class."""
    monkeypatch.setattr(models, "cached_download", None)
    for ckpt in ([], ["--ckpt", "xl-512"]):
        line = complaint("sample.py", *ckpt, "--class", "a photo of a cat", "--out", tmp_path / "x.png")
        assert "reads like a sentence" in line and "--ckpt emoji-text --prompt 'a photo of a cat'" in line
    assert "did you mean" in complaint("sample.py", "--class", "golden retriver", "--out", tmp_path / "x.png")


def test_a_class_named_by_a_number_wins_over_an_index_and_the_ambiguity_is_said(tmp_path):
    save_checkpoint(tmp_path / "x.pt", run_state(1) | {"class_names": ["1", "10", "2"]})
    flags = ["--ckpt", tmp_path / "x.pt", "--num", 1, "--steps", 1, "--out", tmp_path / "x"]
    assert "--class 1 is taken for the class of that name (index 0), not for index 1, 10\n" in draw(
        *flags, "--class", 1
    )
    assert os.listdir(tmp_path / "x") == ["00000-1.png"]
    assert draw(*flags, "--class", "0").count("\n") == 1 and os.listdir(tmp_path / "x") == ["00000-1.png"]


@pytest.mark.parametrize(
    "flags,message",
    [
        (["--class", "nine"], "did you mean"),
        (["--class", "3"], "0 to 2"),
        (["--class=-1"], "0 to 2"),
        (["--class", ""], "'' is unknown"),
        (["--resolution", "18"], "multiples of 4"),
        (["--resolution", "400000", "--num", "64"], "8x8 tokens (32 pixels) are the most"),
        (["--gif-noise"], "does nothing without --gif"),
        (["--class", "a red apple on a table"], "emoji-text --prompt 'a red apple on a table'"),
        (["--upscale", "9000", "--num", "64"], "GB are free"),
        (["--upscale", "1.3"], "must become whole pixels"),
        (["--num", "0"], "argument --num: 0 is not at least 1"),
        (["--num", "9007199254740992"], "GB are free"),
        (["--num", "9007199254740993"], "at most 9,007,199,254,740,992"),
        (["--num", "1e3"], "argument --num: invalid int"),
        (["--steps", "0"], "argument --steps: 0 is not at least 1"),
        (["--steps", "10001"], "at most 10,000"),
        (["--steps", "9" * 5000], "argument --steps"),
        (["--order", "5"], "argument --order"),
        (["--cfg", "nan"], "argument --cfg: nan is not in [-1e9, 1e9]"),
        (["--cfg", "1e309"], "argument --cfg"),
        (["--cfg", "1e308"], "argument --cfg"),
        (["--interval", "1", "0.1"], "LOW must be below HIGH"),
        (["--interval", "nan", "nan"], "argument --interval: nan is not in"),
        (["--interval=-inf", "1"], "argument --interval"),
        (["--interval", "0", "x"], "argument --interval"),
        (["--shift", "0"], "argument --shift: 0 is not in [0.01, 100]"),
        (["--shift", "1e300"], "argument --shift"),
        (["--temperature", "0"], "argument --temperature: 0 is not above 0"),
        (["--temperature", "inf"], "argument --temperature"),
        (["--temperature", "1e308"], "argument --temperature"),
        (["--seed", "9223372036854775808"], "argument --seed: 9223372036854775808 is not a whole number of 64 bits"),
        (["--seed", "0.5"], "argument --seed"),
        (["--batch-size", "0"], "argument --batch-size: 0 is not at least 1"),
        (["--solver", "euler,rk4"], "choose from euler"),
        (["--solver", ""], "choose from euler"),
        (["--device", "nonsense"], "--device nonsense"),
        (["--device", "meta"], "--device meta"),
        (["--ckpt", "nowhere.pt"], "no checkpoint nowhere.pt"),
        (["--ckpt", "."], "is a folder"),
        (["--out", "x.bmp"], "name must end in .png"),
        (["--out", "x.webp", "--num", "2800"], "is too large, 15000 are the limit"),
        (["--gif", "film.mp4"], "must end in .gif"),
        (["--npz", "x.png"], "must end in .npz"),
        (["--npz", "x.npz", "--solver", "euler,heun"], "one --solver"),
        (["--npz", "x.npz", "--gif", "x.gif"], "no --gif"),
        (["--npz", "x.npz", "--num", "10"], "10 images cannot be shared equally by 3 classes: use 12"),
        (["--npz", "x.npz", "--num", "9007199254740992"], "GB are free"),
        (["--npz", "x.npz", "--num", "999999999", "--upscale", "64"], "GB"),
        (["--npz", "x.npz", "--labels", "sorted"], "argument --labels"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_mistakes_get_one_line_and_nothing_is_written(ckpt, tmp_path, monkeypatch, flags, message):
    """For every number of the command line what lies outside its range, and for all else what cannot be."""
    monkeypatch.chdir(tmp_path)
    status, _, errors = run_script("sample.py", "--ckpt", ckpt, "--class", "a,b,c", "--out", "x.png", *flags)
    assert status in (1, 2) and message in errors.splitlines()[-1], errors
    assert errors.splitlines()[-1].startswith("sample.py: ") and (status == 2 or errors.count("\n") == 0)
    assert os.listdir(tmp_path) == []


def test_an_image_that_is_not_finite_is_refused(tmp_path):
    """By a checkpoint whose weights are not."""
    state = run_state(1)
    state["ema"]["decoder.output.bias"][0] = float("nan")
    save_checkpoint(tmp_path / "nan.pt", state)
    for output in (["--out", tmp_path / "x.png"], ["--npz", tmp_path / "x.npz"]):
        line = complaint("sample.py", "--ckpt", tmp_path / "nan.pt", "--num", 3, "--steps", 2, *output)
        assert "a picture is not finite; try fp32, or an earlier checkpoint" in line
    assert not list(tmp_path.rglob("x.npz")) and not list(tmp_path.rglob("*.png"))


@pytest.mark.slow
def test_a_full_disk_as_seen_from_outside(ckpt, tmp_path):
    """A process of its own, whose files may have 1,000 bytes: one line on stderr, status 1, the old picture kept."""
    picture, limit = tmp_path / "x.png", lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
    picture.write_text("before")
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--num", "9", "--steps", "1", "--out", picture]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, preexec_fn=limit)
    assert done.returncode == 1 and done.stderr == "sample.py: [Errno 27] File too large\n", done.stderr
    assert os.listdir(tmp_path) == ["x.png"] and picture.read_text() == "before"


@pytest.mark.parametrize(
    "error,line",
    [
        (KeyboardInterrupt(), "sample.py: interrupted"),
        (OSError(28, "No space left on device"), "No space left"),
        (torch.OutOfMemoryError("CUDA out of memory. A long story.\nWith lines."), "use fewer images at once"),
    ],
    ids=["interrupt", "disk", "memory"],
)
@pytest.mark.parametrize("output", ["x.png", "x.jpg", "x.gif", "x.npz"])
def test_interrupted_writing_is_one_line_and_keeps_the_old_file(ckpt, tmp_path, monkeypatch, output, error, line):
    """Half the bytes are written when it happens. Catches writing under the final name, and left-over halves."""
    save = Image.Image.save

    def fail(self, path, *rest, **more):
        if output == "x.gif" and path.suffix == ".png":
            return save(self, path, *rest, **more)
        with open(path, "wb") as file:
            file.write(b"half")
        raise error

    (tmp_path / output).write_text("before")
    flag = {"x.gif": "--gif", "x.npz": "--npz"}.get(output, "--out")
    flags = ["--out", tmp_path / "singles", flag, tmp_path / output]  # the last --out counts
    monkeypatch.setattr(Image.Image, "save", fail)
    monkeypatch.setattr(pathlib.Path, "write_bytes", lambda path, content: fail(None, path))
    assert line in complaint("sample.py", "--ckpt", ckpt, "--class", "a", "--num", 1, "--steps", 1, *flags)
    assert (tmp_path / output).read_text() == "before"
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {output} | {"x.gif": {"00000-a.png"}, "x.npz": {"settings.json"}}.get(output, set())


def test_the_shipped_model_draws_every_class_in_colour(tmp_path):
    draw("--ckpt", "emoji", "--num", 2, "--steps", 6, "--solver", "adams", "--out", tmp_path / "x.png")
    assert (ROOT / "assets" / "emoji-nano.pt").stat().st_size < 12e6
    sheet = pixels(tmp_path / "x.png")
    assert all(sheet[2 + 34 * row : 34 + 34 * row, -66:].std() > 20 for row in range(9))
