"""What happens when things go wrong while several processes train: kills, crashes, freezes, signals, full disks, NaNs.

    python -m pytest tests/test_reliability.py -m "not slow"      # a sample, about a minute on two quiet cores
    python -m pytest tests/test_reliability.py                    # everything, some ten minutes

Everything runs as on a cluster, train.py under torchrun, only with gloo on a CPU. Faults come from outside: a small
script changes something in the modules that train.py imports and then runs train.py as the command line would, so that
train.py itself knows nothing of being tested. "Exact" is torch.equal on model, EMA, optimizer and step against a run
that nobody disturbed. Not here: what needs one process only, which stands beside its module.
"""

import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid

import pytest
import torch

from helpers import QUICK, ROOT, assert_same_run, last

from model import PRESETS, PixNerd
from pretrained.dinov2 import DINOv2
from runtime.checkpoint import load_checkpoint, save_checkpoint

pytestmark = pytest.mark.skipif(not pathlib.Path("/proc/self/environ").exists(), reason="finds processes through /proc")
slow = pytest.mark.slow
STEPS = 8
# The rate does not depend on --steps, so that a run can also be stopped by a smaller --steps and still be the same run.
FLAGS = [*QUICK, "--schedule", "constant", "--log-every", "1"]
PATIENCE = 150  # seconds until a test gives up waiting: a start takes 6 on a quiet machine, and machines are not quiet
PAUSE = 0.02  # seconds between two looks

PRELUDE = f"""
import itertools, os, pathlib, runpy, signal, sys, time
sys.path.insert(0, {str(ROOT)!r})
sys.argv[0] = {str(ROOT / "train.py")!r}
import data, flow, runtime.checkpoint, runtime.pictures, runtime.run_folder, torch
HERE, RANK = pathlib.Path(__file__).parent, int(os.environ.get("RANK", 0))

def note(name, line):
    with open(HERE / name, "a") as file:
        file.write(f"{{line}}\\n")

def each_step(action):  # calls action(number of the step in this process, loss) -> loss within every forward pass
    plain, count = flow.flow_matching_loss, itertools.count(1)
    flow.flow_matching_loss = lambda *args, **kwargs: action(next(count), plain(*args, **kwargs))
"""
# Two faults-to-be that several tests use: writing down which samples are drawn, and steps slow enough to be caught in.
RECORD_SAMPLES = """
plain_item = data.TrainingSamples.__getitem__
def recorded(self, k):
    sample = plain_item(self, k)
    drawn = [float(sample[name].sum()) for name in ("u", "t", "noise")]
    note("samples", " ".join(map(repr, [k, sample["index"], sample["y"], *drawn])))
    return sample
data.TrainingSamples.__getitem__ = recorded
"""
SLOW_STEPS = """
def count_and_wait(k, loss):
    note(f"steps-{RANK}", k)
    time.sleep(0.3)
    return loss
each_step(count_and_wait)
"""


def sabotage(where, *code):
    """A script in the folder `where` that runs `code` and then train.py, as the command line would."""
    where.mkdir(parents=True, exist_ok=True)
    script = where / "sabotaged_train.py"
    script.write_text("\n".join([PRELUDE, *code, 'runpy.run_path(sys.argv[0], run_name="__main__")\n']))
    return script


class Job:
    """train.py, or a script that sabotages it, under torchrun (one rank: alone), in processes that cannot get away.

    torchrun gives its workers sessions of their own, so they outlive a kill of its process group. All descendants are
    therefore known by a mark in their environment, which they inherit, and leaving the `with` block kills them all.
    """

    def __init__(self, out, *flags, script=ROOT / "train.py", ranks=2, agent=(), **environment):
        out.parent.mkdir(parents=True, exist_ok=True)
        self.mark, self.log = f"RELIABILITY_JOB={uuid.uuid4().hex}", out.parent / f"log-{uuid.uuid4().hex[:8]}.txt"
        launcher = ["-m", "torch.distributed.run", *(agent or ["--standalone"]), f"--nproc_per_node={ranks}"]
        command = [sys.executable, *(launcher if ranks > 1 or agent else []), script, "--out", out, *FLAGS, *flags]
        name, value = self.mark.split("=")
        with open(self.log, "w") as log:
            self.process = subprocess.Popen(
                [str(word) for word in command],
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=out.parent,
                start_new_session=True,
                env=os.environ | {"OMP_NUM_THREADS": "1", name: value} | environment,
            )

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.kill()

    @property
    def text(self):
        """What all processes have printed so far."""
        return self.log.read_text(errors="replace")

    def members(self):
        """{pid: rank or None} of every living process of this job."""
        found = {}
        for entry in pathlib.Path("/proc").iterdir():
            try:
                variables = (entry / "environ").read_text().split("\0") if entry.name.isdigit() else []
            except OSError:  # it has just ended
                continue
            if self.mark in variables:
                found[int(entry.name)] = next((int(v[5:]) for v in variables if v.startswith("RANK=")), None)
        return found

    def pid(self, rank):
        """The process of a rank (None: the agent, or the only one), not one of the loader workers that it started."""
        return next(pid for pid, starter in self.starters(rank).items() if starter not in self.starters(rank))

    def workers(self, rank):
        """The loader workers of a rank."""
        return [pid for pid, starter in self.starters(rank).items() if starter in self.starters(rank)]

    def starters(self, rank):
        """{pid: pid of the process that started it} of a rank. Which is older, the numbers do not tell: they wrap."""
        found = {}
        for pid in (pid for pid, of in self.members().items() if of == rank):
            with contextlib.suppress(OSError):  # it has just ended
                found[pid] = int(pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        return found

    def until(self, condition, what, alive=False):
        """Looks again and again until condition() is true. alive: a job that ends before that is a failure.

        It gives up in the end, or a hang would have none; how long a thing takes is not judged.
        """
        for _ in range(int(PATIENCE / PAUSE)):
            if condition():
                return
            if alive and self.process.poll() is not None:
                break
            time.sleep(PAUSE)
        pytest.fail(f"no {what}; left {self.members()}:\n{self.text}")

    def wait_for(self, condition, what):
        """Waits until condition() is true of a job that runs."""
        self.until(condition, what, alive=True)

    def wait_for_step(self, step):
        """Waits for the line that rank 0 prints after a step."""
        self.wait_for(lambda: f"step {step}/" in self.text, f"step {step}")

    def finish(self, timeout=PATIENCE):
        """The exit status, once all has ended by itself; processes left behind are a failure."""
        try:
            status = self.process.wait(timeout)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {timeout} s:\n{self.text}")
        self.until(lambda: not self.members(), "end")  # loader workers look for their parent every 5 seconds
        return status

    def kill(self):
        """SIGKILL for every process, again until none is left (a fork may be under way)."""

        def gone():
            members = self.members()
            for pid in members:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            return not members

        self.until(gone, "end of all processes")
        self.process.wait()


def run(out, *flags, timeout=PATIENCE, **kwargs):
    """A job from start to end: what it printed. It must succeed."""
    with Job(out, *flags, **kwargs) as job:
        assert job.finish(timeout) == 0, job.text
        return job.text


def fails(out, *flags, timeout=PATIENCE, **kwargs):
    """A job that must fail by itself: what it printed."""
    with Job(out, *flags, **kwargs) as job:
        assert job.finish(timeout) != 0, job.text
        return job.text


def copy_of(run_folder, step, out):
    """A run's folder as it was when `step` had just been saved."""
    (out / "previews").mkdir(parents=True)
    shutil.copy(run_folder / f"step-{step:08d}.pt", out)
    shutil.copy(run_folder / "metrics.jsonl", out)
    return out


def losses(out):
    """{step: loss} from the metrics; no step may appear twice."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert len({line["step"] for line in lines}) == len(lines)
    return {line["step"]: line["loss"] for line in lines}


def samples(where, first=0):
    """What RECORD_SAMPLES wrote, from sample number `first` on, in order of the numbers."""
    lines = (where / "samples").read_text().splitlines()
    return sorted((line for line in lines if int(line.split()[0]) >= first), key=lambda line: int(line.split()[0]))


def assert_one_line(text, line):
    """The program, not torchrun, answered with this line alone: no traceback that runs through train.py."""
    assert f"train.py: {line}" in text, text
    assert '/train.py", line' not in text, text


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The undisturbed run of two ranks, with a checkpoint of every second step and its samples written down."""
    where = tmp_path_factory.mktemp("whole")
    run(where / "run", "--steps", STEPS, "--save-every", 2, "--keep", 9, script=sabotage(where, RECORD_SAMPLES))
    return where / "run"


# ---- killed ----------------------------------------------------------------------------------------------------------

# Every call that touches the disk while a checkpoint is written is a point at which all ranks can die: before, between
# and in the middle of writes, around each fsync, rename, link and removal. `POINTS` has one for each life; it comes in
# the save number `ARMED` of that life, whose calls are noted.
KILL_IN_A_SAVE = """
note(f"pid-{RANK}", os.getpid())
lives = len((HERE / "killed").read_text().splitlines()) if (HERE / "killed").exists() else 0
saves = itertools.count(1)

def die(where):
    note("killed", where)
    for file in sorted(HERE.glob("pid-*"), reverse=True):  # this process, rank 0, is the last
        os.kill(int(file.read_text().split()[-1]), signal.SIGKILL)

def dying(name, plain):
    calls = itertools.count(1)
    def call(*args, **kwargs):
        this = f"{name} {next(calls)}" if armed else None
        if this: note("calls", this)
        if point == f"before {this}": die(point)
        result = plain(*args, **kwargs)
        if point == f"after {this}": die(point)
        return result
    return call

class File:  # dies in the middle of a write
    def __init__(self, *args): self.file = open(*args)
    def __enter__(self): return self
    def __exit__(self, *error): self.file.close()
    def write(self, content):
        room = point - self.file.tell() if armed and isinstance(point, int) else len(content)
        if room < len(content):
            self.file.write(content[:max(0, room)])
            self.file.flush()
            die(f"at byte {point}")
        return self.file.write(content)
    def __getattr__(self, name): return getattr(self.file, name)

if RANK == 0 and lives < len(POINTS):
    point, armed = POINTS[lives], False
    runtime.checkpoint.open = File
    for name in ("fsync", "replace", "link"):
        setattr(os, name, dying(name, getattr(os, name)))
    pathlib.Path.unlink = dying("unlink", pathlib.Path.unlink)
    plain_save = runtime.run_folder.save_run
    def save_run(*args):
        global armed
        armed = next(saves) == ARMED
        return plain_save(*args)
    runtime.run_folder.save_run = save_run
"""
# Places in the file, as a share of its length: the last is in the directory at its end.
PLACES = [0.0, 1e-6, *(random.Random(1).random() for _ in range(8)), 0.999999]


@slow
def test_killed_in_the_middle_of_a_save_resumes_exactly(tmp_path, whole):
    """All ranks get SIGKILL at one point after another, and torchrun starts them again: a chain of resumes.

    Catches: writing over the newest checkpoint, pruning before the new one is safe, half a file taken for a whole one.
    """
    look = tmp_path / "look"
    script = sabotage(look, "POINTS, ARMED = [None], 4", KILL_IN_A_SAVE)  # with keep 2, the third and later ones prune
    run(look / "run", "--steps", 4, "--save-every", 1, script=script, ranks=1)
    calls = (look / "calls").read_text().splitlines()
    calls = [call for call in calls if "unlink" not in call] + calls[-1:]  # of the removals, the one that prunes
    assert {call.split()[0] for call in calls} == {"fsync", "replace", "link", "unlink"}
    size = (whole / "last.pt").stat().st_size
    points = [int(place * size) for place in PLACES]
    points += [f"{when} {call}" for when in ("before", "after") for call in calls]
    steps = 2 * len(points) + 2
    reference = copy_of(whole, STEPS, tmp_path / "reference" / "run")
    run(reference, "--steps", steps)
    out = tmp_path / "life" / "run"
    # The first save of each life succeeds, or there would never be progress.
    script = sabotage(out.parent, f"POINTS, ARMED = {points!r}, 2", KILL_IN_A_SAVE)
    text = run(
        out,
        "--steps",
        steps,
        "--save-every",
        1,
        script=script,
        timeout=PATIENCE * len(points),
        agent=["--standalone", f"--max-restarts={len(points)}"],
    )
    killed = (out.parent / "killed").read_text().splitlines()
    assert killed == [f"at byte {point}" if isinstance(point, int) else point for point in points]  # each was reached
    resumed = [int(step) for step in re.findall(r"resuming .* at step (\d+)", text)]
    assert len(resumed) == len(points) and all(b > a for a, b in zip(resumed, resumed[1:]))  # the save before is there
    assert_same_run(last(out), last(reference))
    assert not list(out.glob(".tmp-*"))


@slow
def test_killed_at_any_time_loses_at_most_one_save_interval(tmp_path, whole):
    """SIGKILL for everything, torchrun too, at random moments, start-up included; then the same command again."""
    out, draw, reached = tmp_path / "run", random.Random(2), 0
    script = sabotage(tmp_path, SLOW_STEPS)
    for attempt in range(6):
        before = reached
        with Job(out, "--steps", STEPS, "--save-every", 2, script=script) as job:
            if attempt % 3:  # else: anywhere in the start-up
                job.wait_for(lambda: "training" in job.text or "step" in job.text, "first step")
            time.sleep(draw.uniform(0, 3))
            done = [int(step) for step in re.findall(r"step (\d+)/", job.text)]
            job.kill()
        saved = [int(path.stem[5:]) for path in out.glob("step-*.pt")]
        reached = max(saved, default=0)
        assert reached >= max([before, *done]) - 2  # the line of a step is printed just before its save
    run(out, "--steps", STEPS, "--save-every", 2, script=script)
    assert_same_run(last(out), last(whole))


@slow
@pytest.mark.parametrize("victim", [0, 1])
def test_when_one_rank_is_killed_all_end_with_an_error(tmp_path, victim):
    """Catches: survivors that wait for the dead one, and loader workers that outlive their rank."""
    with Job(tmp_path / "run", "--steps", 10**6, "--save-every", 0, "--workers", 2) as job:
        job.wait_for_step(3)
        os.kill(job.pid(victim), signal.SIGKILL)
        assert job.finish() != 0
        assert f"train.py: rank {1 - victim} lost touch with another process" in job.text, job.text


@slow
@pytest.mark.parametrize("where", ["step", "loader"])
def test_when_one_rank_raises_all_end_and_its_traceback_is_shown(tmp_path, where):
    """Catches: an error swallowed by a one-line message, or buried under the survivors' complaints about their peer."""
    fault = (
        """
if RANK == 1:
    def crash(k, loss):
        if k == 3:
            raise ArithmeticError("made by the test")
        return loss
    each_step(crash)
"""
        if where == "step"
        else """
if RANK == 1:
    plain_picture = data.Emoji.picture
    def crash(self, i, rng=None):
        if next(count) == 5:
            raise ArithmeticError("made by the test")
        return plain_picture(self, i, rng)
    count, data.Emoji.picture = itertools.count(), crash
"""
    )
    workers = 2 if where == "loader" else 0
    text = fails(
        tmp_path / "run", "--steps", 10**6, "--save-every", 0, "--workers", workers, script=sabotage(tmp_path, fault)
    )
    assert "ArithmeticError: made by the test" in text and "in crash" in text, text
    assert text.count("Traceback (most recent call last)") <= (3 if where == "loader" else 2), text  # + torchrun's own


@slow
def test_a_frozen_rank_is_an_error_after_the_timeout(tmp_path):
    """Catches: waiting forever for a process that neither answers nor ends. torchrun kills it 30 s after the error."""
    with Job(tmp_path / "run", "--steps", 10**6, "--save-every", 0, "--timeout", 10) as job:
        job.wait_for_step(3)
        os.kill(job.pid(1), signal.SIGSTOP)
        assert job.finish() != 0
        assert "train.py: rank 0 lost touch with another process" in job.text, job.text
        assert "imed out" in job.text, job.text


@slow
def test_torchrun_with_max_restarts_resumes_by_itself(tmp_path, whole):
    """One rank crashes once, between two saves."""
    crash_once = """
def crash(k, loss):
    if RANK == 1 and k == 4 and not (HERE / "crashed").exists():
        note("crashed", k)
        raise ArithmeticError("made by the test")
    return loss
each_step(crash)
"""
    text = run(
        tmp_path / "run",
        "--steps",
        STEPS,
        "--save-every",
        2,
        script=sabotage(tmp_path, crash_once),
        agent=["--standalone", "--max-restarts=1"],
    )
    assert "ArithmeticError: made by the test" in text and text.count("resuming") == 1
    assert_same_run(last(tmp_path / "run"), last(whole))
    assert sorted(losses(tmp_path / "run")) == list(range(1, STEPS + 1))


# ---- asked to stop ---------------------------------------------------------------------------------------------------


def stopped_and_resumed(out, job, whole):
    """After a signal: all ranks have left at one step, which is saved; the same command then ends where `whole` did."""
    job.finish()
    step = last(out)["step"]
    assert 0 < step < STEPS, job.text
    assert f"at step {step}, saved" in job.text, job.text
    for rank in (0, 1):
        assert (out.parent / f"steps-{rank}").read_text().split()[-1] == str(step), job.text
    run(out, "--steps", STEPS)
    assert_same_run(last(out), last(whole))


@slow
@pytest.mark.parametrize("workers", [2, 0])
def test_sigterm_to_torchrun_saves_the_same_step_on_all_ranks(tmp_path, whole, workers):
    """torchrun passes the signal on to whole process groups. Catches: loader workers that die of it before the save."""
    out = tmp_path / "run"
    flags = ["--steps", STEPS, "--save-every", 0, "--workers", workers]
    with Job(out, *flags, script=sabotage(tmp_path, SLOW_STEPS)) as job:
        job.wait_for_step(2)
        job.process.send_signal(signal.SIGTERM)
        stopped_and_resumed(out, job, whole)


@slow
def test_sigterm_during_a_preview(tmp_path, whole):
    """Only rank 0 draws; the others wait in the next step already. Catches: a rank that stops one step early."""
    out = tmp_path / "run"
    pause = """
plain_grid = runtime.pictures.picture_grid
def slow_grid(*args):
    note("previewing", RANK)
    time.sleep(3)
    return plain_grid(*args)
runtime.pictures.picture_grid = slow_grid
"""
    with Job(
        out, "--steps", STEPS, "--save-every", 0, "--preview-every", 3, script=sabotage(tmp_path, SLOW_STEPS, pause)
    ) as job:
        job.wait_for((tmp_path / "previewing").exists, "preview")
        job.process.send_signal(signal.SIGTERM)
        stopped_and_resumed(out, job, whole)


@slow
@pytest.mark.parametrize("rank, number", [(1, signal.SIGTERM), (0, signal.SIGINT)])
def test_a_signal_to_one_rank_stops_all_at_one_step(tmp_path, whole, rank, number):
    """Catches: a rank that leaves alone, without a checkpoint, while the others wait for it."""
    out = tmp_path / "run"
    with Job(out, "--steps", STEPS, "--save-every", 0, script=sabotage(tmp_path, SLOW_STEPS)) as job:
        job.wait_for_step(2)
        os.kill(job.pid(rank), number)
        stopped_and_resumed(out, job, whole)
        assert job.process.returncode == 0


# ---- errors that every rank must share -------------------------------------------------------------------------------


@slow
def test_a_full_disk_is_named_and_keeps_the_checkpoint_before(tmp_path, whole):
    """Files may be half as long as a save. Catches: ranks that wait for a failed one; torch.save's unrelated error."""
    out = copy_of(whole, 4, tmp_path / "run")
    before = (out / "step-00000004.pt").read_bytes()
    limit = f"import resource; resource.setrlimit(resource.RLIMIT_FSIZE, ({len(before) // 2},) * 2)"
    text = fails(out, "--steps", STEPS, "--save-every", 2, script=sabotage(tmp_path, limit))
    assert_one_line(text, "[Errno 27] File too large")
    names = sorted(path.name for path in out.glob("*.pt*"))
    assert (
        names == ["last.pt", "step-00000004.pt"] and last(out)["step"] == 4
    )  # no temporary file, no half of a new one
    assert (out / "step-00000004.pt").read_bytes() == before


NOT_FINITE = {
    "loss": "loss * float('nan')",
    "gradient": "(loss.register_hook(lambda gradient: gradient * float('inf')), loss)[1]",  # the loss itself is fine
}


@slow
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_not_finite_on_one_rank_stops_all_before_the_update_and_is_blamed(tmp_path, whole, what):
    """Rank 1 goes wrong in step 3, noticed at the next save. Catches: rank 0 reporting itself, or a step of -1."""
    fault = f"each_step(lambda k, loss: {NOT_FINITE[what]} if RANK == 1 and k == 3 else loss)"
    out = tmp_path / "run"
    text = fails(out, "--steps", STEPS, "--save-every", 2, "--log-every", 0, script=sabotage(tmp_path, fault))
    who = "the loss stopped being finite on rank 1" if what == "loss" else "the gradient was not finite"
    assert_one_line(text, f"{who} at step 3;")
    assert_same_run(last(out), load_checkpoint(whole / "step-00000002.pt"))
    assert not (out / "step-00000004.pt").exists()


@slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_killed_loader_worker_is_an_error_that_names_it(tmp_path, ranks):
    """As the kernel does when memory runs out. Catches: waiting for its batch, and a traceback through the loader."""
    with Job(tmp_path / "run", "--steps", 10**6, "--save-every", 0, "--workers", 2, ranks=ranks) as job:
        job.wait_for_step(3)
        rank = 0 if ranks > 1 else None
        worker = job.workers(rank)[0]
        os.kill(worker, signal.SIGKILL)
        assert job.finish() != 0
        by_torch = [
            f"DataLoader worker (pid {worker}) is killed by signal: Killed",
            f"DataLoader worker (pid(s) {worker}) exited unexpectedly",
        ]
        assert_one_line(job.text, by_torch["unexpectedly" in job.text])


@slow
def test_a_batch_that_does_not_divide_by_the_ranks_is_one_line(tmp_path):
    """It is refused before the ranks meet, so a rank of two can be asked alone."""
    text = fails(tmp_path / "run", "--batch-size", 5, ranks=1, WORLD_SIZE="2", RANK="1")
    assert_one_line(text, "--batch-size 5 cannot be shared equally by 2 processes")


@slow
def test_damaged_checkpoints_found_by_rank_0_end_all_ranks_with_one_line(tmp_path):
    """Only rank 0 looks for checkpoints. Catches: the others waiting for its choice, and one that starts from zero."""
    out = tmp_path / "run"
    out.mkdir()
    (out / "step-00000004.pt").write_bytes(b"PK but not really")
    text = fails(out, "--steps", STEPS)
    assert_one_line(text, f"all 1 checkpoints in {out} are damaged")


# ---- the same run, whoever shares the work ---------------------------------------------------------------------------


@slow
def test_world_size_may_change_between_resumes(tmp_path, whole):
    """Two ranks up to step 4, one to 6, two to 8. Catches: an order, noise or label drop that depends on the rank."""
    out = copy_of(whole, 4, tmp_path / "run")
    script = sabotage(tmp_path, RECORD_SAMPLES)
    run(out, "--steps", 6, script=script, ranks=1)
    run(out, "--steps", STEPS, script=script)
    every = samples(whole.parent)
    assert [int(line.split()[0]) for line in every] == list(range(4 * STEPS))  # each sample of the run exactly once
    assert samples(tmp_path) == samples(whole.parent, first=4 * 4)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-5)


@slow
@pytest.mark.parametrize("ranks, micro", [(1, 4), (2, 1), (4, 1), (1, 2)])
def test_ranks_and_micro_batches_share_the_same_samples(tmp_path, whole, ranks, micro):
    """Catches: gradients averaged twice or not at all, and micro-batches that synchronise too early or not at all."""
    out = tmp_path / "run"
    run(out, "--steps", STEPS, "--micro-batch", micro, ranks=ranks, script=sabotage(tmp_path, RECORD_SAMPLES))
    assert samples(tmp_path) == samples(whole.parent)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-4)
    for key, value in last(whole)["model"].items():
        torch.testing.assert_close(last(out)["model"][key], value, atol=1e-4, rtol=1e-3)


@slow
def test_buffers_which_never_change_are_not_sent_from_rank_to_rank(tmp_path):
    """A buffer that is made different on rank 1 stays so, and nobody is warned of the flag that says it.

    Catches: constants that travel in every forward pass.
    """
    fault = """
import runtime.distributed
plain_share = runtime.distributed.Processes.share_gradients
def share(self, module, device):
    shared = plain_share(self, module, device)
    buffers.append(next(module.buffers()))
    buffers[0] += RANK
    return shared
buffers = []
each_step(lambda k, loss: (note(f"buffer-{RANK}", float(buffers[0].mean())), loss)[1])
runtime.distributed.Processes.share_gradients = share
"""
    assert "Warning" not in run(tmp_path / "run", "--steps", 3, script=sabotage(tmp_path, fault))
    means = [[float(line) for line in (tmp_path / f"buffer-{rank}").read_text().splitlines()] for rank in range(2)]
    assert means[1] == pytest.approx([mean + 1 for mean in means[0]]) and len(means[0]) == 3


@slow
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("stop", [3, 4], ids=["end_of_an_epoch", "mid_epoch"])
def test_workers_and_the_place_in_the_epoch_do_not_matter(tmp_path, folder, workers, stop):
    """Six pictures in batches of four: step 3 ends the second epoch. Reference: no workers, no stop."""
    run(tmp_path / "reference" / "run", "--data", folder, "--steps", 6, "--workers", 0)
    out = tmp_path / "run"
    for steps in (stop, 6):
        run(out, "--data", folder, "--steps", steps, "--workers", workers)
    assert_same_run(last(out), last(tmp_path / "reference" / "run"))


@slow
def test_ranks_that_find_different_pictures_end_with_one_line(tmp_path, folder):
    """As with copies of the data on each machine. Catches: two orders of two data sets, and a run that looks fine."""
    fault = f"""
if RANK == 1:
    plain = data.open_dataset
    data.open_dataset = lambda spec, *args, **flags: plain({str(tmp_path / "other")!r}, *args, **flags)
"""
    shutil.copytree(folder, tmp_path / "other")
    (tmp_path / "other" / "cat" / "0.png").rename(tmp_path / "other" / "cat" / "new.png")
    text = fails(tmp_path / "run", "--data", folder, "--steps", 2, script=sabotage(tmp_path, fault))
    assert_one_line(text, f"rank 1 finds other pictures in {folder} than rank 0")


@slow
def test_a_mistake_in_the_data_is_told_by_all_ranks_in_the_same_words(tmp_path):
    """Rank 0 looks first. Catches: the others complaining of a lost connection."""
    text = fails(tmp_path / "run", "--data", tmp_path / "nowhere")
    assert text.count("nowhere") == 2 and "lost touch" not in text, text


@slow
@pytest.mark.parametrize("recompute", ["field", "all"])
def test_compiled_blocks_and_recomputing_work_between_ranks(tmp_path, whole, recompute):
    """Catches: gradients that DDP does not see ready, or sees twice, when activations are made again."""
    out = tmp_path / "run"
    run(out, "--steps", STEPS, "--micro-batch", 1, "--recompute", recompute, "--compile", "on", timeout=400)
    assert losses(out) == pytest.approx(losses(whole), rel=1e-3)


@slow
def test_two_nodes_train_as_one_node_does(tmp_path, whole):
    """Two torchrun agents that meet on the loopback, one rank each; the folder is shared, as on a cluster."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    agent = ["--nnodes=2", "--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{port}", "--rdzv-id=two-nodes"]
    flags = ["--steps", STEPS, "--save-every", 3]
    with (
        Job(tmp_path / "run", *flags, ranks=1, agent=[*agent, "--node-rank=0"]) as a,
        Job(tmp_path / "run", *flags, ranks=1, agent=[*agent, "--node-rank=1"]) as b,
    ):
        assert a.finish() == 0 and b.finish() == 0, a.text + b.text
        assert (a.text + b.text).count(f"step {STEPS}/{STEPS}") == 1  # only rank 0 of both nodes speaks
    assert_same_run(last(tmp_path / "run"), last(whole))


# ---- alignment and fine-tuning ---------------------------------------------------------------------------------------


@slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_alignment_trains_resumes_exactly_and_saves_its_projector(tmp_path, ranks):
    """A small DINOv2 with random weights. Catches: a projector that is not optimised, not saved or not restored."""
    torch.manual_seed(0)
    teacher = DINOv2(img_size=70, patch_size=14, embed_dim=64, depth=2, num_heads=1)
    for parameter in teacher.parameters():
        parameter.normal_(std=0.3)
    torch.save(teacher.state_dict(), tmp_path / "dino.pth")
    flags = ["--repa", 0.5, "--repa-block", 2, "--dino", tmp_path / "dino.pth"]
    whole = tmp_path / "whole" / "run"
    run(whole, "--steps", 4, "--save-every", 2, *flags, ranks=ranks)
    out = copy_of(whole, 2, tmp_path / "again" / "run")
    run(out, "--steps", 4, *flags, ranks=ranks)
    assert_same_run(last(out), last(whole))
    projector, halfway = last(whole)["projector"], load_checkpoint(whole / "step-00000002.pt")["projector"]
    assert len(projector) == 6  # three linear layers
    for key, value in projector.items():
        assert torch.equal(last(out)["projector"][key], value)
        assert not torch.equal(halfway[key], value)
    lines = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    assert all(-1 <= line["alignment"] <= 2 for line in lines)


@slow
def test_starting_from_another_number_of_classes_says_that_the_embedding_is_new(tmp_path):
    """Everything else is taken over. Catches: a silently random trunk, and class vectors of the wrong classes."""
    torch.manual_seed(5)
    tiny = {"hidden_size": 32, "depth": 2, "num_heads": 2, "patch_size": 16, "field_width": 8, "field_depth": 1}
    config = dataclasses.replace(PRESETS["Nano"], num_classes=3, **tiny)
    model = PixNerd(config)
    save_checkpoint(
        tmp_path / "source.pt",
        {"format": "pixnerd 1", "config": dataclasses.asdict(config), "class_names": None, "ema": model.state_dict()},
    )
    out = tmp_path / "run"
    text = run(out, "--steps", 1, "--lr", "1e-12", "--init", tmp_path / "source.pt", ranks=1)
    assert "class embedding was for 3 classes, this run has 9: a new one is trained" in text
    for key, value in last(out)["model"].items():
        if key == "class_embed.weight":
            assert value.shape[0] == 10  # nine classes, and "no class"
        else:
            torch.testing.assert_close(value, model.state_dict()[key], atol=1e-6, rtol=0)


# ---- all of it, for as long as one likes -----------------------------------------------------------------------------

CLOCK = """
import random
jump, plain_time = random.choice((-1, 1)) * random.uniform(1e3, 1e8), time.time
time.time = lambda: plain_time() + jump
"""


@slow
def test_after_many_kills_stops_restarts_and_jumps_of_the_clock_the_end_is_exact(tmp_path):
    """Two ranks, or one that takes their batch in two parts, for SOAK_MINUTES (default: 1), then compared.

    A life ends by SIGKILL or SIGTERM, to everything or to one rank, at any time from its start on; between two lives
    the times of all files jump too. Catches: whatever the tests above, each with a fault of one kind, do not.
    """
    draw, out, lives = random.Random(int(os.environ.get("SEED", "4"))), tmp_path / "run", collections.Counter()
    script = sabotage(tmp_path, SLOW_STEPS, CLOCK)
    deadline, reached = time.monotonic() + 60 * float(os.environ.get("SOAK_MINUTES", "1")), 0
    while time.monotonic() < deadline:
        ranks, how = draw.choice((1, 2, 2)), draw.choice(("kill all", "kill one", "stop all", "stop one"))
        flags = ["--steps", 10**5, "--save-every", draw.choice((1, 3)), "--micro-batch", 2]
        with Job(out, *flags, script=script, ranks=ranks) as job:
            if draw.random() < 0.8:  # else: somewhere in its start
                job.wait_for(lambda: " left" in job.text, "first step")
            time.sleep(draw.uniform(0, 4))
            victim, number = draw.randrange(ranks), signal.SIGKILL if "kill" in how else signal.SIGTERM
            if how == "kill all":
                job.kill()
            else:
                begun = "one" in how and ranks > 1 and job.starters(victim)
                pid = job.pid(victim) if begun else job.process.pid
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, number)
            print(f"{how}, {ranks} ranks, after {job.text.count(' left')} steps", flush=True)
            job.finish()
            assert "saved; the same command" in job.text or "stop" not in how or " left" not in job.text, job.text
        steps = [int(path.stem[5:]) for path in out.glob("step-*.pt")]
        assert max(steps, default=0) >= reached
        reached, lives[how] = max(steps, default=0), lives[how] + 1
        for path in out.glob("*"):
            os.utime(path, (draw.uniform(0, 4e9),) * 2)
    run(out, "--steps", reached + 3)
    run(tmp_path / "whole" / "run", "--steps", reached + 3)
    assert_same_run(last(out), last(tmp_path / "whole" / "run"))
    assert sorted(losses(out)) == list(range(1, reached + 4))
    print(f"{sum(lives.values())} lives, {dict(lives)}, {reached + 3} steps")
