"""The plots of the page of evidence, which can be read without colour. They need requirements-plots.txt."""

import itertools
import statistics

from experiments.evidence import COUNTS, by_seed, difference, finding, has_run, mean_and_error, plot_file, verdict
from runtime.files import UserError, whole_file


def new_axes(columns, height):
    """(figure, its axes); UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need the package matplotlib: pip install -r requirements-plots.txt")
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot.subplots(1, columns, figsize=(9, height), dpi=80, layout="constrained", squeeze=False)


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
    """Held-out loss by t, and loss while training, of a claim's rows."""
    figure, ((left, right),) = new_axes(2, 3.4)
    for name, look in zip(claim.rows(), looks()):
        if found := list(by_seed(records, name).values()):
            values = [mean_and_error(column) for column in zip(*(record["loss_by_time"] for record in found))]
            times = [(i + 0.5) / len(values) for i in range(len(values))]
            errors = [error or 0 for _, error in values]
            left.errorbar(times, [mean for mean, _ in values], errors, label=name, markersize=4, **look)
            steps = [step for step, _ in found[0]["curve"]]
            curve = [statistics.fmean(c) for c in zip(*([y for _, y in record["curve"]] for record in found))]
            right.plot(steps, curve, markersize=4, **look)
    for axes, across, up in ((left, "t (0: noise, 1: picture)", "held-out loss"), (right, "step", "training loss")):
        axes.set(xlabel=across, ylabel=up)
        logarithmic(axes)
    left.legend(fontsize=8)
    save(figure, path)


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
    for axes, what in ((left, "error against 200 evaluations, 1/255"), (right, "emoji distance")):
        axes.set(xlabel="evaluations", ylabel=what, xscale="log")
        axes.set_xticks(COUNTS, map(str, COUNTS))
        axes.minorticks_off()
    logarithmic(left)
    left.legend(fontsize=8)
    save(figure, path)


def plot_claims(claims, records, path):
    """Each comparison of rows that train: difference in held-out loss, in percent of the base's, and two errors."""
    shown = []
    for key, claim in claims.items():
        for row, base, sign in claim.pairs if claim.measure == "loss" else ():
            mean, error, pairs = difference(claim, records, row, base)
            if pairs:
                unit = mean_and_error(record["loss"] for record in by_seed(records, base).values())[0] / 100
                said = verdict(finding(mean, error, pairs), sign)
                shown.append((f"{key}: {row} - {base}", mean / unit, 2 * (error or 0) / unit, said))
    figure, ((axes,),) = new_axes(1, 1.2 + 0.28 * len(shown))
    filled = {"agrees": "o", "disagrees": "X", "cannot tell": "$?$"}
    for place, (_, mean, error, said) in enumerate(shown):
        axes.errorbar(mean, place, xerr=error, color="black", marker=filled.get(said, "s"), markersize=7, capsize=3)
        axes.annotate(said, (1.01, place), xycoords=("axes fraction", "data"), va="center", fontsize=8)
    axes.axvline(0, color="gray", linewidth=1)
    axes.set_yticks(range(len(shown)), [label for label, *_ in shown], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel(
        "held-out loss of row - base in % of the base's, ± two standard errors\nleft of 0: the row is better"
    )
    save(figure, path)


def write_plots(claims, records, folder):
    """Writes plot-claims.png, and plot-KEY.png of each claim that has run. UserError without matplotlib."""
    done = {key: claim for key, claim in claims.items() if has_run(claim, records)}
    if any(claim.measure == "loss" for claim in done.values()):
        plot_claims(claims, records, folder / plot_file("claims"))
    for key, claim in done.items():
        if plot := {"loss": plot_training, "error": plot_solvers}.get(claim.measure):
            plot(claim, records, folder / plot_file(key))
