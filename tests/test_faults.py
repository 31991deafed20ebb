"""Every write of a run fails, once or from then on; every read of its data fails once.

    FAULTS=all python -m pytest tests/test_faults.py        # each call in turn; by default every 60th of them

A fault is an OSError that one call to the file system raises, as a full, broken, over-used or read-only disk would.
"""

import builtins
import errno
import io
import os
import tarfile

import pytest
from helpers import assert_same_run, last, make_class_folder, train

from runtime import previews

ALL = os.environ.get("FAULTS") == "all"
ERRORS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS)
FLAGS = ("--hidden-size", 32, "--depth", 1, "--num-heads", 2, "--steps", 3, "--save-every", 1, "--preview-every", 2)


class Faults:
    """Counts the calls that touch a file below `folder`, and makes number `failing` of them fail with `error`.

    writing: opening for writing, each write, flush, truncation, closing, fsync, rename, link, removal, new folders;
    else: opening for reading, each read, listing a folder, asking for a file's size. lasting: all calls after it, too.
    """

    def __init__(self, monkeypatch, folder, writing, failing=None, error=errno.EIO, lasting=False):
        self.folder, self.error, self.calls = str(folder), error, []
        self.failing = range(failing or 0, (failing or 0) + (10**9 if lasting else 1)) if failing is not None else ()
        plain = builtins.open

        def opened(file, mode="r", *args, **kwargs):
            ours = isinstance(file, (str, os.PathLike)) and os.fspath(file).startswith(self.folder)
            if not ours or writing != bool(set(mode) & set("wax+")):
                return plain(file, mode, *args, **kwargs)
            self.count("open", file)
            return File(plain(file, mode, *args, **kwargs), self, file)

        monkeypatch.setattr(builtins, "open", opened)
        monkeypatch.setattr(io, "open", opened)
        writes, reads = ("replace", "rename", "link", "unlink", "mkdir"), ("scandir", "listdir", "stat", "pread")
        names = writes if writing else reads
        for name in names:
            monkeypatch.setattr(os, name, self.counted(name, getattr(os, name)))
        if writing:
            monkeypatch.setattr(os, "fsync", self.counted("fsync", os.fsync))

    def counted(self, name, plain):
        def call(path=".", *args, **kwargs):
            place = os.readlink(f"/proc/self/fd/{path}") if isinstance(path, int) else os.fspath(path)
            if place.startswith(self.folder):
                self.count(name, place)
            return plain(path, *args, **kwargs)

        return call

    def count(self, name, place):
        self.calls.append((name, os.path.relpath(place, self.folder)))
        if len(self.calls) - 1 in self.failing:
            raise OSError(self.error, os.strerror(self.error), str(place))


class File:
    """An open file whose calls are counted: reads of one opened for reading, all that may write of another."""

    def __init__(self, file, faults, path):
        self.__dict__.update(file=file, faults=faults, path=path)

    def read(self, *args):
        self.faults.count("read", self.path)
        return self.file.read(*args)

    def write(self, content):
        self.faults.count("write", self.path)
        return self.file.write(content)

    def flush(self):
        self.faults.count("flush", self.path)
        self.file.flush()

    def truncate(self, *args):
        self.faults.count("truncate", self.path)
        return self.file.truncate(*args)

    def close(self):
        """A close that fails has closed the file all the same, as the system's does."""
        counts = not self.file.closed and self.file.mode != "rb"
        self.file.close()
        if counts:
            self.faults.count("close", self.path)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __setattr__(self, name, value):
        setattr(self.file, name, value)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()

    def __iter__(self):
        return iter(self.file)


def chosen(calls, every=60):
    """Which of the recorded calls are to fail: some; each kind of call on each file at least once. FAULTS=all: all."""
    first = {call: number for number, call in reversed(list(enumerate(calls)))}
    return list(range(len(calls))) if ALL else sorted({*range(0, len(calls), every), *first.values()})


@pytest.mark.slow
@pytest.mark.parametrize("lasting", [False, True], ids=["once", "from_then_on"])
def test_a_write_that_fails_is_one_line_and_the_same_command_then_ends_exactly(tmp_path, monkeypatch, lasting):
    """from_then_on: the disk has become read-only, as after an error of its own.

    Catches: tracebacks, a true reason that is hidden, half a file that the next start trusts, lost steps.
    """
    monkeypatch.setattr(previews, "PER_CLASS", 1)
    monkeypatch.setattr(previews, "FOR_SMALL", previews.FOR_SMALL | {"steps": 1})
    assert train(tmp_path / "whole", *FLAGS)[0] == 0
    with monkeypatch.context() as patch:
        faults = Faults(patch, tmp_path / "counted", writing=True)
        assert train(tmp_path / "counted", *FLAGS)[0] == 0
    assert_same_run(last(tmp_path / "counted"), last(tmp_path / "whole"))
    numbers = chosen(faults.calls)[:: 4 if lasting and not ALL else 1]
    for number in numbers:
        out, error = tmp_path / f"run{number}", errno.EROFS if lasting else ERRORS[number % len(ERRORS)]
        with monkeypatch.context() as patch:
            Faults(patch, out, True, number, error, lasting)
            status, _, stderr = train(out, *FLAGS)
        told = stderr.strip().splitlines()
        assert "Traceback" not in stderr and len(told) <= 1, (faults.calls[number], stderr)
        assert status == 0 or os.strerror(error) in told[0], (faults.calls[number], stderr)
        status, _, stderr = train(out, *FLAGS)
        assert status == 0, (faults.calls[number], stderr)
        assert_same_run(last(out), last(tmp_path / "whole"))
        names = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
        assert {"samples.png", "previews/step-00000002.png", "previews/step-00000003.png"} <= names
        assert not [name for name in names if ".tmp-" in name], (faults.calls[number], names)
        assert (out / "metrics.jsonl").read_text().count("\n") == 3
    print(f"{len(numbers)} of {len(faults.calls)} calls failed {'and all after it' if lasting else 'once'}")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["folder", "tar", "captions", "captions_in_a_tar"])
def test_a_read_that_fails_is_one_line_that_names_the_place(tmp_path, monkeypatch, kind):
    """Every read of pictures by class or with captions, from files or from a tar."""
    data = make_class_folder(tmp_path / "data")
    if "captions" in kind:
        for picture in data.rglob("*.png"):
            picture.with_suffix(".txt").write_text(f"a {picture.parent.name}, number {picture.stem}")
    if "tar" in kind:
        with tarfile.open(tmp_path / "data.tar", "w") as tar:
            tar.add(data, ".")
        data = tmp_path / "data.tar"
    flags = ("--data", data, "--hidden-size", 32, "--depth", 1, "--num-heads", 2, "--steps", 2, "--workers", 0)
    flags += ("--text-encoder", "words", "--text-depth", 1) if "captions" in kind else ()
    with monkeypatch.context() as patch:
        faults = Faults(patch, data, writing=False)
        assert train(tmp_path / "whole", *flags)[0] == 0
    numbers = chosen(faults.calls, 10 if "tar" in kind else 60)
    assert len(numbers) > 5
    for number in numbers:
        out, error = tmp_path / f"run{number}", (errno.EIO, errno.EACCES, errno.ENOENT, errno.ESTALE)[number % 4]
        with monkeypatch.context() as patch:
            Faults(patch, data, False, number, error)
            status, _, stderr = train(out, *flags)
        told = stderr.strip().splitlines()
        assert "Traceback" not in stderr and len(told) <= 1, (faults.calls[number], stderr)
        assert status == 0 or str(data) in told[0], (faults.calls[number], stderr)
        if status > 0:  # else the call was not needed, and the result must be right all the same
            assert train(out, *flags)[0] == 0
        assert_same_run(last(out), last(tmp_path / "whole"))
    print(f"{kind}: {len(numbers)} of {len(faults.calls)} reads failed once")
