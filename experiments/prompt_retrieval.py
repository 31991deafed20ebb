"""Prompt retrieval: does a model that was trained on the emoji's names draw what its prompt says?

    python -m experiments.prompt_retrieval assets/emoji-text.pt --npz drawn.npz       # resumes if it was stopped
    python -m experiments.prompt_retrieval runs/held/last.pt --hold-out assets/emoji_held_out.txt
    python -m experiments.prompt_retrieval --write-list assets/emoji_held_out.txt     # one name in 25, by its hash

Draws one picture of each name and looks for the nearest of the 1,906 real drawings: by the mean square of pixels, and
by the distance of the emoji classifier's features. A name counts at k if a drawing of that name is among the k nearest.
By chance that would be 0.0005 at 1. With --hold-out, names that were not trained on are counted apart, and of them
those whose words all occur in names that were. The picture of a held-out name can be right and yet nearer to another
drawing, so this is a lower bound of what composes. --npz keeps the pictures, and with them what an interrupted run has
drawn. Left out: several samples of a name; other encoders' classifiers.
"""

import argparse
import hashlib
import json
import pathlib
import tempfile

import numpy as np
import torch

from data import from_uint8, open_dataset
from pretrained.emoji_classifier import load_emoji_classifier
from pretrained.text_encoders import words
from runtime.distributed import Processes
from runtime.files import UserError, check_writable, run, whole_file
from runtime.models import find_model, weights_hash
from runtime.options import COUNT, POSITIVE, SEED, SHIFT
from runtime.prompts import open_encoder
from runtime.sample_options import FINITE, STEPS
from runtime.shards import Shards
from runtime.some_classes import HeldOut
from sample import draw
from samplers import time_grid

ONE_IN = 25
AT_ONCE = 64


def held_out(names):
    """One name in 25, chosen by a hash of its spelling, so that the list depends on nothing else."""
    number = {name: int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) for name in names}
    return sorted(name for name in number if number[name] % ONE_IN == 0)


def ranks(drawn, real, names, wanted):
    """For each drawn picture, how many drawings of other names are nearer than the nearest of its own: int (N).

    drawn (N, D), real (R, D): vectors to compare; names: of the R real ones; wanted: of the N drawn ones.
    """
    found = []
    for distances, name in zip(torch.cdist(drawn, real), wanted):  # (R)
        own = torch.tensor([other == name for other in names])  # (R)
        found.append(int((distances[~own] < distances[own].min()).sum()))
    return torch.tensor(found)  # (N)


def draw_each(model, encoder, prompts, path, settings, seed, temperature, steps, shift, cfg):
    """One picture of each prompt, image number i from the noise of number i: uint8 (N, 3, H, W).

    They are kept in the npz `path`, in the order of the prompts, and until all are drawn in a folder beside it, from
    which the same call resumes. Raises UserError where that folder was begun with other `settings` (plain values).
    """
    how = dict(times=time_grid(steps, shift), scale=cfg, interval=(0.0, 1.0), solver="adams")
    size = (model.config.resolution, model.config.resolution)

    def some(numbers, watch):  # uint8 (B, 3, H, W)
        y = encoder.encode([prompts[i] for i in numbers])  # (B, M, E)
        return draw(model, y, numbers, size, seed, temperature, watch=watch, **how)

    store = Shards(path, len(prompts), size, AT_ONCE, settings, Processes())
    store.draw(some, steps)
    store.join(np.arange(len(prompts)))
    with np.load(path) as archive:
        return torch.from_numpy(archive["arr_0"]).permute(0, 3, 1, 2)  # (N, 3, H, W)


def retrieval_table(images, real, names, wanted, groups):
    """{group: {measure: share}} of pictures (N, 3, 32, 32) of the prompts `wanted`; groups: {name: indices of some}."""
    network = load_emoji_classifier()
    vectors = {"pixels": lambda u8: from_uint8(u8).flatten(1), "features": lambda u8: network(u8)[0]}
    found = {name: ranks(vector(images), vector(real), names, wanted) for name, vector in vectors.items()}
    table = {}
    for group, indices in groups.items():
        table[group] = {"names": len(indices)}
        for name, rank in found.items():
            for k in (1, 5):
                table[group][f"{name} top {k}"] = round(float((rank[indices] < k).float().mean()), 3)
    return table


def main():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("ckpt", nargs="?", help="a text model of the emoji, by name or file")
    parser.add_argument("--hold-out", help="the captions that it was not trained on, as for train.py")
    parser.add_argument("--num", type=COUNT, help="names that are drawn, spread over all (default: all)")
    parser.add_argument("--append", default="", help="draw each name with this behind it: s asks for (nearly) plurals")
    parser.add_argument("--npz", help="keep the pictures in this file; the same command resumes (default: they go)")
    parser.add_argument("--write-list", help="write the list of held-out names to this file, and stop")
    parser.add_argument("--cfg", type=FINITE, default=2.5)
    parser.add_argument("--shift", type=SHIFT, default=2.0)
    parser.add_argument("--temperature", type=POSITIVE, default=0.8)
    parser.add_argument("--steps", type=STEPS, default=25)
    parser.add_argument("--seed", type=SEED, default=0)
    args = parser.parse_args()
    emoji = open_dataset("emoji", 32, captions=True)
    names = emoji.labels
    if args.write_list:
        with whole_file(args.write_list) as temporary:
            temporary.write_text("\n".join(held_out(names)) + "\n", encoding="utf-8")
        return print(f"{args.write_list}: {len(held_out(names))} of {len(set(names))} names")
    if not args.ckpt:
        raise UserError("name a checkpoint, or give --write-list")
    if args.npz:
        check_writable("--npz", args.npz)
    unseen = set(names) - set(HeldOut(emoji, args.hold_out).labels) if args.hold_out else set()
    model = find_model(args.ckpt)
    if model.class_names is not None:
        raise UserError(f"{args.ckpt} draws from classes: give a model that was trained on the emoji's names")
    encoder = open_encoder(model, None, None, args.ckpt, "cpu")
    count = min(args.num or len(names), len(names))
    wanted = [names[i * len(names) // count] for i in range(count)]
    wanted = wanted if args.num is None else sorted({*wanted, *unseen})
    known = {word for name in names if name not in unseen for word in words(name)}
    groups = {"trained": [i for i, name in enumerate(wanted) if name not in unseen]}
    if unseen:
        groups["held out"] = [i for i, name in enumerate(wanted) if name in unseen]
        groups["held out, of known words"] = [i for i in groups["held out"] if known.issuperset(words(wanted[i]))]
    how = {name: getattr(args, name) for name in ("cfg", "shift", "temperature", "steps", "seed")}
    prompts = [name + args.append for name in wanted]
    digest = hashlib.sha256("\n".join(prompts).encode()).hexdigest()[:12]
    settings = {"model": weights_hash(model), "num": args.num, "hold_out": args.hold_out, "names": digest, **how}
    with tempfile.TemporaryDirectory() as folder:
        path = args.npz or pathlib.Path(folder, "drawn.npz")
        images = draw_each(model, encoder, prompts, path, settings, **how)
    real = torch.stack([emoji.picture(i) for i in range(len(emoji))])  # (R, 3, 32, 32)
    table = retrieval_table(images, real, names, wanted, groups)
    print(json.dumps({"ckpt": args.ckpt, **how}))
    for group, row in table.items():
        print(f"{group:26}", *(f"{name} {value}" for name, value in row.items()), sep="  ")


if __name__ == "__main__":
    run(main)
