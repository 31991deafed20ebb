"""The emoji distance: its features know the emoji, it grows with damage, and nothing wrong gets a number."""
import dataclasses
import functools
import runpy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

import emoji_metric
from checkpoint import CheckpointError, FORMAT, load_checkpoint, load_weights, save_checkpoint
from conftest import ROOT
from data import EMOJI_CLASSES, from_uint8, open_dataset, to_uint8
from emoji_metric import EmojiFeatures, augment, draw_emoji, emoji_distance, labelled_emoji, train_features
from eval_fid import EvalError
from model import PixNerd, PixNerdConfig

IMAGES, TARGETS, KNOWN = labelled_emoji()
LABELS = torch.tensor(open_dataset("emoji", 32).labels)
# 400 real pictures in the place of samples and 400 others as the reference, so that chance is at work.
SOME, OTHERS = IMAGES[torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0))][:800].chunk(2)
TINY = PixNerdConfig(num_classes=9, resolution=32, patch_size=8, hidden_size=16, num_heads=2, depth=1,
                     field_depth=1, field_width=4)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def classifier():
    model = EmojiFeatures()
    load_weights(model, load_checkpoint(emoji_metric.FEATURES_FILE)["features"], "the features file")
    return model.eval()


# The features ----------------------------------------------------------------------------------------------------

def test_the_shipped_features_know_pictures_that_they_never_saw(classifier):
    """98 kinds; always saying "country flag", the most frequent, would be right in 14 of 100 cases."""
    logits = classifier(from_uint8(IMAGES[~KNOWN]))[1]
    assert (logits.argmax(1) == TARGETS[~KNOWN]).float().mean() > 0.45
    assert (logits.topk(5).indices == TARGETS[~KNOWN, None]).any(1).float().mean() > 0.7


def test_the_shipped_features_know_moved_mirrored_and_tinted_pictures(classifier):
    logits = classifier(augment(from_uint8(IMAGES), generator()))[1]
    assert (logits.argmax(1) == TARGETS).float().mean() > 0.45


def test_every_feature_has_about_the_same_weight_in_the_distance():
    """The scale that the table is read by: about 64 for a model that draws nothing but the average."""
    variance = emoji_metric.emoji_features(IMAGES).var(0)
    assert 0.7 < variance.min() and variance.max() < 1.6


def test_the_teacher_tells_what_the_classifier_sees_at_each_place(classifier):
    """A token for each patch, row by row: their mean is what the features are made of. Catches: a turned grid."""
    teacher, images = emoji_metric.EmojiTeacher(), IMAGES[:4] / 255
    tokens = teacher(images, 8)
    assert tokens.shape == (4, 16, teacher.width) and not tokens.requires_grad
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    features = classifier.norm(classifier.project(tokens.mean(1)))
    torch.testing.assert_close(features, classifier(from_uint8(IMAGES[:4]))[0])
    changed = images.clone()
    changed[:, :, :4, 28:] = 0  # the upper right corner
    difference = (teacher(changed, 8) - tokens).norm(dim=-1).sum(0).view(4, 4)
    assert difference.argmax() == 3 and difference[3, 0] == 0  # seen most in the first row's last patch, not across
    for pixels, patch in ((torch.rand(1, 3, 64, 64), 8), (images, 16)):
        with pytest.raises(ValueError, match="sees 32x32 pixels in patches of 8"):
            teacher(pixels, patch)


def test_the_features_file_is_small():
    assert emoji_metric.FEATURES_FILE.stat().st_size < 1.5e6


def test_training_again_gives_the_same_weights_and_another_seed_others():
    train = functools.partial(train_features, IMAGES[:128], TARGETS[:128], epochs=2)
    first, again, other = (train(seed=seed).state_dict()["project.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


# The distance ----------------------------------------------------------------------------------------------------

def blur(images, sigma):
    """A Gaussian blur over 13 x 13 pixels, of uint8 (N, 3, H, W)."""
    weights = torch.exp(-torch.arange(-6, 7) ** 2 / (2 * sigma**2))  # (13)
    kernel = (weights[:, None] * weights / weights.sum() ** 2).expand(3, 1, 13, 13)
    return to_uint8(F.conv2d(F.pad(from_uint8(images), (6, 6, 6, 6), mode="replicate"), kernel, groups=3))


def noisy(images, strength):
    return to_uint8(from_uint8(images) + strength * torch.randn(images.shape, generator=generator()))


def squared(images, side):
    """Every side x side square averaged: what a model that cannot draw inside its patches would give."""
    return to_uint8(F.interpolate(F.avg_pool2d(from_uint8(images), side), scale_factor=side))


def test_the_real_pictures_are_at_zero_and_two_halves_are_near():
    assert emoji_distance(IMAGES) < 1e-9
    assert 0.1 < emoji_distance(*IMAGES[torch.randperm(len(IMAGES), generator=generator())].chunk(2)) < 2


@pytest.mark.parametrize("damage, strengths", [(blur, (0.6, 0.9, 1.4, 2.0)), (noisy, (0.12, 0.2, 0.35, 0.5)),
                                               (squared, (4, 8, 16))])
def test_the_more_damage_the_larger_the_distance(damage, strengths):
    """Order is all that the metric is for. Weaker damage (noise of 0.06, squares of 2) is lost in the floor."""
    distances = [emoji_distance(SOME, OTHERS)] + [emoji_distance(damage(SOME, s), OTHERS) for s in strengths]
    assert distances == sorted(distances) and distances[-1] > 8 * distances[0], distances


def test_missing_classes_and_a_single_repeated_picture_are_far():
    """Each picture is perfect here: only the crowd is wrong, which an average over pictures would not see."""
    flags = IMAGES[LABELS == EMOJI_CLASSES.index("flags")]
    assert emoji_distance(flags, OTHERS) > 20
    assert emoji_distance(IMAGES[:1].expand(200, -1, -1, -1), OTHERS) > 60


def test_the_same_pictures_in_another_order_have_the_same_distance():
    distance = emoji_distance(SOME, OTHERS)
    assert emoji_distance(SOME, OTHERS) == distance
    assert emoji_distance(SOME.flip(0), OTHERS) == pytest.approx(distance, rel=1e-5)


# Samples ---------------------------------------------------------------------------------------------------------

def checkpoint(path, **changes):
    """A tiny model that has learned nothing, at step 7."""
    torch.manual_seed(0)
    config = dataclasses.replace(TINY, **changes)
    save_checkpoint(path, {"format": FORMAT, "config": dataclasses.asdict(config), "class_names": None, "step": 7,
                           "ema": PixNerd(config).state_dict()})
    return path


def test_samples_are_the_same_for_the_same_seed_and_others_for_another():
    torch.manual_seed(0)
    model = PixNerd(TINY).eval()
    first, again, other = (draw_emoji(model, 10, steps=2, seed=seed) for seed in (3, 3, 4))
    assert first.shape == (10, 3, 32, 32) and first.dtype == torch.uint8
    assert torch.equal(first, again) and not torch.equal(first, other)


def test_samples_have_the_classes_of_the_data(monkeypatch):
    """The distance would otherwise measure how unlike the mixtures are."""
    asked = []
    monkeypatch.setattr(emoji_metric, "guide", lambda model, y, cfg: asked.append(y) or (lambda x, t: x))
    draw_emoji(PixNerd(TINY), 953, steps=1)
    counts = torch.cat(asked).bincount(minlength=9)
    assert len(asked) == 10 and (counts * 2 - LABELS.bincount()).abs().max() <= 2


def run_script(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["emoji_metric.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "emoji_metric.py"), run_name="__main__")


def test_the_table_has_a_line_for_each_checkpoint_and_a_column_for_each_seed(tmp_path, monkeypatch, capsys):
    path = checkpoint(tmp_path / "a.pt")
    run_script(monkeypatch, path, path, "--num", 128, "--steps", 1, "--seeds", 0, 1)
    header, first, second, floor = capsys.readouterr().out.splitlines()
    assert "not FID" in header and first == second and floor.split()[0] == "floor"
    step, *distances = first.split()
    assert step == "7" and len(set(distances)) == 2 and all(float(value) > 60 for value in distances)


# Bad input: one line, exit status 1, no number -------------------------------------------------------------------

@pytest.mark.parametrize("images", [
    torch.zeros(200, 3, 32, 32), torch.full((200, 3, 32, 32), float("nan")), torch.zeros(200, 32, 32, 3).byte(),
    torch.zeros(200, 3, 64, 64).byte(), torch.zeros(200, 1, 32, 32).byte(), torch.zeros(3, 32, 32).byte(),
    torch.zeros(127, 3, 32, 32).byte(), torch.zeros(0, 3, 32, 32).byte(),
], ids=["floats", "NaN", "channels last", "64 pixels", "gray", "one picture", "too few", "none"])
def test_row_32_other_pictures_get_no_number(images):
    for arguments in ((images,), (SOME, images)):
        with pytest.raises(EvalError, match="at least 128 pictures") as caught:
            emoji_distance(*arguments)
        assert "\n" not in str(caught.value)


def test_row_32_a_model_that_draws_nan_gets_no_number():
    model = PixNerd(TINY)
    torch.nn.init.constant_(model.patch_embed.bias, float("nan"))
    torch.nn.init.ones_(model.decoder.output.weight)  # zero at first, as are then all velocities
    with pytest.raises(EvalError, match="draws NaN"):
        draw_emoji(model, 128, steps=1)


def test_nine_other_classes_are_not_taken_for_the_nine():
    model = PixNerd(TINY)
    model.class_names = ["fruit", *EMOJI_CLASSES[1:]]
    with pytest.raises(EvalError, match="in their order, not fruit, people, "):
        draw_emoji(model, 128, steps=1)


@pytest.mark.parametrize("arguments, message", [
    (["wide.pt"], "9 classes at 32 pixels, not 9 at 64"), (["many.pt"], "not 1000 at 32"),
    (["gone.pt"], "no checkpoint"), (["text.pt"], "not a checkpoint"), (["good.pt", "--num", "127"], "--num"),
    (["good.pt", "--steps", "0"], "--steps"), (["good.pt", "--device", "nonsense"], "--device nonsense"),
])
def test_bad_checkpoints_and_flags_are_refused(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    checkpoint("good.pt")
    checkpoint("wide.pt", resolution=64)
    checkpoint("many.pt", num_classes=1000)
    (tmp_path / "text.pt").write_text("hello")
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, *arguments)
    error = stop.value.code  # sys.exit(text) prints the text and gives status 1
    assert error.startswith("emoji_metric.py: ") and message in error and "\n" not in error
    assert "7 " not in capsys.readouterr().out


@pytest.mark.parametrize("state", [{}, {"features": {}}, {"features": {"stage1.0.weight": torch.zeros(2)}}])
def test_a_foreign_features_file_is_refused(state, tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "f.pt", state)
    monkeypatch.setattr(emoji_metric, "FEATURES_FILE", tmp_path / "f.pt")
    with pytest.raises(CheckpointError, match="f.pt"):
        emoji_distance(IMAGES)


def test_a_shell_sees_one_line_and_the_right_status(tmp_path):
    done = subprocess.run([sys.executable, str(ROOT / "emoji_metric.py"), "gone.pt"], cwd=tmp_path,
                          capture_output=True, text=True, timeout=100)
    assert done.returncode == 1 and done.stderr == "emoji_metric.py: there is no checkpoint gone.pt\n"
