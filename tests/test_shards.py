"""Many images by any number of processes: the same bytes, nothing done twice, nothing mixed, one line for a mistake."""

import contextlib
import json
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
import types
import zipfile

import numpy as np
import pytest
import torch
from helpers import ROOT, run_script, run_state

from runtime.checkpoint import save_checkpoint
from runtime.files import UserError
from runtime.shards import Shards, check_disk, choose_labels, one_complaint

SIZE = (4, 6)
ALONE = types.SimpleNamespace(rank=0, world=1, barrier=lambda: None, of_all=lambda value: [value])


def image_of(number):
    """An image that tells its number, as a sampler's would: uint8 (3, H, W)."""
    return torch.full((3, *SIZE), number, dtype=torch.uint8)


def draw(numbers, watch, seen=None):
    """Draws a batch, as Shards asks for it; keeps in `seen` what was asked."""
    if seen is not None:
        seen.append(list(numbers))
    for step in range(3):
        watch(step, 0.0, None, None)
    return torch.stack([image_of(number) for number in numbers])


def write(path, num, batch_size, settings=None, seen=None, processes=ALONE):
    """An npz of `num` images, by one rank of `processes`."""
    shards = Shards(path, num, SIZE, batch_size, settings or {"seed": 0}, processes)
    shards.draw(lambda numbers, watch: draw(numbers, watch, seen), 2)
    shards.join(np.arange(num) % 3)


def arrays(path):
    """Images and labels of an npz, after a look at its names and types."""
    with np.load(path) as archive:
        assert sorted(archive.files) == ["arr_0", "arr_1", "labels"]
        assert archive["arr_0"].dtype == np.uint8 and np.array_equal(archive["arr_1"], archive["labels"])
        return archive["arr_0"], archive["labels"]


# ---- labels ----------------------------------------------------------------------------------------------------------


def test_balanced_labels_are_equally_many_and_shuffled_by_the_seed_alone():
    """Catches: sorted classes, of which ADM's Inception Score makes 62 in the place of 298."""
    labels = choose_labels([0, 2, 5], 21, "balanced", seed=0)
    assert np.bincount(labels).tolist() == [7, 0, 7, 0, 0, 7] and (labels.diff() < 0).any()
    assert torch.equal(labels, choose_labels([0, 2, 5], 21, "balanced", seed=0))
    assert not torch.equal(labels, choose_labels([0, 2, 5], 21, "balanced", seed=1))
    with pytest.raises(UserError, match="--num 20 .* equally by 3 classes: use 21, or --labels random"):
        choose_labels([0, 2, 5], 20, "balanced", seed=0)


def test_random_labels_come_by_chance():
    counts = np.bincount(choose_labels([0, 1, 3], 3000, "random", seed=0), minlength=4)
    assert counts[2] == 0 and counts.sum() == 3000 and abs(counts[[0, 1, 3]] - 1000).max() < 100 and counts[0] != 1000


def test_labels_of_the_data_come_as_often_as_its_pictures():
    """To within one image of the exact share, whatever the number of images; of chosen classes, in their proportion."""
    counts = [732, 1300, 10, 1]
    for num in (1, 7, 2043, 50_000):
        labels = choose_labels([0, 1, 2, 3], num, "data", 0, counts)
        share = num * np.array(counts) / sum(counts)
        assert abs(np.bincount(labels, minlength=4) - share).max() <= 1, num
    labels = choose_labels([0, 1, 2, 3], 2043, "data", 0, counts)
    assert np.bincount(labels).tolist() == counts and (labels.diff() < 0).any()
    assert np.bincount(choose_labels([3, 2], 110, "data", 0, counts)).tolist() == [0, 0, 100, 10]
    with pytest.raises(UserError, match="--labels data: the checkpoint does not say"):
        choose_labels([0, 1], 10, "data", 0, None)


# ---- shards ----------------------------------------------------------------------------------------------------------


def test_the_npz_holds_every_image_in_order_and_the_settings(tmp_path):
    """Catches: a lost short last batch, shards in another order, images of another layout, shards left behind."""
    write(tmp_path / "x.npz", 11, 3, {"seed": 5, "steps": 2})
    images, labels = arrays(tmp_path / "x.npz")
    assert images.shape == (11, *SIZE, 3) and (images == np.arange(11)[:, None, None, None]).all()
    assert labels.tolist() == [i % 3 for i in range(11)]
    with zipfile.ZipFile(tmp_path / "x.npz") as archive:
        assert json.loads(archive.comment) == {"seed": 5, "steps": 2}
    assert os.listdir(tmp_path) == ["x.npz"]


@pytest.mark.parametrize("world", [2, 3, 8])
def test_any_number_of_processes_writes_the_same_bytes(tmp_path, world):
    """The ranks one after the other, rank 0 last since it joins. Each image is drawn once."""
    write(tmp_path / "alone.npz", 11, 2)
    seen, ranks = [], []
    for rank in range(world):
        processes = types.SimpleNamespace(rank=rank, world=world, barrier=lambda: None)
        ranks.append(Shards(tmp_path / "x.npz", 11, SIZE, 2, {"seed": 0}, processes))
    for shards in reversed(ranks):
        shards.draw(lambda numbers, watch: draw(numbers, watch, seen), 2)
    for shards in reversed(ranks):
        shards.join(np.arange(11) % 3)
    assert sorted(sum(seen, [])) == list(range(11))
    assert (tmp_path / "x.npz").read_bytes() == (tmp_path / "alone.npz").read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["alone.npz", "x.npz"]


def test_an_interrupted_run_resumes_with_what_is_missing(tmp_path):
    """Catches starting from zero. Other processes may finish it, whose shards differ from those of one."""
    seen = []

    def interrupted(numbers, watch):
        if len(seen) == 2:
            raise KeyboardInterrupt
        return draw(numbers, watch, seen)

    with pytest.raises(KeyboardInterrupt):
        Shards(tmp_path / "x.npz", 12, SIZE, 2, {"seed": 0}, ALONE).draw(interrupted, 2)
    assert seen == [[0, 1], [2, 3]] and os.listdir(tmp_path) == ["x.npz.shards"]
    seen.clear()
    write(tmp_path / "x.npz", 12, 2, seen=seen)
    assert seen == [[4, 5], [6, 7], [8, 9], [10, 11]] and os.listdir(tmp_path) == ["x.npz"]
    assert (arrays(tmp_path / "x.npz")[0] == np.arange(12)[:, None, None, None]).all()


def test_shards_of_other_settings_are_never_mixed(tmp_path):
    Shards(tmp_path / "x.npz", 12, SIZE, 2, {"seed": 0, "interval": [0.1, 1.0]}, ALONE)
    for settings, words in (
        ({"seed": 1, "interval": [0.1, 1.0]}, "seed=0, and this run has 1"),
        ({"seed": 0, "interval": [0.2, 1.0]}, "interval=.0.1, 1.0., and this run has .0.2, 1.0."),
        ({"interval": [0.1, 1.0]}, "seed=0, and this run has None"),
    ):
        with pytest.raises(UserError, match=f"begun with {words}.*delete the folder, or choose another --npz"):
            Shards(tmp_path / "x.npz", 12, SIZE, 2, settings, ALONE)
    for damage in ("{", "[1]"):
        (tmp_path / "x.npz.shards" / "settings.json").write_text(damage)
        with pytest.raises(UserError, match="settings.json is damaged: remove it"):
            Shards(tmp_path / "x.npz", 12, SIZE, 2, {"seed": 0}, ALONE)


def test_a_damaged_or_missing_shard_is_named(tmp_path):
    shards = Shards(tmp_path / "x.npz", 6, SIZE, 3, {"seed": 0}, ALONE)
    shards.draw(draw, 2)
    second = shards.where(1)
    whole = second.read_bytes()
    for content in (whole[:-10], whole + b"more", b"", None):
        second.unlink() if content is None else second.write_bytes(content)
        with pytest.raises(UserError, match="000001.rgb is missing or damaged: delete it and run the same command"):
            shards.join(np.zeros(6))
        assert not (tmp_path / "x.npz").exists() and not (tmp_path / ".tmp-x.npz").exists()
    write(tmp_path / "x.npz", 6, 3)
    assert (arrays(tmp_path / "x.npz")[0] == np.arange(6)[:, None, None, None]).all()


def test_a_shard_whose_writing_fails_leaves_nothing(tmp_path, monkeypatch):
    """Catches: half a shard under its final name, which would never be drawn again."""

    def fail(path, content):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    shards = Shards(tmp_path / "x.npz", 6, SIZE, 3, {"seed": 0}, ALONE)
    monkeypatch.setattr(pathlib.Path, "write_bytes", fail)
    with pytest.raises(OSError, match="No space left"):
        shards.draw(draw, 2)
    assert os.listdir(tmp_path / "x.npz.shards") == ["settings.json"]


def test_a_disk_that_is_too_small_is_found_first(tmp_path, monkeypatch):
    """For shards and npz; what an interrupted run left there already counts."""
    need = 2 * 100 * 16 * 16 * 3
    usage = {"free": need}
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: types.SimpleNamespace(**usage))
    check_disk(tmp_path / "x.npz", 100, (16, 16))
    with pytest.raises(UserError, match="--npz .*x.npz needs .* GB of disk .*smaller --num"):
        check_disk(tmp_path / "x.npz", 101, (16, 16))
    (tmp_path / "x.npz.shards").mkdir()
    (tmp_path / "x.npz.shards" / "000000.rgb").write_bytes(bytes(2 * 16 * 16 * 3))
    check_disk(tmp_path / "x.npz", 101, (16, 16))


# ---- several processes -----------------------------------------------------------------------------------------------


def test_a_mistake_of_all_ranks_is_told_by_the_first_and_ends_the_others_in_silence():
    def enter(rank, failing, failed):
        def of_all(value):
            assert value == (rank in failing)
            return failed

        def barrier():
            raise RuntimeError("connection closed by peer")  # the rank that told it has ended

        processes = types.SimpleNamespace(rank=rank, world=len(failed), of_all=of_all, barrier=barrier)
        with one_complaint(processes):
            if rank in failing:
                raise UserError(f"as rank {rank} sees it")

    enter(0, [], [False, False])
    for failing, rank, told in (([0, 1], 0, True), ([0, 1], 1, False), ([1], 1, True), ([1], 0, False)):
        with pytest.raises(UserError if told else SystemExit) as caught:
            enter(rank, failing, [r in failing for r in range(2)])
        assert str(caught.value) == (f"as rank {rank} sees it" if told else "1")


def torchrun(*arguments):
    """Two ranks of a script: (exit status, stderr). The "--" keeps torchrun from completing the script's flags."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as two:
        try:
            _, errors = two.communicate(timeout=240)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(two.pid, signal.SIGKILL)
    return two.returncode, errors


@pytest.fixture
def flags(tmp_path):
    """sample.py with the flags of an npz of 20 shards by a tiny model, without --npz."""
    save_checkpoint(tmp_path / "tiny.pt", run_state(1))
    how = ["--num", 60, "--batch-size", 3, "--steps", 30, "--solver", "euler-maruyama", "--precision", "fp32"]
    return [ROOT / "sample.py", "--ckpt", tmp_path / "tiny.pt", "--device", "cpu", *how]


@pytest.mark.slow
def test_npz_killed_and_resumed_by_two_processes_has_the_same_bytes(tmp_path, flags):
    """SIGKILL in the middle of one process, then two, against one that was left alone: the whole file is equal.

    Then other settings, by two processes: one line from one rank, and no traceback of ours.
    """
    status, _, errors = run_script(*flags, "--npz", tmp_path / "alone.npz")
    assert status == 0, errors
    shards = tmp_path / "killed.npz.shards"
    command = [sys.executable, *map(str, flags), "--npz", str(tmp_path / "killed.npz")]
    with subprocess.Popen(command, env=os.environ | {"OMP_NUM_THREADS": "1"}) as one:
        deadline = time.monotonic() + 120
        while one.poll() is None and time.monotonic() < deadline and len(list(shards.glob("*.rgb"))) < 5:
            time.sleep(0.01)
        one.send_signal(signal.SIGKILL)
    assert one.returncode == -signal.SIGKILL and not (tmp_path / "killed.npz").exists()
    assert 5 <= len(list(shards.glob("*.rgb"))) < 20

    status, errors = torchrun(*flags, "--npz", tmp_path / "killed.npz", "--seed", 1)
    lines = [line for line in errors.splitlines() if "sample.py: " in line]
    assert status != 0 and len(lines) == 1 and "was begun with seed=0, and this run has 1" in lines[0], errors
    assert "UserError" not in errors and not re.search(r"SystemExit|DistError|lost touch", errors), errors

    status, errors = torchrun(*flags, "--npz", tmp_path / "killed.npz")
    assert status == 0, errors
    assert sorted(os.listdir(tmp_path)) == ["alone.npz", "killed.npz", "tiny.pt"]
    assert (tmp_path / "killed.npz").read_bytes() == (tmp_path / "alone.npz").read_bytes()


@pytest.mark.slow
def test_a_mistake_under_torchrun_is_one_line(tmp_path, flags):
    for mistake, words in (
        (["--class", "nine", "--npz", tmp_path / "x.npz"], "--class 'nine' is unknown"),
        (["--out", tmp_path / "x.png"], "several processes are for --npz"),
    ):
        status, errors = torchrun(*flags, *mistake)
        lines = [line for line in errors.splitlines() if "sample.py: " in line]
        assert status != 0 and len(lines) == 1 and words in lines[0], errors
    assert os.listdir(tmp_path) == ["tiny.pt"]
