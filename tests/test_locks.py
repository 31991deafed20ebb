"""Locks of files, and training where the system lacks what only POSIX has. Windows itself was never at hand."""

import fcntl
import os
import subprocess
import sys
import types

import pytest
from helpers import ROOT, command, last

from runtime.files import locks

# What Python lacks on Windows is taken away before any file of the project is imported. msvcrt.locking, which locks
# bytes from the file's position on, is acted by POSIX's locks, which do the same between processes.
AS_ON_WINDOWS = """
import errno, fcntl, os, runpy, signal, sys, types
import torch, torch.distributed, torch.utils.data
def locking(descriptor, mode, count):
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, count, 0, os.SEEK_CUR)
    except BlockingIOError:
        raise PermissionError(errno.EACCES, "Permission denied")
posix, plain_open = fcntl, os.open
def no_folders(path, *how, **more):
    if os.path.isdir(path):
        raise PermissionError(errno.EACCES, "Permission denied", path)
    return plain_open(path, *how, **more)
sys.modules["msvcrt"], sys.modules["fcntl"] = types.SimpleNamespace(locking=locking, LK_NBLCK=2), None
os.open = no_folders
del signal.SIGHUP, signal.pthread_sigmask, os.O_DIRECTORY, os.sync
del sys.argv[0]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def train_as_on_windows(out, *flags):
    """train.py in a process of its own: its CompletedProcess."""
    words = [sys.executable, "-c", AS_ON_WINDOWS, *command(out, *flags)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(words, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_training_saves_resumes_and_locks_its_folder_without_what_only_posix_has(tmp_path):
    """Catches: an import of fcntl, or a signal or call that Windows lacks, on the way of a training run."""
    out = tmp_path / "run"
    first = train_as_on_windows(out, "--steps", "1")
    assert first.returncode == 0, first.stderr
    again = train_as_on_windows(out, "--steps", "2", "--workers", "1")
    assert again.returncode == 0 and "resuming" in again.stdout, again.stderr
    assert last(out)["step"] == 2
    with open(out / ".lock", "a+") as file:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, locks.PLACE)
        refused = train_as_on_windows(out, "--steps", "3")
    assert refused.returncode == 1 and "is in use by process" in refused.stderr
    assert last(out)["step"] == 2


def test_waiting_for_a_lock_on_windows_tries_until_the_other_process_is_done(tmp_path, monkeypatch):
    """Catches: a download that gives up because another process is at it."""
    tries = []

    def locking(descriptor, mode, count):
        tries.append(os.lseek(descriptor, 0, os.SEEK_CUR))
        if len(tries) < 3:
            raise PermissionError

    monkeypatch.setattr(locks, "fcntl", None)
    monkeypatch.setattr(locks, "msvcrt", types.SimpleNamespace(locking=locking, LK_NBLCK=2), raising=False)
    monkeypatch.setattr(locks.time, "sleep", lambda seconds: None)
    with open(tmp_path / "lock", "w") as file:
        locks.lock_or_wait(file)
        file.write("owner")
    assert tries == [locks.PLACE] * 3 and (tmp_path / "lock").read_text() == "owner"
