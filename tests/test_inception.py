"""The FID network against the numbers of the TensorFlow graph, and what happens to weights that are not its own."""

import collections
import copy
import hashlib
import pathlib

import numpy as np
import pytest
import torch
from helpers import ROOT, inception_recipe

from pretrained.inception import InceptionV3, load_inception, resize_tf1
from runtime.files import UserError

GOLDEN = np.load(ROOT / "tests/golden/inception.npz")
NAMES = GOLDEN["names"].tolist()
SHAPES = {name: value.shape for name, value in InceptionV3().state_dict().items()}


@pytest.fixture(scope="module")
def model():
    network = InceptionV3()
    network.load_state_dict(inception_recipe(SHAPES))  # strict: also proves that no name is missing
    return network


def test_parameter_names_are_the_published_ones():
    ours = [name for name in SHAPES if not name.endswith("num_batches_tracked")]
    assert sorted(ours) == sorted(NAMES)


@pytest.mark.parametrize("pixels", [64, 256])
def test_features_match_the_reference(model, pixels, device):
    """Wrong padding, epsilon, pool, resize, channel order or bias: each one alone is off by far more than 1e-4."""
    images = torch.from_numpy(GOLDEN[f"img_{pixels}"]).permute(0, 3, 1, 2)
    found = copy.deepcopy(model).to(device)(images.to(device))
    for ours, name in zip(map(torch.Tensor.cpu, found), ("pool", "spatial", "logits_unbiased")):
        theirs = torch.from_numpy(GOLDEN[f"{name}_{pixels}"])
        assert ours.shape == theirs.shape and ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 1e-4 * theirs.abs().max()


def test_resize_reads_the_source_at_i_times_ratio():
    """Against the definition, one pixel at a time; would catch half-pixel centres and a wrong last row."""
    image = torch.randint(0, 256, (1, 1, 5, 11), dtype=torch.uint8)
    resized = resize_tf1(image, size=8)[0, 0]
    for i in range(8):
        for j in range(8):
            y, x = i * 5 / 8, j * 11 / 8
            top, left = int(y), int(x)
            bottom, right = min(top + 1, 4), min(left + 1, 10)
            upper = image[0, 0, top, left] * (1 - x + left) + image[0, 0, top, right] * (x - left)
            lower = image[0, 0, bottom, left] * (1 - x + left) + image[0, 0, bottom, right] * (x - left)
            assert resized[i, j] == pytest.approx(float(upper * (1 - y + top) + lower * (y - top)), abs=1e-3)


def test_resize_to_the_same_size_changes_nothing():
    image = torch.randint(0, 256, (2, 3, 299, 299), dtype=torch.uint8)
    assert torch.equal(resize_tf1(image), image.float())


def test_the_network_is_frozen_from_the_start(model):
    """In training mode BatchNorm would use the batch's own statistics: plausible features, all wrong."""
    assert not model.training and not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 64, 64),
        torch.zeros(2, 64, 64, 3, dtype=torch.uint8),
        torch.zeros(3, 64, 64, dtype=torch.uint8),
        torch.zeros(0, 3, 64, 64, dtype=torch.uint8),
    ],
)
def test_pictures_of_another_kind_are_refused(images):
    with pytest.raises(UserError, match="expected uint8"):
        InceptionV3()(images)


# Files of the right names and shapes, but a few kilobytes: a tensor expanded from one number is saved as that number.


def small_weights():
    return {name: torch.ones(1).expand(SHAPES[name]) for name in NAMES}


@pytest.mark.parametrize("form", ["plain", "with counters", "with version note", "legacy format"])
def test_every_form_of_the_published_file_loads(tmp_path, form):
    weights = small_weights()
    if form == "with counters":
        weights |= {name: torch.tensor(7) for name in SHAPES if name.endswith("tracked")}
    if form == "with version note":  # such a note makes load_state_dict ask for the counters
        weights = collections.OrderedDict(weights)
        weights._metadata = InceptionV3().state_dict()._metadata
    torch.save(weights, tmp_path / "w.pth", _use_new_zipfile_serialization=form != "legacy format")
    loaded = load_inception(tmp_path / "w.pth").state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in NAMES)


def change(weights, how):
    if how == "missing":
        del weights["fc.bias"]
    elif how == "surplus":
        weights["AuxLogits.fc.weight"] = torch.ones(2)
    elif how == "shape":  # torchvision's Inception: the same names, 1000 classes
        weights["fc.weight"] = torch.ones(1000, 2048)
    elif how == "nan":
        weights["fc.bias"] = torch.full((1008,), float("nan"))
    elif how == "nan buffer":
        weights["Mixed_5b.branch1x1.bn.running_var"] = torch.full((64,), float("nan"))
    elif how == "not tensors":
        weights["fc.bias"] = "hello"
    return weights


CHANGES = {
    "missing": "lacks the weight fc.bias",
    "surplus": "has the weight AuxLogits.fc.weight, which this architecture does not",
    "shape": r"fc.weight has shape \(1000, 2048\), not \(1008, 2048\)",
    "nan": "fc.bias holds NaN",
    "nan buffer": "running_var holds NaN",
    "not tensors": "no table of weights",
}


@pytest.mark.parametrize("how", CHANGES)
def test_other_weights_are_refused_by_name(tmp_path, how):
    torch.save(change(small_weights(), how), tmp_path / "w.pth")
    with pytest.raises(UserError, match=CHANGES[how]) as caught:
        load_inception(tmp_path / "w.pth")
    assert "\n" not in str(caught.value) and "w.pth" in str(caught.value)


def test_the_sum_of_the_file_is_kept_to_be_compared_with_the_published_one(tmp_path):
    torch.save(small_weights(), tmp_path / "w.pth")
    digest = hashlib.sha256((tmp_path / "w.pth").read_bytes()).hexdigest()
    assert load_inception(tmp_path / "w.pth").sha256 == digest


class Bomb:
    def __reduce__(self):
        return pathlib.Path.touch, (pathlib.Path("touched"),)


@pytest.mark.parametrize("how", ["text", "truncated", "flipped", "code", "legacy code", "list", "empty"])
def test_damaged_foreign_and_hostile_files_are_refused(tmp_path, monkeypatch, how):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "w.pth"
    state = {"code": Bomb()} if "code" in how else [1] if how == "list" else small_weights()
    torch.save(state, path, _use_new_zipfile_serialization=how != "legacy code")
    data = bytearray(path.read_bytes())
    if how == "flipped":  # inside a tensor: torch.load alone would not notice
        place = data.index(np.float32(1).tobytes(), len(data) // 2)
        data[place] ^= 1
    path.write_bytes({"text": b"hello", "truncated": data[: len(data) // 2], "empty": b""}.get(how, data))
    with pytest.raises(UserError, match="w.pth (is damaged|is not a|holds)") as caught:
        load_inception(path)
    assert "\n" not in str(caught.value) and not (tmp_path / "touched").exists()
