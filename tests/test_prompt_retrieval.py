"""Prompt retrieval: the ranks by hand, the held-out names, and the table of a model."""

import json

import numpy as np
import pytest
import torch
from helpers import ROOT, complaint, run_script, text_state
from PIL import Image

from data import ASSETS, open_dataset
from experiments import prompt_retrieval
from experiments.prompt_retrieval import draw_each, held_out, ranks, retrieval_table
from pretrained.text_encoders import load_text_encoder, words
from runtime.checkpoint import load_model, save_checkpoint
from runtime.files import UserError
from runtime.models import find_model
from runtime.prompts import open_encoder


def test_a_rank_counts_the_nearer_drawings_of_other_names():
    """By hand, on a line: "b" has two drawings, of which the nearest counts."""
    real, names = torch.tensor([[0.0], [1.0], [2.0], [7.0]]), ["a", "b", "c", "b"]
    drawn = torch.tensor([[0.9], [0.9], [1.6], [6.0]])
    assert ranks(drawn, real, names, ["b", "c", "a", "b"]).tolist() == [0, 2, 2, 0]


def test_real_drawings_find_themselves():
    """All are found first by themselves, and a shifted set by nearly none: the measure can fail."""
    emoji = open_dataset("emoji", 32, captions=True)
    real = torch.stack([emoji.picture(i) for i in range(0, 1906, 20)])
    names = emoji.labels[::20]
    everything = {"all": list(range(len(names)))}
    table = retrieval_table(real, real, names, names, everything)["all"]
    assert table["pixels top 1"] == table["features top 1"] == 1 and table["names"] == len(names)
    table = retrieval_table(real, real, names, names[1:] + names[:1], everything)["all"]
    assert table["pixels top 1"] == 0


def test_the_list_of_held_out_names_is_one_in_25_of_the_emoji():
    names = open_dataset("emoji", 32, captions=True).labels
    listed = (ASSETS / "emoji_held_out.txt").read_text(encoding="utf-8").splitlines()
    assert listed == held_out(names) and set(listed) <= set(names)
    assert 0.03 < len(listed) / len(set(names)) < 0.05


def test_the_invented_prompts_are_forty_and_none_is_a_name_of_the_emoji():
    """A sheet of what the model composes would otherwise show what it learned."""
    names = {tuple(words(name)) for name in open_dataset("emoji", 32, captions=True).labels}
    prompts = (ASSETS / "invented_prompts.txt").read_text(encoding="utf-8").splitlines()
    assert len(set(prompts)) == 40 and not [prompt for prompt in prompts if tuple(words(prompt)) in names]


def test_the_readmes_row_of_prompts_shows_no_name_of_an_emoji():
    """The prompts are kept in the picture; docs/text.md has the command that drew it."""
    names = {tuple(words(name)) for name in open_dataset("emoji", 32, captions=True).labels}
    with Image.open(ASSETS / "emoji-text.png") as picture:
        prompts = json.loads(picture.text["settings"])["prompt"]
    assert len(prompts) == 6 and not [prompt for prompt in prompts if tuple(words(prompt)) in names]
    page = (ROOT / "docs" / "text.md").read_text(encoding="utf-8")
    assert all(f'--prompt "{prompt}"' in page for prompt in prompts)


def test_an_interrupted_run_goes_on_with_the_names_that_are_missing(tmp_path, monkeypatch):
    """To the pictures of a run that was not interrupted, and not with other settings."""
    monkeypatch.setattr(prompt_retrieval, "AT_ONCE", 2)
    save_checkpoint(tmp_path / "text.pt", text_state())
    model, encoder, asked = load_model(tmp_path / "text.pt"), load_text_encoder("words", 8, 4), []
    names, how = ["red", "green apple", "cat", "dog", "a"], dict(seed=0, temperature=0.8, steps=2, shift=2.0, cfg=2.5)
    whole = draw_each(model, encoder, names, tmp_path / "whole.npz", how, **how)
    assert whole.shape == (5, 3, 16, 16)

    class Stopping:
        def encode(self, texts):
            if len(asked) == 2:
                raise KeyboardInterrupt
            asked.append(texts)
            return encoder.encode(texts)

    with pytest.raises(KeyboardInterrupt):
        draw_each(model, Stopping(), names, tmp_path / "parts.npz", how, **how)
    with pytest.raises(UserError, match="was begun with seed=0, and this run has 1"):
        draw_each(model, encoder, names, tmp_path / "parts.npz", how | {"seed": 1}, **how)
    asked.clear()
    assert torch.equal(draw_each(model, Stopping(), names, tmp_path / "parts.npz", how, **how), whole)
    assert asked == [["a"]]


def test_what_is_appended_to_the_names_is_asked_for(tmp_path):
    names = open_dataset("emoji", 32, captions=True).labels
    plurals = [f"{names[i * len(names) // 2]}s" for i in range(2)]
    flags = ["emoji-text", "--num", 2, "--steps", 2, "--append", "s", "--npz", tmp_path / "drawn.npz"]
    status, _, stderr = run_script("experiments/prompt_retrieval.py", *map(str, flags))
    assert status == 0, stderr
    model, how = find_model("emoji-text"), dict(seed=0, temperature=0.8, steps=2, shift=2.0, cfg=2.5)
    by_hand = draw_each(model, open_encoder(model, None, None, "", "cpu"), plurals, tmp_path / "hand.npz", how, **how)
    with np.load(tmp_path / "drawn.npz") as archive:
        assert (archive["arr_0"] == by_hand.permute(0, 2, 3, 1).numpy()).all()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["emoji"], "emoji draws from classes"),
        (["nowhere.pt"], "nowhere.pt"),
        (["emoji-text", "--hold-out", "nowhere.txt"], "--hold-out nowhere.txt cannot be read"),
        (["emoji-text", "--num", "0"], "--num"),
        (["emoji-text", "--cfg", "nan"], "--cfg"),
        (["emoji-text", "--shift", "0"], "--shift"),
        (["emoji-text", "--temperature", "1e300"], "--temperature"),
        (["emoji-text", "--steps", "10001"], "--steps"),
        (["emoji-text", "--seed", "9" * 30], "--seed"),
        (["emoji-text", "--npz", "."], "--npz . is a folder"),
    ],
)
def test_a_mistake_is_one_line(flags, message):
    assert message in complaint("experiments/prompt_retrieval.py", *flags)
