"""Pictures that are kept in memory: the same to the bit, read once, and only where they fit."""

import shutil

import pytest
import torch

from data import TrainingSamples, open_dataset
from helpers import make_class_folder
from runtime.crops import keep_in_memory
from runtime.files import UserError
from runtime.some_classes import SomeClasses


def told(*_):
    raise AssertionError("a word about something that takes no time")


@pytest.mark.parametrize("augment", [False, True])
@pytest.mark.parametrize("names", [None, ["dog:2"]])
def test_kept_pictures_give_the_same_samples_when_their_files_are_gone(tmp_path, augment, names):
    """Catches a second scaling that is not the identity, other random crops, and numbers of another data set."""
    root = make_class_folder(tmp_path / "data", (("cat", 3), ("dog", 2)), 70, 130)
    whole = open_dataset(root, 16, augment)
    dataset = SomeClasses(whole, names) if names else whole
    before = [TrainingSamples(dataset, 0)[k] for k in range(12)] + [{"image": dataset.picture(0)}]
    keep_in_memory(dataset, 16, told)
    assert dataset.in_memory and len(whole.kept) == (2 if names else 5)
    shutil.rmtree(root)
    after = [TrainingSamples(dataset, 0)[k] for k in range(12)] + [{"image": dataset.picture(0)}]
    assert all(
        torch.equal(torch.as_tensor(a[key]), torch.as_tensor(b[key])) for a, b in zip(before, after) for key in a
    )


def test_what_does_not_fit_is_read_again_in_every_epoch(tmp_path):
    """By the size of the crops without looking, or, of long pictures that are kept whole, when they turn out long."""
    root = make_class_folder(tmp_path / "data", (("cat", 4),), 16, 64)
    said, crops = [], 4 * 3 * 16 * 16
    for limit in (crops - 1, 2 * crops):
        dataset = open_dataset(root, 16, augment=True)
        keep_in_memory(dataset, 16, said.append, limit)
        assert not dataset.in_memory and not dataset.kept and dataset[3][0].shape == (3, 16, 16)
    assert len(said) == 1 and "read again in every epoch" in said[0]
    plain = open_dataset(root, 16)
    keep_in_memory(plain, 16, told, 2 * crops)
    assert plain.in_memory


def test_a_picture_that_cannot_be_read_is_named_before_training(tmp_path):
    root = make_class_folder(tmp_path / "data", (("cat", 4),))
    (root / "cat" / "2.png").write_bytes(b"broken")
    with pytest.raises(UserError, match="cat/2.png is not a readable"):
        keep_in_memory(open_dataset(root, 16), 16, told)
