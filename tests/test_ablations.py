"""The study of the paper's claims: its pairs, its arithmetic, what it does not repeat, and the page in docs/."""

import concurrent.futures
import dataclasses
import itertools
import json
import math

import pytest
import torch
from helpers import ROOT, TINY, complaint, randomised, run_script

from data import from_uint8, open_dataset
from experiments import ablations, claims, evidence, evidence_plots, measures, world
from flow import sample_time
from model import PixNerd
from neural_field import dct_encoding
from runtime.files import UserError
from runtime.flops import forward_flops

CONFIG = dataclasses.replace(TINY, num_classes=9, resolution=32, patch_size=8)
STUDY = world.Study(CONFIG, steps=2, batch_size=3, samples=9, sampler_pictures=9)


@pytest.fixture
def data():
    """Twelve drawings to learn and ten to be judged on."""
    numbers = list(range(0, 1900, 86))
    return world.some_emoji(numbers[:12]), world.some_emoji(numbers[12:])


def a_record(row, seed, loss, distance=10.0, border=1.5, kind="train"):
    """A stored run as the page reads it; every tenth of t has the same loss."""
    measured = {"loss": loss, "loss_by_time": [loss] * 10, "emoji_distance": distance, "border_ratio": border}
    measured |= {"cpu_seconds": 3.0, "gflop_per_step": 2.0, "parameters": 4_000_000, "curve": [[1, loss]]}
    about = {"machine": "a machine", "code": "abc", "wall_seconds": 36.0}
    return {"row": row, "seed": seed, "kind": kind, "study": dataclasses.asdict(STUDY)} | measured | about


# ---- statistics ------------------------------------------------------------------------------------------------------


def test_differences_are_of_the_same_seed_and_their_error_is_that_of_the_mean():
    """By hand: 0.1, 0.2 and 0.3 have mean 0.2 and error 0.1 / sqrt(3). Catches the error of unpaired means, which the
    seeds' own spread of 10 would drown."""
    row = {0: {"loss": 10.1}, 1: {"loss": 20.2}, 2: {"loss": 30.3}, 7: {"loss": 99.0}}
    base = {0: {"loss": 10.0}, 1: {"loss": 20.0}, 2: {"loss": 30.0}, 8: {"loss": 0.0}}
    mean, error, pairs = evidence.paired_difference(row, base)
    assert (mean, error, pairs) == (pytest.approx(0.2), pytest.approx(0.1 / math.sqrt(3)), 3)
    assert evidence.paired_difference(row, {}) == (None, None, 0)


def test_within_two_errors_or_of_fewer_than_three_pairs_nobody_can_tell():
    assert evidence.finding(-0.21, 0.1, 3) == "lower" and evidence.finding(0.21, 0.1, 5) == "higher"
    assert evidence.finding(0.19, 0.1, 9) == evidence.finding(-9.0, 0.1, 2) == "cannot tell"
    assert evidence.finding(-9.0, None, 1) == "cannot tell"
    assert [evidence.verdict(found, -1) for found in ("lower", "higher")] == ["agrees", "disagrees"]
    assert [evidence.verdict(found, 1) for found in ("lower", "higher")] == ["disagrees", "agrees"]
    assert evidence.verdict("lower", 0) == "lower" and evidence.verdict("cannot tell", 1) == "cannot tell"


def a_drawing(row, evaluations, distance, errors, against):
    """A stored row that draws; errors of three pictures."""
    measured = {"evaluations": evaluations, "cpu_seconds_per_picture": 0.5, "emoji_distance": distance, "pictures": 3}
    measured |= {"border_ratio": 1.5, "real_border_ratio": 0.9, "errors": errors, "against": against}
    return {"row": row, "seed": 0, "kind": "draw", "machine": "m", "code": "abc", "wall_seconds": 36.0} | measured


def page_of(records, folder, real=1.0, not_here=()):
    return evidence.page_text(claims.CLAIMS, records, STUDY, not_here, folder, real)


def test_the_tables_hold_what_a_hand_computes(tmp_path):
    """Field 0.1, 0.2, 0.3 against linear 0.2, 0.4, 0.6: -0.2 with error 0.1 / sqrt(3), so the claim is agreed with.

    Its distances 5, 6 and 7 are 4, 3 and 2 below the linear ones, -3 with the same tenfold error.
    """
    records = [a_record("field", seed, 0.1 * (seed + 1), 5.0 + seed) for seed in range(3)]
    records += [a_record("linear", seed, 0.2 * (seed + 1), 9.0, 1.75) for seed in range(3)]
    page = page_of(records, tmp_path, 1.25, ["a thing"])
    assert "| field - linear | 3 | -0.2000 ± 0.0577 | agrees | -3.00 ± 0.58 | agrees |" in page
    assert "| field | 3 | 4.00 M | 2.00 | 3 | 0.2000 ± 0.0577 | 6.00 ± 0.58 | 1.500 ± 0.000 |" in page
    said = "field - linear: by loss -0.2000 ± 0.0577, **agrees**; by distance -3.00 ± 0.58, **agrees**"
    assert f"at equal cost | 4 | {said} |" in page  # six runs of 36 s each
    assert "real pictures it is\n  1.250" in page and "0.1 hours" in page and "- a thing" in page
    assert "| normalisation | normalising both matrices and the output was chosen |  | not run |" in page
    assert "norm none; norm first; norm both" in page and "## normalisation" not in page


def test_each_claim_has_one_line_of_the_first_table_whatever_was_compared(tmp_path):
    records = [a_record(row, seed, 0.1) for row in ("field", "norm none", "norm both") for seed in range(3)]
    page = page_of(records, tmp_path)
    lines = page[: page.index("## How")].splitlines()
    found = [line for line in lines if line.startswith("| ") and not line.startswith("| claim")]
    assert len(found) == len(claims.CLAIMS)
    (line,) = [line for line in found if "normalising both" in line]
    assert "norm none - field: by loss +0.0000 ± 0.0000, **cannot tell**; by distance " in line
    assert "**<br>norm both - field: " in line


def test_two_seeds_are_shown_and_not_concluded_from(tmp_path):
    records = [a_record(row, seed, loss) for row, loss in (("field", 0.1), ("linear", 0.9)) for seed in range(2)]
    page = page_of(records, tmp_path)
    assert "field - linear: by loss -0.8000 ± 0.0000, **cannot tell**; by distance" in page
    assert "- Seeds, of which there are fewer than 3: linear (2); field (2)." in page


def test_solvers_are_judged_by_the_errors_of_the_same_pictures(tmp_path):
    """By hand: 1, 2, 3 less than those of Euler, -2 with error 1 / sqrt(3): agrees. The sum of the unpaired errors, 10
    and more, could not tell."""
    records = [a_drawing("adams2 10", 10, 7.0, [9.0, 28.0, 47.0], {"euler 50": [0.5, 1.0]})]
    records.append(a_drawing("euler 10", 10, 9.0, [10.0, 30.0, 50.0], {"euler 50": [2.5, 1.0]}))
    page = page_of(records, tmp_path)
    assert "| adams2 10 - euler 10: by error -2.00 ± 0.58, **agrees** |" in page
    assert "| euler 10 | 10 | 0.500 | 9.00 | 1.500 (real: 0.900) | 30.00 ± 11.55 | +2.50 ± 1.00 |" in page


def test_guidance_and_sizes_are_judged_by_the_emoji_distance(tmp_path):
    """With three pictures: scale 1 is 3 farther than the paper's choice, ± 1, and scale 5 no farther."""
    records = [a_drawing("scale 3.5 from 0.1", 20, 7.0, [], {})]
    records.append(a_drawing("scale 1 from 0.1", 20, 10.0, [], {"scale 3.5 from 0.1": [3.0, 1.0]}))
    records.append(a_drawing("scale 5 from 0.1", 20, 7.5, [], {"scale 3.5 from 0.1": [0.5, 1.0]}))
    records.append(a_drawing("64 pixels, denser", 20, 7.5, [], {"32 pixels": [4.5, 1.0]}))
    records.append(a_drawing("32 pixels", 20, 7.5, [], {}))
    page = page_of(records, tmp_path)
    assert "| scale 1 from 0.1 - scale 3.5 from 0.1 | 3 | +3.00 ± 1.00 | agrees |" in page
    assert "| scale 5 from 0.1 - scale 3.5 from 0.1 | 3 | +0.50 ± 1.00 | cannot tell |" in page
    assert "| 64 pixels, denser - 32 pixels | 3 | +4.50 ± 1.00 | higher |" in page


def test_the_recommendation_is_the_fewest_evaluations_that_cannot_be_told_from_50_steps():
    """Of each solver, and of those with equally few the one with the least error; lower is not the same either."""
    records = [a_drawing("euler 50", 50, 8.0, [0.1] * 3, {})]
    rows = (("euler 20", 0.2), ("euler 10", 1.1), ("adams2 10", 0.9), ("adams3 10", 0.9), ("heun 6", -1.2))
    for name, gap in rows:
        error = [1.0 if name == "adams3 10" else 2.0] * 3
        records.append(a_drawing(name, int(name.split()[1]), 8.0 + gap, error, {"euler 50": [gap, 0.5]}))
    records.append({"row": "XL/16", "seed": 0, "cpu_seconds_per_evaluation": 2.5})
    (said, _, worth, _) = evidence.recommendation(claims.CLAIMS["solvers"].rows(), records, "euler 50")
    assert "euler 20; " in said and "adams2 10; " in said and "none of heun" in said and "**adams3 10**" in said
    # 0.9 and two errors of 0.5 above the base's 8.
    assert "a distance 1.90 above the 8.00 of euler 50 cannot be excluded" in worth and "by 1/255" in worth
    assert "XL/16 takes 2.5 CPU s an evaluation, so 25 s for 10" in worth
    assert evidence.recommendation(["euler 10"], records[1:], "euler 50") == []


def test_fewer_evaluations_than_some_that_differ_are_not_recommended():
    """Euler at 10 is near by chance: 20 is not. Where no solver keeps the distance, none is recommended."""
    records = [a_drawing("euler 50", 50, 8.0, [0.1] * 3, {})]
    for n, gap in ((20, 2.0), (10, 0.1)):
        records.append(a_drawing(f"euler {n}", n, 8.0 + gap, [2.0] * 3, {"euler 50": [gap, 0.5]}))
    assert "of them: euler 50. Of these" in evidence.recommendation([r["row"] for r in records], records, "euler 50")[0]
    (said, _) = evidence.recommendation(["euler 20", "euler 10"], records, "euler 50")
    assert "none of euler" in said and "Of these" not in said


def test_a_verdict_is_given_by_loss_and_by_distance(tmp_path):
    """The loss is the same, the distance is not, and neither hides behind the other. Of a loss that its claim says
    nothing of, the verdict is a direction."""
    records = [a_record("field", seed, 0.1 + seed, 10.0) for seed in range(3)]
    records += [a_record("linear", seed, 0.1 + seed, 12.0) for seed in range(3)]
    records += [a_record("frequency loss", seed, 0.2 + seed, 12.0) for seed in range(3)]
    page = page_of(records, tmp_path)
    assert "field - linear: by loss +0.0000 ± 0.0000, **cannot tell**; by distance -2.00 ± 0.00, **agrees**" in page
    assert (
        "frequency loss - field: by loss +0.1000 ± 0.0000, **higher**; by distance +2.00 ± 0.00, **disagrees**" in page
    )
    assert "| field - linear | 3 | +0.0000 ± 0.0000 | cannot tell | -2.00 ± 0.00 | agrees |" in page


def test_the_square_of_decoder_and_prediction_holds_what_a_hand_computes(tmp_path):
    """Linear 1 -> 4, field 1 -> 2, in all tenths but the last, which adds 10: +3 and +1, interaction -2."""
    records = []
    for seed in range(3):
        for row, loss in (("linear", 1.0), ("linear, clean", 4.0), ("field", 1.0), ("field, clean", 2.0)):
            record = a_record(row, seed, loss + seed + (0.5 * seed if row == "field, clean" else 0))
            record["loss_by_time"] = [record["loss"]] * 9 + [record["loss"] + 10]
            records.append(record)
    page = page_of(records, tmp_path)
    for name in ("held-out loss", "the same, t < 0.9"):
        assert f"| {name} | linear | 2.0000 ± 0.5774 | 5.0000 ± 0.5774 | +3.0000 ± 0.0000 |" in page
    assert page.count("|  | field | 2.0000 ± 0.5774 | 3.5000 ± 0.8660 | +1.5000 ± 0.2887 |") == 2
    assert page.count("|  | field - linear | +0.0000 ± 0.0000 | -1.5000 ± 0.2887 | -1.5000 ± 0.2887: lower |") == 2
    assert "| emoji distance | linear | 10.00 ± 0.00 | 10.00 ± 0.00 | +0.00 ± 0.00 |" in page
    assert "The two choices" not in page_of([r for r in records if r["row"] != "linear"], tmp_path)


def test_the_borders_are_judged_by_their_distance_to_those_of_real_pictures(tmp_path):
    """Real 1.25: field 1.5, 1.55, 1.6 against linear 1.75: gaps 0.3 and 0.5, -0.2 with error 0.05 / sqrt(3). A ratio
    below that of real pictures has a gap too, and rows of another size have their own real pictures."""
    records = [a_record("field", seed, 0.1, border=1.5 + 0.05 * seed) for seed in range(3)]
    records += [a_record("linear", seed, 0.1, border=1.75) for seed in range(3)]
    records += [a_record("frequency loss", seed, 0.1, border=0.25 + 0.05 * seed) for seed in range(3)]
    for row, border in (("field, patches of 16", 0.75), ("linear, patches of 16", 0.85)):
        records += [a_record(row, seed, 0.1, border=border) | {"real_border_ratio": 0.75} for seed in range(3)]
    page = page_of(records, tmp_path, 1.25)
    assert "| decoder | field - linear | 0.500 ± 0.000 | 0.300 ± 0.029 | -0.200 ± 0.029 | smaller |" in page
    assert "| patch | field, patches of 16 - linear, patches of 16 | 0.100 ± 0.000 | 0.000 ± 0.000 | -0.100 " in page
    assert "- Smaller: field - linear (-40%); field, patches of 16 - linear, patches of 16 (-100%)." in page
    assert "- Larger: frequency loss - field (+217%).\n- Cannot tell: none." in page


def test_hours_are_told_by_the_clock_and_of_the_processor(tmp_path):
    """By hand: two runs of 36 s, in them 3 s of training and 0.5 s for each of 3 pictures."""
    assert evidence.cpu_seconds(a_record("field", 0, 0.1)) == 3.0
    assert evidence.cpu_seconds(a_drawing("euler 50", 50, 8.0, [], {})) == 1.5
    assert evidence.cpu_seconds({"row": "XL/16", "cpu_seconds_per_evaluation": 2.5}) == 2.5
    page = page_of([a_record("field", seed, 0.1) | {"cpu_seconds": 720.0} for seed in range(10)], tmp_path)
    assert "0.1 hours by the clock" in page and "2.0 CPU hours" in page


def test_a_picture_costs_its_evaluations(tmp_path):
    about = {"row": "XL/16", "seed": 0, "kind": "cost", "machine": "m", "code": "abc", "wall_seconds": 9.0}
    page = page_of([about | {"cpu_seconds_per_evaluation": 12.5}], tmp_path)
    assert "XL/16: 625 CPU s with 50" in page and "| CPU s a picture | 62 | 125 | 250 | 625 | 1250 |" in page


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_in_docs_is_what_the_stored_runs_say():
    """Written again from docs/evidence/runs.jsonl, it is the same to the letter. Catches a number typed by hand."""
    study, docs = world.Study(), ROOT / "docs"
    records = ablations.Runs(docs / "evidence").of(study)
    real = measures.border_ratio(open_dataset("emoji", 32).images)
    page = evidence.page_text(claims.CLAIMS, records, study, claims.NOT_HERE, docs / "evidence", real)
    assert page == (docs / "evidence.md").read_text(encoding="utf-8")
    assert not [r["row"] for r in records if r["row"] not in {*claims.ROWS, *claims.DRAWN, *claims.COSTS}]


def test_every_stored_run_says_how_it_was_made():
    for record in ablations.Runs(ROOT / "docs" / "evidence").records:
        assert {"command", "seed", "machine", "code", "study", "wall_seconds", "date"} <= record.keys()
        assert f'--rows "{record["row"]}" --seeds {record["seed"]}' in record["command"]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_rows_of_a_seed_see_the_same_samples_and_another_seed_sees_others(data, monkeypatch):
    """Pictures, noise, times and dropped labels of every step."""
    plain, seen = ablations.training_loss, []

    def watched(student, teacher, batch, *how):
        seen.append(torch.cat([batch[key].double().flatten() for key in ("image", "y", "noise", "t", "u")]))
        return plain(student, teacher, batch, *how)

    monkeypatch.setattr(ablations, "training_loss", watched)
    for name, seed in (("field", 0), ("linear, clean", 0), ("repa, conv", 0), ("frequency loss", 1)):
        ablations.train_row(name, seed, STUDY, data)
    assert len(seen) == 4 * STUDY.steps
    for step in range(STUDY.steps):
        field, linear, conv, other = seen[step :: STUDY.steps]
        assert torch.equal(field, linear) and torch.equal(field, conv) and not torch.equal(field, other)


@pytest.mark.slow
def test_a_run_repeats_to_the_bit_and_counts_what_it_did(data):
    first, second = (ablations.train_row("field, twice as long", 0, STUDY, data) for _ in range(2))
    for name in first.keys() - {"cpu_seconds"}:
        assert first[name] == second[name], name
    assert first["steps"] == 4 and first["curve"][-1][0] == 4
    assert first["gflop_per_step"] == pytest.approx(3 * 3 * forward_flops(CONFIG) / 1e9)


def test_an_interrupted_study_goes_on_where_it_stopped_and_repeats_nothing(tmp_path, monkeypatch):
    """The second of four runs fails; the next start does that one and the rest, and a third start does none."""
    done, fail = [], {("field", 0)}

    def train_row(name, seed, *_):
        if (name, seed) in fail:
            raise KeyboardInterrupt
        done.append((name, seed))
        return {"loss": 0.5, "emoji_distance": 1.0}

    monkeypatch.setattr(ablations, "train_row", train_row)
    with pytest.raises(KeyboardInterrupt):
        ablations.do(["linear", "field"], [0, 1], STUDY, ablations.Runs(tmp_path))
    assert done == [("linear", 0)]
    fail.clear()
    for _ in range(2):
        ablations.do(["linear", "field"], [0, 1], STUDY, ablations.Runs(tmp_path))
        assert done == [("linear", 0), ("field", 0), ("linear", 1), ("field", 1)]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == ["linear", "field", "linear", "field"]
    longer = dataclasses.replace(STUDY, steps=3)
    assert ablations.Runs(tmp_path).find("field", 0, STUDY) and not ablations.Runs(tmp_path).find("field", 0, longer)


def test_rows_that_draw_have_one_seed_whatever_seeds_are_asked_for(tmp_path, monkeypatch):
    """Their pictures are their error bars. Catches a solver that is drawn three times for one line of the page."""
    done = []
    monkeypatch.setattr(ablations, "measured", lambda name, seed, *_: done.append((name, seed)) or {"loss": 0.5})
    ablations.do(["euler 10", "field", "XL/16"], [1, 2], STUDY, ablations.Runs(tmp_path))
    assert done == [("euler 10", 0), ("XL/16", 0), ("field", 1), ("field", 2)]


def test_lines_of_two_machines_are_joined_by_appending_them_in_any_order(tmp_path):
    """The page is the same, and what either has done is done."""
    here = [a_record(row, 0, 0.1) for row in ("field", "linear")] + [a_record("field", 1, 0.1)]
    there = [a_record("linear", 1, 0.3), a_drawing("euler 50", 50, 8.0, [0.1] * 3, {}) | {"study": here[0]["study"]}]
    pages = []
    for number, lines in enumerate((here + there, there[::-1] + here[::-1])):
        folder = tmp_path / str(number)
        folder.mkdir()
        (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        runs = ablations.Runs(folder)
        assert all(runs.find(line["row"], line["seed"], STUDY) for line in lines)
        pages.append(page_of(runs.of(STUDY), tmp_path))
    assert pages[0] == pages[1]


def test_two_processes_that_write_at_once_lose_no_line(tmp_path):
    """Each knows the file as it was before the others'. Catches a file that is replaced by what one has read."""
    processes = [ablations.Runs(tmp_path) for _ in range(4)]
    assert [runs.records for runs in processes] == [[]] * 4

    def finish(seed):
        for row in ("field", "linear", "sincos"):
            processes[seed].add(a_record(row, seed, 0.1))

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(finish, range(4)))
    stored = {(line["row"], line["seed"]) for line in processes[0].records}
    assert stored == set(itertools.product(("field", "linear", "sincos"), range(4)))


def test_a_run_that_two_processes_finish_is_kept_once(tmp_path):
    for loss in (0.1, 0.2):
        ablations.Runs(tmp_path).add(a_record("field", 0, loss))
    (record,) = ablations.Runs(tmp_path).records
    assert record["loss"] == 0.1


def test_lines_appended_by_hand_may_leave_blank_ones_and_lack_the_last_end(tmp_path):
    path = tmp_path / "runs.jsonl"
    path.write_text("\n" + json.dumps(a_record("field", 0, 0.1)) + "\n  \n" + json.dumps(a_record("field", 1, 0.2)))
    ablations.Runs(tmp_path).add(a_record("linear", 0, 0.3))
    assert [line["loss"] for line in ablations.Runs(tmp_path).records] == [0.1, 0.2, 0.3]


@pytest.mark.parametrize("damaged", ['{"row": "field", "se', "12", '{"row": "field"}', "\xff"])
def test_a_damaged_line_is_named_by_its_file_and_number(damaged, tmp_path):
    folder = tmp_path / "evidence"
    ablations.Runs(folder).add(a_record("field", 0, 0.1))
    with open(folder / "runs.jsonl", "a", encoding="latin-1") as file:
        file.write(f"\n{damaged}\n")
    told = "runs.jsonl:3: not the line of a run: remove it, and the run is repeated"
    with pytest.raises(UserError, match=told):
        ablations.Runs(folder).find("linear", 0, STUDY)


def test_every_row_makes_a_model_and_field_and_linear_cost_the_same():
    configs = {name: ablations.config_of(name, world.Study()) for name in claims.ROWS}
    for pair in (("field", "linear"), ("field, patches of 16", "linear, patches of 16")):
        field, linear = (configs[name] for name in pair)
        assert forward_flops(field) == pytest.approx(forward_flops(linear), rel=0.05)
        assert field.hidden_size > 3 * field.patch_size**2  # the paper's 1024 > 768
    for key, claim in claims.CLAIMS.items():
        assert (
            set(claim.rows()) <= {"train": claims.ROWS, "draw": claims.DRAWN, "cost": claims.COSTS}[claim.kind].keys()
        )
        assert set(claim.measures()) <= evidence.MEASURES.keys() and bool(claim.measures()) == bool(claim.pairs), key


@pytest.mark.slow
def test_a_row_of_64_pixels_learns_and_is_judged_at_its_own_size(monkeypatch):
    """Samples are shrunk for the emoji distance, and borders of patches of 16 are compared with those of real ones."""
    small = {"resolution": 64, "patch_size": 16, "hidden_size": 32, "num_heads": 2, "lr": 1e-3}
    monkeypatch.setitem(claims.ROWS, "field, patches of 16", small)
    data = world.some_emoji([1, 2, 3, 4], 64), world.some_emoji([5, 6], 64)
    plain, rates = ablations.update, []
    monkeypatch.setattr(ablations, "update", lambda *what: rates.append(what[5]) or plain(*what))
    study = dataclasses.replace(STUDY, warmup=0)
    found = ablations.train_row("field, patches of 16", 0, study, data)
    assert max(rates) == 1e-3 != study.lr
    real = measures.border_ratio(open_dataset("emoji", 64).images, 16)
    assert found["real_border_ratio"] == pytest.approx(real) and found["emoji_distance"] > 0
    own = dataclasses.replace(CONFIG, resolution=64, patch_size=16, hidden_size=32, num_heads=2)
    assert found["gflop_per_step"] == pytest.approx(3 * 3 * forward_flops(own) / 1e9)


@pytest.mark.slow
def test_more_evaluations_come_closer_to_the_finest(monkeypatch):
    """Of a random model, whose path is anything but straight; the finest itself has no error."""
    monkeypatch.setitem(claims.DRAWN, "finest", {"evaluations": 60})
    cache = {"emoji": (randomised(CONFIG), torch.arange(9))}
    names = ("euler 6", "euler 20", "heun 20", "euler 50", "finest")
    found = {name: ablations.draw_row(name, 0, cache) for name in names}
    errors = [sum(found[name]["errors"]) for name in ("euler 6", "euler 20", "heun 20")]
    assert errors == sorted(errors, reverse=True) and "errors" not in found["finest"]
    assert [found[name]["evaluations"] for name in ("euler 6", "heun 20")] == [6, 20]
    assert found["heun 20"]["against"].keys() == {"euler 50"} and not found["euler 50"]["against"]
    again = ablations.draw_row("heun 20", 0, {"emoji": cache["emoji"]})  # as after a restart: drawn anew
    assert again["errors"] == found["heun 20"]["errors"] and again["against"] == found["heun 20"]["against"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "row, calls, patch", [("48 pixels, more tokens", {(48, None)}, 8), ("64 pixels, denser", {(64, (4, 4))}, 16)]
)
def test_other_sizes_are_drawn_by_more_tokens_or_by_denser_patches(row, calls, patch, monkeypatch):
    """And the borders of their own patches are looked at. Catches a size that is asked for and not drawn."""
    monkeypatch.setitem(claims.DRAWN, row, claims.DRAWN[row] | {"evaluations": 2})
    monkeypatch.setitem(claims.DRAWN, "32 pixels", {"evaluations": 2})
    monkeypatch.setattr(ablations, "bases_of", lambda name: ["32 pixels"])
    plain, seen, model = ablations.generate, set(), randomised(CONFIG)

    def watched(model, y, noise, *how, grid, **more):
        seen.add((noise.shape[-1], grid))
        return plain(model, y, noise, *how, grid=grid, **more)

    monkeypatch.setattr(ablations, "generate", watched)
    found = ablations.draw_row(row, 0, cache := {"emoji": (model, torch.arange(9))})
    assert seen == calls | {(32, None)} and cache[row, 0][0].shape[-1] == claims.DRAWN[row]["side"]
    assert found["border_ratio"] == measures.border_ratio(cache[row, 0][0], patch)
    assert found["against"].keys() == {"32 pixels"}


def test_every_comparison_of_emoji_distances_is_stored_with_the_row():
    for claim in claims.CLAIMS.values():
        for row, base, _ in claim.pairs if claim.measure == "distance" else ():
            assert base in claims.bases_of(row)
    assert claims.bases_of("text, adams2 5") == ["text, euler 50"] and claims.bases_of("euler 50") == []


def test_the_models_in_assets_are_asked_for_what_the_emoji_are():
    """Classes and names as often as in the data, each model with conditions that it takes."""
    model, y = ablations.ask("emoji", 9)
    assert y.shape == (9,) and y.tolist() == sorted(y.tolist()) and model.config.num_classes == 9
    model, y = ablations.ask("emoji-text", 4)
    assert y.shape == (4, model.config.text_length, model.config.text_width) and len(y.unique(dim=0)) == 4


def test_the_time_of_an_evaluation_is_that_of_two_passes(monkeypatch):
    monkeypatch.setitem(claims.COSTS, "XL/16", CONFIG)
    calls = []
    monkeypatch.setattr(ablations, "timings", lambda call, *_: [calls.append(call())] and [3.0, 1.0, 2.0])
    found = ablations.measured("XL/16", 0, STUDY, {}, None)
    assert found == {
        "cpu_seconds_per_evaluation": 2.0,
        "gflop_per_evaluation": pytest.approx(2 * forward_flops(CONFIG) / 1e9),
    }
    assert len(calls) == 1


# ---- the encoding of the paper ---------------------------------------------------------------------------------------


def test_whole_frequencies_are_eq_12_as_the_paper_writes_it():
    """Against a naive loop over pixels and frequencies, in the released model's order of features."""
    features = claims.whole_dct(3, 5, 4)
    for i, j, k, l in itertools.product(range(3), range(5), range(4), range(4)):
        value = math.cos(math.pi * k * j / 4) * math.cos(math.pi * l * i / 2) / (1 + k * l)
        assert features[i * 5 + j, k * 4 + l].item() == pytest.approx(value, abs=1e-6)
    assert features.shape == dct_encoding(3, 5, 4).shape


def test_an_encoding_that_an_experiment_adds_can_be_chosen_by_its_name():
    field = PixNerd(ablations.config_of("whole frequencies", STUDY)).decoder
    assert torch.equal(field.trained_encoding, claims.whole_dct(8, 8, CONFIG.num_freqs))


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_held_out_losses_are_those_of_each_tenth_of_t_with_the_same_noise_for_all_models(data):
    """A model that says 0 has the mean square of the target; one that knows the picture is right at all times."""
    held_out = data[1]
    x, labels = from_uint8(held_out.images), torch.tensor(held_out.labels)

    class Knows(torch.nn.Module):
        def forward(self, x_t, t, y):
            assert torch.equal(y, labels) and len(set((t * 10).long().tolist())) == 1
            return (x - x_t) / (1 - t).view(-1, 1, 1, 1)

    assert max(measures.held_out_loss(Knows(), held_out)) < 1e-3
    nothing = measures.held_out_loss(lambda x_t, t, y: 0 * x_t, held_out)
    assert nothing == measures.held_out_loss(lambda x_t, t, y: 0 * x_t, held_out)
    assert all(value == pytest.approx(1 + x.square().mean().item(), rel=0.05) for value in nothing)


def test_the_loss_is_weighted_as_training_meets_the_times():
    mass = measures.time_mass()
    t = sample_time(200_000, generator=torch.Generator().manual_seed(0))
    shares = (t * 10).long().bincount(minlength=10) / len(t)
    assert sum(mass) == pytest.approx(1) and shares.tolist() == pytest.approx(mass, abs=0.003)


def test_the_border_ratio_compares_steps_across_patches_with_steps_inside():
    """Columns rise by 1 inside a patch and by 4 across its border, rows by 2 and by 4: ratio 4 / 1.5."""
    across = torch.tensor([4 if i % 8 == 0 and i else 1 for i in range(16)]).cumsum(0)
    down = torch.tensor([4 if i % 8 == 0 and i else 2 for i in range(16)]).cumsum(0)
    images = (across + down[:, None]).expand(2, 3, 16, 16).to(torch.uint8)
    assert measures.border_ratio(images) == pytest.approx(4 / 1.5)


def test_the_bootstrap_of_the_same_pictures_finds_no_difference():
    seen, real = torch.randn(40, 3), torch.randn(50, 3)
    assert measures.paired_bootstrap(seen, seen, real) == (0.0, 0.0)
    gap, error = measures.paired_bootstrap(seen + 3, seen, real)
    assert gap > 2 * error > 0


# ---- the data --------------------------------------------------------------------------------------------------------


def test_the_list_of_held_out_drawings_is_what_the_split_gives_and_holds_no_near_duplicate():
    """Of all pairs of a drawing to learn and one held out, none is as close as near-duplicates are."""
    emoji = open_dataset("emoji", 32)
    learnt, held_out = world.training_and_held_out()
    held = [int(line.split()[0]) for line in world.HELD_OUT.read_text(encoding="utf-8").splitlines()]
    assert held == world.split(emoji.images)
    assert len(learnt) + len(held_out) == len(emoji) and 180 < len(held_out) < 200
    assert set(held_out.labels) == set(range(9))
    one, other = (from_uint8(part.images).flatten(1) for part in (learnt, held_out))
    assert (torch.cdist(one, other) / math.sqrt(one.shape[1])).min() >= world.NEAR - 1e-4


def test_pictures_are_resized_by_averages_of_areas():
    """64 to 32 as the data set does it; 48 to 32 is exact for stripes three pixels wide: 1.5 pixels each, a mean."""
    assert torch.equal(world.resized(open_dataset("emoji", 64).images[:9], 32), open_dataset("emoji", 32).images[:9])
    stripes = torch.tensor([0, 90, 180] * 16, dtype=torch.uint8).expand(1, 3, 48, 48)
    assert world.resized(stripes, 32)[0, 0, 0, :4].tolist() == [30, 150, 30, 150]


def test_chains_of_near_duplicates_are_one_group():
    """a is near b and b near c, so all three are together though a is far from c. Catches a single pass."""
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    for i, value in enumerate((100, 115, 130, 200, 145)):
        images[i] = value
    groups = world.near_duplicates(images, near=0.13).tolist()
    assert groups == [0, 0, 0, 3, 0]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_list_names_every_claim_and_what_is_done(tmp_path):
    status, stdout, _ = run_script("experiments/ablations.py", "--list", "--out", tmp_path)
    assert status == 0 and all(f"\n{key}: " in f"\n{stdout}" for key in claims.CLAIMS)
    assert "field: seeds done none" in stdout and "(0 minutes stored)" in stdout


def test_the_page_alone_is_written_from_nothing(tmp_path):
    status, stdout, _ = run_script("experiments/ablations.py", "--page", "--out", tmp_path)
    assert status == 0 and "evidence.md" in stdout
    assert "| decoder | the field is better at equal cost |  | not run |" in (tmp_path / "evidence.md").read_text()


def test_mistakes_get_one_line(tmp_path):
    assert "say what to do" in complaint("experiments/ablations.py", "--out", tmp_path)
    assert "invalid choice" in complaint("experiments/ablations.py", "--claim", "fig9")
    assert "--seeds -1: seeds are 0 or more" in complaint("experiments/ablations.py", "--list", "--seeds", "-1")
    assert "--seeds: 9999" in complaint("experiments/ablations.py", "--list", "--seeds", "9" * 30)


def test_no_two_pictures_of_the_page_have_one_name():
    """Also where a file system ignores case. Catches the plot of a claim that replaces the samples of its row."""
    files = [evidence.strip_file(name) for name in (*claims.ROWS, *claims.DRAWN)]
    files += [evidence.plot_file(key) for key in (*claims.CLAIMS, "claims")]
    assert len({file.lower() for file in files}) == len(files)


def test_plots_are_drawn_from_the_stored_runs(tmp_path):
    pytest.importorskip("matplotlib", reason="requirements-plots.txt is not installed")
    records = [a_record(row, seed, 0.1 + seed) for row in ("field", "linear") for seed in range(3)]
    (tmp_path / "evidence").mkdir()
    for n in (10, 20):
        for solver in ("euler", "adams2"):
            records.append(a_drawing(f"{solver} {n}", n, 9.0, [9.0, 7.0, 5.0], {"euler 50": [0.5, 1.0]}))
    evidence_plots.write_plots(claims.CLAIMS, records, tmp_path / "evidence")
    evidence.write_page(claims.CLAIMS, records, STUDY, [], tmp_path, 1.0)
    for name in ("claims", "decoder", "solvers"):
        assert (tmp_path / "evidence" / f"plot-{name}.png").read_bytes().startswith(b"\x89PNG")
        assert f"evidence/plot-{name}.png" in (tmp_path / "evidence.md").read_text()
