"""What eval_fid.py prints and writes with its numbers: those of the paper, settings, what makes them not comparable."""

import json
import sys

import torch

from pretrained.inception import SHA256_PREFIX
from runtime.files import whole_file

ENOUGH = 50_000  # samples behind published numbers
PUBLISHED = {  # paper, ImageNet 256x256 after 160 epochs; FID, sFID, IS
    "L/16 Euler-50": (2.64, 5.25, 297),
    "XL/16 Euler-50": (2.29, 4.82, 303),
    "XL/16 Adams2-50": (2.16, 4.93, 291),
    "XL/16 Euler-100": (2.15, 4.55, 297),
}


def warnings_about(reference, samples, network):
    """Lines on what a reader of the numbers must know about these PictureSets and this network."""
    if network.title != "FID":
        others = f"others of {samples.count} samples, drawn with the same settings"
        return [f"the {network.title} is not FID: compare it only with {others}"]
    (height, width), (rows, columns) = reference.size, samples.size
    sizes = f"the reference has {width}x{height} pixels, the samples {columns}x{rows}"
    foreign = not network.sha256.startswith(SHA256_PREFIX)
    found = [
        (reference.size != samples.size, f"{sizes}: blur counts as a difference"),
        (samples.count < ENOUGH, f"{samples.count} samples: published numbers use 50,000; fewer make FID larger"),
        (samples.sorted_labels, "the samples are sorted by class: that collapses the Inception Score; shuffle them"),
        (samples.stored, "FID and sFID use the statistics stored with the samples, not their pictures"),
        (foreign, f"the weights are not the published file {SHA256_PREFIX}: nothing is comparable"),
    ]
    return [warning for applies, warning in found if applies]


def report_settings(reference, samples, network, device, processes):
    """What was compared by which network, as plain values for the JSON."""
    settings = {"reference_count": reference.count, "reference_size": reference.size}
    settings["reference_statistics"] = "stored" if reference.stored else "computed"
    settings |= {"samples_count": samples.count, "samples_size": samples.size, "weights_sha256": network.sha256}
    return settings | {"device": str(device), "processes": processes, "torch": torch.__version__}


def write_report(path, metrics, settings, warnings, speed):
    """Prints warnings and a table, and writes all of it as JSON. speed: pictures per second, files to features."""
    for warning in warnings:
        print(f"warning: {warning}", file=sys.stderr)
    print_table(metrics)
    print(f"\nfiles to features: {speed:.1f} pictures/s")
    result = {"metrics": metrics, "settings": settings, "warnings": warnings, "pictures_per_second": speed}
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(result, indent=2))
    print(f"written to {path}")


def print_table(metrics):
    """The numbers; those that the paper has are shown beside its own."""
    published = PUBLISHED if "FID" in metrics else {}
    print(f"\n{'':15}{'this run':>10}" + "".join(f"{name:>17}" for name in published), end="")
    print("   (paper, ImageNet 256)" if published else "   (not FID)")
    for row, (name, value) in enumerate(metrics.items()):
        beside = [numbers[row] if row < len(numbers) else "-" for numbers in published.values()]
        print(f"{name:15}{value:10.4f}" + "".join(f"{number:>17}" for number in beside))
