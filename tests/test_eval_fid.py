"""The five metrics against golden numbers, closed forms and naive loops; and input that must not give a number."""

import json
import os
import re
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from helpers import ROOT, complaint, run_script
from PIL import Image

from data import open_dataset
from eval_fid import (
    Statistics,
    compare,
    describe,
    frechet_distance,
    inception_score,
    judge,
    precision_recall,
    trace_sqrt_product,
)
from pretrained.emoji_classifier import EmojiClassifier, load_emoji_classifier
from pretrained.inception import InceptionV3, load_inception
from runtime.distributed import Processes
from runtime.eval_report import PUBLISHED, print_table
from runtime.feature_networks import check_pictures, open_network
from runtime.files import UserError
from runtime.picture_sets import STATISTICS, PictureSet, open_pictures, pictures_of

GOLDEN = np.load(ROOT / "tests/golden/metrics.npz")
SQRTM = np.load(ROOT / "tests/golden/sqrtm.npz")
ALONE = Processes()


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count, height=8, width=8, seed=0):
    """uint8 (N, H, W, 3), as in an npz."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


def as_pictures(images, name="made here", **changes):
    """PictureSet of uint8 (N, 3, H, W)."""

    def batches(batch_size, rank=0, world=1):
        yield from images.split(batch_size)[rank::world]

    return PictureSet(name, len(images), tuple(images.shape[2:]), batches, **{"stored": {}, **changes})


# ---- the formulas ----------------------------------------------------------------------------------------------------


def test_golden_numbers_of_the_adm_formulas(device):
    reference, samples, probs = (torch.from_numpy(GOLDEN[name]).to(device) for name in ("ref", "sample", "probs"))
    r, s = reference.double(), samples.double()
    assert frechet_distance(r.mean(0), r.T.cov(), s.mean(0), s.T.cov()) == pytest.approx(GOLDEN["fid"], rel=1e-9)
    score = inception_score(probs, int(GOLDEN["is_split"]))
    assert score == pytest.approx(GOLDEN["inception_score"], rel=1e-9)
    assert precision_recall(reference, samples) == (GOLDEN["precision"], GOLDEN["recall"])


def test_frechet_distance_of_gaussians_that_share_their_axes():
    """Closed form: |mu1 - mu2|^2 + sum of (sigma1 - sigma2)^2 over the axes; the rotation must not matter."""
    rotation = torch.linalg.qr(normal(20, 20)).Q
    s1, s2 = normal(20, seed=1).abs(), normal(20, seed=2).abs()
    mu1, mu2 = normal(20, seed=3), normal(20, seed=4)
    ours = frechet_distance(mu1, rotation * s1**2 @ rotation.T, mu2, rotation * s2**2 @ rotation.T)
    assert ours == pytest.approx(((mu1 - mu2).square().sum() + (s1 - s2).square().sum()).item(), rel=1e-10)


def test_frechet_distance_is_zero_for_equal_and_symmetric_for_others():
    x, y = normal(50, 20), normal(50, 20, seed=1) * 2
    a, b = (x.mean(0), x.T.cov()), (y.mean(0), y.T.cov())
    assert 0 <= frechet_distance(*a, *a) < 1e-10
    assert frechet_distance(*a, *b) == pytest.approx(frechet_distance(*b, *a), rel=1e-10)


@pytest.mark.parametrize("case", ["well", "ill", "deficient", "deficient_and_full"])
def test_matrix_root_equals_scipy_sqrtm(case):
    """32 dimensions; spectra 0.5 to 2, 1 to 1e-12, and 10 against 12 or 5 against 200 pictures.

    `trace` is the trace of scipy.linalg.sqrtm(cov1 @ cov2), scipy 1.17.1; `exact` comes from eigenvalues with 60
    digits. We agree with scipy, and where it loses digits we are the nearer to the truth.
    """
    cov1, cov2 = (torch.from_numpy(SQRTM[f"{case}.{name}"]) for name in ("cov1", "cov2"))
    ours = trace_sqrt_product(cov1, cov2).item()
    scipy, exact = SQRTM[f"{case}.trace"], SQRTM[f"{case}.exact"]
    assert ours == pytest.approx(scipy, rel=1e-6)
    assert abs(ours - exact) <= max(abs(scipy - exact), 1e-14 * exact)


def test_matrix_root_with_far_fewer_pictures_than_dimensions():
    """tr((C1 C2)^(1/2)) is also the sum of singular values of the small matrix X1 X2^T: no root of a zero in there."""
    x, y = (normal(n, 200, seed=n) * torch.logspace(0, -3, 200) for n in (20, 30))
    centred = (x - x.mean(0)) @ (y - y.mean(0)).T / (19 * 29) ** 0.5
    exact = torch.linalg.svdvals(centred).sum().item()
    assert trace_sqrt_product(x.T.cov(), y.T.cov()).item() == pytest.approx(exact, rel=1e-9)


def test_frechet_distance_to_a_single_repeated_picture():
    """A collapsed model: its covariance is zero, and only the spread of the other side remains."""
    x = normal(30, 6)
    distance = frechet_distance(x.mean(0), x.T.cov(), x[0], torch.zeros(6, 6))
    assert distance == pytest.approx(((x.mean(0) - x[0]).square().sum() + x.T.cov().trace()).item(), rel=1e-12)


def test_no_covariance_no_distance():
    mu, cov = torch.zeros(3), torch.eye(3)
    for wrong in (-cov, torch.tensor([[1.0, 5, 0], [-5, 1, 0], [0, 0, 1]]), cov * float("nan"), torch.eye(4)):
        with pytest.raises(UserError):
            frechet_distance(mu, cov, mu, wrong)
    with pytest.raises(UserError, match="NaN"):
        frechet_distance(mu, cov, mu * float("nan"), cov)


def naive_score(probs, split):
    scores = []
    for part in np.array_split(probs, range(split, len(probs), split)):
        marginal = part.mean(0)
        total = sum(p * np.log(p / q) for row in part for p, q in zip(row, marginal) if p > 0)
        scores.append(np.exp(total / len(part)))
    return np.mean(scores)


def test_inception_score_equals_a_naive_loop_with_zeros_and_a_short_last_split():
    probs = (normal(53, 6) * 3).softmax(dim=1)
    probs[:5] = torch.eye(6)[:5]  # 0 log 0 must be 0, not NaN
    assert inception_score(probs, 20) == pytest.approx(naive_score(probs.numpy(), 20), rel=1e-12)
    assert inception_score(torch.eye(6).repeat(4, 1)) == pytest.approx(6)  # sure of each, all classes: the maximum
    for wrong in (probs * 2, probs - 1, probs * float("nan"), probs[:1]):
        with pytest.raises(UserError):
            inception_score(wrong)


def naive_precision_recall(reference, samples, k=3):
    def balls(points):
        return [sorted(sum((p - q) ** 2) for j, q in enumerate(points) if j != i)[k - 1] for i, p in enumerate(points)]

    def inside(points, centres):
        radii = balls(centres)
        return np.mean([any(sum((p - c) ** 2) <= r for c, r in zip(centres, radii)) for p in points])

    return inside(samples, reference), inside(reference, samples)


@pytest.mark.parametrize("case", ["random", "ties", "copies", "collapsed", "far from zero"])
def test_precision_and_recall_equal_a_naive_loop(case):
    reference, samples = normal(60, 5), normal(50, 5, seed=1) * 0.8 + 0.3
    if case == "ties":  # on a grid many points lie exactly on the surface of a ball, which is inside
        reference, samples = (reference * 1.5).round(), (samples * 1.5).round()
    elif case == "copies":  # neighbours at distance 0, also between the sets
        samples[:30] = reference[:30]
        reference[40:] = reference[20:40]
    elif case == "collapsed":  # balls of radius 0, which hold their own copies and nothing else
        samples[:] = reference[7]
    elif case == "far from zero":  # |a|^2 + |b|^2 - 2ab would lose everything
        reference, samples = reference + 1e7, samples + 1e7
    naive = naive_precision_recall(reference.numpy(), samples.numpy())
    for block in (1, 7, 1000):  # the size of the blocks must not matter
        assert precision_recall(reference, samples, block=block) == pytest.approx(naive, abs=1e-12)


def test_precision_and_recall_need_enough_points_and_numbers():
    x = normal(10, 4)
    for reference, samples in ((x[:3], x), (x, x[:3]), (x, x[:, :2]), (x, x * float("nan")), (x, x.flatten())):
        with pytest.raises(UserError):
            precision_recall(reference, samples)


# ---- features of a stream --------------------------------------------------------------------------------------------


def test_streaming_mean_and_covariance_equal_numpy():
    x = normal(103, 12) * 3 + 5
    for sizes in ([103], [1, 100, 2], [25, 25, 25, 28]):
        statistics = Statistics(12)
        for batch in x.split(sizes):
            statistics.update(batch)
        mean, cov = statistics.mean_cov()
        np.testing.assert_allclose(mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(cov, np.cov(x.numpy(), rowvar=False), rtol=1e-10, atol=1e-12)


def test_one_picture_or_nan_has_no_covariance():
    for batch in (torch.ones(1, 3), torch.full((4, 3), float("nan"))):
        statistics = Statistics(3)
        statistics.update(batch)
        with pytest.raises(UserError):
            statistics.mean_cov()


def random_pictures(count, seed=0):
    """uint8 (N, 3, 8, 8)."""
    return torch.from_numpy(pictures(count, seed=seed)).permute(0, 3, 1, 2)


class SmallNetwork:
    """A feature network like FID's, of few dimensions: random projections of 8 x 8 pictures."""

    title, widths, side, least, sha256 = "FID", (12, 7), None, 2, ""

    def __init__(self):
        self.weight, self.classes = normal(192, 12).float(), normal(12, 5, seed=1).float()

    def __call__(self, images):
        pool = images.flatten(1).float() / 255 @ self.weight  # (B, 12)
        return pool, pool[:, :7] ** 2, self.logits(pool)

    def logits(self, pool):
        return pool @ self.classes / 10


def test_the_features_of_a_stream_are_those_of_all_pictures_at_once():
    """Whatever the batches. Catches: a last short batch that is lost, and features in another order."""
    images, network = random_pictures(23), SmallNetwork()
    pool, spatial, _ = network(images)
    for batch_size in (1, 5, 64):
        found = describe(as_pictures(images), network, "cpu", ALONE, batch_size)
        torch.testing.assert_close(found["features"], pool)
        for name, features in (("", pool.double()), ("_s", spatial.double())):
            torch.testing.assert_close(found["mu" + name], features.mean(0), rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(found["sigma" + name], features.T.cov(), rtol=1e-4, atol=1e-5)
    some = describe(as_pictures(images), network, "cpu", ALONE, batch_size=5, keep=7)
    torch.testing.assert_close(some["features"], pool[:7])
    torch.testing.assert_close(some["sigma"], found["sigma"], rtol=1e-4, atol=1e-5)


def test_statistics_in_a_file_take_the_place_of_those_of_its_pictures():
    """ADM's reference: statistics of 1.28 million pictures beside 10,000 pictures, which still give the features."""
    stored = {"mu": torch.ones(12), "sigma": torch.eye(12), "mu_s": torch.ones(7), "sigma_s": torch.eye(7)}
    images, network = random_pictures(9), SmallNetwork()
    found = describe(as_pictures(images, stored=stored), network, "cpu", ALONE)
    assert all(torch.equal(found[name], value) for name, value in stored.items())
    torch.testing.assert_close(found["features"], network(images)[0])
    unread = PictureSet("statistics", 9, (8, 8), None, stored)  # of --save-stats
    assert describe(unread, network, "cpu", ALONE) == stored


# ---- from features to numbers ----------------------------------------------------------------------------------------


def test_all_five_metrics_are_those_of_the_formulas():
    """Catches: sides exchanged (precision is not recall), sFID from pool features, the score of the reference."""
    network, sides = SmallNetwork(), (random_pictures(40), random_pictures(30, seed=1) // 2)
    (pool_r, spatial_r, _), (pool_s, spatial_s, logits) = (network(images) for images in sides)
    found = [describe(as_pictures(images), network, "cpu", ALONE, batch_size=16) for images in sides]
    metrics, warnings = compare(*found, network, "cpu")
    assert list(metrics) == ["FID", "sFID", "IS", "precision", "recall"] and not warnings
    for name, x, y in (("FID", pool_r, pool_s), ("sFID", spatial_r, spatial_s)):
        x, y = x.double(), y.double()
        by_hand = frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
        assert metrics[name] == pytest.approx(by_hand, rel=1e-4)
    assert metrics["IS"] == pytest.approx(inception_score(logits.softmax(1)), rel=1e-5)
    assert (metrics["precision"], metrics["recall"]) == precision_recall(pool_r, pool_s)


def test_samples_sorted_by_class_are_noticed_without_labels(monkeypatch):
    """Two classes, the first half all of one: over splits the score is 1, in random order 2."""
    monkeypatch.setattr(inception_score, "__defaults__", (50,))
    network = SmallNetwork()
    network.logits = lambda pool: pool[:, :2]
    real = describe(as_pictures(random_pictures(9)), network, "cpu", ALONE)
    classes = torch.zeros(200, 12)
    classes[:100, 0] = classes[100:, 1] = 50
    for features, score, told in ((classes, 1, 1), (classes.view(2, 100, 12).transpose(0, 1).flatten(0, 1), 2, 0)):
        metrics, warnings = compare(real, real | {"features": features}, network, "cpu")
        assert metrics["IS"] == pytest.approx(score) and len(warnings) == told
        assert all("sorted by class" in warning for warning in warnings)


def test_another_distance_comes_with_its_floor_and_without_published_names():
    """What two halves of the real pictures are apart: below it, a distance says nothing."""
    network, reference = load_emoji_classifier(), pictures_of(open_dataset("emoji", 32), "emoji")
    real = describe(reference, network, "cpu", ALONE)
    metrics, warnings = compare(real, real, network, "cpu")
    assert list(metrics) == ["emoji distance", "floor"] and not warnings
    assert metrics["emoji distance"] < 1e-9 and 0.1 < metrics["floor"] < 2


def test_judge_gives_a_run_its_scores_and_reads_the_reference_once():
    """train.py --eval-every: by the network's own name, as in metrics.jsonl."""
    reads = []

    def batches(batch_size, rank=0, world=1):
        reads.append(rank)
        yield from random_pictures(20).split(batch_size)

    network, samples = SmallNetwork(), random_pictures(30, seed=1)
    reference = PictureSet("the reference", 20, (8, 8), batches, {})
    first, again = (judge(reference, as_pictures(samples), network, "cpu", ALONE) for _ in range(2))
    assert first == again and list(first) == ["fid", "inception_score"] and reads == [0]
    x, y = network(random_pictures(20))[0].double(), network(samples)[0].double()
    by_hand = frechet_distance(x.mean(0), x.T.cov(), y.mean(0), y.T.cov())
    assert first["fid"] == pytest.approx(by_hand, rel=1e-4)
    emoji = open_dataset("emoji", 32)
    scores = judge(pictures_of(emoji, "emoji"), as_pictures(emoji.images[:200]), open_network("emoji"), "cpu", ALONE)
    assert list(scores) == ["emoji_distance"] and scores["emoji_distance"] > 10  # smileys alone are far from all nine


# ---- feature networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", [InceptionV3, load_emoji_classifier])
def test_a_feature_network_is_what_its_protocol_says(network):
    network = network()
    images = torch.from_numpy(pictures(3, 32, 32)).permute(0, 3, 1, 2)
    pool, spatial, logits = network(images)
    assert pool.shape == (3, network.widths[0]) and pool.dtype == torch.float32
    assert (spatial is None) == (network.widths[1] is None)
    assert spatial is None or spatial.shape == (3, network.widths[1])
    torch.testing.assert_close(network.logits(pool), logits)
    assert not logits.requires_grad and not network.training


def test_pictures_that_a_distance_is_not_for_are_refused_before_weights_are_loaded():
    small, large = torch.zeros(128, 3, 32, 32, dtype=torch.uint8), torch.zeros(128, 3, 64, 64, dtype=torch.uint8)
    check_pictures(as_pictures(small), EmojiClassifier)
    check_pictures(as_pictures(large[:4]), InceptionV3)
    for images, network, message in (
        (small[:127], EmojiClassifier, "made here: the emoji distance takes at least 128 pictures, not 127"),
        (large, EmojiClassifier, "made here: the emoji distance is for 32x32 pixels, not 64x64"),
        (small[:3], InceptionV3, "the FID takes at least 4 pictures, not 3"),
    ):
        with pytest.raises(UserError, match=message):
            check_pictures(as_pictures(images), network)
        with pytest.raises(UserError, match=message):
            describe(as_pictures(images), network, "cpu", ALONE)
    foreign = as_pictures(small, stored={"mu": torch.zeros(2048)})
    with pytest.raises(UserError, match="statistics of another network"):
        check_pictures(foreign, EmojiClassifier)


# ---- the command line ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def emoji_files(tmp_path_factory):
    """Two halves of the emoji: ref.npz, and samples.npz a little darker, with sorted labels."""
    folder = tmp_path_factory.mktemp("emoji")
    images = open_dataset("emoji", 32).images.permute(0, 2, 3, 1).numpy()
    np.savez(folder / "ref.npz", arr_0=images[::2])
    np.savez(folder / "samples.npz", arr_0=images[1::2] // 8 * 7, arr_1=np.arange(953))
    return folder


def test_the_emoji_distance_is_printed_as_such_and_never_beside_numbers_of_the_paper(emoji_files):
    """Catches: an emoji distance that is taken for FID."""
    flags = ("--features", "emoji", "--device", "cpu", "--json", emoji_files / "new/result.json")
    status, stdout, stderr = run_script("eval_fid.py", "emoji", emoji_files / "samples.npz", *flags)
    assert status == 0, stderr
    result = json.loads((emoji_files / "new/result.json").read_text())
    assert list(result["metrics"]) == ["emoji distance", "floor"]
    for name, value in result["metrics"].items():
        assert re.search(rf"^{name} +{value:.4f}$", stdout, re.MULTILINE)
    assert "not FID" in stdout and "paper" not in stdout and "2.15" not in stdout
    assert "is not FID: compare it only with others of 953 samples" in stderr
    samples = pictures_of(open_dataset("emoji", 32), "emoji")  # REFERENCE was the word emoji, at 32 pixels
    assert result["settings"]["reference_size"] == [32, 32] and result["settings"]["reference_count"] == samples.count
    assert result["settings"]["samples_count"] == 953 and result["settings"]["features"] == "emoji"


def test_the_numbers_of_the_paper_stand_beside_those_that_it_has(capsys):
    print_table({"FID": 3.25, "sFID": 4.5, "IS": 250.0, "precision": 0.75, "recall": 0.5})
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split() == ["FID", "3.2500", *(str(numbers[0]) for numbers in PUBLISHED.values())]
    assert lines[-1].split() == ["recall", "0.5000", "-", "-", "-", "-"] and "2.15" in lines[2]


def test_the_result_stands_beside_the_samples_and_flags_change_it(tmp_path, emoji_files):
    """--batch-size and --workers change no number; --resolution crops a folder."""
    folder = tmp_path / "drawn"
    folder.mkdir()
    torch.manual_seed(0)
    for i, image in enumerate(open_dataset("emoji", 64).images[:130]):
        from_array(image).save(folder / f"{i}.png")
    assert "not 64x64" in complaint("eval_fid.py", "emoji", folder, "--features", "emoji", "--resolution", 64)
    distances, half = [], emoji_files / "ref.npz"
    for flags in ([], ["--batch-size", 7], ["--workers", 1], ["--resolution", 32]):
        status, _, stderr = run_script("eval_fid.py", half, folder, "--features", "emoji", "--device", "cpu", *flags)
        assert status == 0, stderr
        result = json.loads((tmp_path / "drawn.eval.json").read_text())
        assert result["settings"]["samples_size"] == [32, 32]
        distances.append(result["metrics"]["emoji distance"])
    assert distances == pytest.approx([distances[0]] * 4, rel=1e-6)


def from_array(image):
    """uint8 (3, H, W) -> a PIL picture."""
    return Image.fromarray(image.permute(1, 2, 0).numpy())


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(emoji_files):
    """What torchrun does: the same command in two processes, which find each other by these variables.

    The floor, from halves of the reference, also shows that its features are in the order of the pictures again.
    """
    flags = ["ref.npz", "samples.npz", "--features", "emoji", "--device", "cpu", "--batch-size", "100"]
    paths = [emoji_files / name if name.endswith("npz") else name for name in flags]
    status, _, stderr = run_script("eval_fid.py", *paths, "--json", emoji_files / "one.json")
    assert status == 0, stderr
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(ROOT / "eval_fid.py"), *flags, "--json", "two.json"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    ranks = [
        subprocess.Popen(script, cwd=emoji_files, env=os.environ | shared | {"RANK": r, "LOCAL_RANK": r}, **pipes)
        for r in "01"
    ]
    try:
        outputs = [rank.communicate(timeout=120) for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()  # nothing to do unless something failed; no process outlives the test
            rank.wait()
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    assert "emoji distance" in outputs[0][0] and outputs[1][0] == ""  # rank 0 alone reports
    one, two = (json.loads((emoji_files / name).read_text()) for name in ("one.json", "two.json"))
    assert two["settings"]["processes"] == 2
    assert two["metrics"] == pytest.approx(one["metrics"], rel=1e-5)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(InceptionV3().state_dict(), path)
    return path


@pytest.mark.slow
def test_the_whole_script_gives_the_five_numbers_and_saved_statistics_give_them_again(weights, tmp_path):
    """5 real against 6 generated pictures of different sizes. FID by hand: of few pictures, tr((C1 C2)^(1/2)) is the
    sum of the singular values of a small matrix, as in the test of the root above.
    """
    arrays = {"ref": pictures(5, 32, 40), "samples": pictures(6, 16, 16, seed=1)}
    np.savez(tmp_path / "ref.npz", arr_0=arrays["ref"])
    np.savez(tmp_path / "samples.npz", arr_0=arrays["samples"], arr_1=np.arange(6) // 3)
    flags = ("--inception", weights, "--device", "cpu", "--batch-size", 3)
    out = tmp_path / "first.json"
    status, stdout, stderr = run_script(
        *("eval_fid.py", tmp_path / "ref.npz", tmp_path / "samples.npz", *flags),
        *("--json", out, "--save-stats", tmp_path / "stats.npz"),
    )
    assert status == 0, stderr
    result = json.loads(out.read_text())
    for name in ("FID", "sFID", "IS", "precision", "recall"):
        assert re.search(rf"^{name} +{result['metrics'][name]:.4f}\b", stdout, re.MULTILINE)
    for warning in ("32", "6 samples", "sorted by class", "not the published file"):
        assert warning in stderr

    network = load_inception(weights)
    reference, samples = (network(torch.from_numpy(array).permute(0, 3, 1, 2)) for array in arrays.values())
    for x, y, name in zip(reference, samples, ("FID", "sFID")):
        x, y = x.double(), y.double()
        a, b = (x - x.mean(0)) / (len(x) - 1) ** 0.5, (y - y.mean(0)) / (len(y) - 1) ** 0.5
        spread = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
        by_hand = ((x.mean(0) - y.mean(0)).square().sum() + spread).item()
        assert result["metrics"][name] == pytest.approx(by_hand, rel=1e-4)
    assert result["metrics"]["IS"] == pytest.approx(inception_score(samples[2].softmax(1)), rel=1e-6)

    saved = open_pictures(tmp_path / "stats.npz")
    assert saved.stored["features"].shape == (5, 2048)
    again = ("eval_fid.py", tmp_path / "stats.npz", tmp_path / "samples.npz", *flags, "--json", out)
    status, _, stderr = run_script(*again)
    assert status == 0, stderr
    repeated = json.loads(out.read_text())
    assert repeated["metrics"] == pytest.approx(result["metrics"], rel=1e-6)
    assert repeated["settings"]["reference_statistics"] == "stored"


# ---- mistakes: one line, exit status 1, no number --------------------------------------------------------------------


def test_mistakes_are_one_line_that_names_file_or_flag(tmp_path, weights, emoji_files):
    good, few, real = tmp_path / "good.npz", tmp_path / "few.npz", emoji_files / "ref.npz"
    np.savez(good, arr_0=pictures(5))
    np.savez(few, arr_0=pictures(3))
    stored = {name: np.zeros(shape) for name, shape in STATISTICS.items()}
    np.savez(tmp_path / "stats.npz", **stored, features=np.zeros((4, 2048)), size=np.array([4, 8, 8]))
    (tmp_path / "folder").mkdir()
    emoji, network = ("--features", "emoji"), ("--inception", weights)
    for arguments, message in (
        (
            (good, tmp_path / "missing.npz"),
            "missing.npz: no such file or directory; sample.py --ckpt MODEL --num 50000 --npz .*missing.npz",
        ),
        ((tmp_path / "missing.npz", good), "REFERENCE .*missing.npz: no such file or directory; none is published"),
        ((few, good), "few.npz: the FID takes at least 4 pictures, not 3"),
        ((good, few), "few.npz: the FID takes at least 4 pictures, not 3"),
        ((good, tmp_path / "stats.npz"), "stats.npz: holds saved statistics; the samples must be pictures"),
        ((good, tmp_path / "folder"), "folder holds no JPEG"),
        (("emoji", good, *emoji), "good.npz: the emoji distance takes at least 128 pictures, not 5"),
        (("emoji", real, *emoji, "--resolution", 64), "emoji: the emoji distance is for 32x32 pixels, not 64x64"),
        (("emoji", real, *emoji, *network), "--inception and --save-stats are of FID"),
        (("emoji", real, *emoji, "--save-stats", "x.npz"), "--inception and --save-stats are of FID"),
        ((good, good, "--inception", tmp_path / "missing.pth"), "missing.pth"),
        ((good, good, "--inception", good), "good.npz"),
        ((good, good, *network, "--json", good / "x.json"), "--json .*good.npz.* cannot be written"),
        ((good, good, *network, "--json", tmp_path / "folder"), "--json .*folder is a folder"),
        ((good, good, *network, "--save-stats", tmp_path / "folder"), "--save-stats .*folder is a folder"),
        ((good, good, *network, "--device", "nonsense"), "--device nonsense"),
        ((good, good, "--batch-size", 0), "--batch-size"),
        ((good, good, "--workers", 0), "--workers"),
        ((good, good, "--resolution", 0), "--resolution"),
        ((good, good, "--workers", 1025), "--workers"),
        ((good, good, "--resolution", 2049), "--resolution"),
    ):
        line = complaint("eval_fid.py", *arguments)
        assert line.startswith("eval_fid.py: ") and re.search(message, line), line


def test_features_that_are_not_finite_get_no_number():
    network = SmallNetwork()
    network.weight = network.weight * float("nan")
    with pytest.raises(UserError, match="NaN"):
        describe(as_pictures(random_pictures(9)), network, "cpu", ALONE)


@pytest.mark.slow
def test_a_shell_sees_one_line_and_the_right_status(tmp_path):
    def run(*arguments):
        script = [sys.executable, str(ROOT / "eval_fid.py"), *arguments]
        return subprocess.run(script, cwd=tmp_path, capture_output=True, text=True, timeout=100)

    bad = run("missing.npz", "missing.npz")
    assert bad.returncode == 1 and bad.stdout == "" and re.fullmatch(r"eval_fid\.py: .*missing\.npz.*\n", bad.stderr)
    assert run_script("eval_fid.py", "only_one.npz")[0] == 2
