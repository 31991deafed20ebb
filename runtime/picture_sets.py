"""The pictures that eval_fid.py compares: an npz, a folder, the emoji or any data set, as a stream of batches.

Files of gigabytes pass through one batch at a time, and what a header claims is checked before memory is taken for it.
Left out: tars, zips of pictures, and npy files.
"""

import contextlib
import dataclasses
import math
import os
import pathlib
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch

from data import EMBEDDED, center_crop, open_dataset
from runtime.files import UserError, pictures_below, read_image, whole_file

MAX_SIDE, MAX_COUNT = 2048, 2_000_000  # larger claims are refused: a batch and all features must fit in memory
ADM = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/"
REFERENCES = {256: f"{ADM}256/VIRTUAL_imagenet256_labeled.npz", 512: f"{ADM}512/VIRTUAL_imagenet512.npz"}
MAX_FEATURES = 100_000  # rows of saved features that are read; precision and recall need no more
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}  # of Inception


@dataclasses.dataclass
class PictureSet:
    """One side of the comparison before anything is computed."""

    name: str
    count: int
    size: tuple  # (height, width)
    # batches(batch_size, rank=0, world=1): an iterator over uint8 (B, 3, H, W), every world-th batch from the rank-th
    # on. None for a file of --save-stats, which has "features" instead of pictures.
    batches: Callable | None
    stored: dict  # tensors, those of STATISTICS and "features" that an npz holds
    sorted_labels: bool = False  # the npz says that its pictures are sorted by class


def open_pictures(spec, resolution=None, workers=4, exif="ignore"):
    """spec: an npz, a folder (searched recursively), or "emoji" -> PictureSet, after all checks that need no pixels.

    resolution: to which the pictures of a folder are cropped; of the emoji, 32 or 64 (default). workers: threads that
    decode. exif: "respect" turns the pictures of a folder upright. Raises UserError, OSError.
    """
    if str(spec) in EMBEDDED:
        return pictures_of(open_dataset(spec, resolution or 64), spec, workers)
    path = pathlib.Path(spec)
    if not path.exists():
        remedy = f"sample.py --ckpt MODEL --num 50000 --npz {spec} makes an npz"
        raise UserError(f"{spec}: no such file or directory; {remedy}")
    if not path.is_dir():
        return _from_npz(path)
    files = [path / name for name in sorted(pictures_below(os.fspath(path)))]
    if not files:
        raise UserError(f"{path} holds no JPEG, PNG or WEBP images")

    def load(file):
        picture = read_image(file, exif=exif)
        picture = center_crop(picture, resolution) if resolution else picture
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (3, H, W)

    return _from_items(spec, files, load, workers)


def open_reference(spec, flag, side, resolution=None, workers=4, exif="ignore"):
    """What samples of `side` pixels are compared with: `open_pictures`, with help where it is missing.

    spec: as there, or None where nothing was given; flag: what takes it on the command line. UserError, which says
    where the published reference of that size is.
    """
    if spec is not None and (str(spec) in EMBEDDED or os.path.exists(spec)):
        return open_pictures(spec, resolution, workers, exif)
    missing = f"{flag} is missing" if spec is None else f"{flag} {spec}: no such file or directory"
    published = (
        f"ADM's for ImageNet {side} is at {REFERENCES[side]}"
        if side in REFERENCES
        else f"none is published for {side} pixels"
    )
    own = "eval_fid.py REAL SAMPLES --save-stats FILE makes one of your own pictures"
    raise UserError(f"{missing}; {published}, and {own}")


def pictures_of(dataset, name, workers=4):
    """PictureSet of a data set (data.py says what that is), as they are without augmentation."""
    return _from_items(name, range(len(dataset)), dataset.picture, workers)


def _from_items(name, items, load, workers):
    """PictureSet that are loaded one by one: load(item) -> uint8 (3, H, W)."""
    # A fixed shuffle. Folders list one class after the other, which would collapse the Inception Score; and the first
    # pictures, of which eval_fid.py keeps the features, become a fair choice.
    count = len(items)
    items = [items[index] for index in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()]
    height, width = load(items[0]).shape[1:] if count else (1, 1)
    _check_size(name, count, height, width)

    def load_checked(item):
        picture = load(item)  # (3, H, W)
        if picture.shape[1:] != (height, width):
            sizes = f"{picture.shape[2]}x{picture.shape[1]} pixels, but the others have {width}x{height}"
            raise UserError(f"{item}: {sizes}; --resolution crops a folder to one size")
        return picture

    def batches(batch_size, rank=0, world=1):
        with ThreadPoolExecutor(workers) as pool:  # threads: Pillow decodes outside of Python's lock
            for start in range(rank * batch_size, count, world * batch_size):
                yield torch.stack(list(pool.map(load_checked, items[start : start + batch_size])))  # (B, 3, H, W)

    return PictureSet(str(name), count, (height, width), _ahead(batches), {})


def _ahead(batches):
    """The same stream, each batch read in a thread while the one before it is in use."""

    def read_ahead(*arguments):
        stream = batches(*arguments)
        with ThreadPoolExecutor(1) as thread:
            waiting = thread.submit(next, stream, None)
            while (batch := waiting.result()) is not None:  # errors of the reader appear here
                waiting = thread.submit(next, stream, None)
                yield batch

    return read_ahead


def _check_size(name, count, height, width):
    if count < 2:
        raise UserError(f"{name}: needs at least two pictures, found {count}")
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and count <= MAX_COUNT):
        raise UserError(f"{name}: {count} pictures of {width}x{height}; the limits are {MAX_COUNT} of {MAX_SIDE}")


# ---- npz -------------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _npz_errors(path):
    """Whatever zip, zlib and npy readers raise on a damaged file (a dozen types), as one line that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, (UserError, MemoryError)) or isinstance(error, OSError) and error.filename:
            raise  # our own words; the machine's trouble; or a path that cannot be opened, which says so itself
        reason = (str(error) or repr(error)).splitlines()[0]
        raise UserError(f"{path}: not an npz file, truncated or damaged ({reason})") from error


def _open_array(archive, key):
    """-> (stream at the first value, shape, dtype). Nothing of the array's claimed size is allocated."""
    info, path = archive.getinfo(f"{key}.npy"), archive.filename
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise UserError(f"{path}: {key} is compressed by a method that numpy does not use")
    # Deflate can blow a megabyte up to a gigabyte of zeros. Pictures shrink by less than ten, even drawn ones.
    if info.file_size > 2**30 and info.file_size > 200 * info.compress_size:
        raise UserError(f"{path}: {key} would unpack from {info.compress_size} to {info.file_size} bytes")
    stream = archive.open(info)
    old = np.lib.format.read_magic(stream) == (1, 0)
    read_header = np.lib.format.read_array_header_1_0 if old else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read_header(stream)
    if dtype.hasobject or fortran:
        raise UserError(f"{path}: {key} is a Fortran-ordered or pickled array, which is not read")
    # Python's integers do not overflow: this is the true size of what the header promises.
    if stream.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
        raise UserError(f"{path}: {key} promises {shape} {dtype}, but holds {info.file_size} bytes")
    return stream, shape, dtype


def _read_array(archive, key):
    stream, shape, dtype = _open_array(archive, key)
    return np.frombuffer(bytearray(stream.read()), dtype).reshape(shape)


def _stored_statistics(archive, keys):
    """What the npz holds of STATISTICS (all or nothing) and, beside them, of "features": {name: tensor}."""
    path, stored, wanted = archive.filename, {}, [key for key in STATISTICS if key in keys]
    if wanted and len(wanted) < len(STATISTICS):
        raise UserError(f"{path}: holds {', '.join(wanted)}, but not all of {', '.join(STATISTICS)}")
    for key in wanted + [key for key in keys if key == "features" and wanted]:
        value = _read_array(archive, key)
        expected = STATISTICS.get(key, (min(len(value), MAX_FEATURES), 2048))
        if value.shape != expected or value.dtype not in (np.float32, np.float64):
            found = f"{key} is {value.dtype} {value.shape}"
            raise UserError(f"{path}: {found}; Inception's statistics are float {expected}")
        if not np.isfinite(value).all():
            raise UserError(f"{path}: {key} holds NaN or Inf")
        stored[key] = torch.from_numpy(value)
    return stored


def _from_npz(path):
    """PictureSet of an npz: everything but arr_0 is read now, arr_0 batch by batch when it is asked for."""
    with _npz_errors(path), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        stored, in_order = _stored_statistics(archive, keys), False
        if "features" in stored:  # by --save-stats: all that a reference needs, without pictures
            count, height, width = _read_array(archive, "size").tolist()
            _check_size(path, count, height, width)
            return PictureSet(str(path), count, (height, width), None, stored)
        if "arr_0" not in keys:
            raise UserError(f"{path}: has no arr_0 (it has: {', '.join(keys) or 'nothing'})")
        _, shape, dtype = _open_array(archive, "arr_0")
        if dtype != np.uint8:
            raise UserError(f"{path}: arr_0 is {dtype}; it must be uint8, 0 to 255 (data.to_uint8 converts)")
        if len(shape) != 4 or shape[3] != 3:
            hint = "; this looks like N, 3, H, W: transpose it" if len(shape) == 4 and shape[1] == 3 else ""
            raise UserError(f"{path}: arr_0 has shape {shape}; it must be N, H, W, 3{hint}")
        count, height, width, _ = shape
        _check_size(path, count, height, width)
        if "arr_1" in keys:  # where ADM's sampler and ours store the classes
            labels = _read_array(archive, "arr_1").ravel()
            in_order = len(labels) > 1 and labels[0] != labels[-1] and bool((labels[1:] >= labels[:-1]).all())

    def batches(batch_size, rank=0, world=1):
        # In the order of the file; zipfile compares the checksum when the last byte has passed. Each rank reads all and
        # keeps its part, since reading is quick.
        with _npz_errors(path), zipfile.ZipFile(path) as archive:
            stream = _open_array(archive, "arr_0")[0]
            for index, start in enumerate(range(0, count, batch_size)):
                rows = min(batch_size, count - start)
                data = bytearray(stream.read(rows * height * width * 3))
                if index % world == rank:
                    images = torch.frombuffer(data, dtype=torch.uint8).view(rows, height, width, 3)
                    yield images.permute(0, 3, 1, 2)  # (B, 3, H, W)

    return PictureSet(str(path), count, (height, width), _ahead(batches), stored, in_order)


def save_statistics(path, pictures, found):
    """Writes what eval_fid.describe found of the pictures, as an npz for `open_pictures`. Raises OSError."""
    size = np.array([pictures.count, *pictures.size], dtype=np.int64)  # (3)
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        np.savez(file, size=size, **{key: value.numpy() for key, value in found.items()})
