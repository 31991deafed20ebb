"""Pixels, crops, data sets, random streams and numbered samples."""

import collections
import hashlib
import math
import struct
import traceback

import numpy as np
import pytest
import torch
from PIL import Image

import data
from data import TrainingSamples, center_crop, from_uint8, open_dataset, random_crop, random_stream, to_uint8
from helpers import complaint, make_class_folder, noise_picture, run_script
from runtime.files import UserError
from runtime.loader import BatchNumbers, training_batches
from runtime.plan import Absent
from runtime.some_classes import HeldOut, Part, SomeClasses

CPU = torch.device("cpu")

# ---- pixels ----------------------------------------------------------------------------------------------------------


def test_pixels_survive_the_way_to_floats_and_back():
    u8 = torch.arange(256, dtype=torch.uint8)
    x = from_uint8(u8)
    assert x.min() == -1 and x.max() == 1
    assert torch.equal(to_uint8(x), u8)
    assert to_uint8(torch.tensor([-5.0, 5.0])).tolist() == [0, 255]
    # The released rule clip((x + 1) * 127.5 + 0.5), cut off: half a level goes up, a little less goes down.
    assert to_uint8(torch.tensor([0.5 / 127.5 - 1, 0.49 / 127.5 - 1])).tolist() == [1, 0]


@pytest.mark.parametrize("case", ["37x50_16", "200x123_32", "64x64_64", "20x90_32", "301x500_64"])
def test_center_crop_is_adms_to_the_bit(golden, case):
    file = golden("center_crop")
    crop = center_crop(Image.fromarray(file[f"in_{case}"].numpy()), int(case.split("_")[1]))
    assert np.array_equal(np.asarray(crop), file[f"out_{case}"].numpy())


def test_random_crop_shifts_and_mirrors_by_the_generator_alone():
    """Catches crops that always start in a corner, mirrors that never come, and a hidden second generator."""
    ramp = Image.fromarray(np.arange(64 * 40 * 3, dtype=np.uint8).reshape(40, 64, 3))
    crops = [np.asarray(random_crop(ramp, 16, random_stream("sample", i))) for i in range(40)]
    assert all(crop.shape == (16, 16, 3) for crop in crops)
    seen = {crop.tobytes() for crop in crops}
    assert len(seen) > 5 and any(crop[:, ::-1].tobytes() in seen for crop in crops)  # some crop and its mirror
    assert np.array_equal(crops[3], np.asarray(random_crop(ramp, 16, random_stream("sample", 3))))


@pytest.mark.parametrize("size", [(1, 1), (1, 5000), (5000, 1), (3, 200)])
def test_small_and_extreme_pictures_are_scaled_up_in_bounded_memory(size, monkeypatch):
    """Catches a line of 1x5000 pixels that is scaled to 256x1,280,000 before most of it is cut away."""
    largest, resize = [0], Image.Image.resize

    def watched(image, target, *rest):
        largest[0] = max(largest[0], target[0] * target[1])
        return resize(image, target, *rest)

    monkeypatch.setattr(Image.Image, "resize", watched)
    red = Image.new("RGB", size, "red")
    for crop in (center_crop(red, 256), random_crop(red, 256, random_stream("sample", 0))):
        assert crop.size == (256, 256) and crop.getpixel((128, 128)) == (255, 0, 0)
    assert largest[0] <= 32 * 256 * 256


# ---- data sets -------------------------------------------------------------------------------------------------------


def test_every_data_set_keeps_the_protocol_that_data_py_describes(tmp_path):
    """Catches a data set that works in one script only, because it lacks what another one asks for."""
    folder = make_class_folder(tmp_path, (("cat", 3), ("dog", 2)), 20, 24)
    emoji, pictures = open_dataset("emoji", 32, augment=True), open_dataset(folder, 16, augment=True)
    some = SomeClasses(emoji, ["flags", "food-fruit:2"]), SomeClasses(pictures, ["dog"])
    for dataset, side in ((emoji, 32), (pictures, 16), (some[0], 32), (some[1], 16)):
        assert isinstance(dataset.fingerprint, str) and len(dataset) == len(dataset.labels) > 0
        assert set(dataset.labels) == set(range(len(dataset.classes)))
        assert dataset.in_memory == (side == 32) and dataset.classifier == ("emoji" if side == 32 else None)
        for i in (0, len(dataset) - 1):
            image, label = dataset[i]
            assert image.dtype == torch.uint8 and image.shape == (3, side, side) and label == dataset.labels[i]
            assert torch.equal(image, dataset.picture(i))
            drawn = {dataset.picture(i, random_stream("sample", k)).numpy().tobytes() for k in range(8)}
            assert len(drawn) > 1  # the generator augments, and its absence does not
        for name, numbers in dataset.members().items():
            if name in dataset.classes:
                assert {dataset.labels[i] for i in numbers} == {dataset.classes.index(name)}
                assert len(numbers) == dataset.labels.count(dataset.classes.index(name))
        assert set(dataset.classes) <= set(dataset.members())


def test_a_data_set_of_captions_keeps_it_too_and_has_no_names_for_classes(tmp_path):
    """Catches: a captioned set that ends in a TypeError where its classes are asked for."""
    for i, word in enumerate(("cat", "dog", "owl")):
        noise_picture(20, 24, i).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(word)
    emoji, pictures = (open_dataset(spec, 32, captions=True) for spec in ("emoji", tmp_path))
    (tmp_path / "unwanted").write_text("dog\n")
    for dataset, N in ((emoji, 1906), (pictures, 3), (HeldOut(pictures, tmp_path / "unwanted"), 2)):
        assert dataset.classes is None and dataset.members() == {} and isinstance(dataset.fingerprint, str)
        assert len(dataset) == N and dataset.in_memory == (N == 1906) and hasattr(dataset, "classifier")
        assert dataset[1][0].shape == (3, 32, 32) and dataset[1][1] == dataset.labels[1] and dataset.remark != ""


@pytest.mark.parametrize("flags", [["--classes", "cat"], ["--size", "XXL", "--hold-out", "list.txt"]])
def test_what_a_plan_cannot_know_of_absent_data_is_one_line(tmp_path, flags):
    (tmp_path / "list.txt").write_text("dog\n")
    flags = [str(tmp_path / word) if word == "list.txt" else word for word in flags]
    line = complaint("train.py", "--dry-run", "--data", tmp_path / "absent", *flags)
    assert line.endswith("--classes and --hold-out can be planned only where the data are, and they are not here")


def test_every_kind_of_data_set_is_known_to_these_tests():
    """A new one has to be added above. Absent is a plan's, which may ask for no more than names and numbers."""
    kinds = {kind for base in (data.Pictures, Part) for kind in base.__subclasses__() if kind is not Part}
    assert kinds == {data.Emoji, data.ImageFolder, SomeClasses, HeldOut, Absent}


def test_emoji_at_32_are_box_averages_of_64():
    small, large = open_dataset("emoji", 32), open_dataset("emoji", 64)
    assert len(small) == len(large) == 1906 and len(small.classes) == 9 and small.classes[8] == "flags"
    assert np.bincount(small.labels).tolist() == [169, 386, 159, 131, 218, 85, 264, 224, 270]
    image, label = large[7]
    boxes = image.view(3, 32, 2, 32, 2).float().mean((2, 4))
    assert (small[7][0] - boxes).abs().max() <= 0.5 and small[7][1] == label
    with pytest.raises(UserError, match="32 or 64, not 48"):
        open_dataset("emoji", 48)


def test_augmented_emoji_are_the_drawings_and_their_mirrors():
    plain, augmented = open_dataset("emoji", 32)[0][0], open_dataset("emoji", 32, augment=True)
    drawn = [augmented.picture(0, random_stream("sample", i)) for i in range(20)]
    mirrored = [torch.equal(image, plain.flip(-1)) for image in drawn]
    assert 0 < sum(mirrored) < 20
    assert all(mirror or torch.equal(image, plain) for mirror, image in zip(mirrored, drawn))


def test_the_list_of_kinds_in_assets_is_that_of_the_data():
    emoji, listed = open_dataset("emoji", 32), " ".join((data.ASSETS / "README.md").read_text().split())
    for label, name in enumerate(emoji.classes):
        kinds = collections.Counter(emoji.kinds[np.equal(emoji.labels, label)].tolist())
        line = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        assert f"- {name} {kinds.total()}: {line}" + ("" if name == "flags" else " -") in listed


def test_a_folder_gives_sorted_classes_and_centre_crops(tmp_path):
    make_class_folder(tmp_path, (("dog", 2), ("cat", 3)), 20, 24)
    dataset = open_dataset(str(tmp_path), 16)
    assert dataset.classes == ["cat", "dog"] and dataset.labels == [0, 0, 0, 1, 1]
    expected = center_crop(Image.open(tmp_path / "dog" / "1.png"), 16)
    assert np.array_equal(dataset.picture(4).permute(1, 2, 0).numpy(), np.asarray(expected))


def test_an_augmented_folder_gives_random_crops_of_its_pictures(tmp_path):
    make_class_folder(tmp_path, (("cat", 1),), 20, 40)
    picture, dataset = noise_picture(20, 40), open_dataset(tmp_path, 16, augment=True)
    for k in range(4):
        expected = random_crop(picture, 16, random_stream("sample", k))
        crop = dataset.picture(0, random_stream("sample", k))
        assert np.array_equal(crop.permute(1, 2, 0).numpy(), np.asarray(expected))


def test_empty_roots_and_classes_are_errors_with_the_path(tmp_path):
    with pytest.raises(UserError, match="there is no data folder or tar file .*missing"):
        open_dataset(tmp_path / "missing", 16)
    with pytest.raises(UserError, match="no class folders"):
        open_dataset(tmp_path, 16)
    (tmp_path / "cat").mkdir()
    with pytest.raises(UserError, match="cat holds no JPEG"):
        open_dataset(tmp_path, 16)


def test_imagenet_class_names_are_in_index_order():
    names = (data.ASSETS / "imagenet_classes.txt").read_text().splitlines()
    assert len(names) == len(set(names)) == 1000
    assert names[0] == "tench" and names[207] == "golden retriever" and names[999] == "toilet tissue"


# ---- random numbers --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, numbers, drawn",
    [
        ("order", (3,), [437882, 450923, 991515]),
        ("sample", (3,), [59494, 114781, 300259]),
        ("noise", (3,), [613340, 341053, 897251]),
        ("solver", (3,), [685958, 463256, 451519]),
        ("labels", (), [167425, 803614, 962292]),
    ],
)
def test_each_random_stream_draws_the_numbers_it_always_drew(name, numbers, drawn):
    """Catches a stream that is renumbered or hashed anew: old checkpoints would resume with other samples."""
    generator = random_stream(name, 7, *numbers)
    assert torch.randint(10**6, (3,), generator=generator).tolist() == drawn


def test_random_streams_differ_by_name_seed_and_number_and_repeat():
    keys = [(name, *numbers) for name in data.STREAMS for numbers in ((0,), (1,), (0, 0), (0, 1), (1, 0))]
    drawn = {key: tuple(torch.randn(4, generator=random_stream(*key)).tolist()) for key in keys}
    assert len(set(drawn.values())) == len(keys) and len(set(data.STREAMS.values())) == len(data.STREAMS)
    assert tuple(torch.randn(4, generator=random_stream(*keys[-1])).tolist()) == drawn[keys[-1]]


def test_two_images_whose_keys_agree_in_32_hashed_bits_start_from_other_noise():
    """torch.Generator.manual_seed keeps 32 bits of its seed: these two images used to be the same."""
    one, other = (torch.randn(3, 32, 32, generator=random_stream("noise", 0, i)) for i in (10074, 85843))
    assert not torch.isclose(one, other, atol=1e-3).any(dim=0).all()
    assert abs(torch.corrcoef(torch.stack([one.flatten(), other.flatten()]))[0, 1]) < 0.1


def test_the_words_of_a_streams_generator_are_the_hash_of_its_key():
    """And the first draw twists them: a state filled elsewhere, or read on from its middle, draws other numbers."""
    key = struct.pack("<3q", 7, data.STREAMS["noise"], 3)
    words = np.frombuffer(hashlib.shake_256(key).digest(4 * 624), "<u4")
    twister = np.random.MT19937()
    twister.state = {"bit_generator": "MT19937", "state": {"key": words, "pos": 624}}
    expected = (twister.random_raw(2000) % 2**20).tolist()  # four twists
    assert torch.randint(2**20, (2000,), generator=random_stream("noise", 7, 3)).tolist() == expected


# ---- numbered samples ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "k, t, u, index, noise, total",
    [
        (0, 0.29211277, 0.16195929, 335, -0.67565691, 546955),
        (5, 0.53741086, 0.56028682, 1648, 1.80023229, 470507),
        (2000, 0.26729044, 0.97425300, 1443, 0.47339812, 562967),
    ],
)
def test_a_training_sample_is_what_it_always_was(k, t, u, index, noise, total):
    """Catches draws in another order, which would redraw every run; 2000 lies in the second epoch, and is mirrored."""
    emoji = open_dataset("emoji", 32, augment=True)
    sample = TrainingSamples(emoji, seed=0)[k]
    assert sample["t"].item() == pytest.approx(t, abs=1e-7) and sample["u"].item() == pytest.approx(u, abs=1e-7)
    assert sample["index"] == index and sample["y"] == emoji.labels[index]
    assert sample["noise"][0, 0, 0].item() == pytest.approx(noise, abs=1e-6) and sample["image"].sum() == total


@pytest.mark.parametrize("names", [None, ["food-fruit:3", "flag"]])
def test_a_sample_is_a_function_of_its_number(names):
    """Rule A: whatever the world size, the micro-batch, the workers and the step at which the loader starts."""
    dataset = open_dataset("emoji", 32)
    dataset = SomeClasses(dataset, names) if names else dataset

    def run(start, world, micro, workers=0):
        seen = {}
        for rank in range(world):
            numbers = BatchNumbers(start, 4, 8, micro, rank, world)
            batches = list(training_batches(dataset, numbers, 0, 1.0, workers, CPU))
            assert len(batches) == len(list(numbers)) == (4 - start) * 8 // (micro * world)
            for ks, batch in zip(numbers, batches):
                for i, k in enumerate(ks):
                    seen[k] = {key: value[i] for key, value in batch.items()}
        return seen

    whole = run(0, 1, 8)
    assert sorted(whole) == list(range(32))
    for other in (run(0, 2, 4), run(0, 4, 1), run(2, 1, 4), run(1, 2, 2, workers=2)):
        for k, sample in other.items():
            assert all(torch.equal(sample[key], whole[k][key]) for key in sample)


def test_each_epoch_shows_every_picture_once_in_an_order_of_its_own(tmp_path):
    samples = TrainingSamples(open_dataset(make_class_folder(tmp_path, (("cat", 3), ("dog", 2))), 16), seed=1)
    epochs = [[samples[5 * epoch + i]["index"] for i in range(5)] for epoch in range(6)]
    assert all(sorted(epoch) == [0, 1, 2, 3, 4] for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_shift_moves_the_training_times_and_nothing_else():
    emoji = open_dataset("emoji", 32)
    plain, shifted = (TrainingSamples(emoji, 0, shift)[7] for shift in (1.0, 3.0))
    t = plain["t"]
    assert shifted["t"].item() == pytest.approx((t / (t + (1 - t) * 3)).item())
    assert all(torch.equal(torch.as_tensor(plain[key]), torch.as_tensor(shifted[key])) for key in plain if key != "t")


def test_u_is_uniform_and_independent_of_the_time():
    """It decides whether a label is dropped. Catches t itself in its place: labels dropped near the noise only."""
    emoji = open_dataset("emoji", 32)
    drawn = [TrainingSamples(emoji, 0)[k] for k in range(3000)]
    u, t = (torch.stack([sample[key] for sample in drawn]) for key in ("u", "t"))
    assert 0 <= u.min() and u.max() < 1
    assert torch.histc(u, 10, 0, 1).div(3000).sub(0.1).abs().max() < 0.03
    assert abs(torch.corrcoef(torch.stack([u, t]))[0, 1]) < 4 / math.sqrt(3000)


def test_a_bad_picture_stops_a_loader_with_and_without_workers(tmp_path):
    make_class_folder(tmp_path, (("cat", 3), ("dog", 2)))
    (tmp_path / "dog" / "1.png").write_bytes(b"broken")
    dataset = open_dataset(tmp_path, 16)
    for workers in (0, 2):
        with pytest.raises(UserError, match="1.png is not a readable") as caught:
            list(training_batches(dataset, BatchNumbers(0, 1, 5, 5), 0, 1.0, workers, CPU))
        traceback.clear_frames(caught.tb)  # as `run` does, or Python would wait at exit for the workers


# ---- the command line ------------------------------------------------------------------------------------------------


def test_the_command_line_tells_mistakes_in_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    status, _, stderr = run_script("data.py", "imagenette", tmp_path / "file")
    assert status == 1
    assert stderr == f"data.py: {tmp_path}/file exists and is not this data set: give the name of a new folder"
