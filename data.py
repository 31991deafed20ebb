"""Pictures in and out: the embedded emoji, folders and tars of images, ADM's crop, an order that needs no memory.

Everything random about a training sample (its place in the shuffled order, noise, time, dropped label, crop, flip) is a
function of (seed, number of the sample), where the run's samples are numbered 0, 1, 2, ... in the order in which they
are used: sample `step * batch_size + slot`. So there is no generator state to save, a resumed run draws what the
interrupted one would have drawn, and neither the number of processes nor of loader workers changes a single number.
Left out: videos, captions, aspect-ratio buckets.

    python data.py imagenette FOLDER       # fetches ten classes of ImageNet, to train on something real (340 MB)
"""

import argparse
import difflib
import functools
import gzip
import hashlib
import io
import os
import pathlib
import shlex
import shutil
import struct
import sys
import tarfile
import warnings
import zlib

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from crop_cache import CropCache
from download import cached_download
from flow import sample_time
from picture_index import DataError, index_pictures, pictures_below, tar_members

ASSETS = pathlib.Path(__file__).parent / "assets"
IMAGENETTE = "https://s3.amazonaws.com/fast-ai-imageclas/imagenette2-320.tgz"
warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # read_image makes errors of them
EMOJI_CLASSES = ["smileys", "people", "animals", "food", "travel", "activities", "objects", "symbols", "flags"]


def keyed_generator(*key):
    """A torch.Generator whose state depends on the whole numbers in `key` and on nothing else.

    The key is hashed first: seeds 0, 1, 2, ... given to a generator directly would start related streams.
    """
    digest = hashlib.blake2b(struct.pack(f"<{len(key)}q", *key), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


# ---- pixels ----------------------------------------------------------------------------------------------------------


def from_uint8(u8):
    """Pixels 0..255 of any shape -> float32 in [-1, 1]."""
    return u8.float() / 127.5 - 1


def to_uint8(x):
    """Floats in [-1, 1], any shape, clipped -> pixels 0..255. Adding 0.5 and cutting off rounds (released model)."""
    return ((x.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def read_image(path, content=None):
    """A JPEG, PNG or WEBP file as an RGB picture; gray and palettes are converted, transparency goes over white.

    content: the bytes of the file, if they are not to be read from `path`. Sixteen-bit gray is scaled, where Pillow
    would clip it. EXIF is ignored, as ADM does. Raises DataError, naming the path, for whatever cannot be read
    completely: nothing is ever put in its place.
    """
    try:
        image = Image.open(path if content is None else io.BytesIO(content), formats=["JPEG", "PNG", "WEBP"])
        # Pillow refuses headers that claim over 179 million pixels and warns above 89; here both are errors.
        if image.width * image.height > Image.MAX_IMAGE_PIXELS:
            raise Image.DecompressionBombError
        image.load()
        if image.mode.startswith("I"):  # 16-bit gray; Pillow's own conversion would make everything above 255 white
            image = Image.fromarray((np.asarray(image).astype(np.uint32) // 257).clip(0, 255).astype(np.uint8))
        if image.mode in ("LA", "PA", "RGBA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return image if image.mode == "RGB" else image.convert("RGB")  # which would copy an RGB picture too
    except Image.DecompressionBombError:
        raise DataError(
            f"{path} claims to be larger than {Image.MAX_IMAGE_PIXELS / 1e6:.0f} million pixels: remove it"
        )
    except (OSError, ValueError, SyntaxError, EOFError, struct.error) as error:
        empty = os.path.exists(path) and os.path.getsize(path) == 0 if content is None else not content
        reason = "empty file" if empty else str(error).splitlines()[0]
        raise DataError(f"{path} is not a readable JPEG, PNG or WEBP image ({reason}): repair or remove it")


def _short_side(image, size):
    """The ADM resize: halve with BOX while possible, then BICUBIC so that the short side is `size` pixels."""
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    return image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)


def _bounded(image, size):
    """The middle of a very long picture. Scaling a whole 1x5000 line to 256 rows would take a gigabyte for nothing."""
    width, height = image.size
    limit = 32 * min(width, height)
    if max(width, height) <= limit:
        return image
    left, top = max(0, width - limit) // 2, max(0, height - limit) // 2
    return image.crop((left, top, left + min(width, limit), top + min(height, limit)))


def center_crop(pil_image, size):
    """The size x size middle of a picture, scaled so that the short side fits.

    ADM's preparation, bit for bit, up to a shape of 32 to 1; of a longer picture only the middle is looked at.
    """
    image = _short_side(_bounded(pil_image, size), size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(pil_image, size, generator):
    """`--augment`: the same scaling, then a random size x size window, mirrored half the time."""
    image = _short_side(_bounded(pil_image, size), size)
    left = int(torch.randint(image.width - size + 1, (), generator=generator))
    top = int(torch.randint(image.height - size + 1, (), generator=generator))
    image = image.crop((left, top, left + size, top + size))
    return image.transpose(Image.FLIP_LEFT_RIGHT) if torch.rand((), generator=generator) < 0.5 else image


# ---- data sets: .classes, .labels, .fingerprint, len(), [i] -> (uint8 (3, H, W), label) ------------------------------


class Emoji:
    """The 1,906 drawings in assets/, nine classes, at 64 pixels or averaged over 2x2 boxes at 32.

    .kinds: Unicode's finer name for each drawing, "face-smiling" or "food-fruit" (assets/README.md lists all 98).
    """

    classes = EMOJI_CLASSES

    def __init__(self, resolution, augment=False):
        if resolution not in (32, 64):
            raise DataError(f"the emoji come at resolution 32 or 64, not {resolution}")
        with np.load(ASSETS / "noto_emoji_64.npz") as archive:
            images, self.labels = torch.from_numpy(archive["images"]), archive["labels"].tolist()
            self.kinds = archive["subcategories"]  # (1906) of text
        images = images.permute(0, 3, 1, 2).float()  # (N, 3, 64, 64)
        if resolution == 32:
            images = torch.nn.functional.avg_pool2d(images, 2)  # (N, 3, 32, 32)
        self.images = images.round().to(torch.uint8)
        self.augment = augment
        self.fingerprint = f"emoji {len(self.labels)}"

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i, generator=None):
        image = self.images[i]  # (3, H, W)
        if self.augment and generator is not None and torch.rand((), generator=generator) < 0.5:
            image = image.flip(-1)  # the drawings fill their square, so mirroring is all the augmentation there is
        return image, self.labels[i]


class ImageFolder:
    """A folder with one folder of pictures per class, like ImageNet's train/, or an uncompressed tar of one.

    Classes are the sorted folder names. How a tar is understood, and what `cache` and `write` do: picture_index.py.
    crops: a folder that keeps the centre crops (crop_cache.py).
    """

    def __init__(self, root, resolution, augment=False, cache=None, write=True, crops=None):
        self.index, self.resolution, self.augment = index_pictures(root, cache, write), resolution, augment
        self.classes, self.labels, self.fingerprint = self.index.classes, self.index.labels, self.index.fingerprint
        name = f"{os.path.abspath(root)} {self.fingerprint}"
        self.crops = CropCache(crops, name, len(self), resolution) if crops else None

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i, generator=None):
        augmented = self.augment and generator is not None
        crops = None if augmented else self.crops
        if crops:
            stamp = self.index.stamp(i)  # before the picture is read: if it changes meanwhile, its crop is out of date
            if (crop := crops.get(i, stamp)) is not None:
                return crop, self.labels[i]  # (3, H, W)
        image = read_image(self.index.where(i), self.index.read(i))
        image = random_crop(image, self.resolution, generator) if augmented else center_crop(image, self.resolution)
        # Contiguous, since stacking a batch from rows of pixels would take longer than this copy.
        crop = torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, H, W)
        if crops:
            crops.put(i, stamp, crop)
        return crop, self.labels[i]


class SomeClasses:
    """Some classes of a data set, which become classes 0, 1, ... in the order of `names`.

    A name is one of the data's classes or, of the emoji, one of their kinds. "food-fruit:4" takes each picture of it
    four times per epoch, so that a large class next to it does not take most of the time. Raises DataError for an
    unknown name, a number that is not in 1 .. 1000, and pictures that two names would have. .summary says what was
    taken, for people.
    """

    def __init__(self, dataset, names):
        labels, kinds = np.asarray(dataset.labels), getattr(dataset, "kinds", np.array([]))
        self.dataset, self.classes, self.labels, kept, counts = dataset, [], [], [], []
        taken = np.zeros(len(labels), bool)
        for text in names:
            plain = text in dataset.classes or ":" not in text
            name, times = (text, "1") if plain else text.rsplit(":", 1)
            if name in dataset.classes:
                pictures = np.flatnonzero(labels == dataset.classes.index(name))
            elif name in kinds:
                pictures = np.flatnonzero(kinds == name)
            else:
                known = [*dataset.classes, *np.unique(kinds).tolist()]
                near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or dataset.classes[:10]
                raise DataError(f"--classes: {text!r} is not a class of this data; did you mean {', '.join(near)}?")
            times = int(times) if times.isdecimal() and len(times) <= 4 else 0
            if not 1 <= times <= 1000:
                raise DataError(f"--classes: {text!r} should be {name}:N, N from 1 to 1000: how often in an epoch")
            if taken[pictures].any():
                raise DataError(f"--classes: {text!r} has pictures of a name before it; leave one of the two out")
            taken[pictures] = True
            kept.append(np.tile(pictures, times))
            self.labels += [len(self.classes)] * len(kept[-1])
            self.classes.append(name)
            counts.append(f"{name} {len(pictures)}" + (f" x {times}" if times > 1 else ""))
        self.kept = np.concatenate(kept)  # an array, which loader workers share
        self.summary = f"{taken.sum()} pictures: {', '.join(counts)}"
        self.fingerprint = f"{dataset.fingerprint}, of it in this order {', '.join(names)}"

    def __len__(self):
        return len(self.kept)

    def __getitem__(self, i, generator=None):
        return self.dataset.__getitem__(int(self.kept[i]), generator)[0], self.labels[i]  # (3, H, W), class


def list_images(folder):
    """The JPEG, PNG and WEBP files below a folder, sorted. DataError if there are none."""
    names = pictures_below(os.fspath(folder))
    if not names:
        raise DataError(f"{folder} holds no JPEG, PNG or WEBP images")
    return [pathlib.Path(folder, name) for name in sorted(names)]


def open_dataset(spec, resolution, augment=False, cache=None, write=True, crops=None, only=None):
    """The data set that `--data` names: "emoji", a folder of class folders, or a tar of one. Raises DataError.

    It has len(), [i] -> (uint8 (3, resolution, resolution), class index), .classes (names), .labels and .fingerprint
    (a text that changes when pictures are added, removed or renamed). cache: the folder of the run, which keeps the
    list of the pictures for a quick start next time; write=False only reads what is there. None: neither.
    crops: a folder that keeps the centre crops, so that each picture is decoded once; not for "emoji" (in memory).
    only: names of classes, where not all are wanted, each as SomeClasses reads it.
    """
    if str(spec) == "emoji":
        dataset = Emoji(resolution, augment)
    else:
        dataset = ImageFolder(spec, resolution, augment, cache, write, crops)
    return dataset if only is None else SomeClasses(dataset, only)


# ---- the order of training -------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _shuffled(seed, epoch, length):
    return torch.randperm(length, generator=keyed_generator(seed, 1, epoch)).numpy()


class TrainingSamples(torch.utils.data.Dataset):
    """Sample number k of a run, for any k: the picture and every random number that training on it needs.

    [k] -> dict of image uint8 (3, H, W), noise float32 (3, H, W), t (), y () and index () in the data set. Epoch
    follows epoch without a gap, each in an order of its own. With probability drop_label, y says "no class".
    """

    def __init__(self, dataset, seed, drop_label=0.1, shift=1.0):
        self.dataset, self.seed, self.drop_label, self.shift = dataset, seed, drop_label, shift

    def __getitem__(self, k):
        epoch, place = divmod(k, len(self.dataset))
        index = int(_shuffled(self.seed, epoch, len(self.dataset))[place])
        generator = keyed_generator(self.seed, 2, k)
        t = sample_time(1, self.shift, generator)[0]
        dropped = torch.rand((), generator=generator) < self.drop_label
        image, label = self.dataset.__getitem__(index, generator)
        noise = torch.randn(image.shape, generator=generator)
        return {
            "image": image,
            "noise": noise,
            "t": t,
            "y": len(self.dataset.classes) if dropped else label,
            "index": index,
        }


class BatchNumbers:
    """The sample numbers of each micro-batch of one rank, from `step` to `steps`: what the loader fetches, in order."""

    def __init__(self, step, steps, batch_size, micro_batch, rank=0, world=1):
        self.step, self.steps, self.batch_size, self.micro_batch = step, steps, batch_size, micro_batch
        self.share, self.rank = batch_size // world, rank

    def __len__(self):
        return (self.steps - self.step) * (self.share // self.micro_batch)

    def __iter__(self):
        for step in range(self.step, self.steps):
            first = step * self.batch_size + self.rank * self.share
            for start in range(first, first + self.share, self.micro_batch):
                yield list(range(start, start + self.micro_batch))


def training_batches(dataset, numbers, seed, drop_label, shift, workers, pin):
    """An iterator over the batches that `numbers` lists, made by `workers` processes ahead of time (0: in this one)."""
    loader = torch.utils.data.DataLoader(
        TrainingSamples(dataset, seed, drop_label, shift),
        batch_sampler=numbers,
        num_workers=workers,
        pin_memory=pin,
        prefetch_factor=4 if workers else None,
    )
    return iter(loader)


# ---- pictures for people ---------------------------------------------------------------------------------------------


def picture_grid(images, columns=None, titles=None, headings=None):
    """uint8 images (N, 3, H, W) -> one RGB picture, row by row, with 2 white pixels between; `titles` names the rows.

    With `headings` the images are that many groups of equal number, one grid each, side by side under their headings.
    """
    font = ImageFont.load_default()
    panels = len(headings or [""])
    count, _, height, width = len(images) // panels, *images.shape[1:]
    columns = columns or min(count, max(1, round(count**0.5)))
    rows = -(-count // columns)
    left = 8 + max(int(font.getlength(title)) for title in titles) if titles else 0
    top = 14 if headings else 0
    step = max(
        [columns * (width + 2), *(int(font.getlength(heading)) + 8 for heading in headings or [])]
    )  # of a panel
    sheet = Image.new("RGB", (left + panels * step + 2, top + rows * (height + 2) + 2), "white")
    write = ImageDraw.Draw(sheet).text
    for i, image in enumerate(images.permute(0, 2, 3, 1).cpu().numpy()):
        panel, place = divmod(i, count)
        row, column = divmod(place, columns)
        corner = left + 2 + panel * step + column * (width + 2), top + 2 + row * (height + 2)
        sheet.paste(Image.fromarray(image), corner)
    for row, title in enumerate(titles or []):
        write((left - 4, top + 2 + row * (height + 2) + height // 2), title, "black", font, anchor="rm")
    for panel, heading in enumerate(headings or []):
        write((left + 2 + panel * step, 8), heading, "black", font, anchor="lm")
    return sheet


def save_gif(path, frames, milliseconds=80, hold=1500, comment=""):
    """Pictures of one size -> an endless GIF, the last frame held for `hold` milliseconds, with a comment inside."""
    palette = frames[-1].quantize(255)  # one palette for all frames, taken from the finished picture: no flicker
    durations = [milliseconds] * (len(frames) - 1) + [hold]
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0, comment=comment)


# ---- a data set from the network -------------------------------------------------------------------------------------


def unpack(archive, folder):
    """A .tgz -> the folder, whole or not at all: what lies beside train/ in the archive, train/ included.

    Raises DataError if the archive is damaged, has no train/, or holds links, devices, or names that lead out of it.
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
            raise DataError(f"{archive} has no folder train: remove it and get it again")
        os.rename(roots[0], folder)
    except (tarfile.TarError, gzip.BadGzipFile, zlib.error, EOFError) as error:
        raise DataError(f"{archive} is damaged ({error}): remove it and get it again")
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def fetch_imagenette(folder):
    """Makes `folder` with the train/ and val/ of Imagenette, ten classes of ImageNet, 320 pixels on the short side.

    The archive lands beside `folder`; a broken download goes on where it stopped. Prints how to train on it. Raises
    DataError, and OSError with one line (DownloadError is one).
    """
    folder = pathlib.Path(folder).absolute()
    if (folder / "train").is_dir():
        print(f"{folder} is there already, whole: nothing to do")
    elif folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise DataError(f"{folder} exists and is not this data set: give the name of a new folder")
    else:
        archive = cached_download(IMAGENETTE, folder=folder.parent)
        unpack(archive, folder)
        print(f"{folder} is ready; {archive} can be removed")
    print(f"train on it: python train.py --size S --data {shlex.quote(str(folder / 'train'))} --resolution 128 "
          "--patch-size 8 --batch-size 64 --steps 100000 --ema 0.999 --augment --preview-every 1000 "
          "--out runs/imagenette")  # fmt: skip


def main():
    """The command line: `python data.py imagenette FOLDER`."""
    parser = argparse.ArgumentParser(description="Fetch a data set and say how to train on it.")
    parser.add_argument("name", choices=["imagenette"], help="ten classes of ImageNet, 340 MB")
    parser.add_argument("folder", help="a new folder; a second time, it says what to do with it")
    fetch_imagenette(parser.parse_args().folder)


if __name__ == "__main__":
    try:
        main()
    except (DataError, OSError) as error:
        sys.exit(f"data.py: {error}")
