"""app.py without a browser, most of it without gradio: what is asked, what is refused, what a job sends."""

import dataclasses
import json
import shlex
import threading
import time
import types

import numpy as np
import pytest
import torch
from helpers import TINY, complaint, run_script, run_state, text_state
from PIL import Image

import app
from model import PRESETS, PixNerd
from runtime import asked as asked_module
from runtime import page, sampling_cost
from runtime.asked import Served, controls_of, read
from runtime.checkpoint import FORMAT, load_model, save_checkpoint
from runtime.controls import LABELS, SLIDERS, in_words_of_the_page
from runtime.files import UserError
from runtime.inside import DENSITIES, comparable, field_of_patch
from runtime.jobs import Stopped, in_step, listen
from runtime.models import RELEASED_CONFIGS
from runtime.pictures import film_frame
from runtime.sample_options import SMALL_TEXT_DEFAULTS

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def ckpt(tmp_path_factory):
    """A tiny untrained checkpoint with three classes, a, b and c."""
    path = tmp_path_factory.mktemp("ckpt") / "tiny.pt"
    save_checkpoint(path, run_state(1))
    return path


@pytest.fixture(scope="module")
def models(ckpt):
    return {str(ckpt): Served(str(ckpt), None, CPU)}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    """A tiny text model."""
    path = tmp_path_factory.mktemp("ckpt") / "text.pt"
    save_checkpoint(path, text_state())
    return {str(path): Served(str(path), None, CPU)}


def asked(models, changes=None, limit=1e9, **what):
    """What read makes of the controls as they first stand, but for the changes."""
    (served,) = models.values()
    controls = controls_of(served)
    values = {name: properties.get("value") for name, properties in controls.items()}
    values |= {
        "prompt": "a red apple",
        "negative": "",
        "ckpt": served.name,
        "seed": 0,
        "others": [],
        "num": 4,
        "steps": 6,
    } | (changes or {})
    return read(models, [values[name] for name in LABELS], limit, **what)


def sent(job, *arguments):
    """All that a job sends, in one dict."""
    parts = {}
    job(lambda named, needed=True: parts.update(named), *arguments)
    return parts


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


# ---- what is asked ---------------------------------------------------------------------------------------------------


def same_as_its_command(job, tmp_path):
    """Asserts that sample.py draws, by the command that the page shows, the pixels of the page with its settings."""
    torch.set_num_threads(1)  # as run_script has
    parts = sent(app.draw_job, tmp_path, job)
    script, *flags = shlex.split(parts["command"])[1:]
    flags += ["--precision", job.served.precision, "--compile", "off", "--device", "cpu"]
    status, _, stderr = run_script(script, *flags, "--out", tmp_path / "x")
    assert status == 0, stderr
    expected = sorted((tmp_path / "x").iterdir())
    assert len(parts["gallery"]) == len(expected) == job.flags["num"]
    for (one, _), other in zip(parts["gallery"], expected):
        assert (pixels(one) == pixels(other)).all()
        assert json.loads(Image.open(one).text["settings"]) == json.loads(Image.open(other).text["settings"])
    assert json.loads(Image.open(parts["sheet"]["value"]).text["settings"])["seed"] == job.flags["seed"]
    return np.stack([pixels(path) for path in expected])


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"class": 2, "seed": -5, "num": 3},
        {"solver": "adams", "order": 3, "shift": 2.5, "cfg": 1.0},
        {"solver": "euler-maruyama", "temperature": 0.5},
        {"low": 0.3, "high": 0.65, "cfg": 7.5},
        {"rows": 2, "columns": 5, "pixels": 6},
    ],
    ids=str,
)
def test_the_command_that_the_page_shows_draws_the_same_pixels_and_settings(models, tmp_path, changes):
    same_as_its_command(asked(models, changes), tmp_path)


def test_so_it_does_for_prompts_and_a_negative_prompt_lasts_for_one_job(sentences, tmp_path):
    drawn = []
    prompts = [{}, {"prompt": "--npz=x", "negative": "green"}, {"prompt": "pear", "height": 24}, {}]
    for number, changes in enumerate(prompts):
        (tmp_path / str(number)).mkdir()
        drawn.append(same_as_its_command(asked(sentences, changes), tmp_path / str(number)))
    assert (drawn[0] == drawn[3]).all() and (drawn[0] != drawn[1]).any() and drawn[2].shape[1:3] == (24, 16)


@pytest.mark.parametrize(
    "changes,label",
    [
        ({"prompt": ""}, "Prompt"),
        ({"prompt": "  \n"}, "Prompt"),
        ({"prompt": None}, "Prompt"),
        ({"prompt": "x" * 3000}, "Prompt"),
        ({"negative": "x" * 3000}, "Negative prompt"),
        ({"negative": "green", "cfg": 1}, "Negative prompt"),
        ({"height": 17}, "Height in pixels"),
        ({"height": 1024}, "Height in pixels"),
        ({"width": None}, "Width in pixels"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_prompt_that_cannot_be_drawn_gets_a_sentence(sentences, changes, label):
    with pytest.raises(UserError) as error:
        asked(sentences, changes)
    assert f"“{label}”" in in_words_of_the_page(error.value)


def test_a_text_model_shows_prompts_and_the_defaults_of_sample_py(sentences, models):
    (text,), (classes,) = map(controls_of, sentences.values()), map(controls_of, models.values())
    shown = {name: text[name]["value"] for name in ("solver", "steps", "cfg", "low", "high", "shift")}
    assert shown != {name: classes[name]["value"] for name in shown}
    low, high = SMALL_TEXT_DEFAULTS["interval"]
    assert shown == {"low": low, "high": high} | {
        name: value[0] if name == "solver" else value
        for name, value in SMALL_TEXT_DEFAULTS.items()
        if name != "interval"
    }
    for controls, prompts in ((text, True), (classes, False)):
        visible = {name: controls[name]["visible"] for name in ("class", "prompt", "negative")}
        assert visible == {"class": not prompts, "prompt": prompts, "negative": prompts}


def test_the_controls_of_the_released_text_model_are_those_of_the_authors_demo():
    """Defaults and ranges, from its configuration alone; the number of pictures, 1 to 4 there, is 1 to 16 here."""
    model = types.SimpleNamespace(config=RELEASED_CONFIGS["xxl"], class_names=None)
    controls = controls_of(types.SimpleNamespace(name="xxl", text=True, model=model))
    shown = {"solver": "adams", "order": 2, "steps": 25, "cfg": 4.0, "shift": 3.0, "low": 0.0, "high": 1.0}
    shown |= {"temperature": 1.0, "height": 512, "width": 512, "class": None}
    assert {name: controls[name]["value"] for name in shown} == shown
    ranges = {"steps": (1, 100, 1), "order": (1, 4, 1), "cfg": (0.1, 10, 0.1), "shift": (0.1, 5, 0.1)}
    assert {name: SLIDERS[name][1:] for name in ranges} == ranges and SLIDERS["num"][1:] == (1, 16, 1)
    visible = {name for name, control in controls.items() if control.get("visible", True)}
    assert {"prompt", "negative", "height", "width"} <= visible
    assert not visible & {"class", "rows", "columns", "pixels"}


def test_the_patches_of_a_text_model_can_be_looked_into(sentences):
    looked = sent(app.look_job, asked(sentences, {"num": 2}, inside=True), None, 1)["looked"]
    assert [picture.shape[-1] for picture in looked.pictures] == [16, 32, 64]
    assert set(looked.patch(1, 1, 3)) == {"map", "densities", "basis", "features", "weights"}


@pytest.mark.parametrize(
    "changes,label",
    [
        ({"ckpt": "/etc/passwd"}, "Model"),
        ({"ckpt": ["x"]}, "Model"),
        ({"class": "--npz=x.npz"}, "Class"),
        ({"class": 3}, "Class"),
        ({"class": None}, "Class"),
        ({"class": True}, "Class"),
        ({"seed": None}, "Seed"),
        ({"seed": "12e"}, "Seed"),
        ({"seed": 2**64}, "Seed"),
        ({"solver": "magic"}, "Solver"),
        ({"solver": "euler --out=x"}, "Solver"),
        ({"num": 17}, "Number of pictures"),
        ({"num": 1.5}, "Number of pictures"),
        ({"steps": "ten"}, "Steps"),
        ({"steps": float("nan")}, "Steps"),
        ({"cfg": float("inf")}, "Guidance scale"),
        ({"low": 0.8, "high": 0.2}, "Guided from time"),
        ({"rows": 10**9}, "Height in tokens"),
        ({"rows": 9}, "Height in tokens"),
        ({"columns": None}, "Width in tokens"),
        ({"pixels": 0}, "Pixels along a patch"),
        ({"others": ["magic"]}, "Compare with"),
        ({"others": None}, "Compare with"),
    ],
    ids=str,
)
def test_nonsense_in_a_control_gets_a_sentence_that_names_the_control(models, changes, label):
    with pytest.raises(UserError) as error:
        asked(models, changes, film=True)
    sentence = in_words_of_the_page(error.value)
    assert f"“{label}”" in sentence and "--" not in sentence and "\n" not in sentence and len(sentence) < 250


def test_a_job_that_would_take_too_long_or_too_much_memory_is_refused_before_it_starts(models, monkeypatch):
    with pytest.raises(UserError, match="about .* s, and a job may take 0 s: lower"):
        asked(models, limit=1e-9)
    with pytest.raises(UserError, match="at most 3 solvers and 4 pictures"):
        asked(models, {"num": 5}, film=True)
    monkeypatch.setattr(sampling_cost, "available_memory", lambda device: 1e5)
    with pytest.raises(UserError, match="GB are free"):
        asked(models)


def test_height_and_width_of_a_text_model_are_apart_with_the_ranges_of_the_authors_demo(models, sentences):
    """Of XXL at 512; of another text model in its proportions. Models of classes have other controls."""
    xxl = asked_module.sizes_of(RELEASED_CONFIGS["xxl"])
    for name in ("height", "width"):
        assert xxl[name] == {"minimum": 128, "maximum": 1024, "value": 512, "step": 32, "visible": True}
    shown = {name for name, control in xxl.items() if control["visible"]}
    assert shown == {"height", "width"}
    job = asked(sentences, {"height": 8, "width": 32})
    assert job.size == (8, 32) and job.grid == (2, 2)
    sizes = asked_module.sizes_of(PRESETS["XL"])
    assert {name for name, control in sizes.items() if control["visible"]} == {"rows", "columns", "pixels"}
    assert [sizes["rows"][end] for end in ("minimum", "value", "maximum")] == [1, 16, 32]
    assert [sizes["pixels"][end] for end in ("minimum", "value", "maximum")] == [8, 16, 64]


@pytest.mark.parametrize("name", ["models", "sentences"])
def test_every_size_that_the_controls_offer_is_drawn(request, name):
    """Catches: a slider's end that sample.py's own checks refuse."""
    models = request.getfixturevalue(name)
    (served,) = models.values()
    sizes = {
        name: control for name, control in asked_module.sizes_of(served.model.config).items() if control["visible"]
    }
    for end in ("minimum", "maximum"):
        assert asked(models, {name: control[end] for name, control in sizes.items()}).size


def test_the_time_of_a_job_grows_with_all_that_it_computes(models):
    def seconds(changes=None, **what):
        return asked(models, changes, **what).seconds

    once = seconds()
    assert seconds({"steps": 12}) == pytest.approx(2 * once)
    assert seconds({"num": 8}) == pytest.approx(2 * once)
    assert seconds({"cfg": 1}) == pytest.approx(once / 2)
    assert seconds({"solver": "heun"}) == pytest.approx(2 * once)
    assert seconds({"others": ["adams"]}, film=True) == pytest.approx(2 * once)
    assert once < seconds({"pixels": 8}) < 4 * once  # the field draws four times the pixels, the transformer does not
    assert seconds({"rows": 8}) > 2 * once


def test_classes_of_one_name_and_names_that_are_numbers_are_told_apart(models, tmp_path):
    state = run_state(1) | {"class_names": ["crane", "0", "crane"]}
    save_checkpoint(tmp_path / "x.pt", state)
    served = {"x": Served(str(tmp_path / "x.pt"), None, CPU)}
    served["x"].name = "x"
    for index, flag in ((0, "crane"), (1, "0"), (2, "2")):
        job = asked(served, {"class": index})
        assert job.y.tolist() == [index] * 4 and f"--class={flag} " in job.command


# ---- watch and look inside -------------------------------------------------------------------------------------------


def test_a_film_has_every_step_of_every_solver_from_the_same_noise(models, tmp_path):
    frames = []
    job = asked(models, {"num": 2, "others": ["adams", "euler"]}, film=True)
    assert job.solvers == ["euler", "adams"]
    parts = {}

    def send(named, needed=True):
        parts.update(named)
        frames.append(named.get("frame"))

    app.watch_job(send, tmp_path, job)
    film = Image.open(tmp_path / "film.gif")
    assert film.n_frames == len(parts["watched"]) == 7 == parts["moment"]["maximum"] + 1
    assert json.loads(film.info["comment"])["steps"] == 6
    labels, pictures = zip(*parts["watched"])
    assert parts["frame"] is pictures[-1] and parts["film"] == str(tmp_path / "film.gif")
    assert [labels[0], labels[3], labels[6]] == ["Step 0, time 0.00", "Step 3, time 0.50", "Step 6, time 1.00"]
    assert parts["moment"]["label"] == labels[-1]
    first, last = np.asarray(pictures[0]), np.asarray(parts["frame"])
    top, start = first.shape[0] - 260, first.shape[1] - 522  # below the headings, after the names of the rows
    panels = [slice(start, start + 260), slice(start + 260, start + 520)]  # one for each solver, two pictures wide
    assert (first[top:, panels[0]] == first[top:, panels[1]]).all()  # still the same noise
    assert (last[top:, panels[0]] != last[top:, panels[1]]).any()
    assert len({frame.tobytes() for frame in frames if frame}) >= 7


@pytest.mark.parametrize("count,solvers", [(1, 1), (4, 1), (1, 3), (4, 3)])
def test_headings_of_a_film_can_be_read_on_a_phone(count, solvers):
    """Letters of at least 10 pixels where the picture is 320 wide. Catches: of 3, in a film of three solvers."""
    pairs = [torch.full((2, count, 3, 32, 32), 255, dtype=torch.uint8)] * solvers
    frame = film_frame(pairs, ["euler", "adams", "euler-maruyama"][:solvers])
    top = frame.height - 2 - 130 * (1 if count == solvers == 1 else 2)  # below it, one or two rows of pictures
    ink = np.flatnonzero((np.asarray(frame)[:top] < 128).any((1, 2)))  # rows of pixels
    assert (ink.max() - ink.min() + 1) * 320 / frame.width >= 10


def test_the_text_about_the_patches_names_the_densities_that_are_drawn():
    first, *more, last = (str(factor**2) for factor in DENSITIES)
    assert f"at {', '.join([first, *more])} and {last} times the pixels" in page.DENSITY


def test_the_same_tokens_draw_the_same_patch_at_any_density(models):
    """Where the places are the same, the pixels are: in the corners of each patch. Catches: other tokens, or noise."""
    parts = sent(app.look_job, asked(models, {"num": 2}, inside=True), None, 1)
    plain, *denser = parts["looked"].pictures
    assert [picture.shape[-1] for picture in denser] == [32, 64]
    P = TINY.patch_size
    for picture, k in zip(denser, (2, 4)):
        for corner in ((0, 0), (0, P - 1), (P - 1, 0), (P - 1, P - 1)):
            own = plain[:, corner[0] :: P, corner[1] :: P].int()
            theirs = picture[:, corner[0] * k + (corner[0] > 0) * (k - 1) :: k * P, :].int()
            theirs = theirs[:, :, corner[1] * k + (corner[1] > 0) * (k - 1) :: k * P]
            assert abs(own - theirs).max() <= 1


def test_the_picture_that_is_looked_into_is_the_one_that_was_drawn(models, tmp_path):
    changes = {"num": 2, "solver": "adams", "pixels": 6}
    files = sent(app.draw_job, tmp_path, asked(models, changes))["gallery"]
    looked = sent(app.look_job, asked(models, changes, inside=True), None, 1)["looked"]
    assert abs(pixels(files[1][0]) - looked.pictures[0].permute(1, 2, 0).int().numpy()).max() <= 1
    assert looked.grid == (4, 4) and looked.pictures[2].shape == (3, 96, 96) and len(looked.states) == 7


def test_the_features_of_a_patch_are_those_that_its_velocities_are_made_of(models):
    (served,) = models.values()
    torch.manual_seed(0)
    x, t, y = torch.randn(1, 3, 16, 16), torch.tensor(0.3), torch.tensor([1])
    with torch.inference_mode():
        v = served.model(x, t.expand(1), y)
        for number in (0, 6):
            ((features, w1, w2),) = field_of_patch(served.model, x, t, y, number, {}, "fp32")
            decoded = served.model.decoder.output(served.model.decoder.norm(features)).T.view(3, 4, 4)
            row, column = divmod(number, 4)
            own = v[0, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4]
            assert torch.allclose(decoded, own, atol=1e-5)
            assert w1.shape == (8, 16) and w2.shape == (16, 8)
            assert torch.allclose(w1.norm(dim=0), torch.ones(16)) and torch.allclose(w2.norm(dim=0), torch.ones(8))
    assert not served.model.decoder.blocks[0]._forward_hooks


def test_a_click_finds_its_patch_and_the_patch_is_framed(models):
    looked = sent(app.look_job, asked(models, {"rows": 2, "columns": 4}, inside=True), None, 0)["looked"]
    width, height = looked.map(0, 0).size
    assert width >= 512 and height * 2 == width
    assert looked.place(0, 0) == (0, 0) and looked.place(width - 1, height - 1) == (1, 3)
    assert looked.place(width // 4, height // 2) == (1, 1)
    differs = np.argwhere((np.asarray(looked.map(1, 2)) != np.asarray(looked.map(0, 0))).any(-1))
    assert {looked.place(int(x), int(y)) for y, x in differs} == {(0, 0), (1, 2)}
    parts = looked.patch(1, 2, 3)
    assert {"map", "densities", "basis", "features", "weights"} == set(parts)
    assert all(isinstance(part, Image.Image) for part in parts.values())


def test_a_linear_decoder_stands_beside_the_field_and_is_not_looked_into(models, tmp_path):
    config = dataclasses.replace(TINY, decoder="linear")
    state = {"format": FORMAT, "config": dataclasses.asdict(config), "ema": PixNerd(config).state_dict()}
    save_checkpoint(tmp_path / "linear.pt", state)
    linear = load_model(tmp_path / "linear.pt")
    looked = sent(app.look_job, asked(models, inside=True), linear, 0)["looked"]
    assert len(looked.pictures) == 4 and looked.patch(0, 0, 0)["densities"].width > 4 * 192
    other = dataclasses.replace(config, patch_size=8)
    assert comparable(config, TINY) and not comparable(other, TINY)
    served = {"x": Served(str(tmp_path / "linear.pt"), None, CPU)}
    served["x"].name = "x"
    with pytest.raises(UserError, match="only a neural field"):
        sent(app.look_job, asked(served, inside=True), None, 0)


@pytest.mark.parametrize("number,solver", [(4, "euler"), (-1, "euler"), (None, "euler"), (0, "euler-maruyama")])
def test_what_cannot_be_looked_into_is_refused(models, number, solver):
    with pytest.raises(UserError):
        sent(app.look_job, asked(models, {"solver": solver}, inside=True), None, number)


# ---- one job at a time -----------------------------------------------------------------------------------------------


def test_a_job_stops_at_its_next_report_once_nobody_listens():
    steps, stopped = [], threading.Event()

    def endless(send):
        try:
            while True:
                steps.append(0)
                send(len(steps))
        except Stopped:
            stopped.set()

    results = listen(endless)
    assert next(results) == 1
    results.close()
    assert stopped.wait(30)
    count = len(steps)
    assert list(listen(lambda send: send("next"))) == ["next"]  # the machine is free again
    assert len(steps) == count


def test_jobs_in_step_take_each_step_in_turn():
    order, running = [], threading.Lock()

    def job(name):
        def steps(send):
            for step in range(3):
                assert running.acquire(blocking=False)  # never two at once
                order.append(f"{name}{step}")
                running.release()
                send((name, step))

        return steps

    assert list(in_step([job("a"), job("b")])) == [[("a", step), ("b", step)] for step in range(3)]
    assert order == ["a0", "b0", "a1", "b1", "a2", "b2"]


@pytest.mark.parametrize("how", ["closed", "failed"])
def test_jobs_in_step_all_end_when_they_are_closed_or_one_fails(how):
    ended = [threading.Event(), threading.Event(), threading.Event()]

    def job(number):
        def steps(send):
            try:
                for step in range(1000):
                    if (how, number, step) == ("failed", 1, 5):
                        raise UserError("wrong")
                    send(step)
            finally:
                ended[number].set()

        return steps

    steps = in_step([job(number) for number in range(3)])
    if how == "closed":
        assert next(steps) == [0, 0, 0]
        steps.close()
    else:
        with pytest.raises(UserError, match="wrong"):
            list(steps)
    assert all(event.wait(30) for event in ended)


def test_jobs_run_one_after_the_other():
    running, most = [], []

    def job(send):
        running.append(0)
        most.append(len(running))
        send("here")
        running.pop()

    threads = [threading.Thread(target=lambda: list(listen(job))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 8


def test_a_mistake_in_a_job_reaches_the_page_and_a_report_that_is_late_is_dropped():
    def job(send):
        send("a")
        send("b", needed=False)  # "a" was not taken yet
        send("c")
        raise UserError("wrong")

    started = threading.Event()
    results = listen(lambda send: (job(send), started.set()))
    got = []
    with pytest.raises(UserError, match="wrong"):
        for message in results:
            got.append(message)
    assert got[0] == "a" and got[-1] == "c"


# ---- the script ------------------------------------------------------------------------------------------------------


def test_films_leave_the_memory_and_files_the_disk_when_their_time_is_over(monkeypatch, models, tmp_path):
    pytest.importorskip("gradio")
    from gradio.route_utils import delete_files_created_by_app
    from gradio.state_holder import StateHolder

    monkeypatch.setattr(page, "LIFETIME", 1)
    blocks = page.build(list(models), app.jobs_of(models, 600), lambda name: controls_of(models[name]))
    kept, states = StateHolder(), [part for part in blocks.blocks.values() if part.elem_id in ("watched", "looked")]
    kept.set_blocks(blocks)
    for part in states:
        kept["a tab"][part._id] = ["frames"]
    (tmp_path / "x.png").write_bytes(b"a frame")
    blocks.temp_file_sets.append({str(tmp_path / "x.png")})
    kept.delete_all_expired_state()
    assert len(states) == len(kept["a tab"].state_data) == 2
    time.sleep(1.1)
    kept.delete_all_expired_state()  # which gradio's server does every second
    delete_files_created_by_app(blocks, blocks.delete_cache[1])  # and this every ten minutes
    assert not kept["a tab"].state_data and not (tmp_path / "x.png").exists()


def test_without_gradio_the_page_says_what_to_install(monkeypatch, models):
    monkeypatch.setattr(page, "gr", None)
    with pytest.raises(UserError, match="requirements-page.txt"):
        page.check_address("127.0.0.1", 7860)


@pytest.mark.parametrize(
    "flags,words",
    [
        (["--ckpt", "missing.pt"], "missing.pt"),
        (["--port", "99999"], "--port"),
        (["--host", "203.0.113.1"], "--host 203.0.113.1"),
        (["--host", "not a host"], "--host not a host"),
        (["--limit", "nan"], "--limit"),
        (["--device", "quantum"], "--device"),
        (["--baseline", "emoji"], "--baseline"),
    ],
)
def test_mistakes_on_the_command_line_get_one_line(monkeypatch, flags, words):
    monkeypatch.setattr(page, "gr", page.gr or object())  # where gradio is missing, that would be said first
    assert words in complaint("app.py", *flags)
