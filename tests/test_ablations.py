"""The study of the paper's claims: its pairs, its arithmetic, what it does not repeat, and the page in docs/."""

import dataclasses
import json
import math

import pytest
import torch
from helpers import ROOT, TINY, complaint, randomised, run_script

from data import from_uint8, open_dataset
from experiments import ablations, evidence
from flow import sample_time
from runtime.flops import forward_flops

CONFIG = dataclasses.replace(TINY, num_classes=9, resolution=32, patch_size=8)
STUDY = ablations.Study(CONFIG, steps=2, batch_size=3, samples=9, sampler_pictures=9)


@pytest.fixture
def data():
    """Twelve drawings to learn and ten to be judged on."""
    numbers = list(range(0, 1900, 86))
    return ablations.some_emoji(numbers[:12]), ablations.some_emoji(numbers[12:])


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


def test_the_tables_hold_what_a_hand_computes(tmp_path):
    """Field 0.1, 0.2, 0.3 against linear 0.2, 0.4, 0.6: -0.2 with error 0.1 / sqrt(3), so the claim is agreed with."""
    records = [a_record("field", seed, 0.1 * (seed + 1), 5.0 + seed) for seed in range(3)]
    records += [a_record("linear", seed, 0.2 * (seed + 1), 9.0, 1.75) for seed in range(3)]
    page = evidence.page_text(ablations.CLAIMS, records, STUDY, ["a thing"], tmp_path, 1.25)
    assert "| field - linear | 3 | -0.2000 ± 0.0577 | -3.00 ± 0.58 | -0.250 ± 0.000 | lower | agrees |" in page
    assert "| field | 3 | 4.00 M | 2.00 | 3 | 0.2000 ± 0.0577 | 6.00 ± 0.58 | 1.500 ± 0.000 |" in page
    assert "field against linear: -0.2000 ± 0.0577, 3 seeds: **agrees**" in page
    assert "| norm none - field | 0 |  |  |  |  | not run |" in page
    assert "of the real pictures it is 1.250" in page and "0.1 hours" in page and "- a thing" in page
    assert "- normalisation: norm none, norm first, norm both." in page


def test_two_seeds_are_shown_and_not_concluded_from(tmp_path):
    records = [a_record(row, seed, loss) for row, loss in (("field", 0.1), ("linear", 0.9)) for seed in range(2)]
    page = evidence.page_text(ablations.CLAIMS, records, STUDY, [], tmp_path, 1.0)
    assert "-0.8000 ± 0.0000, 2 seeds: **cannot tell**" in page
    assert "- decoder, with fewer than 3 seeds: linear (2), field (2)." in page


def test_the_recommendation_is_the_cheapest_that_cannot_be_told_from_50_steps(tmp_path):
    def drawn(row, evaluations, difference):
        record = a_record(row, 0, 0.0, kind="draw") | {"evaluations": evaluations, "error": 1.0, "error_se": 0.1}
        return record | {"cpu_seconds_per_picture": 0.5} | difference

    records = [drawn("euler 50", 50, {})]
    for row, n, gap in (("euler 10", 10, 1.1), ("adams2 10", 10, 0.9), ("heun 20", 20, 0.0), ("heun 6", 6, -1.2)):
        records.append(drawn(row, n, {"distance_difference": gap, "distance_difference_se": 0.5}))
    assert "**adams2 10**" in evidence.recommendation(records)[0]
    page = evidence.page_text(ablations.CLAIMS, records, STUDY, [], tmp_path, 1.0)
    assert "| euler 10 | 10 | 0.500 | 1.00 ± 0.10 | 10.00 | +1.10 ± 0.50 | 1.500 |" in page


# ---- the page --------------------------------------------------------------------------------------------------------


def test_the_page_in_docs_is_what_the_stored_runs_say():
    """Written again from docs/evidence/runs.jsonl, it is the same to the letter. Catches a number typed by hand."""
    study, docs = ablations.Study(), ROOT / "docs"
    records = ablations.Runs(docs / "evidence").of(study)
    real = ablations.border_ratio(open_dataset("emoji", 32).images)
    page = evidence.page_text(ablations.CLAIMS, records, study, ablations.NOT_HERE, docs / "evidence", real)
    assert page == (docs / "evidence.md").read_text(encoding="utf-8")


def test_every_stored_run_says_how_it_was_made():
    for record in ablations.Runs(ROOT / "docs" / "evidence").records:
        assert {"command", "seed", "machine", "code", "study", "wall_seconds", "date"} <= record.keys()
        assert f'--rows "{record["row"]}" --seeds {record["seed"]}' in record["command"]


# ---- runs ------------------------------------------------------------------------------------------------------------


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
    claims = [ablations.CLAIMS["decoder"]]
    with pytest.raises(KeyboardInterrupt):
        ablations.do(claims, [0, 1], STUDY, ablations.Runs(tmp_path))
    assert done == [("linear", 0)]
    fail.clear()
    for _ in range(2):
        ablations.do(claims, [0, 1], STUDY, ablations.Runs(tmp_path))
        assert done == [("linear", 0), ("field", 0), ("linear", 1), ("field", 1)]
    lines = (tmp_path / "runs.jsonl").read_text().splitlines()
    assert [json.loads(line)["row"] for line in lines] == ["linear", "field", "linear", "field"]
    longer = dataclasses.replace(STUDY, steps=3)
    assert ablations.Runs(tmp_path).find("field", 0, STUDY) and not ablations.Runs(tmp_path).find("field", 0, longer)


def test_every_row_makes_a_model_and_field_and_linear_cost_the_same():
    trained = {"repa", "projector", "loss", "steps_times"}
    configs = {}
    for name, settings in ablations.ROWS.items():
        changed = {key: value for key, value in settings.items() if key not in trained}
        configs[name] = dataclasses.replace(ablations.WORLD, **changed)
    assert forward_flops(configs["field"]) == pytest.approx(forward_flops(configs["linear"]), rel=0.05)
    for claim in ablations.CLAIMS.values():
        assert set(claim.rows()) <= configs.keys() | ablations.DRAWN.keys() | ablations.GUIDED.keys()


def test_more_evaluations_come_closer_to_the_finest(monkeypatch):
    """Of a random model, whose path is anything but straight; the finest itself has no error."""
    monkeypatch.setitem(ablations.DRAWN, "finest", {"solver": "adams2", "evaluations": 60})
    model, cache = randomised(CONFIG), {}
    found = {
        name: ablations.draw_row(name, 0, STUDY, model, cache)
        for name in ("euler 6", "euler 20", "heun 20", "euler 50", "finest")
    }
    errors = [found[name]["error"] for name in ("euler 6", "euler 20", "heun 20")]
    assert errors == sorted(errors, reverse=True) and "error" not in found["finest"]
    assert [found[name]["evaluations"] for name in ("euler 6", "heun 20")] == [6, 20]
    assert "distance_difference" in found["heun 20"] and "distance_difference" not in found["euler 50"]
    again = ablations.draw_row("heun 20", 0, STUDY, model, {})  # as after a restart: the references are drawn anew
    assert again["error"] == found["heun 20"]["error"]
    assert again["distance_difference_se"] == found["heun 20"]["distance_difference_se"]


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_held_out_losses_are_those_of_each_tenth_of_t_with_the_same_noise_for_all_models(data):
    """A model that says 0 has the mean square of the target; one that knows the picture is right at all times."""
    held_out = data[1]
    x, labels = from_uint8(held_out.images), torch.tensor(held_out.labels)

    class Knows(torch.nn.Module):
        def forward(self, x_t, t, y):
            assert torch.equal(y, labels) and len(set((t * 10).long().tolist())) == 1
            return (x - x_t) / (1 - t).view(-1, 1, 1, 1)

    assert max(ablations.held_out_loss(Knows(), held_out)) < 1e-3
    nothing = ablations.held_out_loss(lambda x_t, t, y: 0 * x_t, held_out)
    assert nothing == ablations.held_out_loss(lambda x_t, t, y: 0 * x_t, held_out)
    assert all(value == pytest.approx(1 + x.square().mean().item(), rel=0.05) for value in nothing)


def test_the_loss_is_weighted_as_training_meets_the_times():
    mass = ablations.time_mass()
    t = sample_time(200_000, generator=torch.Generator().manual_seed(0))
    shares = (t * 10).long().bincount(minlength=10) / len(t)
    assert sum(mass) == pytest.approx(1) and shares.tolist() == pytest.approx(mass, abs=0.003)


def test_the_border_ratio_compares_steps_across_patches_with_steps_inside():
    """Columns rise by 1 inside a patch and by 4 across its border, rows by 2 and by 4: ratio 4 / 1.5."""
    across = torch.tensor([4 if i % 8 == 0 and i else 1 for i in range(16)]).cumsum(0)
    down = torch.tensor([4 if i % 8 == 0 and i else 2 for i in range(16)]).cumsum(0)
    images = (across + down[:, None]).expand(2, 3, 16, 16).to(torch.uint8)
    assert ablations.border_ratio(images) == pytest.approx(4 / 1.5)


def test_the_bootstrap_of_the_same_pictures_finds_no_difference():
    seen, real = torch.randn(40, 3), torch.randn(50, 3)
    assert ablations.paired_bootstrap(seen, seen, real) == {"distance_difference": 0.0, "distance_difference_se": 0.0}
    far = ablations.paired_bootstrap(seen + 3, seen, real)
    assert far["distance_difference"] > 2 * far["distance_difference_se"] > 0


# ---- the data --------------------------------------------------------------------------------------------------------


def test_the_list_of_held_out_drawings_is_what_the_split_gives_and_holds_no_near_duplicate():
    """Of all pairs of a drawing to learn and one held out, none is as close as near-duplicates are."""
    emoji = open_dataset("emoji", 32)
    learnt, held_out = ablations.training_and_held_out()
    held = [int(line.split()[0]) for line in ablations.HELD_OUT.read_text(encoding="utf-8").splitlines()]
    assert held == ablations.split(emoji.images)
    assert len(learnt) + len(held_out) == len(emoji) and 180 < len(held_out) < 200
    assert set(held_out.labels) == set(range(9))
    one, other = (from_uint8(part.images).flatten(1) for part in (learnt, held_out))
    assert (torch.cdist(one, other) / math.sqrt(one.shape[1])).min() >= ablations.NEAR - 1e-4


def test_chains_of_near_duplicates_are_one_group():
    """a is near b and b near c, so all three are together though a is far from c. Catches a single pass."""
    images = torch.zeros(5, 3, 8, 8, dtype=torch.uint8)
    for i, value in enumerate((100, 115, 130, 200, 145)):
        images[i] = value
    groups = ablations.near_duplicates(images, near=0.13).tolist()
    assert groups == [0, 0, 0, 3, 0]


# ---- the command -----------------------------------------------------------------------------------------------------


def test_the_list_names_every_claim_and_what_is_done(tmp_path):
    status, stdout, _ = run_script("experiments/ablations.py", "--list", "--out", tmp_path)
    assert status == 0 and all(f"\n{key}: " in f"\n{stdout}" for key in ablations.CLAIMS)
    assert "field: seeds done none" in stdout


def test_the_page_alone_is_written_from_nothing(tmp_path):
    status, stdout, _ = run_script("experiments/ablations.py", "--page", "--out", tmp_path)
    assert status == 0 and "evidence.md" in stdout
    assert "| [decoder](#decoder-" in (tmp_path / "evidence.md").read_text()


def test_mistakes_get_one_line(tmp_path):
    assert "say what to do" in complaint("experiments/ablations.py", "--out", tmp_path)
    assert "invalid choice" in complaint("experiments/ablations.py", "--claim", "fig9")
    assert "--seeds -1: seeds are 0 or more" in complaint("experiments/ablations.py", "--list", "--seeds", "-1")


def test_plots_are_drawn_from_the_stored_runs(tmp_path):
    pytest.importorskip("matplotlib", reason="requirements-plots.txt is not installed")
    records = [a_record(row, seed, 0.1 + seed) for row in ("field", "linear") for seed in range(3)]
    (tmp_path / "evidence").mkdir()
    evidence.write_page(ablations.CLAIMS, records, STUDY, [], tmp_path, 1.0, plots=True)
    assert (tmp_path / "evidence" / "decoder.png").read_bytes().startswith(b"\x89PNG")
    assert "evidence/decoder.png" in (tmp_path / "evidence.md").read_text()
