"""Files that are whole or not there: the one place that writes and renames (but for download.py, whose parts stay)."""

import contextlib
import os
import pathlib

from runtime.files.errors import UserError


@contextlib.contextmanager
def whole_file(path):
    """`with whole_file(path) as temporary`: what is written to `temporary` becomes `path` when the block ends.

    Flushed to the disk and renamed, so that a crash or a power cut at any instant leaves the old file or the new one.
    After an error the temporary file is gone and `path` is as it was. Folders are created. Raises OSError.
    """
    path = pathlib.Path(path)
    make_folder(path.parent)
    temporary = path.with_name(f".tmp-{path.name}")  # keeps the ending, by which Pillow and numpy choose the format
    try:
        yield temporary
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def sync_folder(folder):
    """Makes a rename in `folder` survive a power cut: a file's name is stored in its folder, not in the file."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folder, and its file system keeps a journal of names
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def make_folder(folder):
    """Creates a folder, and those above it, so that a power cut does not take them and all that is in them. OSError."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in missing:
        sync_folder(path.parent)


def check_writable(flag, path, is_folder=False):
    """UserError, before anything is computed, where the file (or folder) that a flag names could not be written."""
    path = pathlib.Path(path)
    probe = (path if is_folder else path.parent) / f".writable-{os.getpid()}"
    try:
        make_folder(probe.parent)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UserError(f"{flag} {path} cannot be written ({error.strerror}): choose another place")
    if path.is_dir() and not is_folder:
        raise UserError(f"{flag} {path} is a folder: choose another name")
