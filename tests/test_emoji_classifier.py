"""The emoji distance: its features know the emoji, and it grows with damage. And the same network as a teacher."""

import functools
import pathlib
import re

import pytest
import torch
import torch.nn.functional as F
from helpers import run_script

from data import EMOJI_CLASSES, from_uint8, open_dataset, to_uint8
from eval_fid import frechet_distance
from experiments.emoji_classifier import distort, labelled_emoji, train_classifier
from pretrained.emoji_classifier import WEIGHTS_FILE, EmojiTeacher, load_emoji_classifier
from runtime.checkpoint import save_checkpoint
from runtime.files import UserError

IMAGES, TARGETS, TRAINING = labelled_emoji()
LABELS = torch.tensor(open_dataset("emoji", 32).labels)
# 400 real pictures in the place of samples and 400 others as the reference, so that chance is at work.
SOME, OTHERS = IMAGES[torch.randperm(len(IMAGES), generator=torch.Generator().manual_seed(0))][:800].chunk(2)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def classifier():
    return load_emoji_classifier()


@pytest.fixture(scope="module")
def emoji_distance(classifier):
    """The distance of two sets of pictures, all at once."""

    def between(images, reference):
        x, y = (classifier(side)[0].double() for side in (images, reference))
        return frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())

    return between


# ---- the features ----------------------------------------------------------------------------------------------------


def test_the_shipped_features_know_pictures_that_they_never_saw(classifier):
    """98 kinds; always saying "country flag", the most frequent, would be right in 14 of 100 cases."""
    logits = classifier(IMAGES[~TRAINING])[2]
    assert (logits.argmax(1) == TARGETS[~TRAINING]).float().mean() > 0.45
    assert (logits.topk(5).indices == TARGETS[~TRAINING, None]).any(1).float().mean() > 0.7


def test_the_shipped_features_know_moved_mirrored_and_tinted_pictures(classifier):
    features = classifier.features(distort(from_uint8(IMAGES), generator()))
    assert (classifier.logits(features).argmax(1) == TARGETS).float().mean() > 0.45


def test_every_feature_has_about_the_same_weight_in_the_distance(classifier):
    """The scale that the distance is read by: about 64 for a model that draws nothing but the average."""
    variance = classifier(IMAGES)[0].var(0)
    assert 0.7 < variance.min() and variance.max() < 1.6


def test_the_features_file_is_small():
    assert WEIGHTS_FILE.stat().st_size < 1.5e6


def test_training_again_gives_the_same_weights_and_another_seed_others():
    train = functools.partial(train_classifier, IMAGES[:128], TARGETS[:128], epochs=2)
    first, again, other = (train(seed=seed).state_dict()["project.weight"] for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)


@pytest.mark.slow
def test_the_command_that_trains_it_writes_a_file_that_loads(tmp_path):
    out = tmp_path / "features.pt"
    status, stdout, stderr = run_script("experiments/emoji_classifier.py", "--out", out)
    assert status == 0, stderr
    assert 45 < int(re.match(r"(\d+)% of 191 held-out pictures right", stdout)[1]) < 60
    variance = load_emoji_classifier(out)(IMAGES)[0].var(0)
    assert 0.7 < variance.min() and variance.max() < 1.6


# ---- the distance ----------------------------------------------------------------------------------------------------


def blur(images, sigma):
    """A Gaussian blur over 13 x 13 pixels, of uint8 (N, 3, H, W)."""
    weights = torch.exp(-(torch.arange(-6, 7) ** 2) / (2 * sigma**2))  # (13)
    kernel = (weights[:, None] * weights / weights.sum() ** 2).expand(3, 1, 13, 13)
    return to_uint8(F.conv2d(F.pad(from_uint8(images), (6, 6, 6, 6), mode="replicate"), kernel, groups=3))


def noisy(images, strength):
    return to_uint8(from_uint8(images) + strength * torch.randn(images.shape, generator=generator()))


def squared(images, side):
    """Every side x side square averaged: what a model that cannot draw inside its patches would give."""
    return to_uint8(F.interpolate(F.avg_pool2d(from_uint8(images), side), scale_factor=side))


def test_the_real_pictures_are_at_zero_and_two_halves_are_near(emoji_distance):
    assert emoji_distance(IMAGES, IMAGES) < 1e-9
    assert 0.1 < emoji_distance(*IMAGES[torch.randperm(len(IMAGES), generator=generator())].chunk(2)) < 2


DAMAGES = [(blur, (0.6, 0.9, 1.4, 2.0)), (noisy, (0.12, 0.2, 0.35, 0.5)), (squared, (4, 8, 16))]


@pytest.mark.parametrize("damage, strengths", DAMAGES)
def test_the_distance_grows_with_damage(damage, strengths, emoji_distance):
    """Compared with other pictures than the damaged ones, so that copies would not be at zero."""
    distances = [emoji_distance(damage(SOME, s), OTHERS) for s in strengths]
    distances.insert(0, emoji_distance(SOME, OTHERS))
    assert distances == sorted(distances) and distances[-1] > 8 * distances[0], distances


def test_missing_classes_and_a_single_repeated_picture_are_far(emoji_distance):
    """Each picture is perfect here: only the crowd is wrong, which an average over pictures would not see."""
    flags = IMAGES[LABELS == EMOJI_CLASSES.index("flags")]
    assert emoji_distance(flags, OTHERS) > 20
    assert emoji_distance(IMAGES[:1].expand(200, -1, -1, -1), OTHERS) > 60


# ---- the teacher -----------------------------------------------------------------------------------------------------


def test_the_teacher_tells_what_the_classifier_sees_at_each_place(classifier):
    """A token for each patch, row by row: their mean is what the features are made of. Catches: a turned grid."""
    teacher, images = EmojiTeacher(), IMAGES[:4] / 255
    tokens = teacher(images, 8)
    assert tokens.shape == (4, 16, teacher.width) and not tokens.requires_grad
    assert not teacher.training and not teacher.classifier.training  # or BatchNorm would use the batch's statistics
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    features = classifier.norm(classifier.project(tokens.mean(1)))
    torch.testing.assert_close(features, classifier(IMAGES[:4])[0])
    changed = images.clone()
    changed[:, :, :4, 28:] = 0  # the upper right corner
    difference = (teacher(changed, 8) - tokens).norm(dim=-1).sum(0).view(4, 4)
    assert difference.argmax() == 3 and difference[3, 0] == 0  # seen most in the first row's last patch, not across
    for pixels, patch in ((torch.rand(1, 3, 64, 64), 8), (images, 16)):
        with pytest.raises(UserError, match="at --resolution 32 in patches of 8 only"):
            teacher(pixels, patch)


def test_the_teacher_is_for_the_emoji_at_one_size_only():
    teacher = EmojiTeacher()
    teacher.check("emoji", 32, 8)
    knows = "--dino emoji knows --data emoji at --resolution 32 in patches of 8 only, not "
    for run, words in (
        (("emoji", 64, 8), "emoji at 64 in patches of 8"),
        (("emoji", 32, 16), "emoji at 32 in patches of 16"),
        (("photos", 32, 8), "photos at 32 in patches of 8"),
    ):
        with pytest.raises(UserError, match=f"^{knows}{words}$"):
            teacher.check(*run)


# ---- what gets no number ---------------------------------------------------------------------------------------------

WRONG = {
    "floats": torch.zeros(2, 3, 32, 32),
    "channels last": torch.zeros(2, 32, 32, 3).byte(),
    "64 pixels": torch.zeros(2, 3, 64, 64).byte(),
    "gray": torch.zeros(2, 1, 32, 32).byte(),
    "one picture": torch.zeros(3, 32, 32).byte(),
}


@pytest.mark.parametrize("case", WRONG)
def test_pictures_of_another_kind_are_refused(case, classifier):
    with pytest.raises(UserError, match=r"expected uint8 pictures \(B, 3, 32, 32\)") as caught:
        classifier(WRONG[case])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("state", [{}, {"features": {}}, {"features": {"stage1.0.weight": torch.zeros(2)}}])
def test_a_foreign_features_file_is_refused(state, tmp_path):
    save_checkpoint(tmp_path / "f.pt", state)
    with pytest.raises(UserError, match="f.pt"):
        load_emoji_classifier(tmp_path / "f.pt")
    with pytest.raises(FileNotFoundError, match="gone.pt"):
        load_emoji_classifier(pathlib.Path("gone.pt"))
