"""Tensors out of a file that may be damaged, foreign or hostile, and into a module that they must fit exactly."""

import errno
import pathlib
import pickle
import struct
import zipfile
import zlib

import torch

from runtime.files.errors import UserError
from runtime.files.saving import damaged_record


def load_tensors(path, mmap=False, legacy=False):
    """The dict of tensors and plain values that torch.save wrote to `path`, on the CPU, after checking it.

    Every record's CRC is verified first (torch.load alone misses most flipped bits), and weights_only=True refuses
    anything but plain data. mmap=True leaves the tensors in the file until they are used. legacy=True also takes the
    format before torch 1.6, which has no checksums: for a file that is checked otherwise. Raises FileNotFoundError, or
    UserError with one line for a truncated, damaged, foreign or code-carrying file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        folder = f"{path} is a folder: name the file in it, such as last.pt"
        raise FileNotFoundError(folder if path.is_dir() else f"there is no checkpoint {path}")
    with open(path, "rb") as file:
        unchecked = legacy and file.read(2) != b"PK"  # what every zip file starts with
    try:
        damaged = None if unchecked else damaged_record(path)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the disk's trouble, not the file's
            raise
        raise UserError(f"{path} is not a checkpoint, or only part of one: use another, or download it again")
    if damaged:
        raise UserError(f"{path} is damaged (checksum of {damaged}): use an earlier one, or download it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        if unchecked:  # torch says the same of a text and of a pickle that carries code
            raise UserError(f"{path} is not a checkpoint, or holds Python objects: it was refused")
        raise UserError(f"{path} holds Python objects, not plain weights: it was refused, and nothing in it ran")
    except (RuntimeError, ValueError, EOFError, LookupError, TypeError, AttributeError, AssertionError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path} is not a PyTorch checkpoint ({reason})")
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint's dict")
    return state


def load_weights(module, state_dict, path, assign=False):
    """module.load_state_dict, strict, with a UserError that names the first key that does not fit."""
    own = module.state_dict()
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise UserError(f"{path} has no table of weights where one should be")
    for key in own:
        if key not in state_dict:
            raise UserError(f"{path} lacks the weight {key}: it belongs to another architecture")
    for key, tensor in state_dict.items():
        if key not in own:
            raise UserError(f"{path} has the weight {key}, which this architecture does not")
        if own[key].shape != tensor.shape:
            raise UserError(f"{path}: {key} has shape {tuple(tensor.shape)}, not {tuple(own[key].shape)}")
        if own[key].is_floating_point() != tensor.is_floating_point():
            raise UserError(f"{path}: {key} holds {tensor.dtype}, not {own[key].dtype}")
    module.load_state_dict(state_dict, assign=assign)
