"""Fetches Imagenette: ten classes of ImageNet, to train on something real (`python data.py imagenette FOLDER`)."""

import argparse
import fcntl
import gzip
import os
import pathlib
import shlex
import shutil
import tarfile
import zlib

from tqdm import tqdm

from runtime.files import UserError, cached_download, tar_members

IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"


def unpack(archive, folder):
    """A .tgz -> the folder, whole or not at all: what lies beside train/ in the archive, train/ included.

    Raises UserError if the archive is damaged, has no train/, or holds links, devices, or names that lead out of it.
    """
    temporary = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted attempt left behind
    temporary.mkdir(parents=True)
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tqdm(tar_members(tar, archive), desc="unpacking", unit=" files"):
                tar.extract(member, temporary, filter="data")  # Python's own check, after that of tar_members
            while tar.fileobj.read(1 << 20):  # up to the end, where gzip has its checksum
                pass
        roots = [root for root in (temporary, *temporary.iterdir()) if (root / "train").is_dir()]
        if not roots:
            raise UserError(f"{archive} has no folder train: remove it and get it again")
        os.sync()  # the pictures are on the disk before the folder has its name: it says that they are whole
        os.rename(roots[0], folder)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise UserError(f"{archive} is damaged ({error}): remove it and get it again")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch_imagenette(folder):
    """Makes `folder` with the train/ and val/ of Imagenette, ten classes of ImageNet, 320 pixels on the short side.

    The archive lands beside `folder`; a broken download resumes where it stopped. Prints how to train on it. Raises
    UserError and OSError.
    """
    folder = pathlib.Path(folder).absolute()
    if (folder / "train").is_dir():
        print(f"{folder} is there already, whole: nothing to do")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise UserError(f"{folder} exists and is not this data set: give the name of a new folder")
    else:
        archive = cached_download(IMAGENETTE, folder=folder.parent)
        with open(archive.with_name(f"{archive.name}.lock"), "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)  # a second one that runs at the same time waits, and finds the folder
            if not (folder / "train").is_dir():
                unpack(archive, folder)
        print(f"{folder} is ready; {archive} can be removed")
    print(
        f"train on it: python train.py --size S --data {shlex.quote(str(folder / 'train'))} --resolution 128 "
        "--patch-size 8 --batch-size 64 --steps 100000 --ema 0.999 --augment --preview-every 1000 "
        "--out runs/imagenette"
    )


def main():
    """The command line of data.py."""
    parser = argparse.ArgumentParser(description="Fetch a data set and say how to train on it.")
    parser.add_argument("name", choices=["imagenette"], help="ten classes of ImageNet, 340 MB")
    parser.add_argument("folder", help="a new folder; a second time, it says what to do with it")
    fetch_imagenette(parser.parse_args().folder)
