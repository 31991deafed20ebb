"""Prompts of a file, and the folders in which the evaluators of GenEval and DPG-Bench look for their pictures.

    sample.py --prompts evaluation_metadata.jsonl --layout geneval --out geneval      # 00000/samples/0000.png, ...
    sample.py --prompts prompts/ --layout dpg --out dpg                               # ID.png, four pictures in one

Sample k of every prompt starts from the same noise, that of seed k, as released. A prompt is drawn by one process, its
samples in one batch, so the bytes are the same for any number of processes; what is there already is not drawn again.
"""

import dataclasses
import hashlib
import json
import pathlib
import re
import sys

import torch
from PIL import Image
from tqdm import tqdm

from pretrained.text_encoders import check_text_encoder, fit_encoder, load_text_encoder, refuse_encoder
from runtime.files import UserError, check_writable, decode, json_lines, whole_file
from runtime.pictures import save_picture
from runtime.shards import check_begun

LAYOUTS = ("geneval", "dpg")


@dataclasses.dataclass
class Prompt:
    """One prompt: its text, its name in the layout of DPG, and its line of a .jsonl as it stands there."""

    text: str
    id: str
    line: str


def read_prompts(path):
    """The Prompts of a folder of .txt files, of a .jsonl (with "prompt" and perhaps "id"), or of the lines of a text.

    Raises UserError, which names the file and the line.
    """
    path, where = pathlib.Path(path), f"--prompts {path}"
    try:
        if path.is_dir():
            files = [file for file in sorted(path.iterdir()) if file.suffix.lower() == ".txt"]
            found = [Prompt(_one_line(file), file.stem, "") for file in files]
        elif path.suffix.lower() == ".jsonl":
            found = [_of_json(where, *line) for line in json_lines(path.read_bytes(), where)]
        else:
            lines = [line.strip() for line in decode(path.read_bytes(), where).split("\n")]
            found = [Prompt(line, f"{i:05d}", "") for i, line in enumerate(filter(None, lines))]
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read ({error.strerror}): give a file or a folder of .txt files")
    if not found:
        raise UserError(f"--prompts {path} holds no prompt")
    for prompt in found:
        prompt.line = prompt.line or json.dumps({"prompt": prompt.text})
    return found


def _one_line(file):
    text = decode(file.read_bytes(), f"--prompts: {file}").strip()
    if not text:
        raise UserError(f"--prompts: {file} is empty")
    return " ".join(text.splitlines())


def _of_json(where, number, line, entry):
    text, name = entry.get("prompt"), entry.get("id", f"{number - 1:05d}")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"{where}, line {number}: its prompt is missing, no text, or blank")
    if type(name) not in (str, int):
        raise UserError(f"{where}, line {number}: the id {json.dumps(name)[:40]} is neither a text nor a whole number")
    return Prompt(text, str(name), line)


def title_of(prompt):
    """A prompt as the title of a row of pictures: one line of printable letters, at most 40, cut after a word.

    Where the words are too long for that, as in Chinese, which sets no blanks, it is cut within one.
    """
    line = " ".join("".join(letter if letter.isprintable() else " " for letter in prompt).split())
    if len(line) <= 40:
        return line
    whole = line[:37].rpartition(" ")[0]
    return (whole if len(whole) > 18 else line[:36]) + " ..."


def check_encoder(config, spec, ckpt):
    """UserError, before anything large is read, where a text model of `config` has no encoder or is to get another.

    spec: of --text-encoder, or None for what the model asks for. ckpt: the name of the model in messages.
    """
    own = config.text_encoder
    if spec in ("words", "qwen3") and spec != own:
        refuse_encoder(f"--ckpt {ckpt}", own, spec)
    if spec is None and own not in ("words", "qwen3"):
        raise UserError(f"--ckpt {ckpt} reads the text features of {own}: give that Qwen3's folder with --text-encoder")
    check_text_encoder(spec or own)


def open_encoder(model, spec, negative, ckpt, device):
    """The text encoder that `model` was trained with, its null features in the model; UserError for any other.

    spec, ckpt: as in `check_encoder`. negative: a text that takes the place of the empty one, or None.
    """
    config = model.config
    check_encoder(config, spec, ckpt)
    encoder = load_text_encoder(spec or config.text_encoder, config.text_width, config.text_length, device)
    fit_encoder(model, encoder, f"--ckpt {ckpt}")
    if negative is not None:
        model.null_features.copy_(encoder.encode([negative])[0])  # (M, E)
    return encoder


def check_layout(layout, prompts, num, out):
    """UserError, before anything is drawn, for what the evaluator of `layout` could not read."""
    if pathlib.Path(out).suffix:
        raise UserError(f"--out {out}: --layout writes a folder, so give a name without an ending")
    check_writable("--out", out, is_folder=True)
    if layout == "dpg":
        if num != 4:
            raise UserError(f"--layout dpg takes 4 images of each prompt, not --num {num}")
        seen = set()
        for prompt in prompts:
            # The evaluator takes what comes before the first dot for the name.
            usable = re.fullmatch(r"[^./\\\x00-\x1f\ud800-\udfff]+", prompt.id) and len(prompt.id.encode()) <= 200
            if not usable or prompt.id in seen:
                raise UserError(f"--layout dpg: {prompt.id!r} is no file name without a dot, or is there twice")
            seen.add(prompt.id)


def shared_noise(seed, numbers, size):
    """The noise (B, 3, H, W) of samples `numbers` of every prompt: sample k's from torch's seed + k, as released."""
    generators = [torch.Generator().manual_seed(seed + k) for k in numbers]
    return torch.stack([torch.randn(3, *size, generator=generator) for generator in generators])  # (B, 3, H, W)


def draw_layout(layout, prompts, num, out, draw, settings, steps, processes):
    """Draws `num` samples of each prompt into the folder `out`; every rank its share.

    draw(text, watch) -> uint8 (num, 3, H, W) on the CPU. settings (plain values) stand in OUT.settings.json, but for
    the size of a batch, which is always `num`, and with the prompts themselves in the place of their file's name:
    UserError if the folder was begun with others. Returns the number of pictures.
    """
    out = pathlib.Path(out)
    told = json.dumps([dataclasses.astuple(prompt) for prompt in prompts])
    listed = f"a list of {len(prompts)} with SHA-256 {hashlib.sha256(told.encode()).hexdigest()[:16]}"
    settings = {name: value for name, value in settings.items() if name != "batch_size"} | {"prompts": listed}
    if processes.rank == 0:
        record = out.with_name(out.name + ".settings.json")  # beside it: DPG's evaluator takes every file for a picture
        if not record.exists() and out.exists() and any(out.iterdir()):
            raise UserError(f"--out {out} holds other files: choose a new folder")
        check_begun(out, record, settings, "use the same, or choose another --out")
    processes.barrier()
    own = list(enumerate(prompts))[processes.rank :: processes.world]
    for i, prompt in own if layout == "geneval" else ():
        if not (path := out / f"{i:05d}" / "metadata.jsonl").exists():
            with whole_file(path) as temporary:
                temporary.write_text(prompt.line + "\n", encoding="utf-8", newline="\n")
    missing = [
        (i, prompt) for i, prompt in own if not all(path.exists() for path in _paths(layout, out, i, prompt, num))
    ]
    with tqdm(total=len(missing) * steps, disable=processes.rank > 0 or not sys.stderr.isatty()) as bar:
        for i, prompt in missing:
            images = draw(prompt.text, lambda step, *_: bar.update(step > 0)).permute(0, 2, 3, 1)  # (num, H, W, 3)
            paths = _paths(layout, out, i, prompt, num)
            if layout == "dpg":
                rows = [torch.cat(list(pair), dim=1) for pair in images.split(2)]  # (H, 2W, 3) each
                images = torch.cat(rows).unsqueeze(0)  # (1, 2H, 2W, 3)
            for path, image in zip(paths, images):
                save_picture(path, Image.fromarray(image.numpy()))
    processes.barrier()
    return len(prompts) * num


def _paths(layout, out, i, prompt, num):
    """The pictures of prompt number i; GenEval's last file is the last to be written."""
    if layout == "dpg":
        return [out / f"{prompt.id}.png"]
    return [out / f"{i:05d}" / "samples" / f"{k:04d}.png" for k in range(num)]
