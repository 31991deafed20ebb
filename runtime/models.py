"""The models that have a name, `--ckpt xl` or `--init xl`, and those in files."""

import dataclasses
import hashlib
import os

import torch

from data import ASSETS
from runtime.checkpoint import load_model
from runtime.files import UserError, cached_download

# Released ones: address, and side of their pictures in pixels. Shipped ones: file, and the temperature for people, at
# which a small model makes fewer faults, with less variety.
RELEASED = "https://huggingface.co/MCG-NJU/PixNerd-"
RELEASED_FILES = {
    "xl": (f"{RELEASED}XL-P16-C2I/resolve/main/epoch%3D319-step%3D1600000_emainit.ckpt", 256),  # FID 1.93
    "xl-512": (f"{RELEASED}XL-P16-C2I/resolve/main/res512_ft200k_epoch%3D325-step%3D1800000_emainit.ckpt", 512),
    "xxl": (f"{RELEASED}XXL-P16-T2I/resolve/main/model.ckpt", 512),  # reads sentences: GenEval 0.73
}
FOLDERS = {"xxl": "pixnerd-xxl"}  # below torch's folder of downloads, for a file whose name many others have
SHIPPED_FILES = {"emoji": (ASSETS / "emoji-nano.pt", 0.8), "emoji-text": (ASSETS / "emoji-text.pt", 0.8)}
IMAGENET_CLASSES = (ASSETS / "imagenet_classes.txt").read_text().splitlines()  # in index order


def find_model(ckpt, weights="ema"):
    """The model of --ckpt, on the CPU in float32; its config has the resolution, class_names a name for each class.

    class_names is None for a model of sentences. Raises FileNotFoundError and UserError.
    """
    address, resolution = RELEASED_FILES.get(ckpt, (None, None))
    if address:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints", FOLDERS.get(ckpt, ""))
        path = cached_download(address, flag="--ckpt", folder=folder)
    else:
        path = SHIPPED_FILES.get(ckpt, [ckpt])[0]
    try:
        model = load_model(path, weights)
    except UserError as error:
        raise UserError(f"--ckpt {ckpt}: {error} (once deleted, it is downloaded anew)") if address else error
    if address:
        model.config = dataclasses.replace(model.config, resolution=resolution)  # which released files do not say
    C = getattr(model.config, "num_classes", 0)
    if model.class_names is None and C:
        model.class_names = IMAGENET_CLASSES if C == len(IMAGENET_CLASSES) else [str(i) for i in range(C)]
    return model


def weights_hash(model):
    """A text that tells models apart, as the names of their files may not: every training step changes it."""
    return hashlib.sha256(model.decoder.output.weight.detach().numpy()).hexdigest()[:12]
