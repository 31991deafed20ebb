"""The page of evidence: paired statistics, tables and plots, from the runs that experiments/ablations.py keeps.

Everything on the page is a function of the stored lines; nothing here trains or draws. Left out: tests that know more
than means and standard errors.
"""

import itertools
import math
import pathlib
import statistics

from runtime.files import UserError, whole_file

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "evidence.md"
EVIDENCE = PAGE.parent / "evidence"
FEWEST = 3  # seeds, below which nothing is concluded

# ---- statistics ------------------------------------------------------------------------------------------------------


def mean_and_error(values):
    """The mean and its standard error (None of a single value)."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def paired_difference(row, base, measure="loss"):
    """(mean, standard error or None, pairs) of row minus base, records by seed, over the seeds that both have."""
    shared = sorted(row.keys() & base.keys())
    if not shared:
        return None, None, 0
    mean, error = mean_and_error(row[seed][measure] - base[seed][measure] for seed in shared)
    return mean, error, len(shared)


def finding(mean, error, pairs):
    """ "lower", "higher" or, within two standard errors or of fewer than FEWEST pairs, "cannot tell"."""
    if pairs < FEWEST or abs(mean) <= 2 * error:
        return "cannot tell"
    return "lower" if mean < 0 else "higher"


def verdict(found, sign):
    """What a finding means for a claim whose difference should have this sign (-1, 1, or 0: nobody has said)."""
    if found == "cannot tell" or not sign:
        return found
    return "agrees" if (found == "lower") == (sign < 0) else "disagrees"


def by_seed(records, name):
    """{seed: record} of a row."""
    return {record["seed"]: record for record in records if record["row"] == name}


# ---- words and tables ------------------------------------------------------------------------------------------------


def with_error(mean, error, digits=4, sign=""):
    """A mean with its standard error, in text."""
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def table(head, rows):
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def training_table(names, records):
    """One line for each row of a claim: what it costs and what it reached."""
    head = ["row", "seeds", "parameters", "GFLOP a step", "CPU s", "held-out loss", "emoji distance", "border ratio"]
    rows = []
    for name in names:
        found = by_seed(records, name)
        if not found:
            rows.append([name, "not run", *[""] * 6])
            continue
        first = next(iter(found.values()))
        row = [name, str(len(found)), f"{first['parameters'] / 1e6:.2f} M", f"{first['gflop_per_step']:.2f}"]
        row.append(f"{statistics.fmean(record['cpu_seconds'] for record in found.values()):.0f}")
        for measure, digits in (("loss", 4), ("emoji_distance", 2), ("border_ratio", 3)):
            row.append(with_error(*mean_and_error(record[measure] for record in found.values()), digits))
        rows.append(row)
    return table(head, rows)


def verdict_table(claim, records):
    """One line for each comparison of a claim: the paired differences, and what follows."""
    head = ["row - base", "pairs", "loss", "emoji distance", "border ratio", "the loss is", "verdict"]
    rows = []
    for row, base, sign in claim.pairs:
        mine, theirs = by_seed(records, row), by_seed(records, base)
        mean, error, pairs = paired_difference(mine, theirs)
        if not pairs:
            rows.append([f"{row} - {base}", "0", "", "", "", "", "not run"])
            continue
        cells = [with_error(mean, error, 4, "+")]
        for measure, digits in (("emoji_distance", 2), ("border_ratio", 3)):
            cells.append(with_error(*paired_difference(mine, theirs, measure)[:2], digits, "+"))
        found = finding(mean, error, pairs)
        rows.append([f"{row} - {base}", str(pairs), *cells, found, verdict(found, sign)])
    return table(head, rows)


def bins_table(names, records):
    """Held-out loss by tenths of t, mean over the seeds."""
    rows = []
    for name in names:
        if found := by_seed(records, name):
            columns = zip(*(record["loss_by_time"] for record in found.values()))
            rows.append([name, *(f"{statistics.fmean(column):.3f}" for column in columns)])
    return table(["held-out loss at t =", *(f"0.{i}" for i in range(10))], rows) if rows else []


def drawing_table(names, records):
    """One line for each way of drawing."""
    head = ["row", "evaluations", "CPU s a picture", "error", "emoji distance", "difference", "border ratio"]
    rows = []
    for name in names:
        record = by_seed(records, name).get(0)
        if record is None:
            rows.append([name, "not run", *[""] * 5])
            continue
        error = with_error(record["error"], record["error_se"], 2) if "error" in record else ""
        difference = ""
        if "distance_difference" in record:
            difference = with_error(record["distance_difference"], record["distance_difference_se"], 2, "+")
        cells = [str(record["evaluations"]), f"{record['cpu_seconds_per_picture']:.3f}", error]
        rows.append([name, *cells, f"{record['emoji_distance']:.2f}", difference, f"{record['border_ratio']:.3f}"])
    return table(head, rows)


def recommendation(records):
    """The fewest evaluations whose emoji distance is within two standard errors of 50 Euler steps, as lines."""
    drawn = [record for record in records if record["kind"] == "draw" and "error" in record]
    good = [r for r in drawn if abs(r.get("distance_difference", 0)) <= 2 * r.get("distance_difference_se", 0)]
    if not good or not by_seed(records, "euler 50"):
        return []
    best = min(good, key=lambda record: (record["evaluations"], abs(record.get("distance_difference", 0))))
    line = f"The fewest evaluations whose emoji distance cannot be told from that of 50 Euler steps: **{best['row']}**."
    return [line, ""]


# ---- the page --------------------------------------------------------------------------------------------------------


def claim_lines(key, claim, records, folder):
    """The section of one claim."""
    lines = [f"## {key}: {claim.title}", "", f"Said: {claim.says}.", ""]
    if claim.kind == "draw":
        return [*lines, *drawing_table(claim.rows(), records), *(recommendation(records) if key == "solvers" else [])]
    lines += training_table(claim.rows(), records) + verdict_table(claim, records)
    lines += bins_table(claim.rows(), records)
    if any(by_seed(records, name) for name in claim.rows()) and (folder / f"{key}.png").exists():
        lines += [f"![Loss by time and while training](evidence/{key}.png)", ""]
    for name in claim.rows():
        file = f"{name.replace(', ', '-').replace(' ', '-')}.png"
        if by_seed(records, name).get(0) and (folder / file).exists():
            lines += [f"{name}:", "", f"![Samples of {name}](evidence/{file})", ""]
    return lines


def opening(records, study, real_border):
    """The first lines: what was compared, how, on what, in how many hours."""
    hours = sum(record["wall_seconds"] for record in records) / 3600
    machines = "; ".join(sorted({record["machine"] for record in records})) or "none yet"
    commits = ", ".join(sorted({record["code"] for record in records})) or "none yet"
    config = study.config
    return (
        f"""# Evidence

The paper's claims, and three ideas since, in a world small enough for two CPU cores. Every number of this page was
written by the command that measured it, from the lines in [evidence/runs.jsonl](evidence/runs.jsonl), each of which
holds its command, seed, machine and code version:

```
python -m experiments.ablations --list
python -m experiments.ablations --all
```

- **World**: the emoji at {config.resolution} pixels in patches of {config.patch_size}. Tokens have {config.hidden_size}
  numbers, more than the {3 * config.patch_size**2} of a patch (1024 and 768 in the paper), since narrower ones could
  not carry a patch to a linear decoder. One drawing in ten is held out (`experiments/held_out.txt`; near-duplicates are
  on one side).
- **Length**: {study.steps} steps of {study.batch_size} pictures, AdamW, learning rate from {study.lr:g} down to 0.
  That is short: samples are blurred, and what the paper's 800,000 steps would show may differ.
- **Pairs**: runs of one seed see the same pictures, noise, times and dropped labels. A difference is the mean over the
  seeds of row minus base, ± its standard error. Within two standard errors, or with fewer than {FEWEST} seeds, the
  verdict is "cannot tell". With three seeds that is a weak test: 18 of 100 differences that are chance would pass it.
- **Held-out loss**: of the averaged weights, weighted by how often training meets each tenth of t. **Emoji distance**:
  of {study.samples} samples to all drawings ([what it is](measurements.md#the-emoji-distance)); lower is better. The
  small classifier behind it, which is also the teacher of alignment, has seen held-out drawings. **Border ratio**: mean
  difference of neighbours across patch borders over that inside patches; of the real pictures it is {real_border:.3f}.
- **Switches of train.py** for the ideas since, off by default: `--prediction clean` (the decoder gives the image, the
  loss is of the velocity towards it), `--loss frequency` (errors that the eye sees weigh more) and `--repa-projector
  conv` (neighbouring tokens are aligned together, with a teacher that is normalised over the places).
- **CPU s**: processor seconds of one training run, since the machine had other work beside it.
- **Time**: {hours:.1f} hours in all. Machine: {machines}. Code: {commits}.
""".splitlines()
        + [""]
    )


def page_text(claims, records, study, not_here, folder, real_border):
    """The whole page, from the records of this study."""
    summary = []
    for key, claim in claims.items():
        if claim.kind == "draw":
            done = any(by_seed(records, name) for name in claim.rows())
            summary.append([f"[{key}](#{anchor(key, claim)})", claim.says, "see its table" if done else "not run"])
            continue
        for row, base, sign in claim.pairs:
            mean, error, pairs = paired_difference(by_seed(records, row), by_seed(records, base))
            said = f"{row} against {base}: {with_error(mean, error, 4, '+')}, {pairs} seeds" if pairs else ""
            result = f"{said}: **{verdict(finding(mean, error, pairs), sign)}**" if pairs else "not run"
            summary.append([f"[{key}](#{anchor(key, claim)})", claim.says, result])
    lines = opening(records, study, real_border) + table(["claim", "said", "measured: held-out loss"], summary)
    lines += itertools.chain.from_iterable(claim_lines(key, claim, records, folder) for key, claim in claims.items())
    lines += ["## Not run", "", *(f"- {line}" for line in not_here)]
    for key, claim in claims.items():
        if missing := [name for name in claim.rows() if not by_seed(records, name)]:
            lines.append(f"- {key}: {', '.join(missing)}.")
        few = [f"{name} ({n})" for name in claim.rows() if 0 < (n := len(by_seed(records, name))) < FEWEST]
        if few and claim.kind == "train":
            lines.append(f"- {key}, with fewer than {FEWEST} seeds: {', '.join(few)}.")
    return "\n".join(lines) + "\n"


def anchor(key, claim):
    """The anchor that GitHub makes of a claim's heading."""
    title = f"{key}: {claim.title}".lower()
    return "".join(c for c in title if c.isalnum() or c in "-_ ").replace(" ", "-")


def plot_claim(claim, records, path):
    """Two plots of a claim, as PNG: held-out loss by t, and loss while training. UserError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise UserError("plots need the package matplotlib: pip install -r requirements-plots.txt")
    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.2), dpi=80, layout="constrained")
    for name in claim.rows():
        if found := list(by_seed(records, name).values()):
            values = [mean_and_error(column) for column in zip(*(record["loss_by_time"] for record in found))]
            times = [(i + 0.5) / len(values) for i in range(len(values))]
            left.errorbar(times, [mean for mean, _ in values], [error or 0 for _, error in values], label=name)
            steps = [step for step, _ in found[0]["curve"]]
            right.plot(steps, [statistics.fmean(c) for c in zip(*([y for _, y in r["curve"]] for r in found))])
    left.set(xlabel="t", ylabel="held-out loss", yscale="log")
    right.set(xlabel="step", ylabel="training loss", yscale="log")
    left.legend(fontsize=8)
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png", metadata={"Software": None})
    pyplot.close(figure)


def write_page(claims, records, study, not_here, docs, real_border, plots=False):
    """Writes docs/evidence.md and before it, with `plots`, docs/evidence/CLAIM.png, from the records of this study."""
    folder = pathlib.Path(docs) / EVIDENCE.name
    for key, claim in claims.items():
        found = [name for name in claim.rows() if by_seed(records, name)]
        if plots and claim.kind == "train" and len(found) > 1:
            plot_claim(claim, records, folder / f"{key}.png")
    with whole_file(pathlib.Path(docs) / PAGE.name) as temporary:
        text = page_text(claims, records, study, not_here, folder, real_border)
        pathlib.Path(temporary).write_text(text, encoding="utf-8")
