"""Prompt retrieval: the ranks by hand, the held-out names, and the table of a model."""

import torch

from data import ASSETS, open_dataset
from experiments.prompt_retrieval import held_out, measure, ranks


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
    table = measure(real, real, names, names, everything)["all"]
    assert table["pixels top 1"] == table["features top 1"] == 1 and table["names"] == len(names)
    table = measure(real, real, names, names[1:] + names[:1], everything)["all"]
    assert table["pixels top 1"] == 0


def test_the_list_of_held_out_names_is_one_in_25_of_the_emoji():
    names = open_dataset("emoji", 32, captions=True).labels
    listed = (ASSETS / "emoji_held_out.txt").read_text(encoding="utf-8").splitlines()
    assert listed == held_out(names) and set(listed) <= set(names)
    assert 0.03 < len(listed) / len(set(names)) < 0.05
