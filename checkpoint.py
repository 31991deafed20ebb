"""Saving so that nothing is lost, loading so that nothing wrong gets in, and the released model's names.

A checkpoint is one torch.save of a plain dict: "format", "config" (PixNerdConfig as a dict), "ema", and in training
also "model", "optimizers", "step" and whatever train.py needs to go on. Only tensors, numbers, strings, lists and
dicts, so that torch.load(weights_only=True) reads it and no file can run code.

    python checkpoint.py export runs/x/last.pt shared.pt [--half] [--reference]   # weights alone, for sharing

Left out: sharded checkpoints. The largest preset with optimizer is 11 GB, one file that rank 0 writes.
"""

import argparse
import dataclasses
import errno
import os
import pathlib
import pickle
import shutil
import struct
import sys
import zipfile
import zlib

import torch

from download import damaged_record
from model import PixNerd, PixNerdConfig

FORMAT = "pixnerd 1"


class CheckpointError(ValueError):
    """A file that is not the checkpoint it should be. One line: which file, what is wrong, what to do."""


class _Sink:
    """A file for torch.save that remembers why writing failed.

    torch.save's C++ writer turns "no space left on device" into an unrelated RuntimeError, and writing to memory
    first would need a second copy of the state (11 GB for XL). So the first OSError is kept here, the rest of the
    save runs into the void, and `save_checkpoint` raises the true error.
    """

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        if self.error is None:
            try:
                self.file.write(data)
            except OSError as error:
                self.error = error
        return len(data)

    def flush(self):
        pass


def save_checkpoint(path, state):
    """Writes `state` (a dict of plain types and tensors) to `path`, whole or not at all.

    A temporary file in the same folder is written, flushed to the disk and renamed, so that a crash at any instant
    leaves either the old file or the new one. Peak memory: the state and, for tensors on a GPU, one tensor's copy at
    a time. Raises OSError (no space, no permission, ...) after removing the temporary file.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            sink = _Sink(file)
            torch.save(state, sink)
            if sink.error:
                raise sink.error
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def sync_folder(folder):
    """Makes a rename in `folder` survive a power cut: the name lives in the folder, not in the file."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def load_checkpoint(path, mmap=False):
    """Reads a checkpoint written by `save_checkpoint` or released by the authors, onto the CPU, after checking it.

    Every record's CRC is verified first (torch.load alone misses most flipped bits), and weights_only=True refuses
    anything but plain data. mmap=True leaves the tensors in the file until they are used. Raises FileNotFoundError, or
    CheckpointError with one line for a truncated, damaged, foreign or code-carrying file.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is a folder: name the file in it, such as last.pt" if path.is_dir() else
                                f"there is no checkpoint {path}")  # fmt: skip
    try:
        damaged = damaged_record(path)
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, RuntimeError, ValueError, OSError) as error:
        if isinstance(error, OSError) and error.errno != errno.EINVAL:  # the disk's trouble, not the file's
            raise
        raise CheckpointError(f"{path} is not a checkpoint, or only part of one: use another, or download it again")
    if damaged:
        raise CheckpointError(f"{path} is damaged (checksum of {damaged}): use an earlier one, or download it again")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError:
        raise CheckpointError(
            f"{path} holds Python objects, not plain weights: it was refused, and nothing in it ran"
        )
    except (RuntimeError, ValueError, EOFError, LookupError) as error:
        raise CheckpointError(f"{path} is not a PyTorch checkpoint ({str(error).splitlines()[0]})")
    if not isinstance(state, dict):
        raise CheckpointError(f"{path} holds a {type(state).__name__}, not a checkpoint's dict")
    return state


def load_weights(module, state_dict, path, assign=False):
    """module.load_state_dict, strict, with a CheckpointError that names the first key that does not fit."""
    own = module.state_dict()
    if not isinstance(state_dict, dict) or not all(isinstance(tensor, torch.Tensor) for tensor in state_dict.values()):
        raise CheckpointError(f"{path} has no table of weights where one should be")
    for key in own:
        if key not in state_dict:
            raise CheckpointError(f"{path} lacks the weight {key}: it belongs to another architecture")
    for key, tensor in state_dict.items():
        if key not in own:
            raise CheckpointError(f"{path} has the weight {key}, which this architecture does not")
        if own[key].shape != tensor.shape:
            raise CheckpointError(f"{path}: {key} has shape {tuple(tensor.shape)}, not {tuple(own[key].shape)}")
        if own[key].is_floating_point() != tensor.is_floating_point():
            raise CheckpointError(f"{path}: {key} holds {tensor.dtype}, not {own[key].dtype}")
    module.load_state_dict(state_dict, assign=assign)


def load_model(path, weights="ema"):
    """A PixNerd in eval mode, float32, on the CPU, from our checkpoints and from released ones alike.

    weights: "ema" (what sampling uses) or "raw". The names of the classes, where the file has them, are in
    `model.class_names` (else None). Raises FileNotFoundError and CheckpointError.
    """
    if weights not in ("ema", "raw"):
        raise ValueError(f"weights is {weights!r}; choose ema or raw")
    state = load_checkpoint(path, mmap=True)
    if "format" in state:
        config = checked_config(state, path)
        state_dict = state.get({"ema": "ema", "raw": "model"}[weights])
        if state_dict is None:
            raise CheckpointError(
                f"{path} has no {weights} weights; use --weights {'raw' if weights == 'ema' else 'ema'}"
            )
    else:  # released: a PyTorch Lightning file, or its state dict alone
        state_dict = state.get("state_dict", state)
        if not isinstance(state_dict, dict) or not all(isinstance(key, str) for key in state_dict):
            raise CheckpointError(f"{path} is not a PixNerd checkpoint (no table of named weights)")
        prefix = {"ema": "ema_denoiser.", "raw": "denoiser."}[weights]
        if any(key.startswith(("ema_denoiser.", "denoiser.")) for key in state_dict):
            state_dict = {key.removeprefix(prefix): t for key, t in state_dict.items() if key.startswith(prefix)}
        config, state_dict = import_reference(state_dict, path)
    # The model is made without storage and takes the file's memory-mapped tensors as its parameters, so the weights
    # exist once: reading a 6 GB file for its 2.8 GB of EMA needs 2.8 GB.
    with torch.device("meta"):
        model = PixNerd(config)
    load_weights(model, state_dict, path, assign=True)
    model.float()
    model.class_names = state.get("class_names")
    return model.eval()


def checked_config(state, path):
    """The PixNerdConfig of a loaded checkpoint of ours. CheckpointError for another format or unknown fields."""
    if state.get("format") != FORMAT or not isinstance(state.get("config"), dict):
        raise CheckpointError(f"{path} has format {state.get('format')!r}; this version reads {FORMAT!r}")
    unknown = sorted(set(state["config"]) - {field.name for field in dataclasses.fields(PixNerdConfig)})
    if unknown:
        raise CheckpointError(f"{path} has configuration fields unknown to this version: {', '.join(unknown)}")
    try:
        return PixNerdConfig(**state["config"])
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}")


# ---- a training run's folder -----------------------------------------------------------------------------------------


def save_run(folder, state, keep=2):
    """Saves state as folder/step-N.pt, also called last.pt, then prunes to the newest `keep` (at least 2).

    Old files go only after the new one is safe. Raises OSError.
    """
    folder = pathlib.Path(folder)
    path = folder / f"step-{state['step']:08d}.pt"
    save_checkpoint(path, state)
    name_last(path)
    for old in [*run_checkpoints(folder)[max(2, keep) :], *folder.glob("*.pt.tmp")]:
        old.unlink(missing_ok=True)
    return path


def name_last(path):
    """Gives a run's checkpoint its second name, last.pt, if it does not have it.

    It is a hard link, not a symbolic one, so copying or moving the folder cannot break it; where the file system has
    no hard links it is a copy. Raises OSError.
    """
    last, link = path.with_name("last.pt"), path.with_name("last.pt.tmp")
    if last.exists() and last.samefile(path):
        return
    found, wanted = last.stat() if last.exists() else None, path.stat()
    if found and found.st_size == wanted.st_size and found.st_mtime_ns >= wanted.st_mtime_ns:
        return  # it is a copy already: same length, and not older
    link.unlink(missing_ok=True)
    try:
        os.link(path, link)
    except OSError:
        shutil.copyfile(path, link)
    os.replace(link, last)
    sync_folder(path.parent)


def go_on_from(path):
    """Tidies the folder of a run that was resumed from the checkpoint `path`. Raises OSError.

    Newer files were passed over as damaged: they become step-N.damaged, or they would count among those to be kept and
    push out a sound one. And last.pt is made what it was to be, if a kill came between a save and its second name.
    """
    for newer in run_checkpoints(path.parent):
        if newer.name > path.name:  # true of all for "last.pt"
            newer.rename(newer.with_suffix(".damaged"))
    if path.name != "last.pt":
        name_last(path)


def run_checkpoints(folder):
    """The step-N.pt files of a run's folder, newest first."""
    return sorted(pathlib.Path(folder).glob("step-*.pt"), reverse=True)


def load_run(folder, warn=print, mmap=False):
    """(path, state) of the newest sound checkpoint in a run's folder, or None where there is none yet.

    A damaged one is passed over with a warning, for the one before it; last.pt comes last, for a folder that has only
    that. All damaged is a CheckpointError, never a silent restart from zero. mmap: as in `load_checkpoint`.
    """
    paths, last = run_checkpoints(folder), pathlib.Path(folder) / "last.pt"
    if last.exists() and not any(last.samefile(path) for path in paths):
        paths.append(last)
    for path in paths:
        try:
            return path, load_checkpoint(path, mmap)
        except CheckpointError as error:
            warn(f"warning: {error}; trying the one before")
    if paths:
        raise CheckpointError(f"all {len(paths)} checkpoints in {folder} are damaged: move them away to start anew")
    return None


def check_same(saved, wanted, path):
    """CheckpointError, naming the field and both values, unless two dicts of settings agree on what both have."""
    for name in saved:
        if name in wanted and saved[name] != wanted[name]:
            raise CheckpointError(f"{path} was trained with {name}={saved[name]!r}, but this run asks for "
                                  f"{wanted[name]!r}: use the same value, or another file or --out folder")  # fmt: skip


# ---- the released model ----------------------------------------------------------------------------------------------


def reference_names(config):
    """Our state dict's keys -> the released model's, whose list `blocks` holds the trunk and then the field."""
    names = {
        "patch_embed": "s_embedder.proj",
        "time_embed.mlp.0": "t_embedder.mlp.0",
        "time_embed.mlp.2": "t_embedder.mlp.2",
        "decoder.embed": "x_embedder.embedder.0",
        "decoder.output": "final_layer.linear",
    }
    names = {f"{ours}.{kind}": f"{theirs}.{kind}" for ours, theirs in names.items() for kind in ("weight", "bias")}
    names["class_embed.weight"] = "y_embedder.embedding_table.weight"
    names["decoder.norm.weight"] = "final_layer.norm.weight"
    for i in range(config.depth):
        for same in ("norm1.weight", "attn.qkv.weight", "attn.q_norm.weight", "attn.k_norm.weight", "attn.proj.weight",
                     "attn.proj.bias", "norm2.weight", "mlp.w1.weight", "mlp.w3.weight", "mlp.w2.weight"):  # fmt: skip
            names[f"blocks.{i}.{same}"] = f"blocks.{i}.{same}"
        for kind in ("weight", "bias"):
            names[f"blocks.{i}.modulation.{kind}"] = f"blocks.{i}.adaLN_modulation.0.{kind}"
    for i in range(config.field_depth):
        names[f"decoder.blocks.{i}.norm.weight"] = f"blocks.{config.depth + i}.norm.weight"
        for kind in ("weight", "bias"):
            names[f"decoder.blocks.{i}.to_weights.{kind}"] = f"blocks.{config.depth + i}.param_generator1.0.{kind}"
    return names


def import_reference(state_dict, path="the file"):
    """(config, state dict of ours) from the released model's state dict, its prefix removed.

    The configuration is read off the shapes. What shapes cannot tell is as released: DCT encoding, everything
    normalised, and a resolution of 16 x 16 patches. Raises CheckpointError naming a missing or superfluous key.
    """
    try:
        dim, patch_values = state_dict["s_embedder.proj.weight"].shape
        field_width, field_inputs = state_dict["x_embedder.embedder.0.weight"].shape
        trunk = [key for key in state_dict if key.endswith(".attn.qkv.weight")]
        field = [key for key in state_dict if key.endswith(".param_generator1.0.bias")]
        patch_size = round((patch_values / 3) ** 0.5)
        config = PixNerdConfig(
            num_classes=len(state_dict["y_embedder.embedding_table.weight"]) - 1,
            resolution=16 * patch_size,
            patch_size=patch_size,
            hidden_size=dim,
            num_heads=dim // len(state_dict["blocks.0.attn.q_norm.weight"]),
            depth=len(trunk),
            field_depth=len(field),
            field_width=field_width,
            field_ratio=len(state_dict[f"blocks.{len(trunk)}.param_generator1.0.bias"]) // (2 * field_width**2),
            num_freqs=round((field_inputs - 3) ** 0.5),
        )
    except (KeyError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} is not a PixNerd checkpoint ({str(error).strip()})")
    names = reference_names(config)
    for theirs in names.values():
        if theirs not in state_dict:
            raise CheckpointError(f"{path} lacks the weight {theirs}")
    for theirs in state_dict.keys() - names.values():
        raise CheckpointError(f"{path} has the weight {theirs}, which a class-conditional PixNerd does not")
    return config, {ours: state_dict[theirs] for ours, theirs in names.items()}


def export_reference(model):
    """The model's state dict under the released key names. ValueError for choices that the released code has not."""
    config = model.config
    for name, released in (("decoder", "field"), ("encoding", "dct"), ("field_norm", "output")):
        if getattr(config, name) != released:
            raise ValueError(f"the released code knows only {name}={released!r}, not {getattr(config, name)!r}")
    own = model.state_dict()
    return {theirs: own[ours] for ours, theirs in reference_names(config).items()}


def main():
    """The command line: `export`, which strips a checkpoint to its EMA weights and configuration."""
    parser = argparse.ArgumentParser(description="Export a checkpoint's weights for sharing.")
    parser.add_argument("action", choices=["export"])
    parser.add_argument("source", help="a checkpoint, ours or released")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="which of the two sets of weights")
    parser.add_argument("--half", action="store_true", help="store float16: half the size, read back as float32")
    parser.add_argument("--reference", action="store_true", help="use the released code's key names")
    args = parser.parse_args()
    model = load_model(args.source, args.weights)
    dtype = torch.float16 if args.half else torch.float32
    if args.reference:
        named = export_reference(model)
        state = {"state_dict": {f"{prefix}.{key}": tensor.to(dtype) for key, tensor in named.items()
                                for prefix in ("denoiser", "ema_denoiser")}}  # fmt: skip
    else:
        state = {"format": FORMAT, "config": dataclasses.asdict(model.config), "class_names": model.class_names,
                 "ema": {key: tensor.to(dtype) for key, tensor in model.state_dict().items()}}  # fmt: skip
    save_checkpoint(args.target, state)
    print(f"wrote {args.target}, {os.path.getsize(args.target) / 1e6:.1f} MB")
    if args.reference and model.config.resolution != 16 * model.config.patch_size:
        print(f"the released format keeps no resolution: draw with --resolution {model.config.resolution}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"checkpoint.py: {error}")
