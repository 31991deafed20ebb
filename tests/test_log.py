"""The same numbers in metrics.jsonl, TensorBoard and Weights & Biases, once per step, and nothing unasked for.

TensorBoard and wandb are the real packages (requirements-logs.txt); without them their tests are skipped. wandb runs
offline: what it would send is read back from its own file.
"""

import json
import struct
import sys

import numpy as np
import pytest
from helpers import refuses, train
from PIL import Image

from runtime.distributed import Processes
from runtime.files import UserError
from runtime.log import Log, cut_metrics, flat


def metrics(out):
    """The lines of metrics.jsonl."""
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def events(out):
    """What TensorBoard itself makes of the folder: ({name: [(step, value)]}, [(step, width, height)] of previews)."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(out / "tensorboard"), size_guidance={"scalars": 0, "images": 0})
    board.Reload()
    scalars = {name: [(e.step, e.value) for e in board.Scalars(name)] for name in board.Tags()["scalars"]}
    images = board.Images("previews") if "previews" in board.Tags()["images"] else []
    return scalars, [(e.step, e.width, e.height) for e in images]


def wandb_history(out):
    """{step: {name: value}} and the run ids of all offline runs of a folder.

    A .wandb file is LevelDB's log format: blocks of 32 KiB (the first begins with 7 bytes of its own) with pieces of
    checksum (4 bytes), length (2) and kind (1: whole, 2 to 4: first, middle, last); joined, a protobuf message each.
    """
    import wandb
    from wandb.proto.wandb_internal_pb2 import Record

    wandb.teardown()  # its own process writes the file, and may do so a moment after the run was finished
    history, ids = {}, []
    for path in sorted((out / "wandb").glob("offline-run-*/*.wandb")):
        data, place, message = path.read_bytes(), 7, b""
        while place + 7 <= len(data):
            if 32768 - place % 32768 < 7:  # too little left of the block for a record: padding
                place += 32768 - place % 32768
                continue
            _, length, kind = struct.unpack_from("<IHB", data, place)
            message += data[place + 7 : place + 7 + length]
            place += 7 + length
            if kind not in (1, 4):
                continue
            record, message = Record.FromString(message), b""
            if record.HasField("run"):
                ids.append(record.run.run_id)
            if record.HasField("history"):
                items = {i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in record.history.item}
                history.setdefault(items["_step"], {}).update(items)
    return history, ids


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """wandb, kept from the network and from this account's settings."""
    pytest.importorskip("wandb")
    for name, value in (
        ("MODE", "offline"),
        ("SILENT", "true"),
        ("CONFIG_DIR", tmp_path),
        ("CACHE_DIR", tmp_path),
        ("DATA_DIR", tmp_path),
        ("ERROR_REPORTING", "false"),
    ):
        monkeypatch.setenv(f"WANDB_{name}", str(value))


# ---- metrics.jsonl ---------------------------------------------------------------------------------------------------


def test_resuming_cuts_the_metrics_behind_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    cut_metrics(path, 3)
    assert not path.exists()
    path.write_text('{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 4, "fid": 9}\n{"step": 6, "lo')
    assert cut_metrics(path, 4) == {4}  # the steps that were evaluated
    assert path.read_text() == '{"step": 2, "loss": 1}\n{"step": 4, "loss": 1}\n{"step": 4, "fid": 9}\n'
    before = path.stat().st_ino
    cut_metrics(path, 4)
    assert path.stat().st_ino == before  # nothing to cut, nothing written


def test_a_crash_while_cutting_leaves_the_metrics_whole(tmp_path, monkeypatch):
    """Catches: cutting in place, where a crash between opening and writing loses every line."""
    path, text = tmp_path / "metrics.jsonl", '{"step": 2}\n{"step": 4}\n'
    path.write_text(text)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError("crash")))
    with pytest.raises(OSError, match="crash"):
        cut_metrics(path, 2)
    assert path.read_text() == text
    monkeypatch.undo()
    cut_metrics(path, 2)
    assert path.read_text() == '{"step": 2}\n' and [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_file_of_something_else_is_named_and_left_alone(tmp_path):
    for text in ("a note\n", "[]\n", '{"loss": 1}\n'):
        (tmp_path / "metrics.jsonl").write_text(text)
        with pytest.raises(UserError, match="metrics.jsonl holds lines that are not metrics"):
            Log(tmp_path, Processes(), 0, 8, 4)
        assert (tmp_path / "metrics.jsonl").read_text() == text


def test_other_ranks_write_and_say_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANK", "1")
    log = Log(tmp_path, Processes(), 0, 8, 4)
    log.send_to(tensorboard=True, wandb=True, settings={})
    log.training(2, {"loss": 1.0})
    log.numbers(2, {"fid": 3.0})
    log.close(8)
    assert not list(tmp_path.iterdir()) and capsys.readouterr() == ("", "")


def test_mfu_is_useful_work_over_the_peak_and_left_out_where_that_is_unknown(tmp_path, monkeypatch):
    """4 steps of 8 images of 1 TFLOP in 2 s are 16 TFLOP/s; a pause of 3 s, and a first step that compiles, are not."""
    clock = [0.0]
    monkeypatch.setattr("runtime.log.time.perf_counter", lambda: clock[0])
    for peak in (64e12, 0):
        log = Log(tmp_path, Processes(), 0, 8, 8, flops=1e12, peak=peak)
        clock[0] += 40
        with log.pause():
            clock[0] += 3
        clock[0] += 2
        log.training(5, {"loss": 1.0})
        line = metrics(tmp_path)[-1]
        assert line["images_per_second"] == 16
        assert line["mfu"] == 0.25 if peak else "mfu" not in line
        log.close(8)


def test_the_speed_leaves_out_compilation_also_where_each_step_has_a_line(tmp_path, monkeypatch, capsys):
    """A first step of 40 s, then one of 2 s. Catches a first speed that is the compiler's, with --log-every 1."""
    clock = [0.0]
    monkeypatch.setattr("runtime.log.time.perf_counter", lambda: clock[0])
    log = Log(tmp_path, Processes(), 4, 8, 8, flops=1e12, peak=64e12)  # a start that resumes
    for step, seconds in ((5, 40), (6, 2)):
        clock[0] += seconds
        log.training(step, {"loss": 1.0})
        with log.pause():
            clock[0] += 3
    first, second = metrics(tmp_path)
    assert first == {"step": 5, "loss": 1.0} and second["images_per_second"] == 4
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "step 5/8, loss 1.0000, 40 s for the first step, which may compile"
    assert told[1].endswith("4 images/s, 2 s a step, 0:00:04 left")


def test_lists_become_one_number_per_bin_and_empty_bins_none():
    assert flat({"loss": 2.0, "loss_by_time": [1.0, None]}) == {"loss": 2.0, "loss_by_time/0.0": 1.0}


# ---- TensorBoard -----------------------------------------------------------------------------------------------------


def test_tensorboard_reads_back_every_number_and_the_previews_also_after_resuming(tmp_path, quick_previews):
    pytest.importorskip("tensorboard")
    out, flags = tmp_path / "run", ("--tensorboard", "--log-every", 2)
    assert train(out, "--steps", 4, *flags)[0] == 0
    status, _, stderr = train(out, "--steps", 6, *flags, "--preview-every", 6)
    assert status == 0, stderr
    scalars, images = events(out)
    lines = metrics(out)
    assert [line["step"] for line in lines] == [2, 4, 6]
    for name in ("loss", "lr", "grad_norm", "images_per_second"):
        assert scalars[name] == [(line["step"], pytest.approx(line[name], rel=1e-6)) for line in lines], name
    assert any(name.startswith("loss_by_time/0.") for name in scalars)
    assert images == [(6, *Image.open(out / "samples.png").size)]


def test_tensorboard_drops_what_a_crash_left_behind_the_checkpoint(tmp_path):
    """Catches: the same step twice in the curves after a resume from an earlier checkpoint."""
    pytest.importorskip("tensorboard")
    picture = Image.fromarray(np.zeros((4, 6, 3), np.uint8))
    for start, values in ((0, [1, 2, 3, 4]), (2, [30, 40])):  # the first run never comes to its close()
        log = Log(tmp_path, Processes(), start, 8, 4)
        log.send_to(tensorboard=True, wandb=False, settings={})
        for step, value in enumerate(values, start=start + 1):
            log.numbers(step, {"loss": float(value)})
            log.picture(step, picture)
    scalars, images = events(tmp_path)
    assert scalars["loss"] == [(1, 1), (2, 2), (3, 30), (4, 40)]
    assert images == [(step, 6, 4) for step in (1, 2, 3, 4)]
    assert [line["loss"] for line in metrics(tmp_path)] == [1, 2, 30, 40]


# ---- Weights & Biases ------------------------------------------------------------------------------------------------


@pytest.mark.slow  # make test stays within five minutes on a slow day
def test_wandb_offline_holds_the_run_under_one_id_also_after_resuming(tmp_path, offline):
    out, flags = tmp_path / "run", ("--wandb", "--log-every", 2)
    assert train(out, "--steps", 4, *flags)[0] == 0
    status, _, stderr = train(out, "--steps", 6, *flags, "--preview-every", 6)
    assert status == 0, stderr
    history, ids = wandb_history(out)
    assert len(ids) == 2 and set(ids) == {(out / "wandb-id").read_text()}
    for line in metrics(out):
        found = history[line["step"]]
        assert found["loss"] == line["loss"] and found["grad_norm"] == line["grad_norm"]
        assert any(name.startswith("loss_by_time/0.") for name in found)
    drawn = {step for step, found in history.items() if any(name.startswith("previews") for name in found)}
    assert drawn == {6}
    assert len(list((out / "wandb").glob("offline-run-*/files/media/images/previews_*.png"))) == 1


def test_wandb_that_cannot_start_is_told_in_one_line(tmp_path, offline, monkeypatch):
    def fail(**_):
        raise RuntimeError("api_key not configured (no-tty)\nand more")

    monkeypatch.setattr("wandb.init", fail)
    line = refuses(tmp_path / "run", "--steps", 1, "--wandb")
    assert line.startswith("train.py: --wandb: api_key not configured (no-tty) (WANDB_MODE=offline")
    assert not list((tmp_path / "run").glob("*.pt"))


# ---- without them ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_missing_package_is_named_before_training_starts(tmp_path, monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)  # Python's own mark for "cannot be imported"
    line = refuses(tmp_path / "run", "--steps", 1, f"--{package}")
    assert line == f"train.py: --{package} needs the package {package}: pip install {package}"
    assert not list((tmp_path / "run").glob("*.*"))


def test_without_the_flags_neither_package_is_imported(tmp_path, monkeypatch):
    for package in ("tensorboard", "wandb"):
        monkeypatch.setitem(sys.modules, package, None)
    assert train(tmp_path / "run", "--steps", 1, "--log-every", 1)[0] == 0
    assert metrics(tmp_path / "run")[0]["step"] == 1


def test_a_slow_run_says_how_slow(tmp_path, monkeypatch, capsys):
    """XL on a CPU: 60 s a step of 4. Catches `0 images/s`, on the terminal and in metrics.jsonl."""
    clock = iter([100.0, 400.0, 400.5])
    monkeypatch.setattr("runtime.log.time.perf_counter", lambda: next(clock))
    log = Log(tmp_path, Processes(), 0, 800_000, 4)
    log.training(5, {"loss": 1.0})
    log.training(6, {"loss": 1.0})
    slow, fast = capsys.readouterr().out.splitlines()
    assert "0.067 images/s, 60 s a step, 555 days" in slow and "8 images/s, 4" in fast
    assert [line["images_per_second"] for line in metrics(tmp_path)] == [0.06667, 8.0]
