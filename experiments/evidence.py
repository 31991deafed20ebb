"""The page of evidence: paired statistics and tables, from the runs that experiments/ablations.py keeps.

Everything on the page is a function of the stored lines; nothing here trains or draws. Left out: tests that know more
than means and standard errors.
"""

import math
import operator
import pathlib
import statistics

from experiments.measures import time_mass
from runtime.files import whole_file
from runtime.previews import JUDGED_SMALL

PAGE = pathlib.Path(__file__).parent.parent / "docs" / "evidence.md"
EVIDENCE = PAGE.parent / "evidence"
TEXT = pathlib.Path(__file__).with_name("evidence_page.md")  # the words around the numbers
FEWEST = 3  # pairs, below which nothing is concluded
MEASURES = {"loss": "held-out loss", "error": "error of the pictures", "distance": "emoji distance"}
KEYS = {"loss": "loss", "distance": "emoji_distance"}  # where a run that trains has them
COUNTS = (5, 10, 20, 50, 100)  # evaluations that a picture's cost is told of
DIGITS = {"loss": 4, "error": 2, "distance": 2, "emoji_distance": 2, "border_ratio": 3}

# ---- statistics ------------------------------------------------------------------------------------------------------


def mean_and_error(values):
    """The mean and its standard error (None of a single value)."""
    values = list(values)
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return statistics.fmean(values), error


def by_seed(records, name):
    """{seed: record} of a row."""
    return {record["seed"]: record for record in records if record["row"] == name}


def paired_difference(row, base, value=operator.itemgetter("loss")):
    """(mean, standard error or None, pairs) of row minus base, records by seed, over the seeds that both have.

    value: what is compared of a record.
    """
    shared = sorted(row.keys() & base.keys())
    if not shared:
        return None, None, 0
    mean, error = mean_and_error(value(row[seed]) - value(base[seed]) for seed in shared)
    return mean, error, len(shared)


def difference(records, row, base, measure):
    """(mean, standard error or None, pairs) of row minus base in a measure of MEASURES; 0 pairs where one is missing.

    Pairs are seeds of runs that train, and pictures of those that draw.
    """
    mine, theirs = by_seed(records, row), by_seed(records, base)
    if measure in KEYS and all(record["kind"] == "train" for record in mine.values()):
        return paired_difference(mine, theirs, operator.itemgetter(KEYS[measure]))
    if 0 not in mine or 0 not in theirs:
        return None, None, 0
    if measure == "error":
        errors = list(zip(mine[0]["errors"], theirs[0]["errors"]))
        return *mean_and_error(one - other for one, other in errors), len(errors)
    return *mine[0]["against"][base], mine[0]["pictures"]


def finding(mean, error, pairs):
    """What a difference is: "lower", "higher" or, within two standard errors or of too few pairs, "cannot tell"."""
    if pairs < FEWEST or abs(mean) <= 2 * error:
        return "cannot tell"
    return "lower" if mean < 0 else "higher"


def verdict(found, sign):
    """What a finding means for a claim whose difference should have this sign (-1, 1, or 0: none was published)."""
    if found == "cannot tell" or not sign:
        return found
    return "agrees" if (found == "lower") == (sign < 0) else "disagrees"


def judged(claim, records, row, base, sign):
    """{measure: (mean, standard error, pairs, verdict)} of a comparison of a claim, empty if it has not run."""
    found = {measure: difference(records, row, base, measure) for measure in claim.measures()}
    signs = {measure: 0 if measure == claim.unsaid else sign for measure in found}
    return {m: (*said, verdict(finding(*said), signs[m])) for m, said in found.items() if said[2]}


# ---- words and tables ------------------------------------------------------------------------------------------------


def with_error(mean, error, digits=4, sign=""):
    """A mean with its standard error, in text."""
    return f"{mean:{sign}.{digits}f}" + (f" ± {error:.{digits}f}" if error is not None else "")


def table(head, rows):
    """Lines of a table in Markdown."""
    return [f"| {' | '.join(head)} |", "|" + "---|" * len(head), *(f"| {' | '.join(row)} |" for row in rows), ""]


def strip_file(name):
    """The name of the file with a row's samples."""
    return f"{name.replace(', ', '-').replace(' ', '-')}.png"


def plot_file(key):
    """The name of the file with a claim's plot, which no strip has: a row may be called as its claim is."""
    return f"plot-{key}.png"


def anchor(heading):
    """The anchor that GitHub makes of a heading."""
    return "".join(c for c in heading.lower() if c.isalnum() or c in "-_ ").replace(" ", "-")


def heading(key, claim):
    """The heading of a claim's section."""
    return f"{key}: {claim.title}"


def border_ratios(records, usual):
    """The mean border ratio of some records, with that of real pictures of their size, if it is not the usual one."""
    text = with_error(*mean_and_error(record["border_ratio"] for record in records), DIGITS["border_ratio"])
    real = records[0].get("real_border_ratio", usual)
    return text + (f" (real: {real:.3f})" if abs(real - usual) > 1e-3 else "")


def training_table(names, records, real_border):
    """One line for each row that trains and has run: what it costs and what it reached."""
    head = ["row", "seeds", "parameters", "GFLOP a step", "CPU s", "held-out loss", "emoji distance", "border ratio"]
    rows = []
    for name in names:
        if found := list(by_seed(records, name).values()):
            row = [name, str(len(found)), f"{found[0]['parameters'] / 1e6:.2f} M", f"{found[0]['gflop_per_step']:.2f}"]
            row.append(f"{statistics.fmean(record['cpu_seconds'] for record in found):.0f}")
            for measure in ("loss", "emoji_distance"):
                row.append(with_error(*mean_and_error(record[measure] for record in found), DIGITS[measure]))
            rows.append([*row, border_ratios(found, real_border)])
    return table(head, rows)


def drawing_table(names, records, real_border, base=None):
    """One line for each row that draws and has run; with a base, also errors, and distances against that row's."""
    head = ["row", "evaluations", "CPU s a picture", "emoji distance", "border ratio"]
    rows = []
    for record in filter(None, (by_seed(records, name).get(0) for name in names)):
        row = [record["row"], str(record["evaluations"]), f"{record['cpu_seconds_per_picture']:.3f}"]
        row += [f"{record['emoji_distance']:.2f}", border_ratios([record], real_border)]
        if base:
            row.append(with_error(*mean_and_error(record["errors"]), 2) if "errors" in record else "")
            row.append(with_error(*record["against"][base], 2, "+") if base in record["against"] else "")
        rows.append(row)
    return table([*head, "error", f"distance - that of {base}"] if base else head, rows)


def verdict_table(claim, records):
    """One line for each comparison of a claim that has run: the paired differences, and what follows from each."""
    told = [word for measure in claim.measures() for word in (MEASURES[measure], f"by {measure}")]
    rows = []
    for row, base, sign in claim.pairs:
        if found := judged(claim, records, row, base, sign):
            cells = [f"{row} - {base}", str(next(iter(found.values()))[2])]
            for measure, (mean, error, _, said) in found.items():
                cells += [with_error(mean, error, DIGITS[measure], "+"), said]
            rows.append(cells)
    return table(["row - base", "pairs", *told], rows)


def before_the_last_tenth(record):
    """The held-out loss of a run over t < 0.9."""
    mass = time_mass()[:-1]
    return sum(share * loss for share, loss in zip(mass, record["loss_by_time"])) / sum(mass)


def square_table(claim, records):
    """The four rows of a claim's square, the paired differences along both sides, and the difference of those."""
    left, right, (a, b), (c, d) = claim.square
    runs = {name: by_seed(records, name) for name in (a, b, c, d)}
    seeds, lines = sorted(set.intersection(*map(set, runs.values()))), []
    measures = {MEASURES["loss"]: (operator.itemgetter("loss"), 4), "the same, t < 0.9": (before_the_last_tenth, 4)}
    measures[MEASURES["distance"]] = operator.itemgetter("emoji_distance"), 2
    for name, (value, digits) in measures.items() if seeds else ():
        cell = lambda values, sign="", digits=digits: with_error(*mean_and_error(values), digits, sign)
        minus = lambda one, other: [x - y for x, y in zip(one, other)]
        v = {row: [value(run[seed]) for seed in seeds] for row, run in runs.items()}
        above, below = minus(v[b], v[a]), minus(v[d], v[c])
        both = minus(below, above)
        said = finding(*mean_and_error(both), len(seeds))
        lines.append([name, a, cell(v[a]), cell(v[b]), cell(above, "+")])
        lines.append(["", c, cell(v[c]), cell(v[d]), cell(below, "+")])
        beside = [cell(minus(v[c], v[a]), "+"), cell(minus(v[d], v[b]), "+"), f"{cell(both, '+')}: {said}"]
        lines.append(["", f"{c} - {a}", *beside])
    told = f"The two choices together; at the lower right of each measure their interaction, the change of {right} - "
    told += f"{left} from {a} to {c}:"
    return [told, "", *table(["measure", "row", left, right, f"{right} - {left}"], lines)] if lines else []


def bins_table(names, records):
    """Held-out loss by tenths of t of rows that have run, mean over the seeds; folded away."""
    rows = []
    for name in names:
        columns = zip(*(record["loss_by_time"] for record in by_seed(records, name).values()))
        rows.append([name, *(f"{statistics.fmean(column):.3f}" for column in columns)])
    lines = table(["row", *(f"{i / 10:.1f} to {(i + 1) / 10:.1f}" for i in range(10))], rows)
    return ["<details><summary>Held-out loss by tenths of t</summary>", "", *lines, "</details>", ""]


def recommendation(names, records, base):
    """The fewest evaluations of each solver that keep the base's emoji distance, and what that is worth, as lines.

    They keep it where it is within two standard errors of the base's, with that many evaluations and with all more.
    """
    found = [record for name in names if (record := by_seed(records, name).get(0)) and "errors" in record]
    if not by_seed(records, base):
        return []
    fewest = {record["row"].rpartition(" ")[0]: None for record in found}
    lost = set()
    for record in sorted(found, key=lambda record: -record["evaluations"]):
        solver, (gap, error) = record["row"].rpartition(" ")[0], record["against"].get(base, (0, 0))
        if abs(gap) > 2 * error:
            lost.add(solver)
        elif solver not in lost:
            fewest[solver] = record
    said = [record["row"] if record else f"none of {solver}" for solver, record in fewest.items()]
    start = f"The fewest evaluations whose emoji distance is within two standard errors of that of {base}, as with all "
    lines, kept = [f"{start}more of them: {'; '.join(said)}.", ""], [record for record in fewest.values() if record]
    if not kept:
        return lines
    best = min(kept, key=lambda record: (record["evaluations"], statistics.fmean(record["errors"])))
    (gap, error), usual = best["against"].get(base, (0, 0)), by_seed(records, base)[0]["emoji_distance"]
    apart = statistics.fmean(best["errors"])
    lines[0] += f" Of these, the fewest with the least error: **{best['row']}**."
    lines += [
        f"That is not equality. With {best['pictures']} pictures, a distance {gap + 2 * error:.2f} above the "
        f"{usual:.2f} of {base} cannot be excluded, and a picture differs from the finest by {apart:.0f}/255. It holds "
        "for this model, its size, its guidance and one choice of noise.",
        "",
    ]
    for record in records:
        if seconds := record.get("cpu_seconds_per_evaluation"):
            number = best["evaluations"]
            lines[-2] += (
                f" {record['row']} takes {seconds:.1f} CPU s an evaluation, so {number * seconds:.0f} s for {number}; "
                "whether its pictures allow so few was not measured."
            )
    return lines


def cost_lines(names, records):
    """The seconds of an evaluation, times the number of evaluations."""
    lines = []
    for record in filter(None, (by_seed(records, name).get(0) for name in names)):
        seconds = record["cpu_seconds_per_evaluation"]
        lines += [f"{record['row']}: {seconds:.1f} CPU s for one guided evaluation of one picture, in fp32.", ""]
        lines += table(
            ["evaluations", *map(str, COUNTS)], [["CPU s a picture", *(f"{n * seconds:.0f}" for n in COUNTS)]]
        )
    return [*lines, "Up to t = 0.1 evaluations are not guided and cost half, which is not counted here.", ""]


# ---- the page --------------------------------------------------------------------------------------------------------


def has_run(claim, records):
    """Whether there is anything to say of a claim: a comparison, or a cost."""
    if claim.kind == "cost":
        return any(by_seed(records, name) for name in claim.rows())
    return any(judged(claim, records, *pair) for pair in claim.pairs)


def linked(key, claims, records):
    """A claim's key, with a link to its section if there is one."""
    return f"[{key}](#{anchor(heading(key, claims[key]))})" if has_run(claims[key], records) else key


def minutes(claim, records):
    """How long the stored runs of a claim's rows took, by the clock, all seeds together."""
    rows = claim.rows()
    return sum(record["wall_seconds"] for record in records if record["row"] in rows) / 60


def summary(claims, records):
    """The table of claims, one line each: the minutes of its runs, and what each comparison says by each measure."""
    rows = []
    for key, claim in claims.items():
        said = [] if has_run(claim, records) else ["not run"]
        for row, base, sign in claim.pairs:
            parts = [
                f"by {measure} {with_error(mean, error, DIGITS[measure], '+')}, **{verdict}**"
                for measure, (mean, error, _, verdict) in judged(claim, records, row, base, sign).items()
            ]
            said += [f"{row} - {base}: {'; '.join(parts)}"] if parts else []
        if claim.kind == "cost":
            costs = (by_seed(records, name).get(0) for name in claim.rows())
            said = [f"{r['row']}: {50 * r['cpu_seconds_per_evaluation']:.0f} CPU s with 50" for r in costs if r]
        spent = f"{minutes(claim, records):.0f}" if has_run(claim, records) else ""
        rows.append([linked(key, claims, records), claim.says, spent, "<br>".join(said)])
    return table(["claim", "said", "minutes", "row - base, ± standard error: verdict"], rows)


def claim_lines(key, claim, records, folder, real_border):
    """The section of one claim."""
    lines = [f"## {heading(key, claim)}", "", f"Said: {claim.says}.", ""]
    if claim.note:
        lines += [claim.note, ""]
    if claim.kind == "cost":
        return lines + cost_lines(claim.rows(), records)
    lines += verdict_table(claim, records)
    lines += square_table(claim, records) if claim.square else []
    if claim.kind == "draw":
        base = next((name for name in claim.others if name.endswith("euler 50")), None)
        lines += drawing_table(claim.others or claim.rows(), records, real_border, base)
        lines += recommendation(claim.rows(), records, base) if base else []
    if (folder / plot_file(key)).exists():
        lines += [f"![Plot of {key}](evidence/{plot_file(key)})", ""]
    return lines


def cpu_seconds(record):
    """The processor seconds of a stored run's training steps, of its drawing or of its evaluation."""
    keys = ("cpu_seconds", "cpu_seconds_per_evaluation")
    found = next((record[key] for key in keys if key in record), 0)
    return found + record.get("cpu_seconds_per_picture", 0) * record.get("pictures", 0)


def how_measured(claims, records, study, real_border):
    """What TEXT says of how it was measured: {name: value}."""
    compared = [
        judged(claim, records, *pair) for claim in claims.values() if claim.kind == "train" for pair in claim.pairs
    ]
    return {
        "study": study,
        "patch_numbers": 3 * study.config.patch_size**2,
        "length": linked("length", claims, records),
        "fewest": FEWEST,
        "verdicts": sum(map(len, compared)),
        "judged": JUDGED_SMALL,
        "real_border": real_border,
        "hours": sum(record["wall_seconds"] for record in records) / 3600,
        "cpu_hours": sum(map(cpu_seconds, records)) / 3600,
        "machines": "; ".join(sorted({record["machine"] for record in records})) or "none yet",
        "commits": ", ".join(sorted({record["code"] for record in records})) or "none yet",
    }


def borders(claims, records, usual):
    """The section on patches that show: which choices bring the border ratio closer to that of real pictures."""
    gap = lambda record: abs(record["border_ratio"] - record.get("real_border_ratio", usual))
    rows, told = [], {"smaller": [], "larger": [], "cannot tell": []}
    for key, claim in claims.items():
        for row, base, _ in claim.pairs if claim.kind == "train" else ():
            mine, theirs = by_seed(records, row), by_seed(records, base)
            mean, error, pairs = paired_difference(mine, theirs, gap)
            if pairs:
                before = statistics.fmean(gap(record) for record in theirs.values())
                said = {"lower": "smaller", "higher": "larger"}.get(found := finding(mean, error, pairs), found)
                told[said].append(f"{row} - {base} ({mean / before:+.0%})")
                cells = [with_error(*mean_and_error(map(gap, run.values())), 3) for run in (theirs, mine)]
                rows.append([key, f"{row} - {base}", *cells, with_error(mean, error, 3, "+"), said])
    if not rows:
        return []
    return [
        "## Borders",
        "",
        "Which choices close the gap between the border ratio of samples and that of real pictures "
        f"({usual:.3f} at the usual size)? Of each comparison, the gap of the row minus that of its base, paired by "
        "seed, and in percent of the base's gap:",
        "",
        *(f"- {said.capitalize()}: {'; '.join(those) or 'none'}." for said, those in told.items()),
        "",
        "A small gap alone is no merit: noise inside patches lowers the ratio as smooth borders do, so it has to be "
        "read beside the distance and the [samples](#samples).",
        "",
        *table(["claim", "row - base", "gap of the base", "gap of the row", "difference", "the gap is"], rows),
    ]


def not_run(claims, records, not_here):
    """The section of what the page does not know."""
    lines = ["## Not run", "", *(f"- {line}" for line in not_here)]
    names = list(dict.fromkeys(name for claim in claims.values() for name in claim.rows()))
    if missing := [name for name in names if not by_seed(records, name)]:
        lines.append(f"- Rows: {'; '.join(missing)}.")
    trained = dict.fromkeys(name for claim in claims.values() if claim.kind == "train" for name in claim.rows())
    if few := [f"{name} ({n})" for name in trained if 0 < (n := len(by_seed(records, name))) < FEWEST]:
        lines.append(f"- Seeds, of which there are fewer than {FEWEST}: {'; '.join(few)}.")
    return lines


def page_text(claims, records, study, not_here, folder, real_border):
    """The whole page, from the records of this study: the table of claims, one picture, then the details."""
    top, seams = summary(claims, records), borders(claims, records, real_border)
    if (folder / plot_file("claims")).exists():
        told = "Held-out loss and emoji distance of each row against its base"
        top += [f"![{told}](evidence/{plot_file('claims')})", ""]
    if seams:
        top += ["Which part of the field closes the gap at the borders of patches is told in [Borders](#borders).", ""]
    rows, lines = dict.fromkeys(name for claim in claims.values() for name in claim.rows()), []
    if trained := [name for name in rows if "loss" in next(iter(by_seed(records, name).values()), {})]:
        lines += ["## The rows that train", "", *training_table(trained, records, real_border)]
        lines += bins_table(trained, records)
    lines += seams
    for key, claim in claims.items():
        lines += claim_lines(key, claim, records, folder, real_border) if has_run(claim, records) else []
    if strips := [name for name in rows if by_seed(records, name).get(0) and (folder / strip_file(name)).exists()]:
        told = "Of seed 0: each column asks for one class, or one name of the text rows, and starts from the same "
        told += "noise in all rows of one size. Of solvers with more than 10 evaluations only the finest are shown."
        lines += ["## Samples", "", told, ""]
        lines += table(["row", "samples"], [[name, f"![{name}](evidence/{strip_file(name)})"] for name in strips])
    lines += not_run(claims, records, not_here)
    how = how_measured(claims, records, study, real_border)
    return TEXT.read_text(encoding="utf-8").format(summary="\n".join(top), sections="\n".join(lines), **how)


def write_page(claims, records, study, not_here, docs, real_border):
    """Writes docs/evidence.md from the records of this study; it shows the plots that are there."""
    text = page_text(claims, records, study, not_here, pathlib.Path(docs) / EVIDENCE.name, real_border)
    with whole_file(pathlib.Path(docs) / PAGE.name) as temporary:
        pathlib.Path(temporary).write_text(text, encoding="utf-8")
