"""Crops that were kept: the very ones that decoding gives, whatever happened to the file meanwhile."""

import os
import types

import numpy as np
import pytest
import torch
from PIL import Image

import crop_cache
import data
from data import BatchNumbers, DataError, open_dataset, training_batches
from test_data import folder  # noqa: F401, a fixture
from test_picture_index import write_folder, write_tar


def crops_of(dataset):
    return torch.stack([dataset[i][0] for i in range(len(dataset))])  # (N, 3, 16, 16)


def cache_file(kept):
    (name,) = os.listdir(kept)
    return kept / name


@pytest.fixture
def kept(tmp_path_factory):
    """A place beside the pictures."""
    return tmp_path_factory.mktemp("kept") / "crops"


@pytest.fixture
def no_decoding(monkeypatch):
    """From now on, whoever decodes a picture fails the test."""

    def start():
        monkeypatch.setattr(data, "read_image", lambda path, content=None: pytest.fail(f"{path} was decoded again"))

    return start


@pytest.mark.parametrize("write", [write_folder, write_tar])
def test_each_picture_is_decoded_once_and_its_crop_is_the_same(tmp_path, kept, no_decoding, write):
    source = write(tmp_path / "pictures")
    expected = crops_of(open_dataset(source, 16))
    assert torch.equal(crops_of(open_dataset(source, 16, crops=kept)), expected)
    no_decoding()
    again = open_dataset(source, 16, crops=kept)
    assert torch.equal(crops_of(again), expected) and again[0][1] == 0


def test_other_sizes_and_data_sets_have_files_of_their_own(tmp_path, kept):
    for name, side in (("a", 16), ("a", 8), ("b", 16)):
        source = tmp_path / name if (tmp_path / name).exists() else write_folder(tmp_path / name)
        assert torch.equal(crops_of(open_dataset(source, side, crops=kept)), crops_of(open_dataset(source, side)))
    assert len(os.listdir(kept)) == 3


@pytest.mark.parametrize("damage", ["pixel", "checksum", "half", "shifted", "empty"])
def test_a_damaged_record_is_decoded_again_and_mended(folder, kept, no_decoding, damage):  # noqa: F811
    expected = crops_of(open_dataset(folder, 16))
    crops_of(open_dataset(folder, 16, crops=kept))
    content = bytearray(cache_file(kept).read_bytes())
    record = len(content) // 5
    if damage == "pixel":
        content[2 * record + 400] ^= 1
    elif damage == "checksum":
        content[2 * record] ^= 1
    elif damage == "half":  # a write that a power cut ended
        content[2 * record + 300 : 3 * record] = bytes(record - 300)
    elif damage == "shifted":  # the record of another picture, whole
        content[2 * record : 3 * record] = content[3 * record : 4 * record]
    else:
        content = b""
    cache_file(kept).write_bytes(content)
    assert torch.equal(crops_of(open_dataset(folder, 16, crops=kept)), expected)
    no_decoding()
    assert torch.equal(crops_of(open_dataset(folder, 16, crops=kept)), expected)


def test_a_picture_that_was_changed_is_decoded_again(folder, kept):  # noqa: F811
    dataset = open_dataset(folder, 16, crops=kept)
    before = crops_of(dataset)
    Image.fromarray(np.zeros((20, 20, 3), np.uint8)).save(folder / "cat" / "1.png")
    assert (dataset[1][0] == 0).all() and (before[1] != 0).any()  # in a run
    again = open_dataset(folder, 16, crops=kept)  # in the next run
    assert torch.equal(crops_of(again), crops_of(open_dataset(folder, 16)))
    (folder / "cat" / "1.png").unlink()
    with pytest.raises(DataError, match="cat/1.png is not a readable"):
        dataset[1]


def test_workers_that_fill_it_at_once_change_nothing(folder, kept):  # noqa: F811
    """Two epochs and a half; pictures are read while others are written, some of them twice at a time."""
    numbers = BatchNumbers(0, 6, 2, 1)
    batches = [list(training_batches(open_dataset(folder, 16, crops=where), numbers, 0, 0.1, 1.0, workers, pin=False))
               for where, workers in ((None, 0), (kept, 2), (kept, 0))]  # fmt: skip
    for others in batches[1:]:
        assert all(torch.equal(a[key], b[key]) for a, b in zip(batches[0], others, strict=True) for key in a)


def test_augmented_pictures_are_not_taken_from_it(folder, kept):  # noqa: F811
    crops_of(open_dataset(folder, 16, crops=kept))
    plain, cached = (open_dataset(folder, 16, True, crops=where) for where in (None, kept))
    for i in range(5):
        a, b = (dataset.__getitem__(i, data.keyed_generator(i))[0] for dataset in (plain, cached))
        assert torch.equal(a, b)


def test_a_disk_that_is_too_small_or_full_gets_one_line(folder, kept, monkeypatch):  # noqa: F811
    dataset = open_dataset(folder, 16, crops=kept)
    (kept.parent / "a file").write_text("")
    with pytest.raises(DataError, match="a file cannot be used .*: choose another folder"):
        open_dataset(folder, 16, crops=kept.parent / "a file")
    monkeypatch.setattr(crop_cache.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=3000))
    with pytest.raises(DataError, match="for 5 crops and has room for"):
        open_dataset(folder, 16, crops=kept.parent / "small")
    cache_file(kept).unlink()
    os.symlink("/dev/full", dataset.crops.path)  # reads as zeros, and says "no space left" to whoever writes
    with pytest.raises(DataError, match="cannot be written .*: make room, or leave out --cache-crops"):
        dataset[0]
