"""The plots of the page of evidence, which can be read without colour. They need requirements-plots.txt."""

import itertools
import statistics

from experiments.evidence import (
    COUNTS,
    KEYS,
    MEASURES,
    by_seed,
    has_run,
    judged,
    mean_and_error,
    paired_difference,
    plot_file,
)
from runtime.files import UserError, whole_file
from runtime.gauges import TIME_BINS


def new_axes(columns, height, width=9):
    """(figure, its axes), sides in inches of 80 pixels; UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need the package matplotlib: pip install -r requirements-plots.txt")
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(width, height), dpi=80, layout="constrained", squeeze=False)


def save(figure, path):
    """Writes a figure as PNG and forgets it."""
    from matplotlib import pyplot

    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    pyplot.close(figure)


def logarithmic(axes):
    """Makes the upward axis logarithmic, with plain numbers."""
    from matplotlib.ticker import LogLocator

    axes.set_yscale("log")
    axes.yaxis.set_minor_locator(LogLocator(subs=(2, 3, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")


def looks():
    """Lines that can be told apart without colour."""
    return itertools.cycle(
        [{"marker": marker, "linestyle": line} for marker, line in zip("osD^vx", ("-", "--", ":") * 2)]
    )


def plot_training(claim, records, path):
    """Of a claim's rows: held-out loss by t, the paired differences in it, and loss while training."""
    figure, ((left, middle, right),) = new_axes(3, 3 + 0.2 * max(len(claim.rows()), len(claim.pairs)), 12)
    for name, look in zip(claim.rows(), looks()):
        if found := list(by_seed(records, name).values()):
            plot_by_time(
                left, [mean_and_error(column) for column in zip(*(r["loss_by_time"] for r in found))], name, look
            )
            steps = [step for step, _ in found[0]["curve"]]
            curve = [statistics.fmean(c) for c in zip(*([y for _, y in record["curve"]] for record in found))]
            right.plot(steps, curve, markersize=4, **look)
    for (row, base, _), look in zip(claim.pairs, looks()):
        mine, theirs = by_seed(records, row), by_seed(records, base)
        values = []
        for i in range(TIME_BINS) if mine.keys() & theirs.keys() else ():
            mean, error, _ = paired_difference(mine, theirs, lambda record: record["loss_by_time"][i])
            unit = statistics.fmean(record["loss_by_time"][i] for record in theirs.values()) / 100
            values.append((mean / unit, 2 * (error or 0) / unit))
        if values:
            plot_by_time(middle, values, f"{row} - {base}", look | {"color": "black", "capsize": 2})
    middle.axhline(0, color="gray", linewidth=1)
    times, what = "t (0: noise, 1: picture)", "held-out loss"
    left.set(xlabel=times, ylabel=f"{what}, ± standard error")
    middle.set(xlabel=times, ylabel="row - base in % of the base,\n± two standard errors")
    right.set(xlabel="step", ylabel="training loss")
    if max(map(abs, middle.get_ylim())) > 100:
        middle.set_yscale("symlog", linthresh=10)
        middle.yaxis.set_major_formatter("{x:g}")
    for axes in (left, right):
        logarithmic(axes)
    for axes in (left, middle):
        axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1))
    save(figure, path)


def plot_by_time(axes, values, name, look):
    """A line with errors, of (mean, error) by equal parts of t."""
    times = [(i + 0.5) / len(values) for i in range(len(values))]
    means, errors = zip(*((mean, error or 0) for mean, error in values))
    axes.errorbar(times, means, errors, label=name, markersize=4, **look)


def plot_solvers(claim, records, path):
    """Error and emoji distance by the number of evaluations, one line for each solver."""
    figure, ((left, right),) = new_axes(2, 3.4)
    found = [record for name in claim.rows() if (record := by_seed(records, name).get(0)) and "errors" in record]
    found.sort(key=lambda record: record["evaluations"])
    for solver, look in zip(dict.fromkeys(record["row"].rpartition(" ")[0] for record in found), looks()):
        own = [record for record in found if record["row"].rpartition(" ")[0] == solver]
        counts = [record["evaluations"] for record in own]
        left.plot(counts, [statistics.fmean(record["errors"]) for record in own], label=solver, **look)
        right.plot(counts, [record["emoji_distance"] for record in own], **look)
    for axes, what in ((left, "error against 200 evaluations, 1/255"), (right, MEASURES["distance"])):
        axes.set(xlabel="evaluations", ylabel=what, xscale="log")
        axes.set_xticks(COUNTS, map(str, COUNTS))
        axes.minorticks_off()
        logarithmic(axes)
    left.legend(fontsize=8)
    save(figure, path)


def plot_claims(claims, records, path):
    """Each comparison of rows that train: differences in loss and in distance, in percent of the base's, two errors."""
    shown = []
    for key, claim in claims.items():
        for row, base, sign in claim.pairs if claim.kind == "train" else ():
            if found := judged(claim, records, row, base, sign):
                shown.append((f"{key}: {row} - {base}", base, found))
    figure, (both,) = new_axes(2, 1.2 + 0.28 * len(shown), 12)
    filled = {"agrees": {"marker": "o"}, "disagrees": {"marker": "X"}}
    filled["cannot tell"] = {"marker": "o", "markerfacecolor": "white"}
    for axes, (measure, key) in zip(both, KEYS.items()):
        for place, (_, base, found) in enumerate(shown):
            mean, error, _, said = found[measure]
            unit = statistics.fmean(record[key] for record in by_seed(records, base).values()) / 100
            look = {"color": "black", "markersize": 7, "capsize": 3} | filled.get(said, {"marker": "s"})
            axes.errorbar(mean / unit, place, xerr=2 * (error or 0) / unit, **look)
            axes.annotate(said, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
        axes.axvline(0, color="gray", linewidth=1)
        axes.invert_yaxis()
        axes.set_xlabel(
            f"{MEASURES[measure]} of row - base in % of the base's,\n± two standard errors; left of 0: lower"
        )
    both[0].set_yticks(range(len(shown)), [label for label, *_ in shown], fontsize=8)
    both[1].set_yticks(range(len(shown)), [""] * len(shown))
    save(figure, path)


def write_plots(claims, records, folder):
    """Writes plot-claims.png, and plot-KEY.png of each claim that has run. UserError without matplotlib."""
    done = {key: claim for key, claim in claims.items() if has_run(claim, records)}
    if any(claim.kind == "train" for claim in done.values()):
        plot_claims(claims, records, folder / plot_file("claims"))
    for key, claim in done.items():
        if plot := plot_training if claim.kind == "train" else {"error": plot_solvers}.get(claim.measure):
            plot(claim, records, folder / plot_file(key))
