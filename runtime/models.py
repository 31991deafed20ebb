"""The models that have a name, `sample.py --ckpt xl` or `train.py --init xl`, and those in files."""

import dataclasses
import hashlib
import os

import torch

from data import ASSETS
from model import PRESETS
from runtime.checkpoint import check_start, load_model
from runtime.files import UserError, cached_download
from text_model import PRESETS as TEXT_PRESETS

# Released ones: address, and side of their pictures in pixels. Shipped ones: file, and the temperature for people, at
# which a small model makes fewer faults, with less variety.
RELEASED = "https://huggingface.co/MCG-NJU/PixNerd-"
RELEASED_FILES = {
    "xl": (f"{RELEASED}XL-P16-C2I/resolve/main/epoch%3D319-step%3D1600000_emainit.ckpt", 256),  # FID 1.93
    "xl-512": (f"{RELEASED}XL-P16-C2I/resolve/main/res512_ft200k_epoch%3D325-step%3D1800000_emainit.ckpt", 512),
    "xxl": (f"{RELEASED}XXL-P16-T2I/resolve/main/model.ckpt", 512),  # reads sentences: GenEval 0.73
}
FOLDERS = {"xxl": "pixnerd-xxl"}  # below torch's folder of downloads, for a file whose name many others have
RELEASED_CONFIGS = {  # as their files tell, so that --init can be checked before a download
    "xl": PRESETS["XL"],
    "xl-512": dataclasses.replace(PRESETS["XL"], resolution=512),
    "xxl": dataclasses.replace(TEXT_PRESETS["XXL"], resolution=512),
}
SHIPPED_FILES = {"emoji": (ASSETS / "emoji-nano.pt", 0.8), "emoji-text": (ASSETS / "emoji-text.pt", 0.8)}
IMAGENET_CLASSES = (ASSETS / "imagenet_classes.txt").read_text().splitlines()  # in index order


def model_file(name, flag):
    """The path of a model by its name, downloaded first if it is a released one; any other name is a path. UserError.

    flag: what takes it on the command line.
    """
    if name in RELEASED_FILES:
        folder = os.path.join(torch.hub.get_dir(), "checkpoints", FOLDERS.get(name, ""))
        return cached_download(RELEASED_FILES[name][0], flag=flag, folder=folder)
    return SHIPPED_FILES.get(name, [name])[0]


def check_init(name, config, planned):
    """UserError for an --init from which a run of `config` cannot start, as far as that is known without a download.

    planned: for --dry-run, which looks into files too. Returns a remark on a file that is not on this machine, or None.
    """
    if name in RELEASED_CONFIGS:
        check_start(RELEASED_CONFIGS[name], config, name)
    elif planned and os.path.exists(path := model_file(name, "--init")):
        check_start(load_model(path).config, config, path)
    elif planned and os.path.splitext(name)[1]:
        return f"--init {name} is not here: whether it fits is not checked"
    elif planned:
        names = ", ".join(RELEASED_FILES | SHIPPED_FILES)
        raise UserError(f"--init {name} is neither a file nor a name: the names are {names}")


def find_model(ckpt, weights="ema"):
    """The model of --ckpt, on the CPU in float32; its config has the resolution, class_names a name for each class.

    class_names is None for a model of sentences. Raises FileNotFoundError and UserError.
    """
    address, resolution = RELEASED_FILES.get(ckpt, (None, None))
    path = model_file(ckpt, "--ckpt")
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
