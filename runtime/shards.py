"""Many images for eval_fid.py (sample.py --npz): computed in shards by any number of processes, joined at the end.

Shard s, a batch of consecutive images, is computed by process s % world and kept in a folder beside the npz until all
are there. What shares a batch thus does not depend on the number of processes, and neither do the bytes of the npz; an
interrupted run loses its unfinished shards only, and the same command resumes. The disk must hold the images twice.
"""

import contextlib
import json
import math
import pathlib
import shutil
import sys
import zipfile

import numpy as np
import torch
from tqdm import tqdm

from data import random_stream
from runtime.files import UserError, whole_file

SHARES = ("balanced", "random", "data")  # how choose_labels can share images among classes


def choose_labels(classes, num, how, seed, counts=None):
    """The classes of `num` images in shuffled order: int64 (num), from the class indices `classes`.

    how: "balanced", equally many of each; "random", each by chance; "data", as often as in the training data: `counts`
    has the number of training pictures of each class of the model. UserError where that is impossible.
    """
    # Shuffled, since ADM's Inception Score takes consecutive images for a fair sample of all classes.
    generator, C = random_stream("labels", seed), len(classes)
    if how == "random":
        return torch.tensor(classes)[torch.randint(C, (num,), generator=generator)]
    shuffled = torch.randperm(num, generator=generator)  # (num)
    if how == "balanced":
        if num % C:
            remedy = f"use {num + -num % C}, or --labels random"
            raise UserError(f"--num {num} images cannot be shared equally by {C} classes: {remedy}")
        return torch.tensor(classes)[shuffled % C]
    if counts is None:
        raise UserError("--labels data: the checkpoint does not say how many pictures each class was trained on")
    ends = torch.tensor([counts[c] for c in classes]).cumsum(0)  # (C)
    pictures = shuffled * int(ends[-1]) // num  # (num): spread evenly over the training pictures of these classes
    return torch.tensor(classes)[torch.searchsorted(ends, pictures, right=True)]


def check_disk(path, num, size):
    """UserError where the disk has no room for `num` images of `size` (height, width), in shards and in the npz."""
    path = pathlib.Path(path)
    need, free = 2 * num * size[0] * size[1] * 3, shutil.disk_usage(path.parent).free
    need -= sum(shard.stat().st_size for shard in _folder(path).glob("*.rgb"))
    if need > free:
        room = f"{need / 1e9:.1f} GB of disk while it is written, and {free / 1e9:.1f} GB are free"
        raise UserError(f"--npz {path} needs {room}: use a smaller --num, or another place")


def _folder(path):
    return path.with_name(path.name + ".shards")


@contextlib.contextmanager
def one_complaint(processes):
    """Context: a mistake of the user that several ranks find in it is reported by one of them, and all end."""
    mistake = None
    try:
        yield
    except (UserError, OSError) as error:
        mistake = error
    failed = processes.of_all(mistake is not None)
    if any(failed):
        if processes.rank == failed.index(True):
            raise mistake
        # Waits until that rank has ended: torchrun stops the others as soon as one has failed, be it before its line.
        with contextlib.suppress(RuntimeError):
            processes.barrier()
        sys.exit(1)


def check_begun(folder, record, settings, remedy):
    """UserError, naming the difference, if `folder` was begun with other `settings` (plain values); else keeps them.

    record: the file that does.
    """
    if not record.exists():
        with whole_file(record) as temporary:
            temporary.write_text(json.dumps(settings, indent=1))
        return
    try:
        before, now = json.loads(record.read_text()), json.loads(json.dumps(settings))
        name = next((name for name in before | now if before.get(name) != now.get(name)), None)
    except (ValueError, AttributeError, TypeError):
        raise UserError(f"{record} is damaged: remove it and {folder}, or choose another place")
    if name is not None:
        difference = f"{name}={before.get(name)!r}, and this run has {now.get(name)!r}"
        raise UserError(f"{folder} was begun with {difference}: {remedy}")


class Shards:
    """The folder of shards of the npz `path`, for `num` images of `size` (height, width) in batches of `batch_size`.

    `settings` (plain values) are kept in it; UserError if it was begun with others. Every rank makes one, and rank 0
    the folder.
    """

    def __init__(self, path, num, size, batch_size, settings, processes):
        self.path, self.shape, self.settings, self.processes = pathlib.Path(path), (num, *size, 3), settings, processes
        self.batches = [range(start, min(start + batch_size, num)) for start in range(0, num, batch_size)]
        self.folder = _folder(self.path)
        if processes.rank > 0:
            return
        self.folder.mkdir(exist_ok=True)
        remedy = "use the same, delete the folder, or choose another --npz"
        check_begun(self.folder, self.folder / "settings.json", settings, remedy)

    def where(self, s):
        """The file of shard s: its images as bytes, uint8 (B, H, W, 3)."""
        return self.folder / f"{s:06d}.rgb"

    def draw(self, draw, steps):
        """Computes what is missing, this rank's share. draw(numbers, watch) -> uint8 (B, 3, H, W) on the CPU.

        watch(step, ...) is to be called at each of `steps` solver steps and at step 0, for the progress bar.
        """
        rank, world = self.processes.rank, self.processes.world
        missing = [s for s in range(rank, len(self.batches), world) if not self.where(s).exists()]
        with tqdm(total=len(missing) * steps, disable=rank > 0 or not sys.stderr.isatty()) as bar:
            for s in missing:
                images = draw(self.batches[s], lambda step, *_: bar.update(step > 0))  # (B, 3, H, W)
                with whole_file(self.where(s)) as temporary:
                    temporary.write_bytes(images.permute(0, 2, 3, 1).numpy().tobytes())  # (B, H, W, 3)

    def join(self, labels):
        """Writes the npz, one shard in memory at a time, and removes the folder: rank 0, when all have drawn.

        Arrays: arr_0 uint8 (N, H, W, 3); arr_1 and labels (N), the classes. UserError for a shard that is missing or
        damaged.
        """
        self.processes.barrier()
        if self.processes.rank > 0:
            return
        with whole_file(self.path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            archive.comment = json.dumps(self.settings).encode()
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:  # above 2 GB
                header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
                np.lib.format.write_array_header_1_0(file, header)
                for s, numbers in enumerate(self.batches):
                    content = self.where(s).read_bytes() if self.where(s).exists() else b""
                    if len(content) != len(numbers) * math.prod(self.shape[1:]):
                        remedy = "delete it and run the same command again, where all processes see this folder"
                        raise UserError(f"{self.where(s)} is missing or damaged: {remedy}")
                    file.write(content)
            for name in ("arr_1.npy", "labels.npy"):  # ADM's name, and a telling one
                with archive.open(zipfile.ZipInfo(name), "w") as file:
                    np.lib.format.write_array(file, labels)
        shutil.rmtree(self.folder)
