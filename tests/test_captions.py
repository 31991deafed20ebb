"""Pictures with captions: folders, tars, tables, the released crop, and every way in which they can be wrong."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

from data import TrainingSamples, center_crop, open_dataset, released_crop
from helpers import ROOT, noise_picture
from runtime.files import UserError, index_captions
from runtime.some_classes import HeldOut


def write(root, pairs):
    """Pictures and captions below root: {"a/x.png": "a caption"}; None leaves the caption out."""
    for i, (name, caption) in enumerate(pairs.items()):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        noise_picture(20 + i, 30, i).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
    return root


def as_tar(path, root):
    with tarfile.open(path, "w") as tar:
        for file in sorted(root.rglob("*")):
            if file.is_file():
                tar.add(file, file.relative_to(root))
    return path


PAIRS = {"x.png": "a red apple\n", "deep/er/y.jpg": " zwei Äpfel ", "z.webp": "three"}


def test_a_caption_is_the_whole_text_beside_its_picture_at_any_depth(tmp_path):
    """Not stripped, as released; sorted by path."""
    dataset = open_dataset(write(tmp_path, PAIRS), 16, captions=True)
    assert dataset.labels == [" zwei Äpfel ", "a red apple\n", "three"] and dataset.classes is None
    assert torch.equal(dataset.picture(1), as_pixels(center_crop(noise_picture(20, 30, 0), 16)))


def as_pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def test_a_tar_of_pairs_is_the_folder_it_was_made_of(tmp_path):
    folder = open_dataset(write(tmp_path / "data", PAIRS), 16, captions=True)
    tar = open_dataset(as_tar(tmp_path / "data.tar", tmp_path / "data"), 16, captions=True)
    assert tar.labels == folder.labels and tar.fingerprint == folder.fingerprint
    assert all(torch.equal(tar.picture(i), folder.picture(i)) for i in range(3))


def test_tars_in_a_folder_may_use_the_same_keys(tmp_path):
    """As img2dataset writes them: 00000.tar, 00001.tar, ..."""
    for number in range(2):
        write(tmp_path / f"{number}", {"000.png": f"caption {number}"})
        (tmp_path / "tars").mkdir(exist_ok=True)
        as_tar(tmp_path / "tars" / f"0000{number}.tar", tmp_path / f"{number}")
    dataset = open_dataset(tmp_path / "tars", 16, captions=True)
    assert dataset.labels == ["caption 0", "caption 1"]
    assert dataset.index.where(1).endswith("00001.tar: 00001.tar/000.png") and len(dataset.picture(1)) == 3


def test_a_table_names_files_beside_it(tmp_path):
    write(tmp_path, {"sub/x.png": None, "sub/y.png": None})
    lines = [{"file_name": "y.png", "text": "second"}, {"file_name": "x.png", "text": "first", "more": 1}]
    (tmp_path / "sub" / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    assert open_dataset(tmp_path, 16, captions=True).labels == ["first", "second"]


def test_names_of_the_emoji_are_captions():
    emoji = open_dataset("emoji", 32, captions=True)
    assert len(emoji.labels) == 1906 and emoji.labels[0] == "grinning face" and emoji.classes is None
    assert torch.equal(emoji.picture(7), open_dataset("emoji", 32).picture(7))


def test_the_released_crop_is_the_released_one_to_the_bit(golden):
    file = golden("image_text")
    size = int(file["resolution"])
    for k in range(5):
        crop = released_crop(Image.fromarray(file[f"in_{k}"].numpy()), size)
        assert np.array_equal(np.asarray(crop), file[f"out_{k}"].numpy()), k


def test_a_folder_is_read_as_the_released_data_set_reads_it(tmp_path):
    """Pictures and captions of one golden file, from files to tensors; no blank is taken off a caption."""
    with np.load(ROOT / "tests" / "golden" / "image_text.npz") as archive:
        pictures = {key: archive[key] for key in archive.files}
    texts = [str(pictures[f"text_{k}"]) for k in range(5)]
    for k, text in enumerate(texts):
        Image.fromarray(pictures[f"in_{k}"]).save(tmp_path / f"{k}.png")
        (tmp_path / f"{k}.txt").write_bytes(text.encode())
    dataset = open_dataset(tmp_path, int(pictures["resolution"]), captions=True, crop="released")
    assert dataset.labels == texts and texts[3] == " caption 3\n"
    for k in range(5):
        assert np.array_equal(dataset.picture(k).permute(1, 2, 0).numpy(), pictures[f"out_{k}"]), k


def test_the_crop_is_chosen_by_name(tmp_path):
    write(tmp_path, {"x.png": "caption"})
    crops = {name: open_dataset(tmp_path, 16, captions=True, crop=name).picture(0) for name in ("adm", "released")}
    assert torch.equal(crops["released"], as_pixels(released_crop(noise_picture(20, 30, 0), 16)))
    assert not torch.equal(crops["adm"], crops["released"])


def test_the_fingerprint_changes_with_a_word(tmp_path):
    """So that a run is not resumed with other captions without a word."""
    before = index_captions(write(tmp_path, PAIRS)).fingerprint
    assert index_captions(tmp_path).fingerprint == before
    (tmp_path / "x.txt").write_text("a green apple\n")
    assert index_captions(tmp_path).fingerprint != before


def test_samples_bring_their_caption(tmp_path):
    samples = TrainingSamples(open_dataset(write(tmp_path, PAIRS), 16, captions=True), seed=0)
    sample = samples[4]
    assert sample["y"] == samples.dataset.labels[sample["index"]]


def test_held_out_captions_are_not_trained_on(tmp_path):
    (tmp_path / "list.txt").write_text("grinning face\nred apple\n")
    emoji = open_dataset("emoji", 32, captions=True)
    rest = HeldOut(emoji, tmp_path / "list.txt")
    assert len(rest) == 1904 and not {"grinning face", "red apple"} & set(rest.labels)
    assert torch.equal(rest.picture(0), emoji.picture(1)) and rest.fingerprint != emoji.fingerprint
    (tmp_path / "list.txt").write_text("green aple\n")
    with pytest.raises(UserError, match="list.txt: no picture has the caption 'green aple'"):
        HeldOut(emoji, tmp_path / "list.txt")
    (tmp_path / "list.txt").write_bytes("\ufeffgreen apple \r\nred apple\n".encode())  # of a Windows editor
    assert len(HeldOut(emoji, tmp_path / "list.txt")) == len(emoji) - 2
    (tmp_path / "list.txt").write_bytes("Äpfel".encode("latin-1"))
    with pytest.raises(UserError, match="--hold-out .*list.txt is not a text in UTF-8"):
        HeldOut(emoji, tmp_path / "list.txt")
    with pytest.raises(UserError, match="nowhere.txt cannot be read .No such file or directory.:"):
        HeldOut(emoji, tmp_path / "nowhere.txt")
    (tmp_path / "all.txt").write_text("\n".join(emoji.labels), encoding="utf-8")
    with pytest.raises(UserError, match="all.txt leaves no picture to train on"):
        HeldOut(emoji, tmp_path / "all.txt")


# ---- what can be wrong -----------------------------------------------------------------------------------------------


def refusal(source, skip=False):
    with pytest.raises(UserError) as caught:
        index_captions(source, skip)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_pictures_without_captions_are_counted_and_named(tmp_path):
    write(tmp_path, PAIRS | {f"bare{i}.png": None for i in range(5)} | {"blank.png": " \n"})
    message = refusal(tmp_path)
    assert "6 pictures without a caption (bare0.png, bare1.png, bare2.png, ...)" in message
    index = index_captions(tmp_path, skip=True)
    assert len(index.labels) == 3 and index.remark.endswith("6 files")


def test_a_blank_caption_is_told_from_a_missing_one(tmp_path):
    write(tmp_path, PAIRS | {"blank.png": " \n"})
    assert "1 picture without a caption (blank.png: its text is blank)" in refusal(tmp_path)


def test_captions_without_a_picture_are_counted_and_named(tmp_path):
    write(tmp_path, PAIRS)
    (tmp_path / "lonely.txt").write_text("no picture")
    assert "1 caption without a picture (lonely)" in refusal(tmp_path)
    assert len(index_captions(tmp_path, skip=True).labels) == 3


def test_a_caption_that_is_not_utf_8_is_named(tmp_path):
    write(tmp_path, PAIRS)
    (tmp_path / "x.txt").write_bytes("Äpfel".encode("latin-1"))
    assert "x.txt is not a text in UTF-8" in refusal(tmp_path)
    (tmp_path / "x.txt").write_bytes("apple".encode("utf-16-le"))  # whose bytes pass for UTF-8
    assert "x.txt is not a text in UTF-8" in refusal(tmp_path)
    (tmp_path / "x.txt").write_bytes("\N{BYTE ORDER MARK}Äpfel".encode())
    assert "Äpfel" in index_captions(tmp_path).labels


def test_a_table_that_is_not_utf_8_is_named(tmp_path):
    write(tmp_path, {"y.png": None})
    line = '{"file_name": "y.png", "text": "grüner Apfel"}\n'
    for encoding in ("latin-1", "utf-16"):
        (tmp_path / "metadata.jsonl").write_bytes(line.encode(encoding))
        assert "metadata.jsonl is not a text in UTF-8: save it in that encoding" in refusal(tmp_path)
    (tmp_path / "metadata.jsonl").write_bytes(f"  \n\ufeff{line}".encode("utf-8-sig").replace(b"\n", b"\r\n"))
    assert "line 2, is not a JSON object" in refusal(tmp_path)  # a mark within the text is none
    (tmp_path / "metadata.jsonl").write_bytes(f"  \n\t\n{line}".encode("utf-8-sig").replace(b"\n", b"\r\n"))
    assert index_captions(tmp_path).labels == ["grüner Apfel"]


@pytest.mark.parametrize(
    "line, complaint",
    [
        ("{", "line 2, is not a JSON object"),
        ("[1]", "line 2, is not a JSON object"),
        pytest.param("[" * 100_000, "line 2, is not a JSON object", id="too deep for Python"),
        ('{"file_name": "x.png", "text": "a\\u0000b"}', "line 2: the caption of picture x holds a zero character"),
        ('{"file_name": "x.png"}', "line 2, lacks file_name or text"),
        ('{"file_name": "x.png", "text": 3}', "line 2, lacks file_name or text"),
        ('{"file_name": "y.png", "text": "again"}', "picture y has a second caption here"),
        ('{"file_name": "no.png", "text": "nothing"}', "1 caption without a picture (no)"),
    ],
)
def test_a_broken_table_is_told_with_the_line(tmp_path, line, complaint):
    write(tmp_path, {"y.png": None})
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "y.png", "text": "right"}\n' + line + "\n")
    assert complaint in refusal(tmp_path)


def test_two_pictures_cannot_share_a_caption(tmp_path):
    write(tmp_path, {"x.png": "one", "x.jpg": None})
    assert "x.jpg and x.png share one caption" in refusal(tmp_path)


def test_a_key_that_is_twice_in_a_tar_is_named(tmp_path):
    write(tmp_path / "data", {"x.png": "one"})
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for _ in range(2):
            tar.add(tmp_path / "data" / "x.png", "x.png")
    assert "holds x.png twice" in refusal(tmp_path / "a.tar")


def test_what_is_no_captioned_data_is_told(tmp_path):
    assert "no data folder or tar file" in refusal(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    assert "holds no JPEG, PNG or WEBP images" in refusal(tmp_path / "empty")
    write(tmp_path / "bare", {"x.png": None})
    assert "not one picture has a caption" in refusal(tmp_path / "bare", skip=True)
    (tmp_path / "a.tar").write_bytes(b"no tar at all" * 100)
    assert "a.tar is not an uncompressed tar file" in refusal(tmp_path / "a.tar")


def test_a_tar_that_changes_under_a_run_is_told(tmp_path):
    write(tmp_path / "data", {"x.png": "one"})
    path = as_tar(tmp_path / "a.tar", tmp_path / "data")
    dataset = open_dataset(path, 16, captions=True)
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match="a.tar: x.png: the tar was changed"):
        dataset.picture(0)
