"""--class, --resolution and --upscale: what they mean, and one line for what means nothing."""

import dataclasses
import re

import pytest
from helpers import ROOT, TINY

from model import PRESETS
from runtime.choices import far_from_training, find_classes, find_size, waves
from runtime.files import UserError
from text_model import PRESETS as TEXT_PRESETS

IMAGENET = (ROOT / "assets" / "imagenet_classes.txt").read_text().splitlines()


def test_classes_by_index_by_name_and_all():
    assert len(IMAGENET) == len(set(IMAGENET)) == 1000
    for text in ("207", "golden retriever", "Golden Retriever", " 207 ", "00207"):
        assert find_classes(text, IMAGENET) == ([207], []), text
    assert find_classes("0, tench,999", IMAGENET) == ([0, 0, 999], [])
    assert find_classes("all", ["a", "b", "c"]) == ([0, 1, 2], [])


@pytest.mark.parametrize("wrong", ["-1", "1000", "1001", "9" * 5000])
def test_an_index_out_of_range_is_refused_with_the_range(wrong):
    with pytest.raises(UserError, match=f"{wrong} is out of range: this model knows 0 to 999"):
        find_classes(wrong, IMAGENET)


@pytest.mark.parametrize("wrong", ["golden retreiver", "--5", "²", "", ",", "\n", "goldfish,"])
def test_an_unknown_class_is_refused_with_what_there_is(wrong):
    with pytest.raises(UserError, match="is unknown; did you mean [a-z]") as caught:
        find_classes(wrong, IMAGENET)
    assert "\n" not in str(caught.value)
    assert wrong != "golden retreiver" or "did you mean golden retriever" in str(caught.value)


def test_an_exact_name_wins_over_an_index_and_the_ambiguity_is_said():
    """Class folders may be named by numbers. Catches: `--class 2` drawing the class with index 2."""
    names = ["1", "10", "2", "3"]
    found, remarks = find_classes("2,10,1", names)
    assert found == [2, 1, 0]
    assert len(remarks) == 1 and "--class 1 " in remarks[0] and "not for index 1, 10" in remarks[0]
    assert find_classes("0", names) == ([0], [])  # no name: an index
    found, remarks = find_classes("3", ["0", "1", "2", "3"])
    assert (found, remarks) == ([3], [])  # the name of a class that has this index too
    found, remarks = find_classes("all", ["some", "all"])
    assert found == [1] and "not for every class" in remarks[0]


def test_a_name_as_it_is_wins_over_the_same_in_other_letters():
    names = ["Cat", "cat", "DOG"]
    assert [find_classes(text, names)[0] for text in ("cat", "Cat", "CAT", "dog")] == [[1], [0], [0], [2]]


def test_a_name_with_a_comma_can_be_named():
    names = ["car, red", "car", "red"]
    assert find_classes("car, red", names)[0] == [0]
    assert find_classes('red,"car, red"', names)[0] == [2, 0]
    assert find_classes("red,car", names)[0] == [2, 1]


@pytest.mark.parametrize(
    "resolution,upscale,size,grid",
    [
        (None, "1", (16, 16), None),
        ("32", "1", (32, 32), None),
        ("8x24", "1", (8, 24), None),
        (None, "2", (32, 32), (4, 4)),
        (None, "1.5", (24, 24), (4, 4)),
        (None, "2x1.25", (32, 20), (4, 4)),
        ("8x24", "1.5X3", (12, 72), (2, 6)),
    ],
)
def test_resolution_adds_tokens_and_upscale_pixels_per_token(resolution, upscale, size, grid):
    assert find_size(TINY, resolution, upscale) == (size, grid)


@pytest.mark.parametrize(
    "resolution,upscale,message",
    [
        ("18", "1", "multiples of 4"),
        ("0", "1", "multiples of 4"),
        ("-16", "1", "multiples of 4"),
        ("big", "1", "not N or HEIGHTxWIDTH"),
        ("16x16x16", "1", "not N or HEIGHTxWIDTH"),
        ("x", "1", "not N or HEIGHTxWIDTH"),
        ("9" * 5000, "1", "not N or HEIGHTxWIDTH"),
        (None, "1.3", "multiples of 1/4: patches of 4 pixels must become whole pixels"),
        (None, "0", "not a factor"),
        (None, "-2", "not a factor"),
        (None, "1/0", "not a factor"),
        (None, "x", "not a factor"),
        (None, "", "not a factor"),
        (None, "nan", "not a factor"),
        (None, "1e999999999", "not a factor"),
    ],
)
def test_sizes_that_are_none_are_refused(resolution, upscale, message):
    """In no time: written out, 1e999999999 has a billion digits."""
    with pytest.raises(UserError, match=message):
        find_size(TINY, resolution, upscale)


def test_sizes_of_which_only_noise_can_come_are_refused_and_the_next_ones_are_not():
    """XL has 8 half-waves over 16 pixels, the small model 6 over 8."""
    xl, nano = PRESETS["XL"], PRESETS["Nano"]
    assert [waves(config) for config in (xl, nano)] == [8, 6]
    for config, refused, least in ((xl, "7/16", "0.5"), (nano, "5/8", "0.75")):
        with pytest.raises(UserError, match="fewer than the . half-waves .*: use --upscale"):
            find_size(config, None, refused)
        assert find_size(config, None, least)[1] == (config.resolution // config.patch_size,) * 2
    text = dataclasses.replace(TEXT_PRESETS["XXL"], resolution=512)  # whose cosines are mostly slow
    assert find_size(text, "128x1024") == ((128, 1024), (32, 32))
    most = r"33x16 tokens, and .* with 16x16, .*noise .*32x32 tokens \(512 pixels\) are the most"
    with pytest.raises(UserError, match=most):
        find_size(xl, "528x256")
    assert find_size(xl, "512") == ((512, 512), None)


@pytest.mark.parametrize(
    "resolution, upscale, remarks",
    [
        (None, "1", []),
        (None, "2", []),
        ("320", "1", []),
        ("384x256", "1", ["24x16 tokens .*16x16.* --upscale gives more"]),
        ("128", "1", ["8x8 tokens .*fragments"]),
        (None, "4", ["64x64 pixels a patch .*16x16.* --upscale 2"]),
        ("512", "0.5", ["32x32 tokens", "8x8 pixels a patch .*shrink"]),
    ],
)
def test_a_size_far_from_training_is_remarked_on_with_what_would_help(resolution, upscale, remarks):
    found = far_from_training(PRESETS["XL"], *find_size(PRESETS["XL"], resolution, upscale))
    assert len(found) == len(remarks) and all(map(re.search, remarks, found))


@pytest.mark.parametrize("text", ["a red apple", "a small dog, running over wet grass"])
def test_a_class_that_reads_like_a_sentence_points_to_prompts(text):
    """And a long name that is nearly one of the classes does not."""
    with pytest.raises(UserError, match=f"reads like a sentence, .*--prompt '{text}'"):
        find_classes(text, ["tench", "golden retriever", "great white shark"])
    with pytest.raises(UserError, match="did you mean great white shark"):
        find_classes("great whit shark", ["tench", "great white shark"])


def test_upscale_of_a_linear_decoder_is_refused():
    linear = dataclasses.replace(TINY, decoder="linear")
    assert find_size(linear, None, "1") == ((16, 16), None)
    with pytest.raises(UserError, match="--upscale 2 needs a neural field"):
        find_size(linear, None, "2")
