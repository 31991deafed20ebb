"""Prompts of a file, and the folders in which the evaluators of GenEval and DPG-Bench look for their pictures.

    sample.py --prompts evaluation_metadata.jsonl --layout geneval --out geneval      # 00000/samples/0000.png, ...
    sample.py --prompts prompts/ --layout dpg --out dpg                               # ID.png, four pictures in one

Sample k of every prompt starts from the same noise, that of seed k, as released. A prompt is drawn by one process, its
samples in one batch, so the bytes are the same for any number of processes; what is there already is not drawn again.
"""

import dataclasses
import json
import pathlib
import re
import sys
import textwrap

import torch
from PIL import Image
from tqdm import tqdm

from pretrained.text_encoders import fit_encoder, load_text_encoder, refuse_encoder
from runtime.files import UserError, check_writable, whole_file
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
    path = pathlib.Path(path)
    try:
        if path.is_dir():
            found = [Prompt(_one_line(file), file.stem, "") for file in sorted(path.glob("*.txt"))]
        elif path.suffix == ".jsonl":
            lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
            found = [_of_json(path, number, line) for number, line in lines if line.strip()]
        else:
            lines = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
            found = [Prompt(line, f"{i:05d}", "") for i, line in enumerate(filter(None, lines))]
    except UnicodeDecodeError:
        raise UserError(f"--prompts {path} is not a text in UTF-8: save it in that encoding")
    except OSError as error:
        raise UserError(f"--prompts {path} cannot be read ({error.strerror}): give a file or a folder of .txt files")
    if not found:
        raise UserError(f"--prompts {path} holds no prompt")
    for prompt in found:
        prompt.line = prompt.line or json.dumps({"prompt": prompt.text})
    return found


def _one_line(file):
    try:
        text = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError:
        raise UserError(f"--prompts: {file} is not a text in UTF-8: save it in that encoding")
    if not text:
        raise UserError(f"--prompts: {file} is empty")
    return " ".join(text.splitlines())


def _of_json(path, number, line):
    try:
        entry = json.loads(line)
        text, name = entry["prompt"], entry.get("id", f"{number - 1:05d}")
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"--prompts {path}, line {number}, is not a JSON object with a prompt")
    if not isinstance(text, str) or not text.strip():
        raise UserError(f"--prompts {path}, line {number}: the prompt is not a text, or empty")
    return Prompt(text, str(name), line)


def title_of(prompt):
    """A prompt as the title of a row of pictures: one short line of printable letters."""
    line = "".join(letter if letter.isprintable() else " " for letter in prompt)
    return textwrap.shorten(line, 40, placeholder=" ...") or line[:40]


def open_encoder(model, spec, negative, ckpt, device):
    """The text encoder that `model` was trained with, its null features in the model; UserError for any other.

    spec: of --text-encoder, or None for what the model asks for. negative: a text that takes the place of the empty
    one, or None. ckpt: the name of the model in messages.
    """
    config = model.config
    if spec in ("words", "qwen3") and spec != config.text_encoder:  # told before gigabytes of it are downloaded
        refuse_encoder(f"--ckpt {ckpt}", config.text_encoder, spec)
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
            if not re.fullmatch(r"[^./\\\x00-\x1f]{1,200}", prompt.id) or prompt.id in seen:
                raise UserError(f"--layout dpg: {prompt.id!r} is no file name without a dot, or is there twice")
            seen.add(prompt.id)


def shared_noise(seed, numbers, size):
    """The noise (B, 3, H, W) of samples `numbers` of every prompt: sample k's from torch's seed + k, as released."""
    generators = [torch.Generator().manual_seed(seed + k) for k in numbers]
    return torch.stack([torch.randn(3, *size, generator=generator) for generator in generators])  # (B, 3, H, W)


def draw_layout(layout, prompts, num, out, draw, settings, steps, processes):
    """Draws `num` samples of each prompt into the folder `out`; every rank its share.

    draw(text, watch) -> uint8 (num, 3, H, W) on the CPU. settings (plain values) stand in OUT.settings.json: UserError
    if the folder was begun with others. Returns the number of pictures.
    """
    out = pathlib.Path(out)
    if processes.rank == 0:
        record = out.with_name(out.name + ".settings.json")  # beside it: DPG's evaluator takes every file for a picture
        if not record.exists() and out.exists() and any(out.iterdir()):
            raise UserError(f"--out {out} holds other files: choose a new folder")
        check_begun(out, record, settings, "use the same, or choose another --out")
    processes.barrier()
    own = list(enumerate(prompts))[processes.rank :: processes.world]
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
            else:
                with whole_file(out / f"{i:05d}" / "metadata.jsonl") as temporary:
                    temporary.write_text(prompt.line + "\n", encoding="utf-8")
            for path, image in zip(paths, images):
                save_picture(path, Image.fromarray(image.numpy()))
    processes.barrier()
    return len(prompts) * num


def _paths(layout, out, i, prompt, num):
    """The pictures of prompt number i; GenEval's last file is the last to be written."""
    if layout == "dpg":
        return [out / f"{prompt.id}.png"]
    return [out / f"{i:05d}" / "samples" / f"{k:04d}.png" for k in range(num)]
