"""FID, sFID, Inception Score, precision and recall, with the formulas and habits of ADM's evaluator.

A generated picture cannot be right or wrong; only a crowd of them can resemble a crowd of real ones. All numbers here
compare two crowds by the features that one classifier sees (pretrained/inception.py). The paper's numbers come from the
evaluator of ADM (Dhariwal & Nichol, arXiv 2105.05233), a TensorFlow 1 program; this file computes the same.

    python eval_fid.py VIRTUAL_imagenet256_labeled.npz samples.npz            # the paper's protocol
    python eval_fid.py IMAGENET/train samples.npz --resolution 256 --save-stats imagenet256.npz
    python eval_fid.py imagenet256.npz samples.npz                            # with the saved statistics
    torchrun --nproc_per_node=8 eval_fid.py REFERENCE.npz samples.npz         # shares the feature extraction
    python eval_fid.py --features emoji emoji samples.npz                     # the emoji distance, offline; not FID

Each input is an npz with `arr_0` (uint8, N x H x W x 3), a folder of pictures, or `emoji`. An npz may carry statistics
(mu, sigma, mu_s, sigma_s), which are then used in place of those of its own pictures: ADM's reference file holds those
of all 1.28 million training pictures, and 10,000 pictures for precision and recall.

To check an installation: ADM's admnet_guided_upsampled_imagenet256.npz against VIRTUAL_imagenet256_labeled.npz must
give IS 215.84, FID 3.9426, sFID 6.1404, precision 0.8265, recall 0.5309.
Left out: Kernel Inception Distance, CLIP and DINOv2 variants of FID, text-to-image scores.
"""

import argparse
import os
import time

import torch
from tqdm import tqdm

from runtime.distributed import Processes
from runtime.eval_report import report_settings, warnings_about, write_report
from runtime.feature_networks import NETWORKS, check_pictures, open_network
from runtime.files import UserError, check_writable, run
from runtime.machine import float64_device, full_float32, pick_device
from runtime.options import COUNT, WORKERS, whole
from runtime.picture_sets import MAX_FEATURES, MAX_SIDE, open_pictures, open_reference, save_statistics

IS_SPLIT = 5000  # pictures per split of the Inception Score, as in ADM
NEIGHBOUR = 3  # precision and recall measure to the 3rd nearest neighbour, as in ADM
REFERENCE_KEEP = 10_000  # pictures of a reference folder for precision and recall; ADM's file has as many

# ---- the three formulas ----------------------------------------------------------------------------------------------


def frechet_distance(mu1, cov1, mu2, cov2):
    """Squared Frechet distance of two Gaussians: FID when they are fitted to Inception features.

    mu1, mu2: (D,); cov1, cov2: (D, D), symmetric, no negative eigenvalues; any float type. Returns a float >= 0,
    computed in float64. Raises UserError on other shapes, NaN, or matrices that are no covariances.
    Source: Dowson & Landau 1982; Heusel et al., arXiv 1706.08500, Eq. 6.
    """
    mu1, cov1, mu2, cov2 = values = [torch.as_tensor(value).cpu().double() for value in (mu1, cov1, mu2, cov2)]
    if mu1.ndim != 1 or mu1.shape != mu2.shape or {cov1.shape, cov2.shape} != {(len(mu1), len(mu1))}:
        raise UserError("statistics of different dimensions: " + ", ".join(str(tuple(v.shape)) for v in values))
    # d^2 = |mu1 - mu2|^2 + tr(C1) + tr(C2) - 2 tr((C1 C2)^(1/2))
    squared = (mu1 - mu2).square().sum() + cov1.trace() + cov2.trace() - 2 * trace_sqrt_product(cov1, cov2)
    if not squared.isfinite():
        raise UserError("the statistics hold NaN or Inf")
    return max(squared.item(), 0.0)  # equal Gaussians may come out as -1e-13


def trace_sqrt_product(cov1, cov2):
    """tr((C1 C2)^(1/2)) of two float64 covariances (D, D) -> float64 scalar. Raises UserError.

    C1 C2 is not symmetric and often singular (fewer pictures than dimensions), where a general matrix root is slow
    and loses half of the digits. With roots C = R R^T from symmetric eigendecompositions, C1 C2 = R1 R1^T R2 R2^T
    has the eigenvalues of (R1^T R2)(R1^T R2)^T: their square roots are the singular values of R1^T R2. These have
    errors of 1e-16 of the largest. Eigenvalues of the product would have them *before* the root, so 1e-8 after it.
    """

    def root(cov):  # (D, D) -> (D, rank)
        if not cov.isfinite().all():
            raise UserError("the covariance holds NaN or Inf")
        values, vectors = torch.linalg.eigh((cov + cov.T) / 2)  # (D), (D, D); the largest value is the last
        # Rounding may leave eigenvalues of -1e-13; much more than that is a damaged file, not a covariance.
        if values[0] < -1e-4 * values[-1].abs() or (cov - cov.T).abs().max() > 1e-4 * cov.abs().max():
            raise UserError("the matrix is no covariance: not symmetric, or with negative eigenvalues")
        # What rounding makes of a zero: up to D * 2e-16 of the largest. Its root, 1e-7, would be a visible error.
        real = values > len(values) * torch.finfo(torch.float64).eps * values[-1]  # (D)
        return vectors[:, real] * values[real].sqrt()  # (D, rank)

    try:
        return torch.linalg.svdvals(root(cov1).T @ root(cov2)).sum()
    except torch.linalg.LinAlgError as error:
        raise UserError("the decomposition of the covariance did not converge") from error


def inception_score(probs, split_size=IS_SPLIT):
    """Inception Score: high when each picture is clearly of one class and all classes occur.

    probs: (N, classes), rows that sum to 1. Returns a float in [1, classes]: the mean over consecutive splits of
    `split_size` pictures, of which the last may be shorter and counts like the others. Raises UserError.
    Each split should hold all classes, so the order matters: of class-sorted samples each split holds a few classes
    only, and 298 becomes 62. Source: Salimans et al., arXiv 1606.03498, section 4.
    """
    probs = torch.as_tensor(probs)
    if probs.ndim != 2 or len(probs) < 2:
        raise UserError(f"Inception Score needs (N, classes) with N >= 2, got {tuple(probs.shape)}")
    scores = []
    for p in probs.split(split_size):  # one split in float64 at a time
        p = p.double()  # (n, classes)
        if not ((p >= 0).all() and (p.sum(dim=1) - 1).abs().max() < 1e-3):  # NaN fails, too
            raise UserError("class probabilities must be >= 0 and sum to 1")
        marginal = p.mean(dim=0)  # (classes)
        # exp(mean_n KL(p_n || marginal)); xlogy makes 0 log 0 = 0
        scores.append((torch.xlogy(p, p) - torch.xlogy(p, marginal)).sum(dim=1).mean().exp())
    return torch.stack(scores).mean().item()


def precision_recall(reference, samples, k=NEIGHBOUR, block=1000):
    """The share of samples that look real, and the share of reality that the samples cover.

    reference: (N, D), samples: (M, D), features. Returns two floats in [0, 1]. Computed in float64 on the tensors'
    device, `block` rows at a time: memory is block * max(N, M), and the result does not depend on it.
    Raises UserError on other shapes, NaN, or k or fewer rows.
    Source: Kynkaanniemi et al., arXiv 1904.06991, Eq. 1 and 2.

    Each set is described by balls: one around each of its points, reaching to the k-th nearest other point of that
    set. Precision: the part of the samples inside any ball of the reference. Recall: the other way round.
    """
    if reference.ndim != 2 or samples.ndim != 2 or reference.shape[1] != samples.shape[1]:
        raise UserError(f"features must be (N, D) and (M, D), got {tuple(reference.shape)}, {tuple(samples.shape)}")
    if (least := min(len(reference), len(samples))) <= k:
        raise UserError(f"precision and recall need more than {k} pictures on each side, got {least}")
    # Distances do not change when everything moves, and less is lost to rounding near the origin. The shift itself
    # is rounded so that features which are whole numbers stay so, and ties between them stay ties.
    shift = reference.double().mean(dim=0).round()  # (D)
    reference, samples = reference.double() - shift, samples.double() - shift  # (N, D), (M, D)
    if not (reference.isfinite().all() and samples.isfinite().all()):
        raise UserError("the features hold NaN or Inf")

    def radii(points):  # squared distance to the k-th neighbour; one more, because the nearest is the point itself
        nearest = (squared_distances(rows, points).topk(k + 1, largest=False).values for rows in points.split(block))
        return torch.cat([distances[:, -1] for distances in nearest])

    radius_ref, radius_smp = radii(reference), radii(samples)  # (N), (M)
    realistic, covered = torch.zeros(len(samples), dtype=torch.bool, device=samples.device), 0  # (M), a count
    for rows, radius in zip(reference.split(block), radius_ref.split(block)):
        squared = squared_distances(rows, samples)  # (block, M)
        realistic |= (squared <= radius[:, None]).any(dim=0)  # (M): a point on the surface is inside
        covered += (squared <= radius_smp).any(dim=1).sum().item()
    return realistic.double().mean().item(), covered / len(reference)


def squared_distances(a, b):
    """All |a_i - b_j|^2, of (n, D) and (m, D), float64 -> (n, m)."""
    # |a - b|^2 = |a|^2 + |b|^2 - 2 a.b: one matrix multiplication, many times faster than forming differences.
    lengths = a.square().sum(dim=1)[:, None] + b.square().sum(dim=1)  # (n, m)
    squared = torch.addmm(lengths, a, b.T, alpha=-2)  # (n, m)
    # The price is an error of about 1e-14 of the lengths, where copies of a picture, with balls of radius 0, must give
    # exactly 0. Below a millionth of their length two points count as the same: float32 features are no more exact.
    return squared.masked_fill_(squared < 1e-12 * lengths, 0)  # (n, m)


# ---- features of a stream of pictures --------------------------------------------------------------------------------


class Statistics:
    """Mean and covariance of features that arrive in batches; memory does not grow with their number.

    Keeps n, sum x and sum x x^T, in float64: features are of order 1, so that n = 1e6 leaves ten good digits.
    """

    def __init__(self, dim, device="cpu"):
        self.count = torch.zeros((), dtype=torch.float64, device=device)
        self.total = torch.zeros(dim, dtype=torch.float64, device=device)  # (D)
        self.outer = torch.zeros(dim, dim, dtype=torch.float64, device=device)  # (D, D)

    def update(self, features):
        """features: (B, D), any float type."""
        x = features.to(self.total.device).double()  # (B, D)
        self.count += len(x)
        self.total += x.sum(dim=0)  # (D)
        self.outer.addmm_(x.T, x)  # (D, D)

    def mean_cov(self):
        """-> mean (D,), covariance (D, D), float64 on the CPU. Raises UserError on fewer than two rows or NaN."""
        n, mean = self.count.cpu(), (self.total / self.count).cpu()  # (), (D)
        cov = (self.outer.cpu() - n * torch.outer(mean, mean)) / (n - 1)  # (D, D)
        if not cov.isfinite().all():
            raise UserError(f"no covariance of the features of {n:.0f} pictures: fewer than two, or with NaN or Inf")
        return mean, cov


def describe(pictures, network, device, processes, batch_size=64, keep=None):
    """PictureSet -> {"mu": (D), "sigma": (D, D), "mu_s", "sigma_s": of spatial ones, "features": float32 (rows, D)}.

    All on the CPU, and the same on all ranks, which share the work. Stored statistics are taken in place of computed
    ones. keep: rows of features (None: all; 0: none, nor is anything computed where statistics are stored).
    """
    check_pictures(pictures, network)
    if pictures.batches is None or keep == 0 and pictures.stored:
        return pictures.stored
    statistics = [Statistics(width, float64_device(device)) for width in network.widths if width]
    keep = pictures.count if keep is None else min(keep, pictures.count)
    features = torch.zeros(keep, network.widths[0], device=float64_device(device))  # (keep, D)
    starts = range(processes.rank * batch_size, pictures.count, processes.world * batch_size)
    batches = pictures.batches(batch_size, processes.rank, processes.world)
    bar = tqdm(starts, f"features of {os.path.basename(pictures.name)}", disable=processes.rank > 0 or None)
    for start, images in zip(bar, batches, strict=True):
        with full_float32():
            found = network(images.to(device))  # (B, D), (B, S)
        for sums, values in zip(statistics, found):
            sums.update(values)
        features[start : start + len(images)] = found[0][: max(0, keep - start)]
    computed = {}
    for suffix, sums in zip(("", "_s"), statistics):
        processes.sum(sums.count, sums.total, sums.outer)
        computed["mu" + suffix], computed["sigma" + suffix] = sums.mean_cov()
    if keep:
        # Each row was written by one rank and is zero on the others, so that this sum is a gather, and exact.
        processes.sum(features)
        computed["features"] = features.cpu()
    return computed | pictures.stored


def distance(reference, samples, suffix=""):
    """The Frechet distance of two results of `describe`; suffix "_s": of their spatial features."""
    return frechet_distance(*(side[key + suffix] for side in (reference, samples) for key in ("mu", "sigma")))


def probabilities(features, network, device):
    """Pool features (N, D) -> class probabilities (N, K), on the CPU."""
    return torch.cat([network.logits(rows.to(device)).cpu() for rows in features.split(IS_SPLIT)]).softmax(dim=1)


def shuffled(rows):
    """The rows of a tensor in a fixed random order."""
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]


def compare(reference, samples, network, device):
    """Two results of `describe` -> {metric: float}, and a list of warnings. Raises UserError.

    sFID, Inception Score, precision and recall have these names for FID's network only, the one with spatial features.
    Any other distance has no published numbers to compare with, but a floor: that of two halves of the reference.
    """
    metrics, warnings = {network.title: distance(reference, samples)}, []
    if network.widths[1] is None:
        first, second = shuffled(reference["features"]).double().chunk(2)  # (N/2, D) each
        metrics["floor"] = frechet_distance(first.mean(0), first.T.cov(), second.mean(0), second.T.cov())
        return metrics, warnings
    probs = probabilities(samples["features"], network, device)  # (N, K)
    metrics |= {"sFID": distance(reference, samples, "_s"), "IS": inception_score(probs)}
    # Samples sorted by class give themselves away: in random order each split has all classes, and the score rises.
    if (better := inception_score(shuffled(probs))) > 1.1 * metrics["IS"]:
        warnings.append(f"the samples look sorted by class: in random order, their IS is {better:.2f}")
    sides = (side["features"].to(float64_device(device)) for side in (reference, samples))
    metrics["precision"], metrics["recall"] = precision_recall(*sides)
    return metrics, warnings


def judge(reference, samples, network, device, processes):
    """Two PictureSets -> {"fid", "inception_score"} or {"emoji_distance"}, on all ranks: for a model while it trains.

    The statistics of the reference are kept in reference.stored for the next time. Raises UserError.
    """
    reference.stored |= describe(reference, network, device, processes, keep=0)
    drawn, scores = describe(samples, network, device, processes), None
    if processes.rank == 0:
        scores = {network.title.lower().replace(" ", "_"): distance(reference.stored, drawn)}
        if network.widths[1]:
            scores["inception_score"] = inception_score(probabilities(drawn["features"], network, device))
    return processes.from_rank_0(scores)


# ---- the script ------------------------------------------------------------------------------------------------------


def parse_args():
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("reference", help="npz, folder of real pictures, file of --save-stats, or emoji")
    add("samples", help="npz or folder of generated pictures")
    add("--features", choices=NETWORKS, default="inception", help="emoji: the emoji distance, which is not FID")
    add("--inception", metavar="FILE", help="weights of FID's network (default: downloaded once)")
    add("--resolution", type=whole(1, MAX_SIDE), help="crop the pictures of folders to this size, as ADM does")
    add("--save-stats", metavar="FILE", help="keep the reference's statistics of FID as an npz")
    add("--json", metavar="FILE", help="results and settings (default: SAMPLES.eval.json)")
    add("--batch-size", type=COUNT, default=64, help="pictures per run of the network and device (default: 64)")
    many = {"type": whole(1, WORKERS), "default": min(8, os.cpu_count())}
    add("--workers", **many, help="threads that decode pictures (default: up to 8)")
    add("--device", default="auto", help="auto (cuda, then mps, then cpu), or its name")
    args = parser.parse_args()
    if args.features != "inception" and (args.inception or args.save_stats):
        parser.error(f"--inception and --save-stats are of FID: leave them out with --features {args.features}")
    args.json = args.json or args.samples.rstrip("/") + ".eval.json"
    return args


def main():
    """Checks both inputs, extracts features, and prints and writes the numbers."""
    args, processes = parse_args(), Processes()
    device = pick_device(args.device, processes.local_rank)
    # All that can be found wrong without the network comes first, not after an hour of features.
    for flag, path in (("--json", args.json), ("--save-stats", args.save_stats)):
        if path:
            check_writable(flag, path)
    Network = NETWORKS[args.features][0]
    resolution = args.resolution or Network.side
    samples = open_pictures(args.samples, resolution, args.workers)
    reference = open_reference(args.reference, "REFERENCE", samples.size[0], resolution, args.workers)
    if samples.batches is None:
        raise UserError(f"{args.samples}: holds saved statistics; the samples must be pictures")
    for side in (reference, samples):
        check_pictures(side, Network)
    network = open_network(args.features, args.inception).to(device)

    processes.connect(device, seconds=1800)
    start = time.perf_counter()
    drawn = describe(samples, network, device, processes, args.batch_size)
    speed = samples.count / (time.perf_counter() - start)
    keep = REFERENCE_KEEP if os.path.isdir(args.reference) else MAX_FEATURES
    real = describe(reference, network, device, processes, args.batch_size, keep)
    processes.close()  # the rest is one process's work
    if processes.rank > 0:
        return
    metrics, more = compare(real, drawn, network, device)
    if args.save_stats:
        save_statistics(args.save_stats, reference, real)
    settings = vars(args) | report_settings(reference, samples, network, device, processes.world)
    settings |= {"reference_features": len(real["features"]), "split_size": IS_SPLIT, "neighbour": NEIGHBOUR}
    write_report(args.json, metrics, settings, warnings_about(reference, samples, network) + more, speed)


if __name__ == "__main__":
    run(main)
