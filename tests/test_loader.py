"""The processes that prepare batches end with the run."""

import multiprocessing.connection
import multiprocessing.reduction
import os
import signal
import subprocess
import sys

import pytest
import torch
from helpers import ROOT

from runtime.loader import BatchNumbers, training_batches

HANGS = """
import os, sys, time, torch
torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds that torch waits for a worker to end, in place of 5
from runtime.files import UserError, run
from runtime.loader import BatchNumbers, training_batches

class Hanging:
    labels, in_memory = [0] * 8, False
    def __len__(self):
        return 8
    def picture(self, i, rng):
        if torch.utils.data.get_worker_info().id == 1:
            print("hanging", flush=True)
            time.sleep(10_000)
        return torch.zeros(3, 4, 4, dtype=torch.uint8)

def main():
    batches = training_batches(Hanging(), BatchNumbers(0, 4, 2, 2), 0, 1.0, 2, torch.device("cpu"))
    next(batches)
    sys.stdin.read()
    if mistake:
        raise UserError("something else")

for mistake in (False, True):  # two runs at once, in children of a process that has imported torch
    if os.fork() == 0:
        run(main)
        sys.exit()
print(sorted(os.waitstatus_to_exitcode(os.wait()[1]) for _ in range(2)), flush=True)
"""


@pytest.mark.slow
def test_a_worker_that_hangs_in_a_read_does_not_outlive_the_run_nor_keep_it_from_ending():
    """As on a network drive that is gone. Catches: workers that block SIGTERM, for which Python waits at its end."""
    pipes = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    command = [sys.executable, "-W", "ignore", "-c", HANGS]  # torch warns of two workers on a machine with one core
    process = subprocess.Popen(command, cwd=ROOT, text=True, start_new_session=True, **pipes)
    try:
        assert [process.stdout.readline() for _ in range(2)] == ["hanging\n"] * 2
        stdout, stderr = process.communicate(timeout=120)  # until all who could write have ended
        assert stdout == "[0, 1]\n" and stderr == "-c: something else\n", stderr
    finally:
        try:
            os.killpg(process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass


class KilledAsItSends:
    """The worker is killed, as for want of memory, while the batch is on its way: in `owner.function`."""

    labels, in_memory = [0] * 8, False

    def __init__(self, owner, function):
        self.owner, self.function = owner, function

    def __len__(self):
        return 8

    def picture(self, i, rng):
        setattr(self.owner, self.function, lambda *_: os.kill(os.getpid(), signal.SIGKILL))
        return torch.zeros(3, 4, 4, dtype=torch.uint8)


@pytest.mark.parametrize(
    ("owner", "function"),
    [(multiprocessing.connection.Connection, "recv"), (multiprocessing.reduction, "send_handle")],
    ids=["connection reset", "connection closed"],
)
def test_a_worker_killed_while_it_sends_is_named(owner, function):
    """Catches: "Connection reset by peer" and an EOFError, which are seen before the death of the worker is."""
    dataset = KilledAsItSends(owner, function)
    batches = training_batches(dataset, BatchNumbers(0, 4, 2, 2), 0, 1.0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match="DataLoader worker"):
        next(batches)
