"""One process at a time: locks on an open file, which the system frees when their process ends, however it ends."""

import os
import time

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None
    import msvcrt

PLACE = 2**30  # the byte that Windows locks: what the file says must stay readable, and locked bytes are not


def lock_or_refuse(file):
    """Locks an open file for this process alone, not for those that it forks. BlockingIOError where another has it.

    Raises another OSError on file systems without locks.
    """
    if fcntl:  # lockf: of POSIX's kind, which loader workers neither inherit nor outlive
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    else:
        _lock_on_windows(file)


def lock_or_wait(file):
    """Locks an open file, also against other threads, and waits for that as long as it takes. Raises OSError."""
    if fcntl:
        return fcntl.flock(file, fcntl.LOCK_EX)
    while True:
        try:
            return _lock_on_windows(file)
        except BlockingIOError:
            time.sleep(0.2)


def _lock_on_windows(file):
    os.lseek(file.fileno(), PLACE, os.SEEK_SET)
    try:
        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    except PermissionError as error:
        raise BlockingIOError(error.errno, "locked by another process") from error
    finally:
        os.lseek(file.fileno(), 0, os.SEEK_SET)
