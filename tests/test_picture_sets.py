"""Streams of pictures: each picture once, in a known order, and no number from a file that is damaged or not meant."""

import zipfile

import numpy as np
import pytest
import torch
from helpers import make_class_folder
from PIL import Image

from data import open_dataset
from runtime.files import UserError
from runtime.picture_sets import REFERENCES, STATISTICS, open_pictures, open_reference, pictures_of, save_statistics


def pictures(count, height=8, width=8, seed=0):
    """uint8 (N, H, W, 3), as in an npz."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# ---- streams ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_streams_its_own_pictures_in_order_and_ranks_share_them(tmp_path, save):
    """Catches: channels read as columns, a batch lost between two ranks."""
    array = pictures(11, 6, 9)
    save(tmp_path / "a.npz", arr_0=array)
    opened = open_pictures(tmp_path / "a.npz")
    assert (opened.count, opened.size, opened.stored) == (11, (6, 9), {})
    whole = torch.from_numpy(array).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat(list(opened.batches(4))), whole)
    first, second = list(opened.batches(4, 0, 2)), list(opened.batches(4, 1, 2))
    assert torch.equal(torch.cat([first[0], second[0], first[1]]), whole)


def test_a_folder_gives_each_picture_once_in_a_fixed_order_that_mixes_classes(tmp_path):
    """In the order of the folders, each split of the Inception Score would hold one class."""
    array = pictures(12)
    for i, picture in enumerate(array):
        (tmp_path / f"class{i // 6}").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"class{i // 6}" / f"{i:02}.png")
    batches = open_pictures(tmp_path, workers=2).batches
    read = torch.cat(list(batches(5))).permute(0, 2, 3, 1).numpy()
    order = [next(i for i, picture in enumerate(array) if (picture == one).all()) for one in read]
    assert sorted(order) == list(range(12)) and order != sorted(order)
    assert torch.equal(torch.cat(list(batches(5))), torch.cat(list(batches(3))))


def test_a_resolution_crops_the_pictures_of_a_folder_to_one_size(tmp_path):
    folder = make_class_folder(tmp_path / "data")  # each picture has another height
    opened = open_pictures(folder, resolution=16)
    assert opened.size == (16, 16) and torch.cat(list(opened.batches(4))).shape == (6, 3, 16, 16)
    with pytest.raises(UserError, match=r"\.png: 40x.* pixels, .*--resolution crops"):
        list(open_pictures(folder).batches(4))


def test_the_emoji_and_any_data_set_are_pictures_too():
    assert open_pictures("emoji").size == (64, 64)
    dataset = open_dataset("emoji", 32)
    named, given = open_pictures("emoji", 32), pictures_of(dataset, "the data")
    assert given.name == "the data" and given.count == len(dataset) and given.size == (32, 32)
    assert torch.equal(next(named.batches(5)), next(given.batches(5)))
    everything = torch.cat(list(given.batches(500)))
    assert everything.float().mean() == pytest.approx(dataset.images.float().mean().item())


def test_labels_in_order_are_noticed(tmp_path):
    """ADM's sampler and ours write the classes beside the pictures; sorted samples collapse the Inception Score."""
    for labels, in_order in (([0, 0, 1, 1], True), ([0, 1, 0, 1], False), ([2, 2, 2, 2], False), ([], False)):
        np.savez(tmp_path / "a.npz", arr_0=pictures(4), arr_1=np.array(labels))
        assert open_pictures(tmp_path / "a.npz").sorted_labels == in_order


def test_saved_statistics_are_read_back(tmp_path):
    found = {name: torch.randn(shape, dtype=torch.float64) for name, shape in STATISTICS.items()}
    found["features"] = torch.randn(5, 2048)
    np.savez(tmp_path / "pictures.npz", arr_0=pictures(5, 32, 40))
    save_statistics(tmp_path / "new" / "stats", open_pictures(tmp_path / "pictures.npz"), found)
    saved = open_pictures(tmp_path / "new" / "stats")
    assert (saved.count, saved.size, saved.batches) == (5, (32, 40), None)
    assert saved.stored.keys() == found.keys()
    assert all(torch.equal(saved.stored[name], value) for name, value in found.items())


# ---- what is refused, in one line that names the file ----------------------------------------------------------------

GOOD = {"arr_0": pictures(5)}
STORED = {name: np.zeros(shape) for name, shape in STATISTICS.items()}
SAVED = STORED | {"features": np.zeros((4, 2048)), "size": np.array([4, 8, 8])}
BAD_ARRAYS = {
    "no arr_0": ({"images": pictures(5)}, "has no arr_0"),
    "float pictures": ({"arr_0": np.zeros((5, 8, 8, 3), np.float32)}, "float32; it must be uint8"),
    "NaN": ({"arr_0": np.full((5, 8, 8, 3), np.nan)}, "float64; it must be uint8"),
    "channels first": ({"arr_0": pictures(5).transpose(0, 3, 1, 2).copy()}, "looks like N, 3, H, W"),
    "gray": ({"arr_0": pictures(5)[..., 0].copy()}, "it must be N, H, W, 3"),
    "transparency": ({"arr_0": np.zeros((5, 8, 8, 4), np.uint8)}, "it must be N, H, W, 3"),
    "Fortran order": ({"arr_0": np.asfortranarray(pictures(5))}, "Fortran"),
    "pickled": ({"arr_0": np.array([{}, 1], dtype=object)}, "pickled"),
    "nothing": ({"arr_0": pictures(0)}, "at least two pictures, found 0"),
    "one picture": ({"arr_0": pictures(1)}, "at least two pictures, found 1"),
    "huge pictures": ({"arr_0": np.zeros((5, 2049, 1, 3), np.uint8)}, "the limits are"),
    "some statistics": (GOOD | {"mu": np.zeros(2048)}, "holds mu, but not all of"),
    "other dimensions": (GOOD | STORED | {"mu": np.zeros(192)}, r"mu is float64 \(192,\)"),
    "other matrix": (GOOD | STORED | {"sigma": np.zeros((192, 192))}, "sigma is float64"),
    "whole numbers": (GOOD | STORED | {"mu": np.zeros(2048, int)}, "mu is int64"),
    "NaN statistics": (GOOD | STORED | {"mu_s": np.full(2023, np.nan)}, "mu_s holds NaN"),
    "other features": (SAVED | {"features": np.zeros((4, 192))}, "features is float64"),
    "no size": (SAVED | {"size": np.zeros(3)}, "at least two pictures"),
}


@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(case, tmp_path):
    arrays, message = BAD_ARRAYS[case]
    np.savez_compressed(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=f"bad.npz: .*{message}") as caught:
        open_pictures(tmp_path / "bad.npz")
    assert "\n" not in str(caught.value)


def npy(header_shape, data=b""):
    """An npy file that promises `header_shape` uint8 and holds `data`."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": header_shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


def damaged_npz(path, case):
    array = pictures(5)
    if case == "lying header":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", npy((10**6, 512, 512, 3), b"few"))
    elif case == "broken header":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", npy((5, 8, 8, 3), array.tobytes()).replace(b"}", b"("))
    elif case == "other compression":  # bzip2 packs zeros a million times smaller
        with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
            archive.writestr("arr_0.npy", npy((5, 8, 8, 3), array.tobytes()))
    elif case == "zip bomb":  # header and directory agree on 786 GB; a real one would come from a real compressor
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", npy((10**6, 512, 512, 3)))
            archive.filelist[0].file_size += 10**6 * 512 * 512 * 3
    else:
        np.savez(path, arr_0=array)
        data = path.read_bytes()
        if case == "bit flip":
            place = data.index(array.tobytes()) + 100
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
        path.write_bytes({"truncated": data[: len(data) // 2], "text": b"not a zip", "empty": b""}.get(case, data))


DAMAGES = {
    "truncated": "not an npz file, truncated or damaged",
    "text": "not an npz file",
    "empty": "not an npz file",
    "lying header": "promises .*but holds",
    "broken header": "not an npz file",
    "zip bomb": "would unpack",
    "other compression": "numpy does not use",
    "bit flip": "Bad CRC-32",  # in the pixels: noticed when they have been read, in the thread that reads ahead
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damaged_and_hostile_files_are_refused(case, tmp_path):
    damaged_npz(tmp_path / "bad.npz", case)
    with pytest.raises(UserError, match=f"bad.npz: .*{DAMAGES[case]}") as caught:
        list(open_pictures(tmp_path / "bad.npz").batches(2))
    assert "\n" not in str(caught.value)


def test_a_full_memory_is_not_taken_for_a_damaged_file(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    damaged_npz(tmp_path / "sound.npz", "none")
    monkeypatch.setattr("runtime.picture_sets._stored_statistics", fail)
    with pytest.raises(MemoryError):
        open_pictures(tmp_path / "sound.npz")


def test_folders_without_sound_pictures_are_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty holds no JPEG"):
        open_pictures(tmp_path / "empty")
    (tmp_path / "broken").mkdir()
    for i in range(3):
        (tmp_path / "broken" / f"{i}.png").write_bytes(b"")
    with pytest.raises(UserError, match=r"broken.*\d\.png .*empty file"):
        open_pictures(tmp_path / "broken")
    with pytest.raises(UserError, match="missing.npz: no such file or directory; sample.py .* makes an npz"):
        open_pictures(tmp_path / "missing.npz")


def test_a_picture_that_breaks_in_the_middle_of_a_stream_stops_it(tmp_path):
    """Catches: an error of the reading threads that ends the stream early and gives a number from fewer pictures."""
    folder = make_class_folder(tmp_path / "data", counts=(("cat", 8),))
    opened = open_pictures(folder, resolution=16)
    for path in sorted(folder.glob("cat/*.png"))[:7]:  # whichever comes first
        path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(UserError, match="not a readable"):
        list(opened.batches(2))


def test_a_missing_reference_names_its_address_and_the_flag(tmp_path):
    """Of the samples' own size. Catches the reference of 256 pixels for samples of 512."""
    for side, address in REFERENCES.items():
        assert str(side) in address.rpartition("/")[2]
        for spec in (None, tmp_path / "nowhere.npz"):
            with pytest.raises(UserError, match="^--eval-ref .*(missing|no such file)") as caught:
                open_reference(spec, "--eval-ref", side, side)
            assert f"{side} is at {address}" in str(caught.value) and "--save-stats" in str(caught.value)
    make_class_folder(tmp_path / "data")
    assert open_reference(tmp_path / "data", "--eval-ref", 16, 16).count == 6
    assert open_reference("emoji", "--eval-ref", 32, 32).size == (32, 32)
