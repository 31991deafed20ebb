"""`--classes`: some classes, the emoji's finer kinds, and pictures that come more often than others."""

import collections

import numpy as np
import pytest
import torch
from PIL import Image

from data import open_dataset, random_stream
from helpers import make_class_folder
from runtime.files import UserError
from runtime.some_classes import SomeClasses


@pytest.fixture(scope="module")
def emoji():
    return open_dataset("emoji", 32)


def test_some_classes_are_the_same_pictures_with_numbers_of_their_own(emoji):
    """In the order asked for. Catches labels of the whole set, and pictures of the neighbours."""
    some = SomeClasses(emoji, ["flags", "food"])
    assert some.classes == ["flags", "food"] and len(some) == len(some.labels) == 270 + 131
    kept = [i for name in some.classes for i, label in enumerate(emoji.labels) if emoji.classes[label] == name]
    for place in (0, 130, 269, 270, 400):
        image, label = some[place]
        assert torch.equal(image, emoji[kept[place]][0])
        assert label == some.labels[place] == ["flags", "food"].index(emoji.classes[emoji.labels[kept[place]]])


def test_another_choice_is_another_data_set(emoji):
    """By the fingerprint, from which a resumed run sees that its data changed."""
    choices = (["flags", "food"], ["food", "flags"], ["flags"], ["flags", "food:2"])
    prints = {SomeClasses(emoji, names).fingerprint for names in choices} | {emoji.fingerprint}
    assert len(prints) == len(choices) + 1
    assert SomeClasses(emoji, ["flags", "food"]).fingerprint in prints


def test_augmentation_arrives_through_the_choice(tmp_path):
    folder = make_class_folder(tmp_path, (("cat", 3), ("dog", 2)), 20, 24)
    whole = open_dataset(folder, 16, augment=True)
    dogs = SomeClasses(whole, ["dog"])
    assert len(dogs) == 2 and dogs[1][1] == 0
    for k in range(4):
        crop = dogs.picture(1, random_stream("sample", k))
        assert torch.equal(crop, whole.picture(4, random_stream("sample", k)))


def test_a_kind_with_a_number_comes_so_often_per_epoch(emoji):
    """food-fruit:4 is the twenty fruit, each four times. Catches numbers and names that drift apart."""
    some = SomeClasses(emoji, ["food-fruit:4", "country-flag"])
    assert some.classes == ["food-fruit", "country-flag"] and len(some) == 4 * 20 + 259
    seen = collections.Counter((some[i][0].numpy().tobytes(), some[i][1]) for i in range(len(some)))
    fruit = {(emoji[i][0].numpy().tobytes(), 0) for i in np.flatnonzero(emoji.kinds == "food-fruit")}
    assert {picture for picture, times in seen.items() if times == 4} == fruit and len(fruit) == 20
    assert all(label == 1 for picture, label in seen.keys() - fruit)
    assert some.remark == "--classes takes 279 pictures: food-fruit 20 x 4, country-flag 259"
    assert len(SomeClasses(emoji, ["food-fruit", "country-flag"])) == 20 + 259


@pytest.mark.parametrize(
    "names, message",
    [
        (["foodfruit"], r"'foodfruit' is not a class of the data; did you mean food-fruit, .*\?$"),
        (["food-fruit:4:2"], "'food-fruit:4' is not a class"),
        (["food:2", "food-fruit"], "'food-fruit' has pictures of a name before it"),
        (["flags", "flags"], "'flags' has pictures of a name before it"),
        ([""], "'' is not a class"),
        *(
            ([f"food:{times}"], "should be food:N, N from 1 to 1000")
            for times in ("", "0", "-1", "1.5", "1001", "x", "9" * 5000)
        ),
    ],
)
def test_a_mistake_in_classes_is_one_line_that_says_what_to_write(emoji, names, message):
    with pytest.raises(UserError, match=message) as error:
        SomeClasses(emoji, names)
    assert "\n" not in str(error.value) and str(error.value).startswith("--classes: ")


def test_names_of_a_folder_are_suggested_too(tmp_path):
    with pytest.raises(UserError, match=r"'cats' is not a class of the data; did you mean cat\?$"):
        SomeClasses(open_dataset(make_class_folder(tmp_path), 16), ["cats"])


def test_a_class_folder_with_a_colon_in_its_name_is_found(tmp_path):
    for name in ("a:2", "a"):
        (tmp_path / name).mkdir()
        Image.new("RGB", (16, 16), "red").save(tmp_path / name / "1.png")
    whole = open_dataset(tmp_path, 16)
    assert SomeClasses(whole, ["a:2"]).classes == ["a:2"]
    assert len(SomeClasses(whole, ["a:2:3", "a"])) == 4
