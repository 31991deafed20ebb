"""The processes that prepare batches end with the run."""

import os
import signal
import subprocess
import sys

from helpers import ROOT

HANGS = """
import sys, time, torch
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
    sys.stdin.readline()
    if sys.argv[1] == "mistake":
        raise UserError("something else")

run(main)
"""


def test_a_worker_that_hangs_in_a_read_does_not_outlive_the_run_nor_keep_it_from_ending(tmp_path):
    """As on a network drive that is gone. Catches: workers that block SIGTERM, for which Python waits at its end."""
    for ending, expected in (("end", 0), ("mistake", 1)):
        process = subprocess.Popen(
            [sys.executable, "-c", HANGS, ending],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            assert process.stdout.readline() == "hanging\n"
            stdout, stderr = process.communicate("go on\n", timeout=120)  # until all who could write have ended
            assert process.returncode == expected and stderr == ("-c: something else\n" if expected else ""), stderr
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
