"""FID, sFID, Inception Score, precision and recall, with the formulas and habits of ADM's evaluator.

A generated picture cannot be right or wrong; only a crowd of them can resemble a crowd of real ones. All five
numbers compare two crowds by the features that one classifier sees (inception.py). The paper's numbers come from
the evaluator of ADM (Dhariwal & Nichol, arXiv 2105.05233), a TensorFlow 1 program; this file computes the same.

    python eval_fid.py VIRTUAL_imagenet256_labeled.npz samples.npz            # the paper's protocol
    python eval_fid.py IMAGENET/train samples.npz --resolution 256 --save-stats imagenet256.npz
    python eval_fid.py imagenet256.npz samples.npz                            # with the saved statistics
    torchrun --nproc_per_node=8 eval_fid.py REFERENCE.npz samples.npz         # shares the feature extraction

Each input is an npz with `arr_0` (uint8, N x H x W x 3), a folder of pictures (searched recursively), or `emoji`.
An npz may carry statistics (mu, sigma, mu_s, sigma_s), which are then used in place of those of its own pictures:
ADM's reference file holds those of all 1.28 million training pictures, and 10,000 pictures for precision, recall.

To check an installation: ADM's admnet_guided_upsampled_imagenet256.npz against VIRTUAL_imagenet256_labeled.npz must
give IS 215.84, FID 3.9426, sFID 6.1404, precision 0.8265, recall 0.5309.

Read in this order: 1 the three formulas, 2 statistics of a stream, 3 reading pictures, 4 features, 5 the script.
Left out: Kernel Inception Distance, CLIP and DINOv2 variants of FID, text-to-image scores.
"""
import argparse
import contextlib
import dataclasses
import hashlib
import json
import math
import os
import pathlib
import sys
import time
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.distributed as dist
from tqdm import tqdm

import inception
from data import DataError, center_crop, list_images, open_dataset, read_image
from device import DeviceError, pick_device
from download import DownloadError, cached_download
from processes import place

IS_SPLIT = 5000  # pictures per split of the Inception Score, as in ADM
NEIGHBOUR = 3  # precision and recall measure to the 3rd nearest neighbour, as in ADM
REFERENCE_KEEP = 10_000  # pictures of a reference folder for precision and recall; ADM's file has as many
MAX_SIDE, MAX_COUNT = 2048, 2_000_000  # whoever claims more is refused: a batch and all features must fit in memory
STATISTICS = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}
PUBLISHED = {  # paper, ImageNet 256x256 after 160 epochs; FID, sFID, IS
    "L/16 Euler-50": (2.64, 5.25, 297), "XL/16 Euler-50": (2.29, 4.82, 303),
    "XL/16 Adams2-50": (2.16, 4.93, 291), "XL/16 Euler-100": (2.15, 4.55, 297),
}


class EvalError(ValueError):
    """Input that cannot give a meaningful number; the message is one line."""


# 1. The three formulas -------------------------------------------------------------------------------------------

def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance of two Gaussians: FID when they are fitted to Inception features.

    mu1, mu2: (D,); cov1, cov2: (D, D), symmetric, no negative eigenvalues; any float type. Returns a float >= 0,
    computed in float64. Raises EvalError on other shapes, NaN, or matrices that are no covariances.
    Source: Dowson & Landau 1982; Heusel et al., arXiv 1706.08500, Eq. 6.
    """
    mu1, cov1, mu2, cov2 = (torch.as_tensor(value).cpu().double() for value in (mu1, cov1, mu2, cov2))
    if mu1.ndim != 1 or mu1.shape != mu2.shape or {cov1.shape, cov2.shape} != {(len(mu1), len(mu1))}:
        raise EvalError("statistics of different dimensions: " + ", ".join(
            str(tuple(value.shape)) for value in (mu1, cov1, mu2, cov2)))
    # d^2 = |mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))
    distance = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_sqrt_product(cov1, cov2)
    if not distance.isfinite():
        raise EvalError("the statistics hold NaN or Inf")
    return max(distance.item(), 0.0)  # equal Gaussians may come out as -1e-13


def trace_sqrt_product(cov1, cov2):
    """tr((C1 C2)^(1/2)) of two float64 covariances (D, D) -> float64 scalar. Raises EvalError.

    C1 C2 is not symmetric and often singular (fewer pictures than dimensions), where a general matrix root is slow
    and loses half of the digits. With roots C = R R^T from symmetric eigendecompositions, C1 C2 = R1 R1^T R2 R2^T
    has the eigenvalues of (R1^T R2)(R1^T R2)^T: their square roots are the singular values of R1^T R2. These have
    errors of 1e-16 of the largest. Eigenvalues of the product would have them *before* the root, so 1e-8 after it.
    """
    def root(cov):  # (D, D) -> (D, rank)
        if not cov.isfinite().all():
            raise EvalError("the covariance holds NaN or Inf")
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)  # (D), (D, D); the largest value is the last
        # Rounding may leave eigenvalues of -1e-13; much more than that is a damaged file, not a covariance.
        if values[0] < -1e-4 * values[-1].abs() or (cov - cov.T).abs().max() > 1e-4 * cov.abs().max():
            raise EvalError("the matrix is no covariance: not symmetric, or with negative eigenvalues")
        # What rounding makes of a zero: up to D * 2e-16 of the largest. Its root, 1e-7, would be a visible error.
        real = values > len(values) * torch.finfo(torch.float64).eps * values[-1]  # (D)
        return vectors[:, real] * values[real].sqrt()  # (D, rank)

    try:
        return torch.linalg.svdvals(root(cov1).T @ root(cov2)).sum()  # ()
    except torch.linalg.LinAlgError as error:
        raise EvalError("the decomposition of the covariance did not converge") from error


def inception_score(probs, split_size=IS_SPLIT):
    """Inception Score: high when each picture is clearly of one class and all classes occur.

    probs: (N, classes), rows that sum to 1. Returns a float in [1, classes]: the mean over consecutive splits of
    `split_size` pictures, of which the last may be shorter and counts like the others. Raises EvalError.
    Each split should hold all classes, so the order matters: of class-sorted samples each split holds a few classes
    only, and 298 becomes 62. Source: Salimans et al., arXiv 1606.03498, section 4.
    """
    probs = torch.as_tensor(probs)
    if probs.ndim != 2 or len(probs) < 2:
        raise EvalError(f"Inception Score needs (N, classes) with N >= 2, got {tuple(probs.shape)}")
    scores = []
    for p in probs.split(split_size):  # one split in float64 at a time
        p = p.double()  # n classes
        if not ((p >= 0).all() and (p.sum(dim=1) - 1).abs().max() < 1e-3):  # NaN fails, too
            raise EvalError("class probabilities must be >= 0 and sum to 1")
        marginal = p.mean(dim=0)  # classes
        # exp(mean_n KL(p_n || marginal)); xlogy makes 0 log 0 = 0
        scores.append((torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1).mean().exp())  # ()
    return torch.stack(scores).mean().item()


def precision_recall(reference, samples, k=NEIGHBOUR, block=1000):
    """How many samples look real, and how much of reality the samples cover.

    reference: (N, D), samples: (M, D), features. Returns two floats in [0, 1]. Computed in float64 on the tensors'
    device, `block` rows at a time: memory is block * max(N, M), and the result does not depend on it.
    Raises EvalError on other shapes, NaN, or k or fewer rows.
    Source: Kynkaanniemi et al., arXiv 1904.06991, Eq. 1 and 2.

    Each set is described by balls: one around each of its points, reaching to the k-th nearest other point of that
    set. Precision: the part of the samples inside any ball of the reference. Recall: the other way round.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise EvalError(f"features must be (N, D) and (M, D), got {tuple(reference.shape)}, {tuple(samples.shape)}")
    if min(len(reference), len(samples)) <= k:
        raise EvalError(f"precision and recall need more than {k} pictures on each side, "
                        f"got {len(reference)} and {len(samples)}")
    # Distances do not change when everything moves, and less is lost to rounding near the origin. The shift itself
    # is rounded so that features which are whole numbers stay so, and ties between them stay ties.
    shift = reference.double().mean(dim=0).round()  # D
    reference, samples = reference.double() - shift, samples.double() - shift  # N D, M D
    if not (reference.isfinite().all() and samples.isfinite().all()):
        raise EvalError("the features hold NaN or Inf")

    def blocks(rows, what):
        return tqdm(rows.split(block), desc=what, leave=False, disable=None)  # None: no bar in a log file

    def radii(points, what):  # squared distance to the k-th neighbour; one more, because the nearest is oneself
        return torch.cat([squared_distances(rows, points).topk(k + 1, largest=False).values[:, -1]
                          for rows in blocks(points, what)])

    radius_ref, radius_smp = radii(reference, "reference balls"), radii(samples, "sample balls")  # N, M
    realistic = torch.zeros(len(samples), dtype=torch.bool, device=samples.device)  # M
    covered = 0
    for rows, radius in zip(blocks(reference, "precision, recall"), radius_ref.split(block)):
        squared = squared_distances(rows, samples)  # block M
        realistic |= (squared <= radius[:, None]).any(dim=0)  # M: a point on the surface is inside
        covered += (squared <= radius_smp).any(dim=1).sum().item()
    return realistic.double().mean().item(), covered / len(reference)


def squared_distances(a, b):
    """All |a_i - b_j|^2, of (n, D) and (m, D), float64 -> (n, m)."""
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b: one matrix multiplication, many times faster than forming differences.
    lengths = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)  # n m
    squared = torch.addmm(lengths, a, b.T, alpha=-2)  # n m
    # The price is an error of about 1e-14 of the lengths, where copies of one picture must give exactly 0: balls of
    # radius 0 exist when samples repeat. Below a millionth of their length two points count as the same; the
    # float32 features of one picture, computed in two different batches, differ by about as little.
    return squared.masked_fill_(squared < 1e-12 * lengths, 0)  # n m


# 2. Statistics of a stream ---------------------------------------------------------------------------------------

class Statistics:
    """Mean and covariance of features that arrive in batches; memory does not grow with their number.

    Keeps n, sum x and sum x x^T, in float64: features are of order 1, so that n = 1e6 leaves ten good digits. Sums
    of several processes simply add up.
    """

    def __init__(self, dim, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)  # ()
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)  # D
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # D D

    def update(self, features):
        """features: (B, D), any float type."""
        x = features.to(self.total.device).double()  # B D
        self.count += len(x)
        self.total += x.sum(dim=0)  # D
        self.outer.addmm_(x.T, x)  # D D

    def mean_cov(self):
        """-> mean (D,), covariance (D, D), float64 on the CPU. Raises EvalError on fewer than two rows or NaN."""
        n, total, outer = self.count.item(), self.total.cpu(), self.outer.cpu()
        if n < 2:
            raise EvalError(f"a covariance needs at least two pictures, got {n:.0f}")
        if not outer.isfinite().all():
            raise EvalError("the features hold NaN or Inf")
        mean = total / n  # D
        return mean, (outer - n * torch.outer(mean, mean)) / (n - 1)  # D, D D


# 3. Reading pictures ---------------------------------------------------------------------------------------------

@dataclasses.dataclass
class Pictures:
    """One side of the comparison before anything is computed."""
    name: str
    count: int
    size: tuple  # (height, width)
    # batches(batch_size, rank, world) -> iterator over uint8 (B, 3, H, W), every world-th batch from the rank-th
    # on; None for a file of --save-stats, which has "features" instead of pictures
    batches: Callable
    stored: dict  # tensors: what an npz holds of STATISTICS and, from --save-stats, "features"
    sorted_labels: bool = False


def open_pictures(spec, resolution=None, workers=4):
    """spec: an npz, a folder, or "emoji" -> Pictures, after all checks that do not need the pixels.

    resolution: crop the pictures of a folder to this size. Raises EvalError, DataError, OSError.
    """
    if str(spec) == "emoji":
        dataset = open_dataset("emoji", resolution or 64)
        return _from_items(spec, range(len(dataset)), lambda index: dataset[index][0], workers)
    path = pathlib.Path(spec)
    if not path.is_dir():
        return _from_npz(path)
    files = list_images(path)

    def load(file):
        picture = read_image(file)
        picture = center_crop(picture, resolution) if resolution else picture
        return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # 3 H W

    return _from_items(spec, files, load, workers)


def _from_items(name, items, load, workers):
    """Pictures that are loaded one by one: load(item) -> uint8 (3, H, W)."""
    # A fixed shuffle. Folders list one class after the other, which would collapse the Inception Score; besides,
    # the first REFERENCE_KEEP pictures become a fair choice for precision and recall.
    count = len(items)
    items = [items[index] for index in torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()]
    height, width = load(items[0]).shape[1:]
    _check_size(name, count, height, width)

    def load_checked(item):
        picture = load(item)  # 3 H W
        if picture.shape[1:] != (height, width):
            raise EvalError(f"{item}: {picture.shape[2]}x{picture.shape[1]} pixels, but the others have "
                            f"{width}x{height}; --resolution crops a folder to one size")
        return picture

    def batches(batch_size, rank=0, world=1):
        with ThreadPoolExecutor(workers) as pool:  # threads: Pillow decodes outside of Python's lock
            for start in range(rank * batch_size, count, world * batch_size):
                yield torch.stack(list(pool.map(load_checked, items[start:start + batch_size])))  # B 3 H W

    return Pictures(str(name), count, (height, width), batches, {})


def _check_size(name, count, height, width):  # from a header: nothing is allocated before this has passed
    if count < 2:
        raise EvalError(f"{name}: needs at least two pictures, found {count}")
    if not (1 <= height <= MAX_SIDE and 1 <= width <= MAX_SIDE and count <= MAX_COUNT):
        raise EvalError(f"{name}: {count} pictures of {width}x{height}; the limits are {MAX_COUNT} of {MAX_SIDE}")


@contextlib.contextmanager
def _npz_errors(path):
    """Whatever zip, zlib and npy readers raise on a damaged file (a dozen types), as one line that names it."""
    try:
        yield
    except Exception as error:
        if isinstance(error, EvalError) or isinstance(error, OSError) and error.filename:
            raise  # our own words; or a path that cannot be opened, which says so itself
        reason = (str(error) or repr(error)).splitlines()[0]
        raise EvalError(f"{path}: not an npz file, truncated or damaged ({reason})") from error


def _open_array(archive, key):
    """-> (stream at the first value, shape, dtype). Nothing of the array's claimed size is allocated."""
    info = archive.getinfo(f"{key}.npy")
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise EvalError(f"{archive.filename}: {key} is compressed by a method that numpy does not use")
    # Deflate can blow a megabyte up to a gigabyte of zeros. Pictures shrink by less than ten, even drawn ones.
    if info.file_size > 2**30 and info.file_size > 200 * info.compress_size:
        sizes = f"from {info.compress_size} to {info.file_size} bytes"
        raise EvalError(f"{archive.filename}: {key} would unpack {sizes}")
    stream = archive.open(info)
    version = np.lib.format.read_magic(stream)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(stream)
    if dtype.hasobject or fortran:
        raise EvalError(f"{archive.filename}: {key} is a Fortran-ordered or pickled array, which is not read")
    # Python's integers do not overflow: this is the true size of what the header promises.
    if stream.tell() + math.prod(shape) * dtype.itemsize != info.file_size:
        raise EvalError(f"{archive.filename}: {key} promises {shape} {dtype}, but holds {info.file_size} bytes")
    return stream, shape, dtype


def _from_npz(path):
    """Pictures of an npz: everything but arr_0 is read now, arr_0 batch by batch when it is asked for."""
    stored = {}
    with _npz_errors(path), zipfile.ZipFile(path) as archive:
        keys = [name.removesuffix(".npy") for name in archive.namelist()]
        wanted = [key for key in STATISTICS if key in keys]
        if wanted and len(wanted) < len(STATISTICS):
            raise EvalError(f"{path}: holds {', '.join(wanted)}, but not all of {', '.join(STATISTICS)}")
        saved = bool(wanted) and "features" in keys  # by --save-stats: all that a reference needs, without pictures
        for key in wanted + ["features"] * saved:
            stream, shape, dtype = _open_array(archive, key)
            rows = min(shape[0], 10 * REFERENCE_KEEP) if shape else 0  # of features only
            expected = STATISTICS.get(key, (rows, 2048))
            if shape != expected or dtype not in (np.float32, np.float64):
                raise EvalError(f"{path}: {key} is {dtype} {shape}; Inception's statistics are float {expected}")
            stored[key] = torch.from_numpy(np.frombuffer(stream.read(), dtype).reshape(shape).copy())
            if not stored[key].isfinite().all():
                raise EvalError(f"{path}: {key} holds NaN or Inf")
        if saved:
            stream, shape, dtype = _open_array(archive, "size")
            if shape != (3,) or dtype != np.int64:
                raise EvalError(f"{path}: size is {dtype} {shape}; --save-stats writes int64 (3,)")
            count, height, width = np.frombuffer(stream.read(), dtype).tolist()
            return Pictures(str(path), count, (height, width), None, stored)
        if "arr_0" not in keys:
            raise EvalError(f"{path}: has no arr_0 (it has: {', '.join(keys) or 'nothing'})")
        _, shape, dtype = _open_array(archive, "arr_0")
        if dtype != np.uint8:
            raise EvalError(f"{path}: arr_0 is {dtype}; it must be uint8, 0 to 255 (data.to_uint8 converts)")
        if len(shape) != 4 or shape[3] != 3:
            hint = "; this looks like N, 3, H, W: transpose it" if len(shape) == 4 and shape[1] == 3 else ""
            raise EvalError(f"{path}: arr_0 has shape {shape}; it must be N, H, W, 3{hint}")
        count, height, width, _ = shape
        _check_size(path, count, height, width)
        labels = None
        if "arr_1" in keys:  # ADM's sampler and ours store the classes there
            stream, label_shape, dtype = _open_array(archive, "arr_1")
            if label_shape == (count,) and dtype.kind in "iu":
                labels = np.frombuffer(stream.read(), dtype)

    def batches(batch_size, rank=0, world=1):
        # One batch at a time in the order of the file, so that it is never in memory as a whole; zipfile compares
        # the checksum when the last byte has passed. Each rank reads all and keeps its part: reading is quick.
        with _npz_errors(path), zipfile.ZipFile(path) as archive:
            stream = _open_array(archive, "arr_0")[0]
            for index, start in enumerate(range(0, count, batch_size)):
                rows = min(batch_size, count - start)
                data = stream.read(rows * height * width * 3)
                if len(data) != rows * height * width * 3:
                    raise EvalError(f"{path}: truncated after picture {start}")
                if index % world == rank:
                    images = torch.frombuffer(bytearray(data), dtype=torch.uint8).view(rows, height, width, 3)
                    yield images.permute(0, 3, 1, 2)  # B 3 H W

    in_order = labels is not None and labels[0] != labels[-1] and bool((labels[1:] >= labels[:-1]).all())
    return Pictures(str(path), count, (height, width), batches, stored, in_order)


# 4. Features -----------------------------------------------------------------------------------------------------

def prefetch(iterator):
    """The same items, each read in a thread while the one before it is in use."""
    iterator = iter(iterator)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(next, iterator, None)
        while (item := waiting.result()) is not None:  # errors of the reader appear here
            waiting = thread.submit(next, iterator, None)
            yield item


def extract_features(model, batches, device="cpu", keep=None, total=None, desc="features"):
    """Run the network over a stream of pictures.

    model: InceptionV3 on `device`; batches: iterable of uint8 (B, 3, H, W); keep: how many rows of pool to return
    (None: all); total: number of batches, which turns the progress bar on.
    Returns Statistics of pool, Statistics of spatial, and pool itself, float32 (rows, 2048) on the CPU. The logits
    are not kept: `model.logits(pool)` gives them again.
    """
    exact = "cpu" if str(device) == "mps" else device  # Apple's GPUs have no float64
    pool_stats, spatial_stats = Statistics(2048, exact), Statistics(2023, exact)
    kept, rows = [torch.empty(0, 2048)], 0  # a rank may get no batch at all
    for images in tqdm(batches, desc=desc, total=total, unit="batch", disable=None if total else True):
        pool, spatial, _ = model(images.to(device))  # B 2048, B 2023
        pool_stats.update(pool)
        spatial_stats.update(spatial)
        if keep is None or rows < keep:
            kept.append(pool.cpu())
            rows += len(pool)
    return pool_stats, spatial_stats, torch.cat(kept)[:keep]


def share_features(pool_stats, spatial_stats, kept, batch_size, keep=None):
    """Under torchrun: add up the sums of all ranks and put the kept features into the order of the pictures.

    Rank r has had batches r, r + world, r + 2 world, ...; all of `batch_size` except the very last.
    Returns the three arguments as one process alone would have got them, up to rounding in the sums.
    """
    if not dist.is_initialized():
        return pool_stats, spatial_stats, kept
    for statistics in (pool_stats, spatial_stats):
        for value in (statistics.count, statistics.total, statistics.outer):
            dist.all_reduce(value)
    count = int(pool_stats.count)
    keep = min(count, keep or count)
    local = torch.arange(len(kept))
    row = (local // batch_size * dist.get_world_size() + dist.get_rank()) * batch_size + local % batch_size
    everything = torch.zeros(keep, kept.shape[1], device=pool_stats.total.device)  # keep 2048
    # Each row is written by one rank and zero elsewhere, so that the sum over ranks is a gather, and exact.
    everything[row[row < keep].to(everything.device)] = kept[row < keep].to(everything.device)
    dist.all_reduce(everything)
    return pool_stats, spatial_stats, everything.cpu()


def describe(pictures, model, device="cpu", batch_size=64, keep=None, rank=0, world=1):
    """Pictures -> dict with mu, sigma, mu_s, sigma_s (float64) and features (float32 (rows, 2048)), on the CPU.

    Statistics that the file carries are taken from there; the network runs for the rest. keep: as above.
    """
    if pictures.batches is None:
        return pictures.stored
    total = len(range(0, pictures.count, world * batch_size)) if rank == 0 else None  # one rank draws the bar
    batches = prefetch(pictures.batches(batch_size, rank, world))
    found = extract_features(model, batches, device, keep, total, f"features of {pathlib.Path(pictures.name).name}")
    pool, spatial, features = share_features(*found, batch_size, keep)
    (mu, sigma), (mu_s, sigma_s) = pool.mean_cov(), spatial.mean_cov()
    computed = {"mu": mu, "sigma": sigma, "mu_s": mu_s, "sigma_s": sigma_s, "features": features}
    return computed | pictures.stored


def evaluate(reference, samples, model, device="cpu"):
    """Two results of `describe` -> dict of the five metrics (floats), list of warnings. Raises EvalError."""
    warnings = []
    features = samples["features"]  # N 2048
    logits = torch.cat([model.logits(rows.to(device)).cpu() for rows in features.split(IS_SPLIT)])  # N 1008
    probs = logits.softmax(dim=1)  # N 1008
    score = inception_score(probs)
    # Samples sorted by class give themselves away: in random order each split has all classes, and the score rises.
    shuffled = inception_score(probs[torch.randperm(len(probs), generator=torch.Generator().manual_seed(0))])
    if shuffled > 1.1 * score:
        warnings.append(f"the samples look sorted by class: in random order, their IS is {shuffled:.2f}")
    exact = "cpu" if str(device) == "mps" else device  # for float64
    precision, recall = precision_recall(reference["features"].to(exact), features.to(exact))
    fid = frechet_distance(reference["mu"], reference["sigma"], samples["mu"], samples["sigma"])
    sfid = frechet_distance(reference["mu_s"], reference["sigma_s"], samples["mu_s"], samples["sigma_s"])
    return {"FID": fid, "sFID": sfid, "IS": score, "precision": precision, "recall": recall}, warnings


# 5. The script ---------------------------------------------------------------------------------------------------

def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("reference", help="npz, folder of real pictures, file of --save-stats, or emoji")
    parser.add_argument("samples", help="npz or folder of generated pictures")
    parser.add_argument("--inception", metavar="FILE", help="weights of the network, in place of the download")
    parser.add_argument("--resolution", type=int, help="crop the pictures of folders to this size, as ADM does")
    parser.add_argument("--save-stats", metavar="FILE", help="keep the reference's statistics as an npz")
    parser.add_argument("--json", metavar="FILE", help="results and settings; if left out, SAMPLES.eval.json")
    parser.add_argument("--batch-size", type=int, default=64, help="pictures per run of the network and device")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count()), help="threads that decode pictures")
    parser.add_argument("--device", default="auto", help="auto takes cuda, then mps, then cpu")
    parser.add_argument("--speed", action="store_true", help="also time the network alone, on a ready batch")
    args = parser.parse_args()
    if min(args.batch_size, args.workers, 1 if args.resolution is None else args.resolution) < 1:
        parser.error("--batch-size, --workers and --resolution must be at least 1")
    args.json = pathlib.Path(args.json or args.samples.rstrip("/") + ".eval.json")
    args.save_stats = args.save_stats and pathlib.Path(args.save_stats)
    return args


def write_whole(path, write):
    """write(file), so that at every moment `path` is absent, the old file, or all of the new one."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # left only after an error


def network_speed(model, batch_size, size, device, repeats=5):
    """Pictures per second of the network in a plain loop on a ready batch: what reading has to keep up with."""
    images = torch.randint(0, 256, (batch_size, 3, *size), dtype=torch.uint8).to(device)  # B 3 H W
    for repeat in range(repeats + 1):
        if repeat == 1:  # the first run chooses kernels and is not counted
            start = time.perf_counter()
        model(images)[0].cpu()  # a copy to the CPU waits until the device is done
    return repeats * batch_size / (time.perf_counter() - start)


def print_table(metrics):
    """The five numbers, beside the paper's."""
    print(f"\n{'':10}{'this run':>10}" + "".join(f"{name:>17}" for name in PUBLISHED) + "   (paper, ImageNet 256)")
    for row, (name, value) in enumerate(metrics.items()):
        # Precision and recall have no entry: only the first three are in the table that we compare with.
        published = [numbers[row] if row < len(numbers) else "-" for numbers in PUBLISHED.values()]
        print(f"{name:10}{value:10.4f}" + "".join(f"{number:>17}" for number in published))


def main():
    """Checks both inputs, extracts features, and prints and writes the five numbers."""
    args = parse_args()
    rank, local_rank, world = place()
    device = pick_device(args.device, local_rank)
    # Full float32 on GPUs: with TF32 the inputs of a convolution lose all but 10 bits of their mantissa.
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    if world > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    warnings = []

    # All that can be found wrong without the network comes first, not after an hour of features.
    for path in filter(None, (args.json, args.save_stats)):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.is_dir() or not os.access(path.parent, os.W_OK):
            raise EvalError(f"{path} cannot be written; --json and --save-stats choose other places")
    reference = open_pictures(args.reference, args.resolution, args.workers)
    samples = open_pictures(args.samples, args.resolution, args.workers)
    if samples.batches is None:
        raise EvalError(f"{args.samples}: holds saved statistics; the samples must be pictures")
    if min(reference.count, samples.count) <= NEIGHBOUR:
        raise EvalError(f"precision and recall need more than {NEIGHBOUR} pictures on each side, "
                        f"got {reference.count} and {samples.count}")
    if reference.size != samples.size:
        warnings.append("the reference has {1}x{0} pixels, the samples {3}x{2}: blur counts as a difference".format(
            *reference.size, *samples.size))
    if samples.count < 50_000:
        warnings.append(f"{samples.count} samples: published numbers use 50,000; fewer make FID larger")
    if samples.sorted_labels:
        warnings.append("the samples are sorted by class (arr_1): that collapses the Inception Score; shuffle them")
    if samples.stored:
        warnings.append("FID and sFID use the statistics stored with the samples, not their pictures")

    published = inception.SHA256_PREFIX
    weights = args.inception or cached_download(inception.URL, flag="--inception", sha256_prefix=published)
    digest = hashlib.sha256(pathlib.Path(weights).read_bytes()).hexdigest()
    if not digest.startswith(published):
        warnings.append(f"{weights} is not the published file {published}: nothing is comparable")
    model = inception.load_inception(weights).to(device)

    start = time.perf_counter()
    found_samples = describe(samples, model, device, args.batch_size, None, rank, world)
    speed = samples.count / (time.perf_counter() - start)
    keep = (1 if pathlib.Path(args.reference).is_dir() else 10) * REFERENCE_KEEP  # --save-stats is read with so many
    found_reference = describe(reference, model, device, args.batch_size, keep, rank, world)
    if world > 1:
        dist.destroy_process_group()  # the rest is one process's work
    if rank > 0:
        return
    metrics, more = evaluate(found_reference, found_samples, model, device)
    if not all(math.isfinite(value) for value in metrics.values()):
        raise EvalError(f"a metric is not finite: {metrics}")
    warnings += more

    if args.save_stats:
        arrays = {key: value.numpy() for key, value in found_reference.items()}
        arrays["size"] = np.array([reference.count, *reference.size], dtype=np.int64)
        write_whole(args.save_stats, lambda file: np.savez(file, **arrays))
    settings = {"reference": args.reference, "samples": args.samples, "resolution": args.resolution,
                "reference_count": reference.count, "reference_size": reference.size,
                "reference_statistics": "stored" if reference.stored else "computed",
                "reference_features": len(found_reference["features"]), "samples_count": samples.count,
                "samples_size": samples.size, "inception_sha256": digest, "split_size": IS_SPLIT,
                "neighbour": NEIGHBOUR, "batch_size": args.batch_size, "device": str(device), "processes": world,
                "torch": torch.__version__}
    result = {"metrics": metrics, "settings": settings, "warnings": warnings, "pictures_per_second": speed}
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print_table(metrics)
    print(f"\nfiles to features: {speed:.1f} pictures/s")
    if args.speed:
        result["network_alone"] = network_speed(model, args.batch_size, samples.size, device)
        print(f"network alone on ready batches: {result['network_alone']:.1f} pictures/s on one device")
    write_whole(args.json, lambda file: file.write(json.dumps(result, indent=2).encode()))
    print(f"written to {args.json}")


if __name__ == "__main__":
    try:
        main()
    except (EvalError, DataError, DeviceError, DownloadError, inception.InceptionError, OSError) as error:
        sys.exit(f"eval_fid.py: {error}")
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "/gloo/" not in str(error):
            raise
        line = str(error).strip().splitlines()[-1]  # the process that failed says why
        sys.exit(f"eval_fid.py: rank {os.environ.get('RANK', 0)} lost touch with another process: {line}")
