"""Saving so that nothing is lost, and loading so that nothing wrong gets in.

A checkpoint is one torch.save of a plain dict: "format", "config", "ema" and, of a run, what run_folder.py adds. Only
tensors, numbers, strings, lists and dicts, so that torch.load(weights_only=True) reads it and no file can run code.

    python -m runtime.checkpoint export runs/x/last.pt shared.pt [--half] [--reference]   # weights alone, for sharing

Left out: sharded checkpoints. The largest preset with optimizer is 11 GB, one file that rank 0 writes.
"""

import argparse
import dataclasses
import os

import torch

from model import PixNerd, PixNerdConfig
from pretrained.released import export_reference, import_reference
from runtime.files import UserError, load_tensors, load_weights, run, whole_file
from text_model import TextPixNerd, TextPixNerdConfig

FORMAT = "pixnerd 1"


def build_model(config):
    """The model of a configuration, newly initialised: PixNerd(config) or TextPixNerd(config)."""
    return PixNerd(config) if isinstance(config, PixNerdConfig) else TextPixNerd(config)


class _Sink:
    """A file for torch.save that remembers why writing failed.

    torch.save's C++ writer turns "no space left on device" into an unrelated RuntimeError, and writing to memory first
    would need a second copy of the state (11 GB for XL). So the first OSError is kept here, the rest of the save is
    dropped, and `save_checkpoint` raises the true error.
    """

    def __init__(self, file):
        self.file, self.error = file, None

    def write(self, data):
        try:
            self.error or self.file.write(data)
        except OSError as error:
            self.error = error.with_traceback(None)  # whose frames would keep the whole state in memory
        return len(data)

    def flush(self):
        pass


def save_checkpoint(path, state):
    """Writes `state` (a dict of plain types and tensors) to `path`, whole or not at all. Raises OSError.

    Peak memory: the state and, for tensors on a GPU, one tensor's copy at a time.
    """
    with whole_file(path) as temporary, open(temporary, "wb") as file:
        sink = _Sink(file)
        torch.save(state, sink)
        if sink.error:
            raise sink.error


load_checkpoint = load_tensors  # (path, mmap=False) -> what `save_checkpoint` was given, or a released file's dict


def load_model(path, weights="ema"):
    """A PixNerd or TextPixNerd in eval mode, float32, on the CPU, from our checkpoints and from released ones alike.

    weights: "ema" (what sampling uses) or "raw". Where the file has them, `model.class_names` are the names of the
    classes and `model.class_counts` the numbers of their training pictures (else None). `null_features` of a released
    text-to-image model are zeros: its file has none. Raises FileNotFoundError and UserError.
    """
    key, prefix, other = {"ema": ("ema", "ema_denoiser.", "raw"), "raw": ("model", "denoiser.", "ema")}[weights]
    state, config = load_checkpoint(path, mmap=True), None
    if "format" in state:
        config, state_dict = checked_config(state, path), state.get(key)
    else:  # released: a PyTorch Lightning file, or its state dict alone
        state_dict = state.get("state_dict", state)
        if not isinstance(state_dict, dict) or not all(isinstance(name, str) for name in state_dict):
            raise UserError(f"{path} is not a PixNerd checkpoint (no table of named weights)")
        if any(name.startswith(("ema_denoiser.", "denoiser.")) for name in state_dict):
            named = {name.removeprefix(prefix): t for name, t in state_dict.items() if name.startswith(prefix)}
            state_dict = named or None
    if state_dict is None:
        raise UserError(f"{path} has no {weights} weights; use --weights {other}")
    if config is None:
        config, state_dict = import_reference(state_dict, path)
    # The model is made without storage and takes the file's memory-mapped tensors as its parameters, so the weights
    # exist once: reading a 6 GB file for its 2.8 GB of EMA needs 2.8 GB.
    with torch.device("meta"):
        model = build_model(config)
    load_weights(model, state_dict, path, assign=True)
    classes = getattr(config, "num_classes", 0)
    for name, kind in (("class_names", str), ("class_counts", int)):
        values = state.get(name)
        if values is not None and (type(values) is not list or [type(value) for value in values] != [kind] * classes):
            raise UserError(f"{path} has {name} that do not fit its {classes} classes: it is damaged, or was edited")
        setattr(model, name, values)
    return model.float().eval()


def checked_config(state, path):
    """The configuration in a loaded checkpoint of ours, of either model. UserError for a format or field unknown."""
    if state.get("format") != FORMAT or not isinstance(state.get("config"), dict):
        raise UserError(f"{path} has format {state.get('format')!r}; this version reads {FORMAT!r}")
    kind = TextPixNerdConfig if "text_width" in state["config"] else PixNerdConfig
    unknown = sorted(set(state["config"]) - {field.name for field in dataclasses.fields(kind)})
    if unknown:
        raise UserError(f"{path} has configuration fields unknown to this version: {', '.join(unknown)}")
    try:
        return kind(**state["config"])
    except ValueError as error:
        raise UserError(f"{path}: {error}")


def check_same(saved, wanted, path, note=""):
    """UserError, naming the field and both values, unless two dicts of settings agree on what both have."""
    for name, value in saved.items():
        if name in wanted and wanted[name] != value:
            asked = f"{wanted[name]!r}: use the same value, or another file or --out folder{note}"
            raise UserError(f"{path} was trained with {name}={value!r}, but this run asks for {asked}")


def check_start(theirs, ours, path):
    """UserError, with the flags that fit, unless a run of configuration `ours` may start from the weights of `theirs`.

    Every setting must be the same unless it is marked fine_tuning.
    """
    if type(theirs) is not type(ours):
        one, other = ("classes", "text") if isinstance(ours, PixNerdConfig) else ("text", "classes")
        raise UserError(f"{path} draws from {other}, and this run is to draw from {one}: use another file")
    fixed = [field.name for field in dataclasses.fields(ours) if not field.metadata["fine_tuning"]]
    fixed = {name: getattr(theirs, name) for name in fixed}
    flags = " ".join(f"--{name.replace('_', '-')} {value}" for name, value in fixed.items())
    check_same(fixed, dataclasses.asdict(ours), path, f"; it was trained with {flags}")


def start_from(model, path, class_names):
    """--init: gives `model` the EMA weights of a checkpoint, and says in words what was done.

    Of the settings that may differ, another resolution interpolates positions, and other classes (by number or, where
    the checkpoint has them, by name) get a new class embedding, only that. Raises UserError as `check_start` does, and
    FileNotFoundError.
    """
    source, classes = load_model(path), isinstance(model, PixNerd)
    check_start(source.config, model.config, path)
    weights, note, other = source.state_dict(), f"starting from {path}", None
    if not classes:
        if not source.null_features.any():  # a released file has none
            weights["null_features"] = model.null_features
    elif source.config.num_classes != model.config.num_classes:
        other = f"{source.config.num_classes} classes, this run has {model.config.num_classes}"
    elif list(source.class_names or class_names) != list(class_names):
        other = "other classes, or another order"
    if other:
        weights["class_embed.weight"] = model.class_embed.weight
        note += f"; its class embedding was for {other}: a new one is trained"
    load_weights(model, weights, path)
    return note


def main():
    """The command line: `export`, which keeps of a checkpoint its weights and configuration only."""
    parser = argparse.ArgumentParser(description="Export a checkpoint's weights for sharing.")
    parser.add_argument("action", choices=["export"])
    parser.add_argument("source", help="a checkpoint, ours or released")
    parser.add_argument("target", help="the file to write")
    parser.add_argument("--weights", choices=["ema", "raw"], default="ema", help="which of the two sets of weights")
    parser.add_argument("--half", action="store_true", help="store float16: half the size, read back as float32")
    parser.add_argument("--reference", action="store_true", help="use the released code's key names")
    args = parser.parse_args()
    model = load_model(args.source, args.weights)
    weights = export_reference(model) if args.reference else model.state_dict()
    weights = {key: tensor.to(torch.float16 if args.half else torch.float32) for key, tensor in weights.items()}
    for key, tensor in weights.items():
        if args.half and not tensor.isfinite().all():
            raise UserError(f"--half: {key} has numbers beyond float16's 65,504: export {args.source} without it")
    if args.reference:
        prefixes = ("denoiser", "ema_denoiser")
        state = {"state_dict": {f"{prefix}.{key}": weights[key] for key in weights for prefix in prefixes}}
    else:
        state = {"format": FORMAT, "config": dataclasses.asdict(model.config), "ema": weights}
        state |= {"class_names": model.class_names, "class_counts": model.class_counts}
    save_checkpoint(args.target, state)
    print(f"wrote {args.target}, {os.path.getsize(args.target) / 1e6:.1f} MB")
    if args.reference and model.config.resolution != import_reference(weights)[0].resolution:
        print(f"the released format keeps no resolution: draw with --resolution {model.config.resolution}")


if __name__ == "__main__":
    run(main)
