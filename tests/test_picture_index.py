"""Tars read in place, an index that is kept between starts: the same pictures in the same order, or one clear line."""

import bz2
import gzip
import io
import os
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import TrainingSamples, open_dataset
from runtime.files import UserError, picture_index
from runtime.loader import BatchNumbers, training_batches
from runtime.some_classes import SomeClasses

LONG = "a_name_of_more_than_one_hundred_letters_" * 4 + ".png"  # needs a GNU long name, or a pax header
NAMES = ["cat/0.png", "cat/1.JPG", f"cat/{LONG}", "cat d/2.jpeg", "dog/deep/3.png", "dog/ä\udce4.png", "dog/9.webp"]


def picture(name, seed):
    """The bytes of a small picture of noise, in the format that its name says."""
    content = io.BytesIO()
    pixels = np.random.RandomState(seed).randint(0, 256, (20 + seed, 24, 3), dtype=np.uint8)
    kind = {"png": "PNG", "webp": "WEBP"}.get(name.split(".")[-1], "JPEG")
    Image.fromarray(pixels).save(content, kind)
    return content.getvalue()


PICTURES = {name: picture(name, seed) for seed, name in enumerate(NAMES)}


def write_folder(root, pictures=PICTURES):
    for name, content in pictures.items():
        os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
        with open(os.path.join(root, name), "wb") as file:
            file.write(content)
    return root


def write_tar(path, pictures=PICTURES, prefix="", members=(), form=tarfile.GNU_FORMAT, mode="w"):
    """A tar of {name: bytes}, last name first, followed by TarInfo `members` without content."""
    with tarfile.open(path, mode, format=form) as tar:
        for name, content in reversed(pictures.items()):
            member = tarfile.TarInfo(prefix + name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
        for member in members:
            tar.addfile(member)
    return path


def write_tar_of_tars(path, pictures=PICTURES):
    """Like ILSVRC2012_img_train.tar: each class is a tar of its pictures, without a folder inside."""
    inner = {}
    for top in dict.fromkeys(name.split("/")[0] for name in pictures):
        write_tar(
            path, {name[len(top) + 1 :]: content for name, content in pictures.items() if name.startswith(f"{top}/")}
        )
        inner[f"{top}.tar"] = path.read_bytes()
    return write_tar(path, inner)


def member(name, kind=tarfile.REGTYPE, **values):
    info = tarfile.TarInfo(name)
    info.type = kind
    for key, value in values.items():
        setattr(info, key, value)
    return info


# ---- tars ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gnu", "pax", "train/", "./", "tar of tars"])
@pytest.mark.parametrize("augment", [False, True])
def test_a_tar_gives_what_its_folder_gives(tmp_path, kind, augment):
    """Catches another order (a tar has that of a disk), other labels, a wrong offset, names cut at 100 bytes."""
    path = tmp_path / "pictures.tar"
    if kind == "tar of tars":
        write_tar_of_tars(path)
    else:
        form = tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT
        write_tar(path, prefix=kind if "/" in kind else "", form=form)
    folder, tar = (open_dataset(spec, 16, augment) for spec in (write_folder(tmp_path / "folder"), path))
    assert tar.classes == folder.classes == ["cat", "cat d", "dog"]
    assert tar.labels == folder.labels == [0, 0, 0, 1, 2, 2, 2]
    assert tar.fingerprint == folder.fingerprint
    assert [tar.index.name(i) for i in range(7)] == [folder.index.name(i) for i in range(7)]
    assert [tar.index.read(i) for i in range(7)] == [PICTURES[tar.index.name(i)] for i in range(7)]
    for k in range(14):
        one, other = TrainingSamples(folder, 0)[k], TrainingSamples(tar, 0)[k]
        assert all(torch.equal(torch.as_tensor(one[key]), torch.as_tensor(other[key])) for key in one)


@pytest.mark.parametrize("names", [None, ["dog:2", "cat d"]])
def test_workers_read_the_same_tar_at_once(tmp_path, names):
    """Catches a file position shared by forked processes, which would mix up their pictures."""
    dataset = open_dataset(write_tar(tmp_path / "a.tar"), 16)
    dataset[0]  # opened before the workers are born
    dataset = SomeClasses(dataset, names) if names else dataset
    batches = [
        list(training_batches(dataset, BatchNumbers(0, 10, 7, 7), 0, 1.0, workers, torch.device("cpu")))
        for workers in (0, 2)
    ]
    assert len(batches[0]) == len(batches[1]) == 10
    assert all(torch.equal(a[key], b[key]) for a, b in zip(*batches) for key in a)


def test_one_class_and_hidden_folders_are_understood_as_in_folders(tmp_path):
    one = open_dataset(write_tar(tmp_path / "one.tar", {"train/cat/0.png": PICTURES["cat/0.png"]}), 16)
    assert one.classes == ["cat"] and one.index.where(0) == f"{tmp_path}/one.tar: train/cat/0.png"
    hidden = PICTURES | {".trash/cat/5.png": b"", "dog/.thumbs/5.png": b"", "notes.txt": b"text", "cat/x.txt": b""}
    tar, folder = (
        open_dataset(make(tmp_path / name, hidden), 16) for make, name in ((write_tar, "a.tar"), (write_folder, "a"))
    )
    assert len(tar) == 7 and tar.fingerprint == folder.fingerprint and tar.classes == folder.classes


def test_the_error_of_an_unreadable_picture_names_tar_and_member(tmp_path):
    bad = PICTURES | {"dog/9.webp": b"no picture", "dog/8.png": b"", "cat/0.png": PICTURES["cat/0.png"][:300]}
    dataset = open_dataset(write_tar(tmp_path / "a.tar", bad, "train/"), 16)
    for name, reason in (("dog/9.webp", "another kind of file"), ("dog/8.png", "empty file"), ("cat/0.png", "")):
        i = [dataset.index.name(i) for i in range(len(dataset))].index(name)
        with pytest.raises(UserError, match=f"a.tar: train/{name} is not a readable .*{reason}") as error:
            dataset[i]
        assert "\n" not in str(error.value)


def refused(path, match):
    """open_dataset says one line that matches, and names the file."""
    with pytest.raises(UserError, match=match) as error:
        open_dataset(path, 16)
    assert "\n" not in str(error.value) and os.path.basename(path) in str(error.value)


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress])
def test_compressed_tars_are_refused(tmp_path, pack):
    path = write_tar(tmp_path / "a.tar")
    path.write_bytes(pack(path.read_bytes()))
    refused(path, "is not an uncompressed tar file, .*: uncompress it")
    refused(write_tar(tmp_path / "b.tar", {"cat.tar": path.read_bytes()}), "cat.tar is not an uncompressed tar file")


def test_what_is_no_tar_is_refused(tmp_path):
    for name, content in (
        ("text.tar", b"this is no tar" * 99),
        ("empty.tar", b""),
        ("short.tar", b"x"),
        ("picture.png", PICTURES["cat/0.png"]),
    ):
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "is not an uncompressed tar file")
    refused(write_tar(tmp_path / "nothing.tar", {}), "holds no JPEG")
    refused(write_tar(tmp_path / "loose.tar", {"0.png": b"", "a/1.png": b""}), "0.png lies beside folders of pictures")
    refused(write_tar(tmp_path / "beside.tar", PICTURES, members=[member("x.png")]), "x.png lies beside")
    refused(write_tar(tmp_path / "twice.tar", {"a/0.png": b"", "./a/0.png": b""}), "a/0.png twice")
    refused(write_tar(tmp_path / "hole.tar", members=[member("bird", tarfile.DIRTYPE)]), "bird holds no JPEG")


def test_a_truncated_or_damaged_tar_is_refused_wherever_it_was_cut(tmp_path):
    """tarfile itself takes a cut between two members, and a header that makes no sense, for the end."""
    path = write_tar(tmp_path / "a.tar")
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        places = [place for info in tar for place in (info.offset, info.offset + 100, info.offset_data + 200)]
        end = tar.offset
    for place in places[1:] + [end, end + 100]:
        path.write_bytes(whole[:place])
        refused(path, "is not an uncompressed tar file, or only part of one")
    for place in (places[6], places[9] + 148):  # the name, and the checksum, of a header in the middle
        path.write_bytes(whole[:place] + b"\xff\xff\xff" + whole[place + 3 :])
        refused(path, "is not an uncompressed tar file, or only part of one")
    nested = write_tar(tmp_path / "b.tar", {"cat.tar": whole[: places[4]]})
    refused(nested, "b.tar: cat.tar is not an uncompressed tar file, or only part of one")


@pytest.mark.parametrize(
    "bad",
    [
        member("cat/link.png", tarfile.SYMTYPE, linkname="0.png"),
        member("cat/hard.png", tarfile.LNKTYPE, linkname="cat/0.png"),
        member("cat/pipe.png", tarfile.FIFOTYPE),
        member("cat/hole.png", tarfile.GNUTYPE_SPARSE),
        member("cat/hole.png", pax_headers={"GNU.sparse.map": "0,0", "GNU.sparse.size": "9"}),
        member("cat/../../x.png"),
        member("/etc/x.png"),
    ],
)
def test_links_sparse_files_devices_and_escaping_names_are_refused(tmp_path, bad):
    form = tarfile.PAX_FORMAT if bad.pax_headers else tarfile.GNU_FORMAT
    path = write_tar(tmp_path / "a.tar", members=[bad], form=form)
    refused(path, f"the member {bad.name} is a link, a sparse file or a device, or its name leads out of the archive")


def test_a_tar_that_changes_while_it_is_in_use_is_an_error(tmp_path):
    path = write_tar(tmp_path / "a.tar")
    dataset = open_dataset(path, 16)
    write_tar(path, dict(reversed(PICTURES.items())))
    with pytest.raises(UserError, match="a.tar: cat/0.png: the tar was changed while it was in use"):
        dataset[0]
    path.unlink()
    with pytest.raises(UserError, match="is the tar still there"):
        dataset[0]


@pytest.mark.parametrize("make", [write_folder, write_tar])
def test_train_and_val_are_not_two_classes(tmp_path, make):
    refused(make(tmp_path / "a.tar", {"train/cat/0.png": b"", "val/cat/1.png": b""}), "give its train folder")


# ---- folders as people have them -------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [write_folder, write_tar])
def test_a_folder_of_pictures_alone_is_one_class_and_says_so(tmp_path, make):
    """Catches pictures that cannot be found because their class is no folder, also by way of the kept index."""
    source = aged(make(tmp_path / "photos", {"b.png": PICTURES["dog/deep/3.png"], "a.JPG": PICTURES["cat/1.JPG"]}))
    plain, _, kept = (open_dataset(source, 16, cache=cache) for cache in (None, tmp_path / "run", tmp_path / "run"))
    for dataset in (plain, kept):
        assert dataset.classes == ["pictures"] and dataset.labels == [0, 0]
        assert dataset.index.where(1) == f"{source}{'/' if make is write_folder else ': '}b.png"
        assert dataset[1][0].shape == (3, 16, 16)
        assert dataset.remark == f"2 pictures, one class ({source} has no class folders)"


def test_the_fingerprint_of_a_flat_folder_is_that_of_its_tar_and_outlives_a_new_name(tmp_path):
    flat = {"b.png": PICTURES["dog/deep/3.png"], "a.JPG": PICTURES["cat/1.JPG"]}
    folders = [open_dataset(write_folder(tmp_path / name, flat), 16).fingerprint for name in ("photos", "holidays")]
    assert folders == [open_dataset(write_tar(tmp_path / "photos.tar", flat), 16).fingerprint] * 2


@pytest.mark.parametrize("make", [write_folder, write_tar])
def test_other_files_are_counted_and_named_by_their_ending(tmp_path, make):
    """Catches photographs of a phone that are left out in silence; hidden files are nobody's pictures."""
    others = {"cat/7.HEIC": b"", "cat/8.heic": b"", "dog/deep/film.mov": b"", "notes": b"", "cat/.DS_Store": b""}
    source = aged(make(tmp_path / "photos", PICTURES | others))
    for cache in (None, tmp_path / "run", tmp_path / "run"):
        dataset = open_dataset(source, 16, cache=cache)
        assert dataset.remark == "7 pictures, 4 skipped: .heic 2, .mov 1, no ending 1"
    assert open_dataset(make(tmp_path / "plain", PICTURES), 16).remark is None


def test_pictures_beside_class_folders_are_said_to_be_left_out(tmp_path):
    dataset = open_dataset(write_folder(tmp_path / "a", PICTURES | {"loose.png": PICTURES["cat/0.png"]}), 16)
    assert len(dataset) == 7 and dataset.remark == "7 pictures, 1 skipped: beside the class folders 1"


def test_a_flat_folder_beside_a_folder_of_films_is_still_one_class(tmp_path):
    dataset = open_dataset(write_folder(tmp_path / "a", {"0.png": PICTURES["cat/0.png"], "films/x.mov": b""}), 16)
    assert dataset.classes == ["pictures"] and dataset.remark.endswith("1 skipped: .mov 1")


# ---- the cache -------------------------------------------------------------------------------------------------------


def aged(path):
    """The folder or tar as if nothing in it had changed for a year: an index of what has just changed is not kept."""
    for folder in (path, *path.rglob("*")):
        os.utime(folder, ns=(0, 1_700_000_000_123_456_789))
    return path


@pytest.fixture
def listings(monkeypatch):
    """Every folder or tar that was really listed, as a growing list."""
    seen = []
    for name in ("_index_folder", "_index_tar"):
        real = getattr(picture_index, name)
        monkeypatch.setattr(picture_index, name, lambda source, real=real: (seen.append(source), real(source))[1])
    return seen


@pytest.mark.parametrize("make", [write_folder, write_tar])
def test_the_index_is_kept_and_is_the_same_from_the_cache(tmp_path, make, listings):
    source, cache = aged(make(tmp_path / "source.tar")), tmp_path / "run"
    plain, first, second = (open_dataset(source, 16, cache=where) for where in (None, cache, cache))
    assert len(listings) == 2 and os.listdir(cache) == ["pictures.index"]
    for other in (first, second):
        assert (other.fingerprint, other.classes, other.labels) == (plain.fingerprint, plain.classes, plain.labels)
        assert [other.index.where(i) for i in range(7)] == [plain.index.where(i) for i in range(7)]
        assert torch.equal(other[6][0], plain[6][0])


def test_without_write_nothing_is_created(tmp_path):
    open_dataset(aged(write_folder(tmp_path / "a")), 16, cache=tmp_path / "run", write=False)
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("kept", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "cat" / "new.png").write_bytes(PICTURES["cat/0.png"]),
        lambda root: (root / "cat" / "0.png").unlink(),
        lambda root: (root / "dog" / "deep" / "3.png").rename(root / "dog" / "deep" / "4.png"),
        lambda root: (root / "cat").rename(root / "bird"),
        lambda root: write_folder(root, {"newt/0.png": PICTURES["cat/0.png"]}),
    ],
)
def test_a_change_at_once_after_the_listing_is_seen_in_spite_of_the_cache(tmp_path, change, kept, listings):
    """Catches a cache that hides what --accept-changed-data is there for, and times that tick too slowly to tell."""
    root, cache = write_folder(tmp_path / "a"), tmp_path / "run"
    before = open_dataset(aged(root) if kept else root, 16, cache=cache).fingerprint
    assert cache.exists() == kept
    if kept:
        change(root)
    else:  # within the same tick of a slow clock: every time is as it was
        times = {path: path.stat().st_mtime_ns for path in (root, *root.rglob("*"))}
        change(root)
        for path in (root, *root.rglob("*")):
            os.utime(path, ns=(0, times.get(path, times[root])))
    after = open_dataset(root, 16, cache=cache)
    assert after.fingerprint != before and after.fingerprint == open_dataset(root, 16).fingerprint
    assert len(listings) == 3


def test_another_tar_of_the_same_size_is_seen_in_spite_of_the_cache(tmp_path):
    path, cache = aged(write_tar(tmp_path / "a.tar")), tmp_path / "run"
    before, size = open_dataset(path, 16, cache=cache).fingerprint, path.stat().st_size
    write_tar(path, {name.replace("9.webp", "8.webp"): content for name, content in PICTURES.items()})
    after = open_dataset(path, 16, cache=cache)
    assert path.stat().st_size == size and after.fingerprint != before and after.index.name(4) == "dog/8.webp"


def test_a_cache_of_other_data_or_a_damaged_one_is_made_again_in_silence(tmp_path, listings, capfd):
    cache, roots = tmp_path / "run", [aged(write_folder(tmp_path / name)) for name in "ab"]  # only the path differs
    plain = open_dataset(roots[0], 16, cache=cache)
    open_dataset(roots[1], 16, cache=cache)
    assert len(listings) == 2  # of b, although a looks the same
    file = cache / "pictures.index"
    whole = file.read_bytes()
    damaged = [whole[:cut] for cut in range(0, len(whole), 97)]
    damaged += [whole[:at] + bytes([whole[at] ^ 8]) + whole[at + 1 :] for at in range(0, len(whole), 17)]
    listings.clear()
    for content in damaged:
        file.write_bytes(content)
        again = open_dataset(roots[1], 16, cache=cache)
        assert (again.fingerprint, again.classes, again.labels) == (plain.fingerprint, plain.classes, plain.labels)
    assert len(listings) > len(damaged) / 2  # the other bits are padding
    assert capfd.readouterr() == ("", "")


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path):
    (tmp_path / "file").write_text("not a folder")
    assert len(open_dataset(write_folder(tmp_path / "a"), 16, cache=tmp_path / "file")) == 7


def test_a_data_set_that_went_away_is_an_error_in_spite_of_the_cache(tmp_path):
    root, cache = write_folder(tmp_path / "a"), tmp_path / "run"
    open_dataset(root, 16, cache=cache)
    root.rename(tmp_path / "b")
    refused(root, "there is no data folder or tar file")
    with pytest.raises(UserError, match="there is no data folder"):
        open_dataset(root, 16, cache=cache)
