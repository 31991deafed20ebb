"""A run's folder: one run at a time, the same run or none, no foreign files, and the newest checkpoint by two names."""

import dataclasses
import json
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
from helpers import ROOT, assert_same_run, command, in_a_fork, last, make_class_folder, refuses, run_state, train

from data import open_dataset
from model import PixNerdConfig
from runtime import previews, run_folder
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.distributed import Processes
from runtime.files import UserError
from runtime.options import OPTIONS
from runtime.run_folder import RunFolder, load_run, name_last, save_run
from text_model import TextPixNerdConfig


def test_a_second_process_on_the_same_folder_is_told_who_has_it(tmp_path):
    """While the first one lives, and no longer. Catches: steps logged twice, and one pruning the other's files."""
    ready, end = multiprocessing.Event(), multiprocessing.Event()

    def hold():
        folder = RunFolder(tmp_path / "run", Processes())  # noqa: F841  the lock is held as long as it lives
        ready.set()
        end.wait(60)

    child = in_a_fork(hold)
    assert ready.wait(60)
    line = refuses(tmp_path / "run", "--steps", 1)
    assert f"is in use by process {child.pid} on " in line
    end.set()
    child.join()
    assert train(tmp_path / "run", "--steps", 1)[0] == 0


def test_only_step_and_eight_digits_is_ours(tmp_path):
    """A copy of the user's is neither pruned nor taken for the newest checkpoint."""
    save_run(tmp_path, run_state(10))
    for name in ("step-00000010-good.pt", "step-best.pt", "step-99.pt"):
        (tmp_path / name).write_bytes(b"the user's own")
    for step in (20, 30):
        save_run(tmp_path, run_state(step))
    assert load_run(tmp_path)[1]["step"] == 30
    assert sorted(os.listdir(tmp_path)) == [
        *("last.pt", "step-00000010-good.pt", "step-00000020.pt", "step-00000030.pt", "step-99.pt", "step-best.pt")
    ]


def test_last_pt_is_the_newest_also_without_hard_links_and_with_the_clock_set_back(tmp_path, monkeypatch):
    """As on some network drives. Catches: a copy that is kept because its time looks newer."""

    def no_links(*_):
        raise OSError("not supported")

    monkeypatch.setattr(os, "link", no_links)
    save_run(tmp_path, run_state(10))
    os.utime(tmp_path / "last.pt", (4e9, 4e9))  # in the future, as after the clock was set back
    save_run(tmp_path, run_state(20))
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 20
    os.utime(tmp_path / "last.pt", (4e9, 4e9))
    name_last(tmp_path / "step-00000010.pt")
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 10


def same_run_settings():
    """(configuration, name, what runs of before the setting were) of every setting that makes another run."""
    for kind in (PixNerdConfig, TextPixNerdConfig):
        for field in dataclasses.fields(kind):
            yield kind(), field.name, field.default
    for option in OPTIONS:
        if option.same_run:
            yield PixNerdConfig(), option.key, "ignore" if option.key == "exif" else option.default


@pytest.mark.parametrize("config, name, value", [*same_run_settings()])
def test_a_run_of_before_a_setting_is_resumed_with_its_default_only(tmp_path, monkeypatch, config, name, value):
    """Of every setting there is, so that a new one cannot be forgotten: a silent resume would train something else."""
    saved = {key: value for key, value in dataclasses.asdict(config).items() if key != name or key == "text_width"}
    state = run_state(1) | {"config": saved, "identity": {}, "optimizers": [], "fingerprint": "", "class_names": None}
    monkeypatch.setattr(run_folder, "load_run", lambda *_: (tmp_path / "last.pt", state))
    data, folder = SimpleNamespace(fingerprint="", classes=None), RunFolder(tmp_path, Processes())
    assert folder.find({name: value}, data) is data
    with pytest.raises(UserError, match=f"trained with {name}={value!r}, but this run asks for 'another'"):
        folder.find({name: "another"}, data)


def test_renamed_classes_are_refused_even_where_changed_data_are_accepted(tmp_path):
    """apple, bird, cat become bird, cat, zebra: every class number would mean something else."""
    out, data = tmp_path / "run", make_class_folder(tmp_path / "data", (("apple", 2), ("bird", 2), ("cat", 2)))
    assert train(out, "--steps", 1, "--data", data)[0] == 0
    (data / "apple").rename(data / "zebra")
    line = refuses(out, "--steps", 2, "--data", data, "--accept-changed-data")
    assert "apple is not in the data, zebra is not in the run" in line
    assert last(out)["step"] == 1


def test_the_same_classes_in_another_order_are_numbered_as_in_the_run(tmp_path):
    """A checkpoint whose classes are not sorted, as of another version. Catches: labels of the wrong class."""
    out, data = tmp_path / "run", make_class_folder(tmp_path / "data", (("apple", 2), ("bird", 2), ("cat", 2)))
    assert train(out, "--steps", 1, "--data", data)[0] == 0
    for name in ("last.pt", "step-00000001.pt"):
        save_checkpoint(out / name, last(out) | {"class_names": ["cat", "apple", "bird"]})
    status, stdout, stderr = train(out, "--steps", 2, "--data", data)
    assert status == 0 and "another order than in the run so far: numbered as there" in stdout, stderr
    assert last(out)["class_names"] == ["cat", "apple", "bird"] and last(out)["class_counts"] == [2, 2, 2]
    assert open_dataset(data, 32).classes == ["apple", "bird", "cat"]


def test_an_evaluation_draws_the_classes_by_the_numbers_of_the_run(tmp_path, monkeypatch, quick_previews):
    """Of classes of unequal size in another order. Catches: as many samples of food as the data have flags."""
    out, flags = tmp_path / "run", ("--classes", "flags,food-fruit", "--eval-every", 1, "--eval-num", 128)
    assert train(out, *flags, "--eval-every", 0, "--steps", 1)[0] == 0
    counts = last(out)["class_counts"]
    assert counts[0] > 2 * counts[1]
    for name in ("last.pt", "step-00000001.pt"):
        save_checkpoint(out / name, last(out) | {"class_names": ["food-fruit", "flags"]})
    seen, plain = [], previews.ema_samples

    def watched(ema, labels, *args):
        seen.append(np.bincount(labels).tolist())
        return plain(ema, labels, *args)

    monkeypatch.setattr(previews, "ema_samples", watched)
    status, _, stderr = train(out, *flags, "--steps", 2)
    assert status == 0 and last(out)["class_counts"] == counts[::-1], stderr
    assert len(seen) == 2 and seen[0] == seen[1] == counts[::-1]  # the one made up for, and that of step 2


def test_the_final_evaluation_and_preview_are_made_up_for_after_a_kill(tmp_path, quick_previews):
    """Killed between the last save and them, the same command draws and judges. Catches: "nothing to do" without it."""
    out, flags = tmp_path / "run", ("--steps", 2, "--preview-every", 2, "--eval-every", 2, "--eval-num", 128)
    assert train(out, *flags)[0] == 0
    metrics, picture = out / "metrics.jsonl", out / "previews" / "step-00000002.png"
    whole, drawn = metrics.read_text(), picture.read_bytes()
    assert "emoji_distance" in whole.splitlines()[-1]
    metrics.write_text("".join(whole.splitlines(True)[:-1]))
    picture.unlink()
    for _ in range(2):  # the second time there is nothing left to make up for
        status, stdout, stderr = train(out, *flags)
        assert status == 0 and "nothing to do" in stdout, stderr
        assert metrics.read_text() == whole and picture.read_bytes() == drawn


def test_a_stop_during_an_evaluation_ends_it_and_the_next_start_makes_up_for_it(tmp_path, monkeypatch, quick_previews):
    """Catches: an evaluation of an hour that goes on until the scheduler's SIGKILL, and a step without its score."""
    flags = ("--steps", 2, "--eval-every", 2, "--eval-num", 128)
    drawn, plain = [], previews.draw_ema

    def interrupted(*args, **kwargs):
        drawn.append(len(drawn))
        os.kill(os.getpid(), signal.SIGTERM)
        return plain(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(previews, "draw_ema", interrupted)
        status, stdout, stderr = train(tmp_path / "run", *flags)
    assert status == 0 and "stopped by SIGTERM at step 2, saved" in stdout, stderr
    assert len(drawn) == 1  # of two batches
    metrics = tmp_path / "run" / "metrics.jsonl"
    assert "emoji_distance" not in metrics.read_text()
    status, stdout, stderr = train(tmp_path / "run", *flags)
    assert status == 0 and "nothing to do" in stdout and "emoji_distance" in metrics.read_text(), stderr


@pytest.mark.slow
def test_a_closed_terminal_saves_and_ends_the_run(tmp_path):
    """SIGHUP, and from then on each line that is printed fails. Catches: steps lost with the terminal."""
    master, terminal = pty.openpty()
    code = "import fcntl, os, runpy, signal, sys, termios; fcntl.ioctl(1, termios.TIOCSCTTY, 0); del sys.argv[0]; "
    code += "signal.signal(signal.SIGHUP, signal.SIG_DFL); "  # as from a shell, also where the tests run under nohup
    training = command(tmp_path / "run", "--steps", 10**6, "--save-every", 0, "--log-every", 1)
    process = subprocess.Popen(
        [sys.executable, "-c", code + "runpy.run_path(sys.argv[0], run_name='__main__')", *training],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,  # so that the terminal can become its own
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
    )
    os.close(terminal)
    try:
        metrics, deadline = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 150
        while not metrics.exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        os.close(master)
        assert process.wait(150) == 0
    finally:
        process.kill()
    step = last(tmp_path / "run")["step"]
    assert train(tmp_path / "whole", "--steps", step)[0] == 0
    assert_same_run(last(tmp_path / "run"), last(tmp_path / "whole"))
