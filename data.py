"""Pictures in and out: the embedded emoji, folders and tars of images, ADM's crop, samples with numbers.

Everything random about a training sample (its place in the shuffled order, noise, time, dropped label, crop, flip) is a
function of (seed, number of the sample): samples are numbered 0, 1, 2, ... in the order in which a run uses them. So
there is no generator state to save, a resumed run draws what the interrupted one would have drawn, and the numbers of
processes and loader workers change nothing.

Left out: videos, aspect-ratio buckets.

    python data.py imagenette FOLDER       # fetches ten classes of ImageNet, to train on something real (340 MB)
"""

import functools
import hashlib
import pathlib
import struct

import numpy as np
import torch
from PIL import Image

from flow import sample_time
from runtime.files import UserError, cut_long_sides, index_captions, index_pictures, read_image, released_crop, run

ASSETS = pathlib.Path(__file__).parent / "assets"
EMOJI_CLASSES = ["smileys", "people", "animals", "food", "travel", "activities", "objects", "symbols", "flags"]

# ---- random numbers --------------------------------------------------------------------------------------------------

# Where the random numbers of training and sampling come from: no two uses share one. Others: initial weights,
# by torch's own seed, the fixed shuffles of eval_fid.py, and the released demo's noise (runtime/prompts.py).
STREAMS = {
    "order": 1,  # of an epoch's pictures: seed, epoch
    "sample": 2,  # time, label drop, augmentation and noise of a training sample: seed, number of the sample
    "noise": 3,  # that an image is drawn from: seed, number of the image
    "solver": 4,  # fresh noise of a stochastic solver: seed, number of the image
    "labels": 5,  # classes of many images, and their order: seed
}


def random_stream(name, seed, *numbers):
    """A Mersenne twister, as a torch.Generator, whose 624 words are a hash of the stream's name, seed and numbers.

    torch's own seeding keeps 32 bits: with it, two of a seed's first 100,000 images start from the same noise.
    """
    key = struct.pack(f"<{2 + len(numbers)}q", seed, STREAMS[name], *numbers)
    words = np.frombuffer(hashlib.shake_256(key).digest(4 * 624), "<u4")
    generator = torch.Generator()
    state = generator.get_state()  # uint8 (5056); the words begin at byte 24, each in 8 bytes
    state.numpy()[24 : 24 + 8 * 624].view(np.uint64)[:] = words
    return generator.set_state(state)


# ---- pixels ----------------------------------------------------------------------------------------------------------


def from_uint8(u8):
    """Pixels 0..255 of any shape -> float32 in [-1, 1]."""
    return u8.float() / 127.5 - 1


def to_uint8(x):
    """Floats in [-1, 1], any shape, clipped -> pixels 0..255. Adding 0.5 and cutting off rounds (released model)."""
    return ((x.float() + 1) * 127.5 + 0.5).clamp(0, 255).to(torch.uint8)


def _scaled(image, size):
    """The ADM resize: halve with BOX while possible, then BICUBIC so that the short side is `size` pixels."""
    image = cut_long_sides(image)
    while min(image.size) >= 2 * size:
        image = image.resize(tuple(side // 2 for side in image.size), Image.BOX)
    scale = size / min(image.size)
    return image.resize(tuple(round(side * scale) for side in image.size), Image.BICUBIC)


def center_crop(pil_image, size):
    """The size x size middle of a picture, scaled so that the short side fits.

    ADM's preparation, bit for bit, up to a shape of 32 to 1; of a longer picture only the middle is looked at.
    """
    image = _scaled(pil_image, size)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


def random_crop(pil_image, size, rng):
    """`--augment`: the same scaling, then a random size x size window, mirrored half the time."""
    image = _scaled(pil_image, size)
    left = int(torch.randint(image.width - size + 1, (), generator=rng))
    top = int(torch.randint(image.height - size + 1, (), generator=rng))
    image = image.crop((left, top, left + size, top + size))
    return image.transpose(Image.FLIP_LEFT_RIGHT) if torch.rand((), generator=rng) < 0.5 else image


# ---- data sets -------------------------------------------------------------------------------------------------------


class Pictures:
    """What every data set has, besides its length and [i], which is (picture(i), labels[i]):

    .classes            the names of the classes; None of a data set with captions
    .labels             the class index of each picture, or its caption
    .fingerprint        a text that changes when pictures are added, removed or renamed
    .picture(i, rng)    picture i, uint8 (3, resolution, resolution); with a torch.Generator `rng`, augmented by it
    .members()          {name: numbers of its pictures} of every name that `--classes` takes; of captions none
    .remark             what a user should hear of it, or None
    .in_memory          whether reading a picture costs nothing
    .classifier         the name of a feature network that was made for it, or None
    """

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.picture(i), self.labels[i]

    def members(self):
        """Of the classes."""
        labels = np.array(self.labels if self.classes else [])
        return {name: np.flatnonzero(labels == c) for c, name in enumerate(self.classes or [])}


class Emoji(Pictures):
    """The 1,906 drawings in assets/, nine classes or with their names for captions, at 64 pixels or, averaged, at 32.

    .kinds: Unicode's finer name for each drawing, "face-smiling" or "food-fruit" (assets/README.md lists all 98).
    """

    in_memory, remark = True, None

    def __init__(self, resolution, augment=False, captions=False):
        if resolution not in (32, 64):
            raise UserError(f"the emoji come at resolution 32 or 64, not {resolution}")
        with np.load(ASSETS / "noto_emoji_64.npz") as archive:
            images, self.kinds = torch.from_numpy(archive["images"]), archive["subcategories"]  # (1906) of text
            self.labels = archive["names" if captions else "labels"].tolist()
        images = torch.nn.functional.avg_pool2d(images.permute(0, 3, 1, 2).float(), 64 // resolution)  # (N, 3, H, W)
        self.images, self.augment = images.round().to(torch.uint8), augment
        self.classes = None if captions else EMOJI_CLASSES
        self.fingerprint = f"emoji {len(self.labels)}"
        self.classifier = "emoji" if resolution == 32 else None

    def picture(self, i, rng=None):
        """Drawing i. They fill their square, so mirroring is all the augmentation there is."""
        image = self.images[i]  # (3, H, W)
        return image.flip(-1) if self.augment and rng is not None and torch.rand((), generator=rng) < 0.5 else image

    def members(self):
        """Of the nine classes, and of the finer kinds."""
        kinds = np.unique(self.kinds) if self.classes else []
        return super().members() | {str(kind): np.flatnonzero(self.kinds == kind) for kind in kinds}


class ImageFolder(Pictures):
    """Pictures of a folder or tar, by class (index_pictures) or with captions; .kept: {i: scaled(i)}, read before."""

    in_memory, classifier = False, None

    def __init__(self, index, resolution, augment=False, crop=center_crop, exif="ignore"):
        self.index, self.resolution, self.augment, self.crop, self.exif = index, resolution, augment, crop, exif
        self.classes, self.labels, self.remark = index.classes, index.labels, index.remark
        self.fingerprint, self.kept = index.fingerprint, {}

    def scaled(self, i):
        """Picture i in as many pixels as its crops need, uint8 (h, w, 3): every crop of that is the picture's own."""
        image = read_image(self.index.where(i), self.index.read(i), self.exif)
        image = _scaled(image, self.resolution) if self.augment else self.crop(image, self.resolution)
        return np.array(image)  # (h, w, 3)

    def picture(self, i, rng=None):
        """Picture i, cropped: to its middle or, with `augment` and a generator, at random."""
        image = Image.fromarray(self.kept[i] if i in self.kept else self.scaled(i))
        if self.augment and rng is not None:
            image = random_crop(image, self.resolution, rng)
        else:
            image = self.crop(image, self.resolution)
        # Contiguous, since stacking a batch from rows of pixels would take longer than this copy.
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()  # (3, H, W)


EMBEDDED = {"emoji": Emoji}  # data sets that need no file
CROPS = {"adm": center_crop, "released": released_crop}


def open_dataset(spec, resolution, augment=False, captions=False, crop="adm", exif="ignore", skip=False, **cache):
    """The data set that `--data` names: "emoji", a folder or a tar, of class folders or with `captions`. UserError.

    crop: a name of CROPS. exif: of read_image. skip: leave out pictures without a caption. cache: of index_pictures.
    """
    if str(spec) in EMBEDDED:
        return EMBEDDED[str(spec)](resolution, augment, captions)
    index = index_captions(spec, skip) if captions else index_pictures(spec, **cache)
    return ImageFolder(index, resolution, augment, CROPS[crop], exif)


# ---- numbered samples ------------------------------------------------------------------------------------------------


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _shuffled(seed, epoch, length):
    return torch.randperm(length, generator=random_stream("order", seed, epoch)).numpy()


class TrainingSamples(torch.utils.data.Dataset):
    """Sample number k of a run, for any k: the picture and every random number that training on it needs.

    [k] -> dict of image uint8 (3, H, W), class or caption y, noise float32 (3, H, W), time t (), u () uniform in [0, 1)
    to decide whether the label is dropped, and index () in the data set. Epoch follows epoch without a gap, each in an
    order of its own.
    """

    def __init__(self, dataset, seed, shift=1.0):
        self.dataset, self.seed, self.shift = dataset, seed, shift

    def __getitem__(self, k):
        epoch, place = divmod(k, len(self.dataset))
        index = int(_shuffled(self.seed, epoch, len(self.dataset))[place])
        rng = random_stream("sample", self.seed, k)
        t = sample_time(1, self.shift, rng)[0]
        u = torch.rand((), generator=rng)
        image = self.dataset.picture(index, rng)
        noise = torch.randn(image.shape, generator=rng)
        return {"image": image, "y": self.dataset.labels[index], "noise": noise, "t": t, "u": u, "index": index}


if __name__ == "__main__":
    from runtime.imagenette import main  # the command line: fetches a data set

    run(main)
