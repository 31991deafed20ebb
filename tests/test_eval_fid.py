"""The five metrics against golden numbers, closed forms and naive loops; and input that must not give a number."""
import json
import os
import pathlib
import re
import runpy
import socket
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

import eval_fid
import inception
from eval_fid import (EvalError, Statistics, evaluate, extract_features, frechet_distance, inception_score,
                      open_pictures, precision_recall, trace_sqrt_product)

ROOT = pathlib.Path(__file__).parent.parent
GOLDEN = np.load(ROOT / "tests/golden/metrics.npz")
SQRTM = np.load(ROOT / "tests/golden/sqrtm.npz")


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def pictures(count, height=8, width=8, seed=0):
    """uint8 (N, H, W, 3), as in an npz."""
    return np.random.default_rng(seed).integers(0, 256, (count, height, width, 3), dtype=np.uint8)


# The formulas ----------------------------------------------------------------------------------------------------

def test_golden_numbers_of_the_adm_formulas():
    reference, samples = torch.from_numpy(GOLDEN["ref"]), torch.from_numpy(GOLDEN["sample"])
    r, s = reference.double(), samples.double()
    assert frechet_distance(r.mean(0), r.T.cov(), s.mean(0), s.T.cov()) == pytest.approx(GOLDEN["fid"], rel=1e-9)
    score = inception_score(torch.from_numpy(GOLDEN["probs"]), int(GOLDEN["is_split"]))
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
        with pytest.raises(EvalError):
            frechet_distance(mu, cov, mu, wrong)
    with pytest.raises(EvalError, match="NaN"):
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
        with pytest.raises(EvalError):
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
        with pytest.raises(EvalError):
            precision_recall(reference, samples)


# Streams ---------------------------------------------------------------------------------------------------------

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
        with pytest.raises(EvalError):
            statistics.mean_cov()


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_an_npz_streams_its_own_pictures_and_ranks_share_them(tmp_path, save):
    array = pictures(11, 6, 9)
    save(tmp_path / "a.npz", arr_0=array)
    opened = open_pictures(tmp_path / "a.npz")
    assert (opened.count, opened.size) == (11, (6, 9))
    whole = torch.from_numpy(array).permute(0, 3, 1, 2)
    assert torch.equal(torch.cat(list(opened.batches(4))), whole)
    first, second = list(opened.batches(4, 0, 2)), list(opened.batches(4, 1, 2))
    assert torch.equal(torch.cat([first[0], second[0], first[1]]), whole)


def test_a_folder_gives_each_picture_once_in_a_fixed_order_that_mixes_classes(tmp_path):
    array = pictures(12)
    for i, picture in enumerate(array):
        (tmp_path / f"class{i // 6}").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / f"class{i // 6}" / f"{i:02}.png")
    batches = open_pictures(tmp_path).batches
    read = torch.cat(list(batches(5))).permute(0, 2, 3, 1).numpy()
    order = [next(i for i, picture in enumerate(array) if (picture == one).all()) for one in read]
    assert sorted(order) == list(range(12)) and order != sorted(order)
    assert torch.equal(torch.cat(list(batches(5))), torch.cat(list(batches(3))))
    assert next(open_pictures(tmp_path, resolution=4).batches(5)).shape == (5, 3, 4, 4)


def test_emoji_are_a_reference_too():
    emoji = open_pictures("emoji")
    assert emoji.size == (64, 64) and next(emoji.batches(5)).dtype == torch.uint8


class FakeInception:
    """Has the shapes of the network, in no time: random projections of 8 x 8 pictures."""
    weight, classes = normal(192, 2048).float(), normal(2048, 1008, seed=1).float()

    def __call__(self, images):
        pool = images.flatten(1).float() / 255 @ self.weight
        return pool, pool[:, :2023], self.logits(pool)

    def logits(self, pool):
        return pool @ self.classes / 10


def test_features_do_not_depend_on_the_batch_size():
    batch = torch.from_numpy(pictures(10)).permute(0, 3, 1, 2)
    pool_a, _, features_a = extract_features(FakeInception(), batch.split(10))
    pool_b, spatial_b, features_b = extract_features(FakeInception(), batch.split(3), keep=7)
    torch.testing.assert_close(features_a[:7], features_b)
    torch.testing.assert_close(pool_a.mean_cov(), pool_b.mean_cov(), rtol=1e-4, atol=1e-4)
    assert spatial_b.count == 10


def test_an_error_of_the_reader_thread_reaches_the_caller():
    def batches():
        yield torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
        raise EvalError("damaged")

    with pytest.raises(EvalError, match="damaged"):
        extract_features(FakeInception(), eval_fid.prefetch(batches()))


def test_samples_sorted_by_class_are_noticed_without_labels(monkeypatch):
    """Two classes, the first half all of one: over splits the score is 1, in random order 2."""
    monkeypatch.setattr(eval_fid, "frechet_distance", lambda *statistics: 0.0)  # slow, and not the question here
    monkeypatch.setattr(eval_fid, "precision_recall", lambda *features: (0.0, 0.0))
    monkeypatch.setattr(inception_score, "__defaults__", (50,))
    model = FakeInception()
    model.logits = lambda pool: pool
    result = dict.fromkeys(("mu", "sigma", "mu_s", "sigma_s")) | {"features": torch.zeros(1, 1)}
    in_order = torch.eye(2).repeat_interleave(100, dim=0) * 50
    in_turn = torch.eye(2).repeat(100, 1) * 50
    metrics, warnings = evaluate(result, result | {"features": in_order}, model)
    assert metrics["IS"] == pytest.approx(1) and "sorted by class" in warnings[0]
    metrics, warnings = evaluate(result, result | {"features": in_turn}, model)
    assert metrics["IS"] == pytest.approx(2) and not warnings


# The command line ------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(inception.InceptionV3().state_dict(), path)
    return path


def run_script(monkeypatch, *arguments):
    """`python eval_fid.py arguments`, without the seconds that importing torch takes."""
    monkeypatch.setattr(sys, "argv", ["eval_fid.py", *map(str, arguments)])
    runpy.run_path(str(ROOT / "eval_fid.py"), run_name="__main__")


# The script, but for the decomposition of 2048 x 2048 matrices, most of its time here: the slow test below has it.
WITHOUT_ROOT = """import eval_fid
eval_fid.frechet_distance = lambda mu1, cov1, mu2, cov2: cov1.trace().item() + 2 * cov2.trace().item()
eval_fid.main()"""


@pytest.fixture(scope="module")
def finished(weights, tmp_path_factory):
    """One evaluation: 5 real against 6 generated pictures (the fewest are 4) of different sizes, sorted labels."""
    folder = tmp_path_factory.mktemp("finished")
    np.savez(folder / "ref.npz", arr_0=pictures(5, 32, 40))
    np.savez(folder / "samples.npz", arr_0=pictures(6, 16, 16, seed=1), arr_1=np.arange(6) // 3)
    command = [sys.executable, "-c", WITHOUT_ROOT, "ref.npz", "samples.npz", "--inception", str(weights), "--device",
               "cpu", "--save-stats", "stats.npz", "--json", "out/result.json", "--batch-size", "3"]
    done = subprocess.run(command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True,
                          text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    return folder, done, json.loads((folder / "out/result.json").read_text())


def test_script_prints_the_table_and_writes_the_settings(finished):
    folder, done, result = finished
    for name in ("FID", "sFID", "IS", "precision", "recall"):
        assert re.search(rf"^{name} +{result['metrics'][name]:.4f}\b", done.stdout, re.MULTILINE)
    assert "2.15" in done.stdout and "files to features" in done.stdout
    assert result["settings"]["samples_count"] == 6 and result["settings"]["reference_size"] == [32, 40]
    for warning in ("32", "6 samples", "sorted by class", "not the published file"):
        assert warning in done.stderr
    assert "Traceback" not in done.stderr


def by_hand(folder, weights):
    """Pool, spatial and logits of the reference and of the samples: the network on each whole set at once."""
    model = inception.load_inception(weights)
    arrays = [np.load(folder / name)["arr_0"] for name in ("ref.npz", "samples.npz")]
    return [model(torch.from_numpy(array).permute(0, 3, 1, 2)) for array in arrays]


def test_script_computes_what_the_functions_compute(finished, weights):
    folder, _, result = finished
    reference, samples = by_hand(folder, weights)
    metrics = result["metrics"]
    assert metrics["IS"] == pytest.approx(inception_score(samples[2].softmax(1)), rel=1e-6)
    recomputed = precision_recall(reference[0], samples[0])
    assert (metrics["precision"], metrics["recall"]) == pytest.approx(recomputed)
    for x, y, name in zip(reference, samples, ("FID", "sFID")):  # as in WITHOUT_ROOT: each side's in its place
        traces = x.double().var(0).sum() + 2 * y.double().var(0).sum()
        assert metrics[name] == pytest.approx(traces.item(), rel=1e-4)


@pytest.mark.slow
def test_the_whole_script_gives_fid_and_times_the_network(finished, weights):
    """Few pictures: tr((C1 C2)^(1/2)) from the small matrix, as in the test of the root above."""
    folder, _, _ = finished
    command = [sys.executable, str(ROOT / "eval_fid.py"), "ref.npz", "samples.npz", "--inception", str(weights),
               "--device", "cpu", "--json", "whole.json", "--batch-size", "3", "--speed"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0 and "network alone" in done.stdout, done.stderr
    metrics = json.loads((folder / "whole.json").read_text())["metrics"]
    for x, y, name in zip(*by_hand(folder, weights), ("FID", "sFID")):
        x, y = x.double(), y.double()
        a, b = (x - x.mean(0)) / (len(x) - 1) ** 0.5, (y - y.mean(0)) / (len(y) - 1) ** 0.5
        spread = a.square().sum() + b.square().sum() - 2 * torch.linalg.svdvals(a @ b.T).sum()
        assert metrics[name] == pytest.approx(((x.mean(0) - y.mean(0)).square().sum() + spread).item(), rel=1e-4)


def test_saved_statistics_replace_the_reference(finished):
    folder, _, _ = finished
    saved = open_pictures(folder / "stats.npz")
    assert (saved.count, saved.size, saved.batches) == (5, (32, 40), None)
    assert saved.stored["features"].shape == (5, 2048)
    x = saved.stored["features"].double()
    torch.testing.assert_close(saved.stored["sigma"], x.T.cov(), rtol=1e-8, atol=1e-12)


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(finished, weights):
    """What torchrun does: the same command in two processes, which find each other by these variables."""
    folder, _, single = finished
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-c", WITHOUT_ROOT, "ref.npz", "samples.npz", "--inception", str(weights), "--device",
               "cpu", "--json", "two.json", "--save-stats", "two.npz", "--batch-size", "2"]
    shared = {"PYTHONPATH": str(ROOT), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    ranks = [subprocess.Popen(command, cwd=folder, env=os.environ | shared | {"RANK": rank, "LOCAL_RANK": rank},
                              start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
             for rank in "01"]
    try:
        for rank in ranks:
            _, errors = rank.communicate(timeout=120)
            assert rank.returncode == 0, errors
    finally:
        for rank in ranks:
            rank.kill()  # nothing to do unless something failed; no process outlives the test
            rank.wait()
    double = json.loads((folder / "two.json").read_text())
    assert double["settings"]["processes"] == 2
    for name in ("IS", "precision", "recall"):
        assert double["metrics"][name] == pytest.approx(single["metrics"][name], rel=1e-5)
    with np.load(folder / "stats.npz") as one, np.load(folder / "two.npz") as two:
        for name in one.files:  # features are in the order of the pictures again: five of them, in batches of two
            np.testing.assert_allclose(two[name], one[name], rtol=1e-3, atol=1e-5 * np.abs(one[name]).max())


# Bad input: one line, exit status 1, no number -------------------------------------------------------------------

GOOD = {"arr_0": pictures(5)}
STORED = {name: np.zeros(shape) for name, shape in eval_fid.STATISTICS.items()}
BAD_ARRAYS = {
    "no arr_0": ({"images": pictures(5)}, "has no arr_0"),
    "float pictures": ({"arr_0": np.zeros((5, 8, 8, 3), np.float32)}, "float32; it must be uint8"),
    "NaN": ({"arr_0": np.full((5, 8, 8, 3), np.nan)}, "float64; it must be uint8"),
    "channels first": ({"arr_0": pictures(5).transpose(0, 3, 1, 2).copy()}, "looks like N, 3, H, W"),
    "gray": ({"arr_0": pictures(5)[..., 0].copy()}, "it must be N, H, W, 3"),
    "transparency": ({"arr_0": np.zeros((5, 8, 8, 4), np.uint8)}, "it must be N, H, W, 3"),
    "Fortran order": ({"arr_0": np.asfortranarray(pictures(5))}, "Fortran"),
    "pickled": ({"arr_0": np.array([{}, 1], dtype=object)}, "pickled"),
    "nothing": ({"arr_0": pictures(0)}, "at least two pictures, found 0"),
    "one picture": ({"arr_0": pictures(1)}, "at least two pictures, found 1"),
    "three pictures": ({"arr_0": pictures(3)}, "more than 3 pictures"),
    "huge pictures": ({"arr_0": np.zeros((5, 2049, 1, 3), np.uint8)}, "the limits are"),
    "some statistics": (GOOD | {"mu": np.zeros(2048)}, "holds mu, but not all of"),
    "other dimensions": (GOOD | STORED | {"mu": np.zeros(192)}, r"mu is float64 \(192,\)"),
    "other matrix": (GOOD | STORED | {"sigma": np.zeros((192, 192))}, "sigma is float64"),
    "whole numbers": (GOOD | STORED | {"mu": np.zeros(2048, int)}, "mu is int64"),
    "NaN statistics": (GOOD | STORED | {"mu_s": np.full(2023, np.nan)}, "mu_s holds NaN"),
}


def refused(monkeypatch, capsys, message, *arguments):
    with pytest.raises(SystemExit) as stop:
        run_script(monkeypatch, *arguments)
    error = stop.value.code  # sys.exit(text) prints the text and gives status 1
    assert isinstance(error, str) and error.startswith("eval_fid.py: ") and "\n" not in error
    assert re.search(message, error), error
    assert "FID" not in capsys.readouterr().out


@pytest.mark.parametrize("side", ["reference", "samples"])
@pytest.mark.parametrize("case", BAD_ARRAYS)
def test_bad_arrays_are_refused(case, side, tmp_path, monkeypatch, capsys):
    arrays, message = BAD_ARRAYS[case]
    bad, good = tmp_path / "bad.npz", tmp_path / "good.npz"
    np.savez_compressed(bad, **arrays)
    np.savez(good, **GOOD)
    refused(monkeypatch, capsys, message, *((bad, good) if side == "reference" else (good, bad)))


def npy(header_shape, data=b""):
    """An npy file that promises `header_shape` uint8 and holds `data`."""
    text = repr({"descr": "|u1", "fortran_order": False, "shape": header_shape}).ljust(117) + "\n"
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text.encode() + data


def damaged_npz(path, case):
    array = pictures(5)
    if case == "lying header":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", npy((10**6, 512, 512, 3), b"few"))
    elif case == "broken header":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("arr_0.npy", npy((5, 8, 8, 3), array.tobytes()).replace(b"}", b"("))
    elif case == "other compression":  # bzip2 packs zeros a million times smaller
        with zipfile.ZipFile(path, "w", zipfile.ZIP_BZIP2) as archive:
            archive.writestr("arr_0.npy", npy((5, 8, 8, 3), array.tobytes()))
    elif case == "zip bomb":  # header and directory agree on 786 GB; a real one would come from a real compressor
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("arr_0.npy", npy((10**6, 512, 512, 3)))
            archive.filelist[0].file_size += 10**6 * 512 * 512 * 3
    else:
        np.savez(path, arr_0=array)
        data = path.read_bytes()
        if case == "bit flip":
            place = data.index(array.tobytes()) + 100
            data = data[:place] + bytes([data[place] ^ 1]) + data[place + 1:]
        path.write_bytes({"truncated": data[:len(data) // 2], "text": b"not a zip", "empty": b""}.get(case, data))


@pytest.mark.parametrize("case, message", [
    ("truncated", "not an npz file, truncated or damaged"), ("text", "not an npz file"), ("empty", "not an npz file"),
    ("lying header", "promises .*but holds"), ("broken header", "not an npz file"), ("zip bomb", "would unpack"),
    ("other compression", "numpy does not use"), ("bit flip", "Bad CRC-32"),
])
def test_damaged_and_hostile_files_are_refused(case, message, tmp_path, weights, monkeypatch, capsys):
    damaged_npz(tmp_path / "bad.npz", case)
    np.savez(tmp_path / "good.npz", **GOOD)
    refused(monkeypatch, capsys, message, tmp_path / "good.npz", tmp_path / "bad.npz", "--inception", weights)


def test_bad_folders_and_paths_are_refused(tmp_path, weights, monkeypatch, capsys):
    good, mixed, empty, broken = (tmp_path / name for name in ("good.npz", "mixed", "empty", "broken"))
    np.savez(good, **GOOD)
    for folder in (mixed, empty, broken):
        folder.mkdir()
    for i in range(5):
        Image.fromarray(pictures(1, 8 + i // 4)[0]).save(mixed / f"{i}.png")
        (broken / f"{i}.png").write_bytes(b"")
    options = ("--inception", weights)
    refused(monkeypatch, capsys, "png: .*--resolution crops", good, mixed, *options)
    refused(monkeypatch, capsys, "empty", good, empty, *options)
    refused(monkeypatch, capsys, "png", good, broken, *options)
    refused(monkeypatch, capsys, "No such file", good, tmp_path / "missing.npz", *options)
    refused(monkeypatch, capsys, "No such file", good, good, "--inception", tmp_path / "missing.pth")
    refused(monkeypatch, capsys, "not a readable weights file", good, good, "--inception", good.with_name("good.npz"))
    refused(monkeypatch, capsys, "good.npz", good, good, "--json", good / "result.json", *options)
    refused(monkeypatch, capsys, "cannot be written", good, good, "--json", mixed, *options)
    refused(monkeypatch, capsys, "--device nonsense", good, good, "--device", "nonsense", *options)


def test_saved_statistics_are_no_samples(finished, monkeypatch, capsys):
    stats = finished[0] / "stats.npz"
    refused(monkeypatch, capsys, "must be pictures", stats, stats)


def test_a_shell_sees_one_line_and_the_right_status(tmp_path):
    def run(*arguments):
        return subprocess.run([sys.executable, str(ROOT / "eval_fid.py"), *arguments], cwd=tmp_path,
                              capture_output=True, text=True, timeout=100)
    bad = run("missing.npz", "missing.npz")
    assert bad.returncode == 1 and bad.stdout == "" and re.fullmatch(r"eval_fid\.py: .*missing\.npz.*\n", bad.stderr)
    assert run("only_one.npz").returncode == 2
