"""Fetches Imagenette: ten classes of ImageNet, to train on something real (`python data.py imagenette FOLDER`)."""

import argparse
import gzip
import os
import pathlib
import shlex
import shutil
import tarfile
import zlib

from tqdm import tqdm

from runtime.files import UserError, cached_download, lock_or_wait

IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"


def unpack(archive, folder):
    """The one folder in a .tgz, named like it, becomes `folder`, whole or not at all. UserError if it is damaged.

    Devices, and links and names that lead out of the folder, count as damage.
    """
    temporary = folder.with_name(f".{folder.name}.unpacking")
    shutil.rmtree(temporary, ignore_errors=True)  # what an interrupted attempt left behind
    try:
        with tarfile.open(archive, "r:gz") as tar:
            for member in tqdm(tar, desc="unpacking", unit=" files"):
                tar.extract(member, temporary, filter="data")
            while tar.fileobj.read(1 << 20):  # up to the end, where gzip has its checksum
                pass
        if hasattr(os, "sync"):  # which Windows does not have
            os.sync()  # the pictures are on the disk before the folder has its name: it says that they are whole
        os.rename(temporary / archive.stem, folder)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError, FileNotFoundError) as error:
        raise UserError(f"{archive} is damaged ({error}): remove it and get it again")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch_imagenette(folder):
    """Makes `folder` with train/ and val/, pictures of 320 pixels on the short side, and prints how to train on it.

    The archive lands beside `folder`; a broken download resumes where it stopped. Raises UserError and OSError.
    """
    folder = pathlib.Path(folder).absolute()
    if (folder / "train").is_dir():
        print(f"{folder} is there already, whole: nothing to do")
    elif folder.is_file() or folder.is_dir() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not this data set: give the name of a new folder")
    else:
        archive = cached_download(IMAGENETTE, folder=folder.parent)
        with open(archive.with_name(f"{archive.name}.lock"), "w") as lock:
            lock_or_wait(lock)  # a second one that runs at the same time waits, and finds the folder
            if not (folder / "train").is_dir():
                unpack(archive, folder)
        print(f"{folder} is ready; {archive} can be removed")
    command = f"python train.py --size S --data {shlex.quote(str(folder / 'train'))} --resolution 128 --patch-size 8"
    command += " --batch-size 64 --steps 100000 --ema 0.999 --augment --preview-every 1000 --out runs/imagenette"
    print(f"train on it: {command}")


def main():
    """The command line of data.py."""
    parser = argparse.ArgumentParser(description="Fetch a data set and say how to train on it.")
    parser.add_argument("name", choices=["imagenette"], help="ten classes of ImageNet, 340 MB")
    parser.add_argument("folder", help="a new folder; a second time, it says what to do with it")
    fetch_imagenette(parser.parse_args().folder)
