"""The teacher gives the published model's features, on any grid, and refuses every file that is not one.

golden/dinov2.npz: a small DINOv2 with random weights and what the reference implementation computes with it.
"""

import pathlib

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import ROOT

from pretrained import dinov2
from pretrained.dinov2 import DINOv2, load_dinov2
from runtime.files import UserError

GOLDEN = {name: torch.from_numpy(array) for name, array in np.load(ROOT / "tests/golden/dinov2.npz").items()}
PUBLISHED = {  # D, depth, Nh and the exact number of parameters (about 22 M, 86 M, 304 M)
    "S": (384, 12, 6, 22_056_576),
    "B": (768, 12, 12, 86_580_480),
    "L": (1024, 24, 16, 304_368_640),
}


def golden_weights():
    return {name[2:]: tensor for name, tensor in GOLDEN.items() if name.startswith("w.")}


def golden_model():
    model = DINOv2(int(GOLDEN["img_size"]), 14, 24, int(GOLDEN["depth"]), int(GOLDEN["num_heads"]))
    model.load_state_dict(golden_weights())  # strict: the parameter names are the published file's
    return model


def random_model(**changes):
    """A toy whose every parameter matters: the zeros of a fresh model would hide mistakes."""
    torch.manual_seed(0)
    shape = {"img_size": 70, "patch_size": 14, "embed_dim": 64, "depth": 2, "num_heads": 1}
    model = DINOv2(**{**shape, **changes})
    for parameter in model.parameters():
        parameter.normal_(std=0.3)
    return model


@pytest.mark.parametrize("shape", ["", "_wide"])
def test_tokens_equal_the_reference_implementation(shape, device):
    """Catches: any wrong constant (mean, eps, 0.1), antialiasing, tanh GELU, rows and columns exchanged."""
    tokens = golden_model().to(device)(GOLDEN["raw" + shape].to(device))
    torch.testing.assert_close(tokens.cpu(), GOLDEN["tokens" + shape], atol=1e-5, rtol=0)


def test_256_pixels_become_224_and_give_the_students_16_by_16_tokens():
    """Catches: 18 x 18 tokens of 14 pixels, against which the student's 256 tokens could not be compared."""
    model = random_model()
    seen = []
    model.patch_embed.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].shape))
    assert model(torch.rand(1, 3, 256, 256)).shape == (1, 16 * 16, 64)
    assert seen == [(1, 3, 224, 224)]


def test_a_student_with_another_patch_gets_one_teacher_token_per_token():
    """Catches: a fixed 14/16, which gives 2 x 2 teacher tokens to the 4 x 4 of an 8-pixel student."""
    assert random_model()(torch.rand(1, 3, 32, 48), student_patch=8).shape == (1, 4 * 6, 64)


def test_tokens_are_row_major_like_the_students():
    """Catches: a transposed grid, which comparing shapes of square images would not show."""
    model = random_model(depth=0)  # no attention: each token sees its own patch only
    images = torch.zeros(2, 3, 32, 64)  # 2 rows of 4 patches
    images[1, :, :16, 16:32] = 1  # only the patch in row 0, column 1 differs
    tokens = model(images)
    changed = (tokens[0] - tokens[1]).abs().amax(dim=-1)
    assert changed.argmax() == 1 and changed[4:6].max() < 0.5 * changed[1]


def test_native_grid_uses_the_position_embedding_untouched():
    """Catches: interpolating 37 -> 37, which the 0.1 in the scale turns into a shift."""
    model = random_model()
    assert model.position_embedding(5, 5) is model.pos_embed
    assert model.position_embedding(5, 4).shape == (1, 1 + 20, 64)


def test_positions_are_placed_by_the_passed_scale_and_not_by_the_size():
    """Catches: F.interpolate(size=...), whose positions differ from the published features'."""
    model = random_model()
    grid = model.pos_embed[:, 1:].reshape(1, 5, 5, 64).permute(0, 3, 1, 2)
    by_size = F.interpolate(grid, size=(4, 4), mode="bicubic").flatten(2).transpose(1, 2)
    ours = model.position_embedding(4, 4)
    assert torch.equal(ours[:, 0], model.pos_embed[:, 0])  # the class token has no place on the grid
    assert 1e-3 < (ours[:, 1:] - by_size).abs().max() < 0.5


def test_teacher_is_frozen_and_its_output_carries_no_gradient():
    """Catches: a teacher that trains, stores activations for a backward pass, or is put into the optimizer."""
    model = random_model()
    assert not model.training and not any(p.requires_grad for p in model.parameters())
    assert not model(torch.rand(1, 3, 32, 32, requires_grad=True)).requires_grad


def test_images_that_are_not_whole_patches_are_refused():
    """Catches: silently dropping the last rows, so that teacher and student tokens no longer match."""
    with pytest.raises(ValueError, match="40x32 pixels are not whole patches of 16"):
        random_model()(torch.rand(1, 3, 40, 32))


@pytest.mark.parametrize("size", PUBLISHED)
def test_published_sizes_have_the_published_parameter_counts(size):
    """Catches: a missing bias or LayerScale. The meta device allocates nothing."""
    dim, depth, num_heads, count = PUBLISHED[size]
    with torch.device("meta"):
        model = DINOv2(518, 14, dim, depth, num_heads)
    assert sum(p.numel() for p in model.parameters()) == count


@pytest.mark.parametrize(
    "changes", [{}, {"embed_dim": 128, "num_heads": 2}, {"img_size": 98, "depth": 3}, {"embed_dim": 24}]
)
def test_load_finds_the_architecture_in_the_files_shapes(tmp_path, changes):
    """Catches: a loader that knows ViT-B only, or that takes the number of heads for something a file says."""
    model = random_model(**changes)
    torch.save(model.state_dict(), tmp_path / "teacher.pth")
    loaded = load_dinov2(tmp_path / "teacher.pth")
    images = torch.rand(1, 3, 32, 48)
    assert torch.equal(loaded(images), model(images))
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())


def test_without_a_path_the_published_file_is_asked_for_with_its_flag(tmp_path, monkeypatch):
    """Catches: a second download code, a wrong address, an error that does not name --dino."""

    def fake_download(url, flag):
        assert url.endswith("/dinov2_vitb14/dinov2_vitb14_pretrain.pth") and flag == "--dino"
        return tmp_path / "teacher.pth"

    torch.save(random_model().state_dict(), tmp_path / "teacher.pth")
    monkeypatch.setattr(dinov2, "cached_download", fake_download)
    assert isinstance(load_dinov2(), DINOv2)


GOOD = random_model().state_dict()


def without(name):
    return {key: tensor for key, tensor in GOOD.items() if key != name}


WRONG_CONTENTS = {
    "missing": (without("norm.bias"), "lacks the weight norm.bias"),
    "shape": ({**GOOD, "norm.bias": torch.zeros(63)}, "norm.bias has shape (63,), not (64,)"),
    "registers": ({**GOOD, "register_tokens": torch.zeros(4, 64)}, "has the weight register_tokens, which"),
    "not a square grid": ({**GOOD, "pos_embed": torch.zeros(1, 28, 64)}, "pos_embed has shape (1, 28, 64), not (1, 26"),
    "no positions": (without("pos_embed"), "does not hold the weights of a DINOv2"),
    "nested": ({"model": GOOD}, "does not hold the weights of a DINOv2"),
    "numbers": ({**GOOD, "pos_embed": 3}, "does not hold the weights of a DINOv2"),
    "a list": ([1, 2, 3], "holds a list"),
}


@pytest.mark.parametrize("case", WRONG_CONTENTS)
def test_wrong_contents_are_one_line_that_names_file_and_tensor(tmp_path, case):
    """Catches: strict=False, and load_state_dict's page of key names."""
    content, message = WRONG_CONTENTS[case]
    torch.save(content, tmp_path / "wrong.pth")
    with pytest.raises(UserError) as caught:
        load_dinov2(tmp_path / "wrong.pth")
    assert message in str(caught.value) and "wrong.pth" in str(caught.value) and "\n" not in str(caught.value)


def test_files_that_are_missing_foreign_or_damaged_are_one_line(tmp_path):
    """Catches: a traceback from inside torch; a flipped bit, which torch.load lets pass (checked below)."""
    good, bad = tmp_path / "good.pth", tmp_path / "bad.pth"
    torch.save(GOOD, good)
    content = good.read_bytes()
    flipped = bytearray(content)
    flipped[content.index(GOOD["norm.bias"].numpy().tobytes())] ^= 1
    bad.write_bytes(flipped)
    assert not torch.equal(torch.load(bad)["norm.bias"], GOOD["norm.bias"])
    folder = bytearray(content)
    folder[content.index(b"PK\1\2") + 38] ^= 0x10  # in the directory: the first record is a folder, says one bit
    for damaged in [b"", b"hello, this is text\n", content[:100], content[:-50], flipped, folder]:
        bad.write_bytes(damaged)
        with pytest.raises(UserError, match="bad.pth is (damaged|not a checkpoint)") as caught:
            load_dinov2(bad)
        assert "\n" not in str(caught.value)
    with pytest.raises(FileNotFoundError, match="absent.pth"):
        load_dinov2(tmp_path / "absent.pth")
    with pytest.raises(FileNotFoundError, match="is a folder"):
        load_dinov2(tmp_path)


class Trap:
    """A pickle that would create a file when it is read."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_a_file_with_pickled_code_is_refused_and_runs_nothing(tmp_path):
    """Catches: torch.load without weights_only: a downloaded file could run anything."""
    torch.save({"pos_embed": Trap(tmp_path / "ran")}, tmp_path / "trap.pth")
    with pytest.raises(UserError, match="trap.pth holds Python objects"):
        load_dinov2(tmp_path / "trap.pth")
    assert not (tmp_path / "ran").exists()
