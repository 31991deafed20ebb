"""Pictures in and out, and the order of training. Numbers of rows are those of the README's list of promises."""

import collections
import gzip
import io
import os
import runpy
import shlex
import struct
import sys
import tarfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import (BatchNumbers, DataError, TrainingSamples, center_crop, from_uint8, keyed_generator, list_images,
                  open_dataset, picture_grid, random_crop, read_image, save_gif, to_uint8,
                  training_batches)  # fmt: skip
from download import DownloadError
from test_download import server  # noqa: F401, a fixture


@pytest.fixture
def folder(tmp_path):
    """Two classes of small pictures, three and two of them."""
    for name, count in (("cat", 3), ("dog", 2)):
        (tmp_path / name).mkdir()
        for i in range(count):
            pixels = np.random.RandomState(i).randint(0, 256, (20 + i, 24, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    return tmp_path


def test_pixels_survive_the_way_to_floats_and_back():
    u8 = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(u8)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), u8)
    assert to_uint8(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]
    # The released rule clip((x+1)*127.5 + 0.5) truncated: 0.5 of a level goes up.
    assert to_uint8(torch.tensor([0.5 / 127.5 - 1, 0.49 / 127.5 - 1])).tolist() == [1, 0]


@pytest.mark.parametrize("case", ["37x50_16", "200x123_32", "64x64_64", "20x90_32", "301x500_64"])
def test_center_crop_is_adms(golden, case):
    file = golden("center_crop")
    crop = center_crop(Image.fromarray(file[f"in_{case}"].numpy()), int(case.split("_")[1]))
    assert np.array_equal(np.asarray(crop), file[f"out_{case}"].numpy())


def test_emoji_at_32_are_box_averages_of_64():
    small, large = open_dataset("emoji", 32), open_dataset("emoji", 64)
    assert len(small) == len(large) == 1906 and len(small.classes) == 9 and small.classes[8] == "flags"
    assert np.bincount(small.labels).tolist() == [169, 386, 159, 131, 218, 85, 264, 224, 270]
    image, label = large[7]
    boxes = image.view(3, 32, 2, 32, 2).float().mean((2, 4))
    assert (small[7][0] - boxes).abs().max() <= 0.5 and small[7][1] == label
    with pytest.raises(DataError, match="32 or 64, not 48"):
        open_dataset("emoji", 48)


def test_folders_give_sorted_classes_and_cropped_pictures(folder):
    dataset = open_dataset(str(folder), 16)
    assert dataset.classes == ["cat", "dog"] and dataset.labels == [0, 0, 0, 1, 1]
    image, label = dataset[4]
    assert label == 1 and image.shape == (3, 16, 16) and image.dtype == torch.uint8
    expected = center_crop(Image.open(folder / "dog" / "1.png"), 16)
    assert np.array_equal(image.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_some_classes_are_the_same_pictures_with_numbers_of_their_own(folder):
    """In the order asked for. Catches: labels of the whole set, or pictures of the neighbours."""
    whole, some = open_dataset("emoji", 32), open_dataset("emoji", 32, only=["flags", "food"])
    assert some.classes == ["flags", "food"] and len(some) == len(some.labels) == 270 + 131
    kept = [i for name in some.classes for i, label in enumerate(whole.labels) if whole.classes[label] == name]
    for place in (0, 130, 269, 270, 400):
        image, label = some[place]
        assert torch.equal(image, whole[kept[place]][0])
        assert label == some.labels[place] == ["flags", "food"].index(whole.classes[whole.labels[kept[place]]])
    assert some.fingerprint not in (whole.fingerprint, open_dataset("emoji", 32, only=["food", "flags"]).fingerprint)
    dogs = open_dataset(folder, 16, augment=True, only=["dog"])
    crops = {dogs.__getitem__(1, keyed_generator(k))[0].numpy().tobytes() for k in range(8)}
    assert len(dogs) == 2 and dogs[1][1] == 0 and len(crops) > 1  # augmentation arrives
    for names, message in ((["cats"], r"'cats' is not a class.*mean cat\?$"), (["dog", "dog"], "'dog' has pictures of")):
        with pytest.raises(DataError, match=message):
            open_dataset(folder, 16, only=names)


def test_kinds_of_the_emoji_and_pictures_that_come_more_often():
    """food-fruit:4 is the twenty fruit, each four times per epoch. Catches: numbers and names that drift apart."""
    whole, some = open_dataset("emoji", 32), open_dataset("emoji", 32, only=["food-fruit:4", "country-flag"])
    assert some.classes == ["food-fruit", "country-flag"] and len(some) == 4 * 20 + 259
    seen = collections.Counter((some[i][0].numpy().tobytes(), some[i][1]) for i in range(len(some)))
    fruit = {(whole[i][0].numpy().tobytes(), 0) for i in np.flatnonzero(whole.kinds == "food-fruit")}
    assert {picture for picture, times in seen.items() if times == 4} == fruit and len(fruit) == 20
    assert all(label == 1 for picture, label in seen.keys() - fruit)
    assert {whole.classes[whole.labels[i]] for i in np.flatnonzero(whole.kinds == "food-fruit")} == {"food"}
    assert some.summary == "279 pictures: food-fruit 20 x 4, country-flag 259"
    once = open_dataset("emoji", 32, only=["food-fruit", "country-flag"])
    assert some.fingerprint != once.fingerprint and len(once) == 20 + 259
    for names, message in (
        (["food:2", "food-fruit"], "'food-fruit' has pictures of a name before it"),
        (["foodfruit"], "'foodfruit' is not a class.*did you mean food-fruit, "),
        (["food-fruit:4:2"], "'food-fruit:4:2' is not a class"),
        *(([f"food:{times}"], "should be food:N, N from 1 to 1000")
          for times in ("", "0", "-1", "1.5", "1001", "x", "9" * 5000)),
    ):
        with pytest.raises(DataError, match=message):
            open_dataset("emoji", 32, only=names)


def test_the_list_of_kinds_in_assets_is_that_of_the_data():
    whole, listed = open_dataset("emoji", 32), " ".join((data.ASSETS / "README.md").read_text().split())
    for label, name in enumerate(whole.classes):
        kinds = collections.Counter(whole.kinds[np.equal(whole.labels, label)].tolist())
        line = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        assert f"- {name} {kinds.total()}: {line}" + ("" if name == "flags" else " -") in listed


def test_a_class_folder_with_a_colon_in_its_name_is_found(tmp_path):
    for name in ("a:2", "a"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), "red").save(tmp_path / name / "1.png")
    assert open_dataset(tmp_path, 16, only=["a:2"]).classes == ["a:2"]
    assert len(open_dataset(tmp_path, 16, only=["a:2:3", "a"])) == 4


def test_augmentation_crops_and_flips_by_the_generator_only(folder):
    ramp = Image.fromarray(np.arange(64 * 40 * 3, dtype=np.uint8).reshape(40, 64, 3))
    crops = [np.asarray(random_crop(ramp, 16, keyed_generator(i))) for i in range(40)]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    seen = {crop.tobytes() for crop in crops}
    assert len(seen) > 5 and any(crop[:, ::-1].tobytes() in seen for crop in crops)  # some picture and its mirror
    assert np.array_equal(crops[3], np.asarray(random_crop(ramp, 16, keyed_generator(3))))


def test_augmented_emoji_are_the_drawings_and_their_mirrors():
    plain, augmented = open_dataset("emoji", 32)[0][0], open_dataset("emoji", 32, augment=True)
    drawn = [augmented.__getitem__(0, keyed_generator(i))[0] for i in range(20)]
    mirrored = [torch.equal(image, plain.flip(-1)) for image in drawn]
    assert 0 < sum(mirrored) < 20
    assert all(mirror or torch.equal(image, plain) for mirror, image in zip(mirrored, drawn))


@pytest.mark.parametrize("only", [None, ["food-fruit:3", "flag"]])
def test_rule_a_every_sample_is_a_function_of_its_number(only):
    """Whatever the world size, the micro-batch, the workers and the step at which the loader starts."""
    dataset = open_dataset("emoji", 32, only=only)

    def run(start, world, micro, workers=0):
        seen = {}
        for rank in range(world):
            numbers = BatchNumbers(start, 4, 8, micro, rank, world)
            batches = training_batches(dataset, numbers, 0, 0.1, 1.0, workers, pin=False)
            for ks, batch in zip(numbers, batches):
                for i, k in enumerate(ks):
                    seen[k] = {key: value[i] for key, value in batch.items()}
        return seen

    whole = run(0, 1, 8)
    assert sorted(whole) == list(range(32))
    for other in (run(0, 2, 4), run(0, 4, 1), run(2, 1, 4), run(1, 2, 2, workers=2)):
        for k, sample in other.items():
            assert all(torch.equal(sample[key], whole[k][key]) for key in sample)


def test_rule_a_each_epoch_is_a_permutation_of_its_own(folder):
    samples = TrainingSamples(open_dataset(str(folder), 16), seed=1)
    epochs = [[samples[5 * epoch + i]["index"] for i in range(5)] for epoch in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_labels_are_dropped_with_the_stated_probability():
    dataset = open_dataset("emoji", 32)
    drawn = [TrainingSamples(dataset, 0, 0.1)[k]["y"] for k in range(3000)]
    assert sum(y == 9 for y in drawn) / 3000 == pytest.approx(0.1, abs=0.02)
    assert all(TrainingSamples(dataset, 0, 0.0)[k]["y"] < 9 for k in range(100))


def test_keyed_generators_differ_for_neighbouring_keys_and_repeat():
    first = [torch.randn(4, generator=keyed_generator(*key)) for key in ((0, 1), (1, 0), (0, 1, 0), (0, 2))]
    assert len({tuple(x.tolist()) for x in first}) == 4
    assert torch.equal(first[0], torch.randn(4, generator=keyed_generator(0, 1)))


# ---- bad pictures ----------------------------------------------------------------------------------------------------


def test_row_24_unreadable_pictures_are_errors_with_the_path(tmp_path):
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.RandomState(0).randint(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    jpeg = tmp_path / "whole.jpg"
    Image.open(whole).save(jpeg)
    cases = {
        "empty.png": b"", "text.jpg": b"this is not a picture", "cut.png": whole.read_bytes()[:900],
        "cut.jpg": jpeg.read_bytes()[:900], "gif.png": b"GIF89a\x01\x00\x01\x00\x00\x00\x00;",
    }  # fmt: skip
    for name, content in cases.items():
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(DataError, match=name.replace(".", r"\.")) as error:
            read_image(path)
        assert "\n" not in str(error.value)
    with pytest.raises(DataError, match="nowhere.png"):
        read_image(tmp_path / "nowhere.png")


def test_row_24_empty_roots_and_classes_are_errors_with_the_path(tmp_path):
    with pytest.raises(DataError, match="there is no data folder"):
        open_dataset(tmp_path / "missing", 16)
    with pytest.raises(DataError, match="no class folders"):
        open_dataset(tmp_path, 16)
    (tmp_path / "cat").mkdir()
    with pytest.raises(DataError, match="cat holds no JPEG"):
        open_dataset(tmp_path, 16)
    with pytest.raises(DataError, match="holds no JPEG"):
        list_images(tmp_path)


def test_row_25_every_mode_becomes_rgb_and_alpha_goes_over_white(tmp_path):
    red = Image.new("RGB", (4, 4), (200, 0, 0))
    for mode in ("L", "RGB", "RGBA", "LA", "P", "1", "CMYK"):
        path = tmp_path / (f"{mode}.jpg" if mode == "CMYK" else f"{mode}.png")
        red.convert(mode).save(path)
        image = read_image(path)
        assert image.mode == "RGB" and image.size == (4, 4), mode
        red_or_gray = {"L": (60,) * 3, "LA": (60,) * 3, "1": None, "P": None}.get(mode, (200, 0, 0))
        if red_or_gray:
            assert max(abs(a - b) for a, b in zip(image.getpixel((0, 0)), red_or_gray)) <= 2, mode
    assert read_image(tmp_path / "RGB.png").getpixel((0, 0)) == (200, 0, 0)
    Image.new("RGBA", (2, 2), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    assert read_image(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    Image.new("LA", (2, 2), (0, 0)).save(tmp_path / "clear-gray.png")
    assert read_image(tmp_path / "clear-gray.png").getpixel((0, 0)) == (255, 255, 255)
    palette = Image.new("P", (2, 2), 1)
    palette.putpalette([0, 0, 0, 9, 9, 9])
    palette.save(tmp_path / "hole.png", transparency=1)
    assert read_image(tmp_path / "hole.png").getpixel((0, 0)) == (255, 255, 255)


def test_row_26_sixteen_bit_gray_is_scaled_and_not_clipped(tmp_path):
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16)[None]
    Image.fromarray(ramp).save(tmp_path / "ramp.png")
    assert np.asarray(read_image(tmp_path / "ramp.png"))[0, :, 0].tolist() == list(range(256))


def test_row_27_decompression_bombs_are_refused_by_their_header(tmp_path):
    """20,000 x 20,000 pixels claimed in 70 bytes; and 10,000 x 10,000, at which Pillow itself only warns."""
    for side in (20_000, 10_000):
        header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
        chunks = b"".join(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
                          for kind, body in ((b"IHDR", header), (b"IDAT", zlib.compress(b"\0" * 9))))  # fmt: skip
        (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + chunks)
        with pytest.raises(DataError, match="bomb.png claims to be larger"):
            read_image(tmp_path / "bomb.png")


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 200)])
def test_row_28_small_and_extreme_pictures_are_scaled_up_in_bounded_memory(size, monkeypatch):
    largest, resize = [0], Image.Image.resize

    def watched(image, target, *args):
        largest[0] = max(largest[0], target[0] * target[1])
        return resize(image, target, *args)

    monkeypatch.setattr(Image.Image, "resize", watched)
    for crop in (center_crop(Image.new("RGB", size, "red"), 256),
                 random_crop(Image.new("RGB", size, "red"), 256, keyed_generator(0))):  # fmt: skip
        assert crop.size == (256, 256) and crop.getpixel((128, 128)) == (255, 0, 0)
    assert largest[0] <= 32 * 256 * 256


def test_row_28_bad_exif_is_ignored(tmp_path):
    image = Image.fromarray(np.random.RandomState(0).randint(0, 256, (8, 8, 3), dtype=np.uint8))
    image.save(tmp_path / "exif.jpg", exif=b"Exif\x00\x00II*\x00\xff\xff\xff\xff garbage")
    assert read_image(tmp_path / "exif.jpg").size == (8, 8)


def test_row_24_a_bad_picture_stops_a_loader_with_workers_too(folder):
    (folder / "dog" / "1.png").write_bytes(b"broken")
    dataset = open_dataset(str(folder), 16)
    for workers in (0, 2):
        with pytest.raises(DataError, match="1.png is not a readable"):
            list(training_batches(dataset, BatchNumbers(0, 1, 5, 5), 0, 0.1, 1.0, workers, pin=False))


# ---- pictures for people ---------------------------------------------------------------------------------------------


def test_grid_places_pictures_row_by_row():
    images = torch.arange(5, dtype=torch.uint8).view(5, 1, 1, 1).expand(5, 3, 4, 6) * 50
    sheet = np.asarray(picture_grid(images, columns=2))
    assert sheet.shape == (3 * 6 + 2, 2 * 8 + 2, 3)
    for i in range(5):
        assert (sheet[2 + i // 2 * 6 :][:4, 2 + i % 2 * 8 :][:, :6] == 50 * i).all()
    assert picture_grid(images, 2, ["a", "long name", "c"]).width > sheet.shape[1]


def test_grid_places_groups_side_by_side_under_their_headings():
    """Catches groups cut in the wrong places, and headings that run into the next panel."""
    images = torch.arange(1, 13, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 4, 6) * 10
    sheet = np.asarray(picture_grid(images, 2, headings=["one", "a much longer heading", "x"])).astype(int)
    step = (sheet.shape[1] - 2) // 3
    assert sheet.shape == (14 + 2 * 6 + 2, 3 * step + 2, 3) and step > 2 * 8
    for i in range(12):
        panel, row, column = i // 4, i % 4 // 2, i % 2
        assert (sheet[16 + row * 6 :][:4, 2 + panel * step + column * 8 :][:, :6] == 10 * (i + 1)).all()
        assert sheet[:14, 2 + panel * step :][:, :step].min() < 128  # its heading ...
        assert (sheet[:14, panel * step + step - 4 : panel * step + step] == 255).all()  # ... ends before the next


def test_gif_plays_every_frame_and_ends_on_the_picture(tmp_path):
    frames = [Image.new("RGB", (8, 8), (value, 0, 0)) for value in (0, 100, 200)]
    frames[2].putpixel((0, 0), (0, 90, 0))
    save_gif(tmp_path / "film.gif", frames, comment="how it was made")
    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and film.info["comment"] == b"how it was made"
        film.seek(2)
        assert film.convert("RGB").getpixel((4, 4)) == (200, 0, 0)
    assert os.listdir(tmp_path) == ["film.gif"]


def test_imagenet_class_names_are_in_index_order():
    names = (data.ASSETS / "imagenet_classes.txt").read_text().splitlines()
    assert len(names) == len(set(names)) == 1000
    assert names[0] == "tench" and names[207] == "golden retriever" and names[999] == "toilet tissue"


# ---- a data set from the network -------------------------------------------------------------------------------------


def archive(*extra):
    """A small imagenette2-320.tgz: (name, bytes or type of a member) after two pictures."""
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w:gz") as tar:
        for name, body in (("train/cat/0.JPEG", os.urandom(9000)), ("val/cat/1.JPEG", b"two"), *extra):
            member = tarfile.TarInfo(f"imagenette2-320/{name}")
            if isinstance(body, str):
                member.type, member.linkname = body.encode(), "/etc/passwd"
            else:
                member.size = len(body)
            tar.addfile(member, None if isinstance(body, str) else io.BytesIO(body))
    return content.getvalue()


@pytest.fixture
def imagenette(server, monkeypatch):  # noqa: F811
    server.body = archive()
    monkeypatch.setattr(data, "IMAGENETTE", server.url.replace("weights.pth", "imagenette2-320.tgz"))
    return server


def test_imagenette_arrives_in_spite_of_a_broken_line_and_a_second_time_needs_none(imagenette, tmp_path, capsys):
    imagenette.cuts = [3000, 2000]
    target = tmp_path / "sets" / "nette"
    data.fetch_imagenette(target)
    assert [r.get("Range") for r in imagenette.requests] == [None, "bytes=3000-", "bytes=5000-"]
    assert len((target / "train" / "cat" / "0.JPEG").read_bytes()) == 9000
    assert (target / "val" / "cat" / "1.JPEG").read_bytes() == b"two"
    left = {"nette", "imagenette2-320.tgz", "imagenette2-320.tgz.lock"}
    assert set(os.listdir(tmp_path / "sets")) == left  # no temporary folder
    assert f"python train.py --size S --data {target}/train " in capsys.readouterr().out
    data.fetch_imagenette(target)
    out = capsys.readouterr().out
    assert "there already" in out and "python train.py" in out and len(imagenette.requests) == 3


def test_the_printed_command_is_one_that_train_accepts(imagenette, tmp_path, capsys):
    """Catches a flag that was renamed, and a shape that the model refuses."""
    from train import parse_args

    data.fetch_imagenette(tmp_path / "my nette")
    command = capsys.readouterr().out.split("python train.py ")[1].split("\n")[0]
    args = parse_args(shlex.split(command))
    assert args.data == str(tmp_path / "my nette" / "train") and args.config.resolution == 128


def test_an_interrupted_unpacking_starts_over(imagenette, tmp_path, monkeypatch):
    """Catches a half-full folder under the final name, and one that is completed from the remains of another."""
    real = tarfile.TarFile.extract

    def interrupted(tar, member, *args, **kwargs):
        if "val" in member.name:
            raise KeyboardInterrupt
        return real(tar, member, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "extract", interrupted)
        patch.setattr(data.shutil, "rmtree", lambda *args, **kwargs: None)  # as if it were a SIGKILL
        with pytest.raises(KeyboardInterrupt):
            data.fetch_imagenette(tmp_path / "nette")
    remains = tmp_path / ".nette.unpacking"
    assert (remains / "imagenette2-320" / "train").is_dir() and not (tmp_path / "nette").exists()
    (remains / "imagenette2-320" / "train" / "stale.JPEG").write_bytes(b"of another version")
    data.fetch_imagenette(tmp_path / "nette")
    assert os.listdir(tmp_path / "nette" / "train") == ["cat"] and not remains.exists()


@pytest.mark.parametrize("extra, match", [
    (("../../evil.JPEG", b"x"), "evil.JPEG leads out of the archive"),
    (("train/link", "2"), "train/link is a link"),
    (("train/hard", "1"), "train/hard is a link"),
    (("train/null", "3"), "train/null is a link, a sparse file or a device"),
])  # fmt: skip
def test_archives_with_links_devices_or_escaping_names_are_refused(imagenette, tmp_path, extra, match):
    imagenette.body = archive(extra)
    with pytest.raises(DataError, match=match) as error:
        data.fetch_imagenette(tmp_path / "in" / "nette")
    assert "\n" not in str(error.value) and "imagenette2-320.tgz" in str(error.value)
    assert {name for name in os.listdir(tmp_path / "in") if "nette2" not in name} == set()
    assert not list(tmp_path.rglob("evil.JPEG"))


def test_damaged_archives_are_refused_and_leave_nothing(imagenette, tmp_path):
    whole = archive()
    flipped = bytearray(whole)
    flipped[-6] ^= 1  # in gzip's checksum: the files look fine
    empty = gzip.compress(bytes(10240))
    for body in (whole[:-4], whole[:5000], bytes(flipped), b"<html>", b"", empty):
        (tmp_path / "imagenette2-320.tgz").write_bytes(body)
        with pytest.raises(DataError, match="imagenette2-320.tgz (is damaged|is a damaged|has no folder)") as error:
            data.fetch_imagenette(tmp_path / "nette")
        assert "\n" not in str(error.value) and "remove it" in str(error.value)
        assert not (tmp_path / "nette").exists() and not (tmp_path / ".nette.unpacking").exists()


def test_a_folder_that_holds_something_else_is_left_alone(imagenette, tmp_path):
    (tmp_path / "mine").mkdir()
    data.fetch_imagenette(tmp_path / "mine")  # an empty one is welcome
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    for name in ("other", "other/letter.txt"):
        with pytest.raises(DataError, match="is not this data set"):
            data.fetch_imagenette(tmp_path / name)
    assert (tmp_path / "other" / "letter.txt").read_text() == "dear"


def test_without_a_network_one_line_says_the_address_and_where_to_put_the_file(imagenette, tmp_path):
    imagenette.shutdown()
    imagenette.server_close()
    with pytest.raises(DownloadError, match="put it at .*imagenette2-320.tgz") as error:
        data.fetch_imagenette(tmp_path / "nette")
    assert data.IMAGENETTE in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "imagenette2-320.tgz").write_bytes(archive())  # as the line says
    data.fetch_imagenette(tmp_path / "nette")
    assert (tmp_path / "nette" / "train").is_dir()


def test_the_command_line_tells_mistakes_in_one_line(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(sys, "argv", ["data.py", "imagenette", str(tmp_path / "file")])
    with pytest.raises(SystemExit, match="data.py: .*file exists and is not this data set") as end:
        runpy.run_path(data.__file__, run_name="__main__")
    assert "\n" not in str(end.value)
