"""The frozen networks that look at pictures: those that eval_fid.py compares by, and the teachers of alignment.

network(images) takes uint8 (B, 3, H, W) on its device and returns, in float32 and without gradients,
    pool     (B, D)            features of whole pictures: the distance is computed from these
    spatial  (B, S) or None    features that have positions, for sFID
    logits   (B, K)            of its classes
and it has .logits(pool), the logits again, .sha256 of its file of weights, and as attributes of the class, so that much
can be checked before any weights are loaded,
    .title           the name of its Frechet distance: "FID", "emoji distance"
    .widths          (D, S or None)
    .side            the only height and width in pixels that it takes; None: any
    .least           the fewest pictures for a distance

teacher(images, patch) takes (B, 3, H, W) in [0, 1] and returns tokens (B, L, .width), one for each patch of that side.
"""

from collections.abc import Callable
from typing import NamedTuple

from pretrained.dinov2 import load_dinov2
from pretrained.emoji_classifier import EmojiClassifier, EmojiTeacher, load_emoji_classifier
from pretrained.inception import InceptionV3, load_inception
from runtime.files import UserError

NETWORKS = {"inception": (InceptionV3, load_inception), "emoji": (EmojiClassifier, load_emoji_classifier)}


class Teacher(NamedTuple):
    """A kind of teacher. Its name is part of the identity of a run."""

    name: str
    load: Callable  # of the file that --dino names (None: the usual one): the network
    check: Callable  # of --data, resolution and patch_size: UserError where it cannot teach
    planned: bool  # whether plans count it; the emoji's is a tenth of Nano's work and 2 % of its weights


DINO = Teacher("DINOv2", load_dinov2, lambda *_: None, True)
TEACHERS = {"emoji": Teacher("emoji", lambda _: EmojiTeacher(), EmojiTeacher.check, False)}


def teacher_named(dino):
    """The Teacher of --dino: one of TEACHERS by its name; any other text is a file of DINOv2's weights."""
    return TEACHERS.get(dino, DINO)


def open_network(features="inception", weights=None):
    """The feature network of that name, on the CPU. weights: a file in place of the usual one. UserError, OSError."""
    return NETWORKS[features][1](weights)


def check_pictures(pictures, network):
    """UserError for a PictureSet that the network's distance is not for. network: one, or its class."""
    name, title, (height, width) = pictures.name, network.title, pictures.size
    if pictures.count < network.least:
        raise UserError(f"{name}: the {title} takes at least {network.least} pictures, not {pictures.count}")
    if network.side and (height, width) != (network.side, network.side):
        raise UserError(f"{name}: the {title} is for {network.side}x{network.side} pixels, not {width}x{height}")
    if pictures.stored and len(pictures.stored["mu"]) != network.widths[0]:
        raise UserError(f"{name} holds statistics of another network, not those of the {title}")
