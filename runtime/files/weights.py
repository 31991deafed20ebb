"""Tensors out of a file that may be damaged, foreign or hostile, and into a module that they must fit exactly."""

import errno
import pathlib
import pickle
import zipfile

import torch

from runtime.files.errors import UserError


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
        state = None if damaged else torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds Python objects, or is not a checkpoint: it was refused, and nothing in it ran")
    except Exception as error:  # zipfile and torch answer damage with a dozen types
        if isinstance(error, MemoryError) or getattr(error, "errno", errno.EINVAL) != errno.EINVAL:
            raise  # the machine's trouble, not the file's
        reason = (str(error) or type(error).__name__).splitlines()[0]
        remedy = "use another, or download it again"
        raise UserError(f"{path} is not a checkpoint, or only part of one ({reason}): {remedy}")
    if damaged:
        raise UserError(f"{path} is damaged (checksum of {damaged}): use an earlier one, or download it again")
    if not isinstance(state, dict):
        raise UserError(f"{path} holds a {type(state).__name__}, not a checkpoint's dict")
    return state


def damaged_record(path):
    """The name of a damaged record in a file of torch.save, or None. Raises what zipfile raises for no such file.

    One flipped bit can turn a record into a folder, of which torch would read nothing and return uninitialised memory.
    """
    with zipfile.ZipFile(path) as archive:
        folders = (record.filename for record in archive.infolist() if record.external_attr & 0x10)
        return next(folders, None) or archive.testzip()


def load_weights(module, state_dict, path, assign=False):
    """module.load_state_dict, strict, with a UserError that names the first key that does not fit."""
    own = module.state_dict()
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise UserError(f"{path} has no table of weights where one should be")
    for key in own | state_dict:
        if key not in state_dict:
            raise UserError(f"{path} lacks the weight {key}: it belongs to another architecture")
        if key not in own:
            raise UserError(f"{path} has the weight {key}, which this architecture does not")
        ours, theirs = own[key], state_dict[key]
        if ours.shape != theirs.shape:
            raise UserError(f"{path}: {key} has shape {tuple(theirs.shape)}, not {tuple(ours.shape)}")
        if ours.is_floating_point() != theirs.is_floating_point():
            raise UserError(f"{path}: {key} holds {theirs.dtype}, not {ours.dtype}")
    module.load_state_dict(state_dict, assign=assign)
