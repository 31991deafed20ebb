"""Damaged files and random command lines: one line or a right result, no traceback, no hang, bounded memory.

FUZZ=100 python -m pytest tests/test_fuzz.py      # 100 times as many cases as by default; SEED=2 for others
"""

import argparse
import contextlib
import io
import os
import random
import resource
import signal
import tarfile
import tempfile

import numpy as np
import pytest
import torch
from helpers import QUICK, ROOT, make_class_folder, noise_picture, run_script, run_state, text_state
from PIL import Image

import app
from data import open_dataset
from runtime import page, sample_options
from runtime.asked import Served, controls_of
from runtime.checkpoint import load_model, save_checkpoint
from runtime.controls import LABELS, in_words_of_the_page
from runtime.files import UserError, read_image
from runtime.models import SHIPPED_FILES
from runtime.options import make_parser
from runtime.picture_sets import open_pictures

SCALE, SEED = int(os.environ.get("FUZZ", "1")), int(os.environ.get("SEED", "1"))
SPECIAL = [0, 1, 0x7F, 0x80, 0xFF]


class Hang(BaseException):
    """Not an Exception, which the code under test may turn into a line."""


@contextlib.contextmanager
def bounded(seconds=900, gigabytes=3):
    """The block must end within a time that only a hang exceeds, and the process must not grow beyond a limit."""

    def hang(*_):
        raise Hang(f"no end after {seconds} s")

    before, peak = signal.signal(signal.SIGALRM, hang), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < gigabytes * 1e6


def mutated(content, draw):
    """The bytes with one to six faults: flipped bits, other bytes, large numbers, pieces cut, doubled or moved."""
    content = bytearray(content)
    for _ in range(draw.choice((1, 1, 1, 2, 3, 6))):
        if not content:
            break
        # Half of the faults near an end, where headers and directories are.
        near = draw.choice((len(content), 64, 512))
        at = draw.randrange(min(near, len(content)))
        at = len(content) - 1 - at if draw.random() < 0.5 else at
        size = draw.choice((1, 2, 4, 8, 100))
        kind = draw.randrange(7)
        if kind == 0:
            content[at] ^= 1 << draw.randrange(8)
        elif kind == 1:
            content[at] = draw.choice(SPECIAL)
        elif kind == 2:
            content[at : at + 4] = draw.choice(
                (b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f")
            )
        elif kind == 3:
            del content[at : at + size]
        elif kind == 4:
            content[at:at] = content[at : at + size]
        elif kind == 5:
            content[at:at] = bytes(draw.randrange(256) for _ in range(size))
        else:
            del content[at:]
    return bytes(content)


def refused(action):
    """What `action` returns, or None where it refuses its file in one line."""
    try:
        with bounded():
            return action()
    except UserError as error:
        assert str(error) and "\n" not in str(error)
        return None


def pictures():
    """JPEG, PNG and WEBP files of several modes, as bytes."""
    picture, found = noise_picture(20, 28), []
    deep = Image.fromarray(np.arange(560, dtype=np.uint16).reshape(20, 28) * 117)
    clear = picture.quantize(16)
    clear.info["transparency"] = 3
    for image, how in (
        (picture, {"format": "JPEG"}),
        (picture, {"format": "JPEG", "progressive": True}),
        (picture.convert("CMYK"), {"format": "JPEG"}),
        (picture, {"format": "PNG"}),
        (picture.convert("LA"), {"format": "PNG"}),
        (clear, {"format": "PNG"}),
        (deep, {"format": "PNG"}),
        (picture, {"format": "WEBP"}),
        (picture.convert("RGBA"), {"format": "WEBP", "lossless": True}),
    ):
        file = io.BytesIO()
        image.save(file, **how)
        found.append(file.getvalue())
    return found


def test_damaged_pictures_are_refused_in_one_line_or_read_as_rgb(tmp_path):
    draw, whole, read = random.Random(SEED), pictures(), 0
    for i in range(1000 * SCALE):
        content = mutated(whole[i % len(whole)], draw)
        image = refused(lambda content=content: read_image("x.png", content))
        if image is not None:
            assert image.mode == "RGB" and image.width * image.height <= Image.MAX_IMAGE_PIXELS
            read += 1
    print(f"{read} of {1000 * SCALE} damaged pictures were read, the others refused")
    assert 0 < read < 1000 * SCALE


def test_damaged_checkpoints_are_refused_in_one_line_or_hold_the_same_weights(tmp_path):
    draw, path, read = random.Random(SEED), tmp_path / "x.pt", 0
    save_checkpoint(path, run_state(1))
    whole, weights = path.read_bytes(), load_model(path).state_dict()
    for _ in range(100 * SCALE):
        path.unlink()  # the model before may be mapped to it
        path.write_bytes(mutated(whole, draw))
        model = refused(lambda: load_model(path))
        if model is not None:
            assert all(torch.equal(tensor, weights[key]) for key, tensor in model.state_dict().items())
            read += 1
    print(f"{read} of {100 * SCALE} damaged checkpoints were read, the others refused")


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_damaged_npz_are_refused_in_one_line_or_hold_the_same_pictures(tmp_path, save):
    draw, path, read = random.Random(SEED), tmp_path / "x.npz", 0
    array = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), dtype=np.uint8)
    save(path, arr_0=array, arr_1=np.arange(6))
    whole = path.read_bytes()
    for _ in range(50 * SCALE):
        path.write_bytes(mutated(whole, draw))
        found = refused(lambda: torch.cat(list(open_pictures(path).batches(4))))
        if found is not None:
            assert np.array_equal(found.permute(0, 2, 3, 1).numpy(), array)
            read += 1
    print(f"{read} of {50 * SCALE} damaged npz were read, the others refused")


def test_damaged_tars_are_refused_in_one_line_or_read(tmp_path):
    """A tar has no checksum of its contents: a picture that can be decoded counts as right."""
    draw, path, read = random.Random(SEED), tmp_path / "x.tar", 0
    with tarfile.open(path, "w") as tar:
        tar.add(make_class_folder(tmp_path / "data", height=8, width=8), "data")
    whole = path.read_bytes()

    def everything():
        dataset = open_dataset(path, 16)
        return [dataset[i] for i in range(len(dataset))]

    for _ in range(100 * SCALE):
        path.write_bytes(mutated(whole, draw))
        found = refused(everything)
        if found is not None:
            assert all(image.shape == (3, 16, 16) and label in (0, 1, 2) for image, label in found)
            read += 1
    print(f"{read} of {100 * SCALE} damaged tars were read, the others refused")


# Values that are valid are small, so that what is accepted is soon done. A NUL cannot be in a command line at all.
VALUES = ["0", "1", "2", "3", "-1", "0.5", "nan", "inf", "-inf", "1e308", "1e-320", "9" * 30, "9" * 5000, "", " ", "x"]
VALUES += ["emoji", "all", "a,b", ",", "a:0", "b:2", "16", "16x", "16x32", "x16", "--", "-", "\1", "é", "a" * 300, "%s"]
LIKELY = ["0", "1", "2", "3", "0.5", "16", "32", "emoji", "auto", "cpu", "fp32", "off", "euler", "a", "x.png", "x.npz"]
LIKELY += ["words", "a,c", "emoji-text", "a pear", "a100", "h100"]


class Listing(argparse.ArgumentParser):
    """A parser that reads nothing and is returned by parse_args, with all that was added to it."""

    def parse_args(self, argv=None):
        raise Listed(self)


class Listed(Exception):
    """From a Listing, with the Listing as its argument."""


def flags_of(make):
    """{flag: what it may be followed by: its choices, [] of a switch, None where that is not known} of a parser."""
    try:
        parser = make()
    except Listed as listed:
        (parser,) = listed.args
    named = [action for action in parser._actions if action.option_strings and action.dest != "help"]
    known = {action.option_strings[-1]: [] if action.nargs == 0 else action.choices for action in named}
    return {name: None if choices is None else list(choices) for name, choices in known.items()} | {"--unknown": None}


CHOICES = {"train.py": flags_of(make_parser), "sample.py": flags_of(lambda: sample_options.parse_args([], Listing))}
LIKELY += sorted({value for known in CHOICES.values() for of in known.values() for value in map(str, of or ())})
# Of a training run that really starts: what costs seconds, what needs the network, and what is given already.
NOT_STARTED = {"--size", "--recipe", "--data", "--repa", "--dino", "--init", "--eval-ref", "--inception", "--wandb"}
NOT_STARTED |= {"--compile", "--device", "--out", "--dry-run", "--tensorboard", "--eval-every", "--text-encoder"}
SMALL = ["1", "2", "4", "0.5", "16", "32"]
FLAGS = {
    "train.py": list(CHOICES["train.py"]),
    "sample.py": list(CHOICES["sample.py"]),
    "eval_fid.py": [
        *("--features", "--resolution", "--batch-size", "--workers", "--device", "--save-stats", "--json"),
        *("--inception", "--unknown"),
    ],
    "app.py": ["--ckpt", "--text-encoder", "--baseline", "--limit", "--device", "--host", "--port", "--unknown"],
    "data.py": ["--help", "--unknown", "x"],  # what is right would ask the network
}


def random_flags(draw, script, started=False):
    """One to three flags with values that are wild, likely, or one of the flag's choices; started: of a tiny run."""
    names = [name for name in FLAGS[script] if not (started and name in NOT_STARTED)]
    words = []
    for name in draw.sample(names, min(draw.choice((1, 1, 1, 2, 3)), len(names))):
        words.append(name)
        of, number = CHOICES.get(script, {}).get(name), draw.choice((0, 1, 1, 1, 1, 1, 1, 2))
        if of is not None and (started or draw.random() < 0.5):
            words += map(str, draw.sample(of, min(1, len(of))))
        else:
            words += draw.sample(SMALL if started else draw.choice((LIKELY, VALUES)), 1 if started else number)
    return words


@pytest.mark.parametrize("script", FLAGS)
def test_random_command_lines_end_with_one_line_or_a_right_result(tmp_path, monkeypatch, quick_previews, script):
    """In an empty folder, which a refused command leaves empty. Of train.py's, a fifth start a run of one step, and the
    others only plan; of sample.py's, half draw from sentences; app.py only lays out its page.
    """
    draw, path, accepted, runs = random.Random(SEED), tmp_path / "tiny.pt", 0, 0
    save_checkpoint(path, run_state(1))
    sets = [tmp_path / name for name in ("one.npz", "two.npz", "nowhere", "tiny.pt")]
    for i, name in enumerate(sets[:2]):  # as few and as small as the emoji distance takes
        np.savez(name, arr_0=np.random.default_rng(i).integers(0, 256, (128, 32, 32, 3), dtype=np.uint8))
    monkeypatch.setattr(page, "serve", lambda blocks, *where: None)
    for name in SHIPPED_FILES if script == "app.py" else ():
        monkeypatch.setitem(SHIPPED_FILES, name, (path, 0.8))
    fixed = {
        "train.py": ["--dry-run"],
        "sample.py": ["--num", "1", "--steps", "1", "--compile", "off", "--device", "cpu"],
        "eval_fid.py": ["--features", "emoji", "--device", "cpu"],
        "app.py": ["--port", "39485"],  # until a later one takes its place
        "data.py": [],
    }[script]
    for i in range(20 * SCALE):
        (here := tmp_path / f"here{i}").mkdir()
        monkeypatch.chdir(here)
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
        line, started = list(map(str, fixed)), script == "train.py" and i % 5 == 0
        if started:
            line = [*QUICK, "--steps", "1", "--eval-num", "128", "--out", "run"]
        if script == "sample.py":
            text = ["--ckpt", str(ROOT / "assets" / "emoji-text.pt"), "--prompt", "a red apple"]
            line += text[: draw.choice((2, 4, 4))] if i % 2 else ["--ckpt", str(path)]
        if script == "eval_fid.py":
            line += [str(draw.choice(sets)), str(draw.choice(sets))]
        line += random_flags(draw, script, started)
        with bounded():
            status, _, stderr = run_script(script, *line)
        told = stderr.strip().splitlines()
        assert "Traceback" not in stderr and status in (0, 1, 2), (line, stderr)
        if status == 0:
            accepted, runs = accepted + 1, runs + started
            assert not started or (here / "run" / "last.pt").exists(), line
            continue
        assert told and told[-1].startswith(f"{script}: "), (line, stderr)
        assert status == 2 or len(told) == 1, (line, stderr)
        assert not [file for file in here.rglob("*") if file.is_file()], line
    assert script != "train.py" or runs
    print(f"{script}, {runs} runs: {accepted} of {20 * SCALE} command lines accepted, the others refused")


# ---- the page --------------------------------------------------------------------------------------------------------

NONSENSE = [None, True, False, -1, 0, 1, 2, 3, 0.5, 1e308, -1e308, 10**400, 2**63, float("nan"), float("inf"), "", " "]
NONSENSE += [
    "x",
    "x" * 5000,
    "--out=x",
    "../../etc/passwd",
    "\0",
    "\ud800",
    "é",
    "1",
    "emoji",
    b"x",
    [],
    [[]],
    ["x"],
    {},
]
NONSENSE += [["adams", "euler"], ["adams"] * 9, {"__type__": "update"}, "euler", "heun", (1, 2), object()]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A tiny model of classes and one of sentences, as the page offers them."""
    folder, models = tmp_path_factory.mktemp("ckpt"), {}
    for name, state in (("classes", run_state(1)), ("text", text_state())):
        save_checkpoint(folder / f"{name}.pt", state)
        models[name] = Served(str(folder / f"{name}.pt"), None, torch.device("cpu"))
    return models


def plain_form(served, name="classes"):
    """The controls as they first stand, with one picture of two steps."""
    values = {part: control.get("value") for part, control in controls_of(served[name]).items()}
    values |= {"ckpt": name, "prompt": "a pear", "negative": "", "seed": 0, "others": [], "num": 1, "steps": 2}
    return [values[part] for part in LABELS]


def random_form(draw, served):
    """Values of all controls, one to four of them nonsense: as much is asked as is soon drawn."""
    values = dict(zip(LABELS, plain_form(served, draw.choice(list(served)))))
    for part in draw.sample(list(LABELS), draw.choice((1, 1, 1, 2, 4))):
        values[part] = draw.choice(NONSENSE)
    return [values[part] for part in LABELS]


def a_sentence(line):
    return 10 < len(line) < 400 and "\n" not in line and "--" not in line.replace("--out=x", "")


def test_random_values_of_the_form_are_refused_in_a_sentence_or_drawn(served, tmp_path):
    draw, jobs, drawn = random.Random(SEED), app.jobs_of(served, 60.0), 0
    for i in range(200 * SCALE):
        name, values, sent = draw.choice(list(jobs)), random_form(draw, served), {}
        if name == "look":
            values.append(draw.choice((0, draw.choice(NONSENSE))))
        (folder := tmp_path / str(i)).mkdir()
        try:
            with bounded():
                jobs[name](lambda named, needed=True, sent=sent: sent.update(named), folder, *values)
        except UserError as error:
            assert a_sentence(in_words_of_the_page(error)), (name, values, error)
            assert not list(folder.iterdir()), (name, values)
            continue
        assert {"draw": "gallery", "watch": "film", "look": "looked"}[name] in sent
        drawn += 1
    print(f"{drawn} of {200 * SCALE} random forms were drawn, the others refused")
    assert 0 < drawn < 200 * SCALE


def test_random_values_in_whatever_the_browser_calls_are_answered_and_never_fail(served, capsys):
    """All handlers of the page, also those that a browser would call with what the page itself has put there."""
    gr = pytest.importorskip("gradio")
    blocks = page.build(list(served), app.jobs_of(served, 60.0), lambda name: controls_of(served[name]))
    draw, handlers = random.Random(SEED), [function for function in blocks.fns.values() if function.fn is not None]
    inside, answers = {}, []
    app.jobs_of(served, 60.0)["look"](lambda named, needed=True: inside.update(named), None, *plain_form(served), 0)
    for _ in range(200 * SCALE):
        function = draw.choice(handlers)
        values = [draw.choice((inside["looked"], None, 0, 1, draw.choice(NONSENSE))) for _ in function.inputs]
        if len(values) >= len(LABELS):
            values = random_form(draw, served) + values[len(LABELS) :]
        elif values and function.inputs[0].elem_id in ("looked", "watched"):  # kept on the server: no browser writes it
            values[0] = {"looked": inside["looked"], "watched": [("Step 0", "a"), ("Step 1", "b")]}[
                function.inputs[0].elem_id
            ]
            values[0] = draw.choice((None, values[0]))
        if function.fn.__name__ == "clicked":
            click = gr.SelectData(None, {"index": draw.choice(([1, 2], draw.choice(NONSENSE))), "value": None})
            values.append(click)
        try:
            with bounded():
                result = function.fn(*values)
                result = list(result) if hasattr(result, "__next__") else [result]
        except gr.Error as error:
            assert a_sentence(error.message), (function.fn.__name__, values, error)
            continue
        answers += [str(part) for named in result if type(named) is dict for part in named.values()]
    assert not [line for line in answers if line.startswith("Failed")], capsys.readouterr().err
    assert [line for line in answers if line.startswith("Not done")] and [line for line in answers if "Done" in line]
