"""Several runs in one picture: their losses, loss by time, speed, and their newest previews side by side.

    pip install -r requirements-plots.txt
    python -m experiments.plot runs/dct runs/sincos --out plot.png

Read from metrics.jsonl and samples.png of each run's folder, also while it trains. Steps are the run's own, so a run
that was resumed is one line; its speed leaves out the first step of each start, which compiles.
"""

import argparse
import json
import pathlib

from PIL import Image

from runtime.files import UserError, check_writable, run, whole_file

PREVIEW = 512  # pixels, above which a preview shows nothing more at this size
LAST = 0.25  # share of a run's lines whose loss by time is averaged: that of one line is mostly chance


def read_run(folder):
    """The lines of training of a run's metrics.jsonl, a list of dicts. Raises UserError."""
    path = pathlib.Path(folder) / "metrics.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        lines = [line for line in lines if "loss" in line]  # the others are scores of --eval-every
        lines = sorted({line["step"]: line for line in lines}.values(), key=lambda line: line["step"])
    except FileNotFoundError:
        raise UserError(f"{folder} is no folder of a run: there is no {path.name} in it")
    except (ValueError, TypeError, LookupError):
        raise UserError(f"{path} holds lines that are not metrics: is it being copied?")
    if not lines:
        raise UserError(f"{path} has no line of training yet: wait for the first, or train with a smaller --log-every")
    return lines


def loss_by_time(lines):
    """(middle of each bin of t, mean loss there over the last lines of a run), without bins that stayed empty."""
    bins = [line["loss_by_time"] for line in lines[-max(1, round(LAST * len(lines))) :]]
    number = len(bins[0])
    columns = [[some[i] for some in bins if some[i] is not None] for i in range(number)]
    found = [((i + 0.5) / number, sum(column) / len(column)) for i, column in enumerate(columns) if column]
    return [t for t, _ in found], [loss for _, loss in found]


def plot(runs, names):
    """A matplotlib figure of {folder: lines}; names: of the runs, for people."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 9), layout="constrained")
    above, below = figure.subfigures(2, 1, height_ratios=(1, 1.2))
    axes = above.subplots(1, 3)
    for name, lines in zip(names, runs.values()):
        steps = [line["step"] for line in lines]
        axes[0].plot(steps, [line["loss"] for line in lines], label=name)
        axes[1].plot(*loss_by_time(lines), "o-", label=name)
        timed = [line for line in lines if "images_per_second" in line]
        axes[2].plot([line["step"] for line in timed], [line["images_per_second"] for line in timed], label=name)
    titles = ("loss", f"loss by time, last {LAST:.0%} of the lines", "images per second")
    for axis, title, across in zip(axes, titles, ("step", "t (0: noise, 1: picture)", "step")):
        axis.set(title=title, xlabel=across)
        axis.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[2].set_ylim(bottom=0)
    axes[0].legend()
    for axis, folder, name in zip(below.subplots(1, len(runs), squeeze=False)[0], runs, names):
        axis.set_title(name)
        axis.axis("off")
        if (path := pathlib.Path(folder) / "samples.png").exists():
            with Image.open(path) as picture:
                picture.thumbnail((PREVIEW, PREVIEW))
                axis.imshow(picture.convert("RGB"))
        else:
            axis.text(0.5, 0.5, "no preview yet", ha="center")
    return figure


def main():
    """Reads every run before anything is drawn."""
    parser = argparse.ArgumentParser(description="Losses, speed and previews of several runs in one picture.")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run, --out of train.py")
    parser.add_argument("--out", default="plot.png", help="a .png, .svg or .pdf")
    args = parser.parse_args()
    runs = {folder: read_run(folder) for folder in args.runs}
    names = [pathlib.Path(folder).resolve().name for folder in runs]
    names = names if len(set(names)) == len(names) else list(runs)
    if pathlib.Path(args.out).suffix not in (".png", ".svg", ".pdf"):
        raise UserError(f"--out {args.out}: the name must end in .png, .svg or .pdf")
    check_writable("--out", args.out)
    try:
        figure = plot(runs, names)
    except ImportError:
        raise UserError("experiments/plot.py needs matplotlib: pip install -r requirements-plots.txt")
    with whole_file(args.out) as temporary:
        figure.savefig(temporary, format=pathlib.Path(args.out).suffix[1:], dpi=80)
    print(f"{len(runs)} runs: {args.out}")


if __name__ == "__main__":
    run(main)
