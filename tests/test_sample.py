"""sample.py as a user starts it: pictures of every kind, the same ones every time, and one line for a mistake."""

import dataclasses
import functools
import http.server
import json
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch
from PIL import ExifTags, Image

import device
import sample
import samplers
from checkpoint import load_model, save_checkpoint
from data import keyed_generator, to_uint8
from device import compiler_trouble
from download import DownloadError
from flow import clean_from_velocity
from model import PRESETS, PixNerd
from sample import SampleError, find_classes
from test_checkpoint import run_state
from test_model import TINY

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


def complaint(monkeypatch, capsys, *flags):
    """Runs sample.py as a program, though in this process; it must end with one line, which is returned."""
    monkeypatch.setattr(sys, "argv", ["sample.py", *map(str, flags)])
    with pytest.raises(SystemExit) as stop:  # any other exception would have been a traceback
        runpy.run_path(str(ROOT / "sample.py"), run_name="__main__")
    if isinstance(stop.value.code, str):  # then Python prints it, and the exit status is 1
        assert "\n" not in stop.value.code
        return stop.value.code
    assert stop.value.code == 2  # argparse, after the usage
    return capsys.readouterr().err.splitlines()[-1]


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


def test_interval_shift_and_order_are_those_of_the_solver(ckpt, tmp_path, monkeypatch):
    """The same picture as by hand. Catches: a flag that is read and forgotten."""
    flags = ["--interval", 0.2, 0.6, "--shift", 2, "--solver", "adams", "--order", 3, "--cfg", 60]
    draw(monkeypatch, "--ckpt", ckpt, "--class", "b", "--num", 1, "--steps", 6, "--precision", "fp32",
         "--out", tmp_path / "x", *flags)  # fmt: skip
    noise = torch.randn(3, 16, 16, generator=keyed_generator(0, 3, 0))[None]
    model, times = load_model(ckpt), samplers.time_grid(6, 2.0)
    with torch.inference_mode():
        x = samplers.adams(samplers.guide(model, torch.tensor([1]), 60.0, (0.2, 0.6)), noise, times, order=3)
    expected = to_uint8(x)[0].permute(1, 2, 0).numpy()
    assert abs(pixels(next((tmp_path / "x").iterdir())).astype(int) - expected).max() <= 1


def test_an_image_depends_on_its_seed_and_not_on_its_batch(ckpt, tmp_path, monkeypatch):
    for solver in ("euler", "euler-maruyama"):
        for name, batch in (("one", 1), ("five", 5)):
            draw(monkeypatch, "--ckpt", ckpt, "--class", "b", "--num", 5, "--steps", 4, "--solver", solver,
                 "--batch-size", batch, "--precision", "fp32", "--out", tmp_path / f"{name}.png")  # fmt: skip
        # Another batch size may round the last bit of a float differently, so one gray level is allowed.
        difference = pixels(tmp_path / "one.png").astype(int) - pixels(tmp_path / "five.png")
        assert abs(difference).max() <= 1
    draw(monkeypatch, "--ckpt", ckpt, "--class", "b", "--num", 5, "--steps", 4, "--seed", 1,
         "--out", tmp_path / "other.png")  # fmt: skip
    assert not np.array_equal(pixels(tmp_path / "one.png"), pixels(tmp_path / "other.png"))


def test_temperature_scales_the_noise_that_a_picture_grows_from(tmp_path, monkeypatch):
    """An untrained model has velocity 0, so what it draws is what it started from."""
    state = run_state(1)
    untrained = PixNerd(TINY)
    state["ema"] = untrained.state_dict()
    save_checkpoint(tmp_path / "untrained.pt", state)
    for temperature in (1, 0.25):
        draw(monkeypatch, "--ckpt", tmp_path / "untrained.pt", "--class", "a", "--num", 1, "--steps", 2,
             "--temperature", temperature, "--out", tmp_path / "one")  # fmt: skip
        noise = torch.randn(3, 16, 16, generator=keyed_generator(0, 3, 0))
        assert np.array_equal(pixels(tmp_path / "one" / "00000-a.png"),
                              to_uint8(temperature * noise).permute(1, 2, 0))  # fmt: skip


def test_only_pictures_of_the_shipped_model_are_calmer_unless_asked():
    def temperature(*flags):
        return sample.parse_args(flags).temperature

    assert temperature() == 1 and temperature("--ckpt", "x.pt") == 1
    assert temperature("--ckpt", "emoji") == 0.8 and temperature("--ckpt", "emoji", "--temperature", "1") == 1
    assert temperature("--ckpt", "emoji", "--npz", "x.npz") == 1  # to be measured


def test_frozen_weights_draw_the_picture_of_autocast(ckpt, tmp_path, monkeypatch):
    """Bit for bit, so nothing is lost by casting the weights once. Catches norms or embeddings cast along."""
    flags = ["--ckpt", ckpt, "--class", "all", "--num", 2, "--steps", 6, "--precision", "bf16"]
    draw(monkeypatch, *flags, "--out", tmp_path / "frozen.png")
    monkeypatch.setattr(sample, "freeze", lambda model, precision, pack: None)
    draw(monkeypatch, *flags, "--out", tmp_path / "autocast.png")
    assert np.array_equal(pixels(tmp_path / "frozen.png"), pixels(tmp_path / "autocast.png"))


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_compiled_sampling_draws_the_same_picture(ckpt, tmp_path, monkeypatch, precision):
    """Five images in batches of 2: guided and not, whole batches and the rest. The tiny model, but the real path.

    In fp32 one gray level is allowed. In bf16 both round, at other places: the compiled one may not be farther from
    the fp32 picture than the eager one is, by a quarter.
    """
    if compiler_trouble():
        pytest.skip("no working compiler")
    flags = ["--ckpt", ckpt, "--class", "b", "--num", 5, "--batch-size", 2, "--steps", 6, "--precision", precision]
    for choice in ("on", "off"):
        draw(monkeypatch, *flags, "--compile", choice, "--out", tmp_path / f"{choice}.png")
    draw(monkeypatch, *flags, "--compile", "off", "--precision", "fp32", "--out", tmp_path / "exact.png")
    exact, on, off = (pixels(tmp_path / f"{name}.png").astype(int) for name in ("exact", "on", "off"))
    print(f"mean distance from fp32: compiled {abs(on - exact).mean():.3f}, eager {abs(off - exact).mean():.3f}")
    if precision == "fp32":
        assert abs(on - off).max() <= 1
    else:
        assert 0 < abs(on - exact).mean() <= 1.25 * abs(off - exact).mean()


def test_compile_auto_counts_the_operations_of_the_run(monkeypatch):
    """200 TFLOP on a CPU: eight XL images of 50 steps, but no emoji sheet. The same command always decides the same."""
    monkeypatch.setattr(sample, "compiler_trouble", lambda device="cpu": None)
    cpu = torch.device("cpu")

    def choice(config, images, *flags):
        args = sample.parse_args(["--precision", "bf16", *flags])
        return sample.pick_compile(args, config, images, (config.resolution,) * 2, cpu)

    assert choice(PRESETS["XL"], 8) == "on" and choice(PRESETS["XL"], 8, "--steps", "30") == "off"
    assert choice(PRESETS["XL"], 8, "--cfg", "1") == "off" and choice(PRESETS["XL"], 16, "--cfg", "1") == "on"
    assert choice(PRESETS["XL"], 1) == "off"
    assert choice(PRESETS["Nano"], 9 * 12) == "off" and choice(PRESETS["Nano"], 1, "--compile", "on") == "on"
    assert choice(PRESETS["XL"], 100, "--compile", "off") == "off"
    assert choice(PRESETS["XL"], 100, "--precision", "fp32") == "off"  # packed weights are faster there


def test_compile_on_without_a_compiler_is_one_line_and_auto_says_so(ckpt, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(device, "compiler_trouble", lambda device="cpu": "no g++ here")
    flags = ["--ckpt", ckpt, "--class", "a", "--num", 1, "--steps", 2, "--out", tmp_path / "x.png"]
    assert complaint(monkeypatch, capsys, *flags, "--compile", "on") == "sample.py: --compile on: no g++ here"
    assert not (tmp_path / "x.png").exists()
    monkeypatch.setattr(sample, "compiler_trouble", lambda device="cpu": "no g++ here")
    monkeypatch.setattr(sample, "COMPILE_PAYS", {("cpu", precision): 0 for precision in ("fp32", "bf16")})
    draw(monkeypatch, *flags)
    assert "not compiling, which is slower but the same: no g++ here" in capsys.readouterr().out


def test_single_files_are_named_by_class_and_solver(ckpt, tmp_path, monkeypatch):
    flags = ["--ckpt", ckpt, "--class", "all", "--num", 1, "--steps", 3, "--out", tmp_path]
    draw(monkeypatch, *flags)
    assert sorted(os.listdir(tmp_path)) == ["00000-a.png", "00001-b.png", "00002-c.png"]
    draw(monkeypatch, *flags, "--class", "b", "--solver", "heun,adams")
    assert sorted(os.listdir(tmp_path))[1:3] == ["00000-b-adams-2.png", "00000-b-heun.png"]


# ---- several solvers, films, metadata --------------------------------------------------------------------------------


def test_several_solvers_stand_side_by_side(ckpt, tmp_path, monkeypatch):
    """Each panel is what its solver draws alone. Catches panels in another order than their headings."""
    flags = ["--ckpt", ckpt, "--class", "a", "--num", 1, "--steps", 4, "--precision", "fp32",
             "--out", tmp_path / "x.png"]  # fmt: skip
    draw(monkeypatch, *flags, "--solver", "euler,heun,adams")
    together = pixels(tmp_path / "x.png")
    step = (together.shape[1] - 2) // 3
    for i, solver in enumerate(("euler", "heun", "adams")):
        draw(monkeypatch, *flags, "--solver", solver)
        alone = pixels(tmp_path / "x.png")  # 2 white pixels around 16x16
        assert np.array_equal(together[16:32, 2 + i * step :][:, :16], alone[2:18, 2:18]), solver
        assert together[:14, 2 + i * step :][:, :step].min() < 128  # a heading


@pytest.mark.parametrize("solver", ["euler", "heun", "adams", "euler-maruyama"])
def test_figure_7_a_film_holds_x_t_and_the_image_predicted_from_it(ckpt, solver):
    """The prediction is x_t + (1 - t) v at x_t itself. Catches Heun's trial points, and a frame too many or too few."""
    flags = ["--ckpt", str(ckpt), "--steps", "4", "--cfg", "2", "--gif", "x.gif", "--precision", "fp32"]
    args = sample.parse_args(flags)
    model, size = sample.find_model(args)
    y, states = torch.tensor([1, 2]), []

    class Bar:
        update = staticmethod(lambda step: None)

    with torch.inference_mode():
        images, film = sample.draw(args, solver, model, y, [5, 6], size, Bar)
        assert film.shape == (5, 2, 2, 3, 16, 16) and all(torch.equal(half, images) for half in film[-1])
        velocity = samplers.guide(model, y, 2.0)
        noise = torch.stack([torch.randn(3, 16, 16, generator=keyed_generator(0, 3, i)) for i in (5, 6)])
        keep = lambda step, t, x: states.append((t, x))
        extra = {"euler-maruyama": {"generator": [keyed_generator(0, 4, i) for i in (5, 6)]}}.get(solver, {})
        getattr(samplers, solver.replace("-", "_"))(velocity, noise, samplers.time_grid(4), callback=keep, **extra)
        for (t, x), (shown, predicted) in zip(states[:-1], film):
            assert torch.equal(shown, to_uint8(x))
            assert torch.equal(predicted, to_uint8(clean_from_velocity(velocity(x, t), x, t)))


def test_gif_plays_every_solver_from_noise_to_picture(ckpt, tmp_path, monkeypatch):
    draw(monkeypatch, "--ckpt", ckpt, "--class", "all", "--num", 1, "--steps", 3, "--solver", "euler,heun",
         "--out", tmp_path / "x.png", "--gif", tmp_path / "path.gif")  # fmt: skip
    with Image.open(tmp_path / "path.gif") as film:
        assert film.n_frames == 4  # the noise and three steps
        assert film.width > 4 * 18 and json.loads(film.info["comment"])["solver"] == ["euler", "heun"]
        film.seek(3)
        last = np.asarray(film.convert("L")).astype(int)
    sheet = last[14:, 8:]  # without headings; at t=1 both panels of a solver show the same pictures
    assert sheet.std() > 20 and sorted(os.listdir(tmp_path)) == ["path.gif", "x.png"]


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_settings_and_seed_can_be_read_back_from_the_picture(ckpt, tmp_path, monkeypatch, ending):
    draw(monkeypatch, "--ckpt", ckpt, "--class", "c", "--steps", 3, "--seed", 17, "--out", tmp_path / f"x.{ending}")
    with Image.open(tmp_path / f"x.{ending}") as image:
        assert image.format == {"jpg": "JPEG"}.get(ending, ending.upper())
        if ending == "png":
            text = image.text["settings"]
        else:
            comment = image.getexif().get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment]
            text = comment.removeprefix(b"ASCII\0\0\0").decode()
    settings = json.loads(text)
    expected = {"seed": 17, "classes": "c", "steps": 3, "ckpt": "tiny.pt", "solver": ["euler"], "cfg": 3.5}
    assert expected.items() <= settings.items() and settings["precision"] in ("fp32", "bf16")  # not "auto"
    assert str(ckpt.parent) not in text  # a shared picture tells nothing about its maker's disk


# ---- --upscale -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("upscale,shape", [
    ("1", (16, 16)), ("2", (32, 32)), ("1.5", (24, 24)), ("2x1.25", (32, 20)), ("0.5", (8, 8)),
])  # fmt: skip
def test_section_4_5_upscale_keeps_the_tokens_under_guidance(ckpt, tmp_path, monkeypatch, upscale, shape):
    """Against Euler and guidance written out, with grid=(4, 4). Catches a grid lost on its way through `guide`."""
    draw(monkeypatch, "--ckpt", ckpt, "--class", "b", "--num", 1, "--steps", 5, "--cfg", 3, "--upscale", upscale,
         "--precision", "fp32", "--out", tmp_path / "x.png")  # fmt: skip
    got = pixels(tmp_path / "x.png")[2:-2, 2:-2]
    assert got.shape == (*shape, 3)
    model, _ = sample.find_model(sample.parse_args(["--ckpt", str(ckpt)]))
    grid = {} if upscale == "1" else {"grid": (4, 4)}  # factor 1 is the plain path
    x = torch.randn(3, *shape, generator=keyed_generator(0, 3, 0))[None]
    with torch.inference_mode():
        for i in range(5):
            t = torch.tensor([i / 5])
            v_class, v_none = (model(x, t, torch.tensor([y]), **grid) for y in (1, TINY.num_classes))
            x = x + (v_none + 3 * (v_class - v_none) if i else v_class) / 5
    assert abs(got.astype(int) - to_uint8(x)[0].permute(1, 2, 0).numpy()).max() <= 1


def test_upscale_and_resolution_together(ckpt, tmp_path, monkeypatch):
    draw(monkeypatch, "--ckpt", ckpt, "--class", "b", "--num", 1, "--steps", 2, "--resolution", "8x24",
         "--upscale", "1.5x3", "--out", tmp_path / "x.png")  # fmt: skip
    assert pixels(tmp_path / "x.png").shape == (12 + 4, 72 + 4, 3)


# ---- --npz -----------------------------------------------------------------------------------------------------------


def arrays(path):
    with np.load(path) as archive:
        assert sorted(archive.files) == ["arr_0", "arr_1", "labels"]
        assert archive["arr_0"].dtype == np.uint8 and np.array_equal(archive["arr_1"], archive["labels"])
        return archive["arr_0"], archive["labels"]


def test_npz_holds_each_class_equally_often_shuffled_by_the_seed_alone(ckpt, tmp_path, monkeypatch):
    """Catches order that depends on the batch, labels of other images, sorted classes, a lost short last batch."""
    flags = ["--ckpt", ckpt, "--steps", 2, "--precision", "fp32", "--num", 21]
    for name, more in (("a", ["--batch-size", 5]), ("b", ["--batch-size", 8]), ("seed", ["--seed", 1]),
                       ("random", ["--labels", "random", "--num", 20]),
                       ("two", ["--class", "a,c", "--num", 4])):  # fmt: skip
        draw(monkeypatch, *flags, *more, "--npz", tmp_path / f"{name}.npz")
    images, labels = arrays(tmp_path / "a.npz")
    assert (
        images.shape == (21, 16, 16, 3) and np.bincount(labels).tolist() == [7, 7, 7] and (np.diff(labels) < 0).any()
    )
    other_images, other_labels = arrays(tmp_path / "b.npz")
    assert np.array_equal(labels, other_labels) and abs(images.astype(int) - other_images).max() <= 1
    assert not np.array_equal(labels, arrays(tmp_path / "seed.npz")[1])
    drawn = np.bincount(arrays(tmp_path / "random.npz")[1], minlength=3)
    assert drawn.sum() == 20 and drawn.min() > 0
    assert sorted(arrays(tmp_path / "two.npz")[1].tolist()) == [0, 0, 2, 2]
    assert sorted(os.listdir(tmp_path)) == [
        "a.npz",
        "b.npz",
        "random.npz",
        "seed.npz",
        "two.npz",
    ]  # no shards are left
    # Image i has the noise of image i and its own label: the fifth, drawn alone.
    args = sample.parse_args(["--ckpt", str(ckpt), "--steps", "2", "--cfg", "2.5", "--precision", "fp32"])
    model, size = sample.find_model(args)
    with torch.inference_mode():
        alone, _ = sample.draw(args, "euler", model, torch.tensor(labels[4:5]), [4], size, sample.tqdm(disable=True))
    assert abs(alone[0].permute(1, 2, 0).numpy().astype(int) - images[4]).max() <= 1


def test_npz_goes_on_with_finished_shards_and_with_the_same_settings_only(ckpt, tmp_path, monkeypatch):
    """Catches starting from zero, and half a file of other pictures."""
    flags = ["--ckpt", ckpt, "--steps", 2, "--num", 12, "--batch-size", 2, "--npz", tmp_path / "x.npz"]
    plain, drawn = sample.draw, []

    def interrupted(args, solver, model, y, numbers, *rest):
        if drawn == [[0, 1], [2, 3]]:
            raise KeyboardInterrupt
        drawn.append(numbers)
        return plain(args, solver, model, y, numbers, *rest)

    monkeypatch.setattr(sample, "draw", interrupted)
    with pytest.raises(KeyboardInterrupt):
        draw(monkeypatch, *flags)
    assert os.listdir(tmp_path) == ["x.npz.shards"]
    for wrong, words in ((["--steps", 3], "steps=2, and this run has 3"), (["--batch-size", 3], "batch_size=2"),
                         (["--seed", 1], "seed=0"), (["--weights", "raw"], "weights='ema'")):  # fmt: skip
        with pytest.raises(SampleError, match=f"begun with {words}"):
            draw(monkeypatch, *flags, *wrong)
    other = tmp_path / "tiny.pt"  # the same name and flags, and yet another model
    save_checkpoint(other, run_state(1, seed=9))
    with pytest.raises(SampleError, match="begun with model="):
        draw(monkeypatch, *flags, "--ckpt", other)
    other.unlink()
    drawn.clear()
    draw(monkeypatch, *flags)
    assert drawn == [[4, 5], [6, 7], [8, 9], [10, 11]] and os.listdir(tmp_path) == ["x.npz"]


def test_npz_names_a_damaged_shard(ckpt, tmp_path, monkeypatch):
    flags = ["--ckpt", ckpt, "--steps", 1, "--num", 6, "--batch-size", 3, "--npz", tmp_path / "x.npz"]
    monkeypatch.setattr(sample.shutil, "rmtree", lambda folder: None)
    draw(monkeypatch, *flags)
    shard = tmp_path / "x.npz.shards" / "000001.npy"
    for content in (shard.read_bytes()[:-100], b""):
        shard.write_bytes(content)
        with pytest.raises(SampleError, match="000001.npy cannot be read .* delete it"):
            draw(monkeypatch, *flags)


@pytest.mark.slow
def test_npz_killed_and_gone_on_with_by_two_processes_has_the_same_bytes(ckpt, tmp_path, monkeypatch):
    """SIGKILL in the middle of one process, then two, against one that was left alone: the whole file is equal."""
    flags = ["--ckpt", ckpt, "--device", "cpu", "--num", 60, "--batch-size", 3, "--steps", 30,
             "--solver", "euler-maruyama"]  # fmt: skip
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as below: another number of threads may add in another order
    draw(monkeypatch, *flags, "--npz", tmp_path / "alone.npz")
    torch.set_num_threads(threads)

    path, environment = tmp_path / "killed.npz", os.environ | {"OMP_NUM_THREADS": "1"}
    flags = [str(flag) for flag in (ROOT / "sample.py", *flags, "--npz", path)]
    shards = tmp_path / "killed.npz.shards"
    with subprocess.Popen([sys.executable, *flags], env=environment) as one:
        deadline = time.monotonic() + 60
        while one.poll() is None and time.monotonic() < deadline and len(list(shards.glob("[0-9]*.npy"))) < 5:
            time.sleep(0.01)
        one.send_signal(signal.SIGKILL)
    assert one.returncode == -signal.SIGKILL and not path.exists() and 5 <= len(list(shards.glob("[0-9]*.npy"))) < 20

    # The "--" keeps torchrun from taking --num for its own --numa-binding.
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--", *flags]
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as two:
        try:
            _, errors = two.communicate(timeout=120)
        finally:
            two.terminate()  # torchrun passes it on to its processes
    assert two.returncode == 0, errors
    assert sorted(os.listdir(tmp_path)) == ["alone.npz", "killed.npz"]
    assert path.read_bytes() == (tmp_path / "alone.npz").read_bytes()


# ---- the released model ----------------------------------------------------------------------------------------------


@pytest.fixture
def released(tmp_path, monkeypatch):
    """A web server on this machine for a small .ckpt of the released structure: (its address, its folder)."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    folder = tmp_path / "web"
    folder.mkdir()
    with np.load(ROOT / "tests" / "golden" / "c2i_square.npz") as file:
        weights = {key[2:]: torch.from_numpy(file[key]) for key in file.files if key.startswith("w.")}
    state = {f"ema_denoiser.{key}": tensor for key, tensor in weights.items()}
    state |= {f"denoiser.{key}": torch.zeros_like(tensor) for key, tensor in weights.items()}
    state |= {"diffusion_trainer.proj.0.weight": torch.zeros(3)}
    torch.save({"epoch": 1, "global_step": 2, "state_dict": state}, folder / "epoch=1-emainit.ckpt")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=folder)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/epoch%3D1-emainit.ckpt"
    monkeypatch.setattr(sample, "RELEASED_FILES", {"xl": (url, 16)})
    yield url, folder
    server.shutdown()
    server.server_close()


def test_the_released_file_gives_the_released_implementations_numbers(released, golden, monkeypatch):
    """End to end by sample.py's own functions: download, import of names and weights, guidance, solver."""
    model, size = sample.find_model(sample.parse_args([]))
    file = golden("c2i_square")
    assert size == (16, 16)
    with torch.inference_mode():
        v = model(file["x"], file["t"], file["y"])
        assert (v - file["v"]).abs().max() < 1e-5 * file["v"].abs().max()
        file = golden("samplers")
        defaults = sample.parse_args([])
        velocity = samplers.guide(model, file["y"], 3.5, defaults.interval)
        x = samplers.euler(velocity, file["noise"], samplers.time_grid(defaults.steps, defaults.shift))
    assert (x - file["euler_50"]).abs().max() < 1e-4 * file["euler_50"].abs().max()


def test_the_downloaded_file_draws_and_a_damaged_one_says_what_to_delete(released, tmp_path, monkeypatch):
    flags = ["--class", "1", "--num", 1, "--steps", 2, "--out", tmp_path / "x.png"]
    draw(monkeypatch, *flags)
    assert pixels(tmp_path / "x.png").shape == (20, 20, 3)
    kept = tmp_path / "cache" / "hub" / "checkpoints" / "epoch=1-emainit.ckpt"
    whole = kept.read_bytes()
    half, rest = whole[: len(whole) // 2], whole[len(whole) // 2 + 3 :]
    for content in (half, half + b"\xff\x00\xff" + rest):  # a cut, and three wrong bytes
        kept.write_bytes(content)
        with pytest.raises(SampleError, match=f"--ckpt xl: {kept} .*once it is deleted"):
            draw(monkeypatch, *flags)
    kept.unlink()
    draw(monkeypatch, *flags)


def test_without_a_network_one_line_names_the_address_and_the_place(released, tmp_path, monkeypatch):
    url = released[0].replace("127.0.0.1:", "127.0.0.1:1/")  # nothing listens on port 1
    monkeypatch.setattr(sample, "RELEASED_FILES", {"xl": (url, 16)})
    with pytest.raises(DownloadError) as caught:
        draw(monkeypatch, "--out", tmp_path / "x.png")
    message, place = str(caught.value), tmp_path / "cache" / "hub" / "checkpoints" / "epoch=1-emainit.ckpt"
    assert url in message and f"put it at {place}" in message and "--ckpt" in message and "\n" not in message


# ---- classes and mistakes --------------------------------------------------------------------------------------------


def test_list_classes_needs_no_download(ckpt, monkeypatch, capsys):
    draw(monkeypatch, "--ckpt", ckpt, "--list-classes")
    assert capsys.readouterr().out == "   0 a\n   1 b\n   2 c\n"
    monkeypatch.setattr(sample, "cached_download", None)
    draw(monkeypatch, "--list-classes")
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1000 and lines[207] == " 207 golden retriever"


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
    (["--resolution", "big"], "not N or HEIGHTxWIDTH"), (["--resolution", "16x16x16"], "not N or HEIGHTxWIDTH"),
    (["--num", "0"], "at least 1"), (["--shift", "0"], "above 0"),
    (["--temperature", "0"], "above 0"), (["--solver", "euler,rk4"], "choose from euler"),
    (["--resolution", "400000", "--num", "64"], "GB are free"), (["--upscale", "9000", "--num", "64"], "GB are free"),
    (["--ckpt", "nowhere.pt"], "no checkpoint nowhere.pt"), (["--device", "nonsense"], "--device nonsense"),
    (["--upscale", "1.3"], "makes patches of 4 pixels 5.2x5.2: both sides must be whole, so use multiples of 1/4"),
    (["--upscale", "0"], "must be whole"), (["--upscale", "1/0"], "not a factor"), (["--upscale", "x"], "not a factor"),
    (["--npz", "x.npz", "--num", "10"], "10 images cannot be shared equally by 3 classes: use 12, or --labels random"),
    (["--npz", "x.npz", "--solver", "euler,heun"], "one --solver"), (["--npz", "x.npz", "--gif", "x.gif"], "no --gif"),
    (["--class=--5"], "'--5' is unknown"), (["--class", "²"], "'²' is unknown"), (["--class", ""], "'' is unknown"),
    (["--cfg", "nan"], "--cfg a number"), (["--interval", "1", "0.1"], "LOW must be below HIGH"),
    (["--interval", "nan", "nan"], "LOW must be below HIGH"), (["--seed", "9223372036854775808"], "--seed must be"),
    (["--gif", "film.mp4"], "must end in .gif"), (["--npz", "x.png"], "must end in .npz"),
    (["--out", "x.bmp"], "name must end in .png"), (["--out", "x.webp", "--num", "2800"], "its format ends at 16383"),
    (["--out", "x.jpg", "--num", "11000"], "its format ends at 65500"), (["--ckpt", "."], "is a folder"),
], ids=lambda value: " ".join(value) if isinstance(value, list) else "")  # fmt: skip
def test_mistakes_get_one_line(ckpt, tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in complaint(monkeypatch, capsys, "--ckpt", ckpt, "--class", "a,b,c", "--out", "x.png", *flags)
    assert os.listdir(tmp_path) == []


def test_a_mistake_seen_from_outside(ckpt, tmp_path):
    command = [sys.executable, ROOT / "sample.py", "--ckpt", ckpt, "--class", "nine", "--out", tmp_path / "x.png"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (
        done.returncode == 1 and done.stderr.count("\n") == 1 and done.stderr.startswith("sample.py: --class 'nine'")
    )


def test_upscale_of_a_linear_decoder_is_refused():
    linear = dataclasses.replace(TINY, decoder="linear")
    assert sample.enlarge(linear, (16, 16), "1") == (16, 16)
    with pytest.raises(SampleError, match="--upscale 2 needs a neural field"):
        sample.enlarge(linear, (16, 16), "2")


@pytest.mark.parametrize("flag,name,reason", [
    ("--out", "file/x.png", "cannot be written"), ("--out", "file", "cannot be written"),
    ("--gif", "file/x.gif", "cannot be written"), ("--npz", "file/x.npz", "cannot be written"),
    ("--out", "folder.png", "is a folder"), ("--npz", "folder.npz", "is a folder"),
])  # fmt: skip
def test_row_15_unwritable_output_is_found_before_drawing(ckpt, tmp_path, monkeypatch, capsys, flag, name, reason):
    (tmp_path / "file").write_text("in the way")
    for folder in ("folder.png", "folder.npz"):
        (tmp_path / folder).mkdir()
    monkeypatch.setattr(samplers, "euler", None)  # drawing would fail
    flags = ["--ckpt", ckpt, "--class", "a", "--out", tmp_path / "x.png", flag, tmp_path / name]
    line = complaint(monkeypatch, capsys, *flags)
    assert f"{flag} {tmp_path / name}" in line and reason in line
    assert sorted(os.listdir(tmp_path)) == ["file", "folder.npz", "folder.png"]


@pytest.mark.parametrize("error,line", [
    (KeyboardInterrupt(), "sample.py: interrupted"), (OSError(28, "No space left on device"), "No space left"),
    (torch.OutOfMemoryError("CUDA out of memory. A long story.\nWith lines."), "use a smaller --batch-size"),
], ids=["interrupt", "disk", "memory"])  # fmt: skip
@pytest.mark.parametrize("output", ["x.png", "x.jpg", "x.gif", "x.npz"])
def test_row_14_interrupted_writing_keeps_the_old_file(ckpt, tmp_path, monkeypatch, capsys, output, error, line):
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
    monkeypatch.setattr(np, "save", lambda path, array: fail(None, path))
    assert line in complaint(monkeypatch, capsys, "--ckpt", ckpt, "--class", "a", "--num", 1, "--steps", 1, *flags)
    assert (tmp_path / output).read_text() == "before"
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert left == {output} | {"x.gif": {"00000-a.png"}, "x.npz": {"settings.json"}}.get(output, set())


def test_row_32_an_image_that_is_not_finite_is_refused(ckpt, tmp_path, monkeypatch):
    monkeypatch.setattr(samplers, "euler", lambda velocity, noise, times, callback: noise * float("nan"))
    with pytest.raises(SampleError, match="not finite"):
        draw(monkeypatch, "--ckpt", ckpt, "--class", "a", "--out", tmp_path / "x.png")
    assert os.listdir(tmp_path) == []


def test_the_shipped_model_draws_every_class_quickly(tmp_path):
    """Under 20 s on two cores, start-up included, and not nothing: every class has colour."""
    seconds = []
    for _ in range(2):  # the better of two: another program may be busy during one
        start = time.monotonic()
        done = subprocess.run([sys.executable, ROOT / "sample.py", "--ckpt", "emoji", "--class", "all",
                               "--out", tmp_path / "x.png"], capture_output=True, text=True, timeout=100)  # fmt: skip
        assert done.returncode == 0, done.stderr
        seconds.append(time.monotonic() - start)
        if seconds[-1] < 20:
            break
    assert min(seconds) < 20
    assert (ROOT / "assets" / "emoji-nano.pt").stat().st_size < 12e6
    sheet = pixels(tmp_path / "x.png")
    assert all(sheet[2 + 34 * row : 34 + 34 * row, -200:].std() > 20 for row in range(9))
