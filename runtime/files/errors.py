"""One class for everything that the user can put right, and the one place that turns it into a line on the terminal."""

import contextlib
import errno
import os
import pathlib
import re
import sys
import traceback

import torch
import torch.distributed as dist


NO_MEMORY = re.compile("can't allocate memory|not enough memory")  # of torch, on a CPU


class UserError(ValueError):
    """A mistake that the user can put right. One line: which file, flag or value, what is wrong, what to do."""


def run(main):
    """Runs the main() of a script. What the user can put right ends as "script.py: one line" and exit status 1.

    So do a full disk, a full memory or GPU, a killed loader worker, and another rank that is gone; a fault of ours
    keeps its traceback.
    """
    script, plain = pathlib.Path(sys.argv[0]).name, (sys.stdout, sys.stderr)
    try:
        # Python has no stream (None) where the caller closed it, as in `train.py >&-`. What is opened in its place
        # takes its number, too, which the next file would get otherwise, and with it what C code prints.
        sys.stdout, sys.stderr = (_Output(stream or open(os.devnull, "w")) for stream in plain)
        main()
    except (Exception, KeyboardInterrupt) as error:  # noqa: BLE001  what is not told in one line is raised again
        # At exit Python waits, for ever, for loader workers that something still refers to: drop all that main() held.
        traceback.clear_frames(error.__traceback__)
        line = _one_line(error)
        if line is None:
            raise
        sys.exit(f"{script}: {line}")
    finally:
        sys.stdout.flush()
        sys.stdout, sys.stderr = plain


def _one_line(error):
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; what was saved stays, and the same command resumes from there"
    if isinstance(error, torch.OutOfMemoryError):
        return "the GPU's memory is full: use fewer images at once (--batch-size, --micro-batch) or smaller ones"
    line = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    if isinstance(error, MemoryError) or isinstance(error, RuntimeError) and NO_MEMORY.search(line):
        return "the memory is full: use fewer images at once (--batch-size, --micro-batch, --num) or a smaller model"
    if isinstance(error, dist.DistError) or "/gloo/" in str(error):  # the rank that failed shows the reason
        return f"rank {os.environ.get('RANK', 0)} lost touch with another process: {line}"
    line = line.split(".UserError: ", 1)[-1]  # from a loader worker it comes with a traceback in its text
    told = isinstance(error, (UserError, OSError)) or line.startswith("DataLoader worker")
    return line if told else None


class _Output:
    """An output stream whose reader may leave, as in `train.py | head`: that ends the output and not the work.

    So may a terminal, on which one cannot write any more once it is closed. Of a file, errors remain errors.
    """

    def __init__(self, stream):
        self.stream, self.terminal = stream, stream.isatty()

    @contextlib.contextmanager
    def _reader_may_leave(self):
        try:
            yield
        except OSError as error:
            if not isinstance(error, BrokenPipeError) and not (self.terminal and error.errno == errno.EIO):
                raise

    def write(self, text):
        with self._reader_may_leave():
            return self.stream.write(text)

    def flush(self):
        with self._reader_may_leave():
            self.stream.flush()

    def __getattr__(self, name):
        return getattr(self.stream, name)
