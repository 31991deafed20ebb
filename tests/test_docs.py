"""README, docs/ and the Makefile: every test they name exists, every link leads somewhere, every command parses."""

import argparse
import ast
import functools
import importlib.util
import os
import pathlib
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, noise_picture, run_script
from torch.distributed.run import get_args_parser as torchrun_parser

from data import open_dataset
from runtime.some_classes import SomeClasses

PAGES = [ROOT / "README.md", ROOT / "assets" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCED = re.compile(r"^```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)


def named_tests(page):
    """[(file, name)] of a page's `test_file.py::test_name`; the name may end in `*`."""
    return re.findall(r"(test_\w+\.py)::([\w*]+)", page.read_text())


@functools.cache
def existing_tests(file):
    """The names of the tests in a file of tests/."""
    tree = ast.parse((ROOT / "tests" / file).read_text())
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def headings(text):
    """The anchors that GitHub gives the headings of a page: lower case, no punctuation, hyphens for spaces."""
    titles = re.findall(r"^#+ (.+)$", FENCED.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def command_lines(text):
    """The commands of a page that start python or torchrun: one string each, on one line, without their comments.

    They stand in fenced blocks, where a backslash continues a line and a variable or srun may stand before them, or in
    the text, between backticks.
    """
    blocks = [line for block in FENCED.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    spans = [span.replace("\n", " ") for span in re.findall(r"`([^`]+)`", FENCED.sub("", text))]
    lines = [re.sub(r"^\s*(srun |[A-Z_]+=\S+ |\.venv/bin/)*", "", line) for line in blocks + spans]
    return [
        re.sub(r"\s#.*", "", line).strip()
        for line in lines
        if re.match(r"(python(?! -m (venv|pytest) )|torchrun) ", line)
    ]


def makefile_commands():
    """What the Makefile runs by the Python of its virtual environment, one string each."""
    text = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    return re.findall(r"^\t(\$\(RUN\) \w+\.py .*)$", text, re.MULTILINE)


RUNNABLE = re.compile(r"^<!-- runnable -->\n```[a-z]*\n(.*?)^```", re.DOTALL | re.MULTILINE)
# What makes the commands of a page short; the last flag of a kind counts.
SHORT = {
    "train.py": "--steps 2 --batch-size 2 --log-every 1 --preview-every 0 --compile off --device cpu",
    "sample.py": "--steps 2 --num 1 --compile off --device cpu",
    "experiments/nearest.py": "--num 2 --device cpu",
}


def runnable_commands(text):
    """The commands of the blocks of a page that are marked <!-- runnable -->, in their order, as lists of words."""
    lines = [line for block in RUNNABLE.findall(text) for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.split("#")[0].strip()]


COMMANDS = sorted({line for page in PAGES for line in command_lines(page.read_text())}) + makefile_commands()


class Parsed(BaseException):
    """Raised in the place of all that a script does after reading its flags."""


def parse_and_stop(parser, *args, plain=argparse.ArgumentParser.parse_args):
    plain(parser, *args)
    raise Parsed


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_test_that_a_page_names_exists(page):
    """Catches: a promise whose test was renamed or removed."""
    for file, name in named_tests(page):
        assert (ROOT / "tests" / file).exists(), f"{page.name} names {file}"
        found = existing_tests(file)
        assert any(test.startswith(name[:-1]) if name[-1] == "*" else test == name for test in found), (
            f"{page.name} names {file}::{name}"
        )


def test_every_promise_and_every_equation_names_a_test():
    """Catches: a promise that is only a sentence."""
    promises = re.split(r"^- ", (ROOT / "docs" / "promises.md").read_text().split("\n## ", 1)[1], flags=re.MULTILINE)
    assert len(promises) > 40
    for promise in promises[1:]:
        assert "::test_" in promise, f"no test proves: {promise}"
    rows = re.findall(r"^\| (?:\d+|section 4.5): .*$", (ROOT / "README.md").read_text(), re.MULTILINE)
    assert len(rows) >= 13 and all("::test_" in row for row in rows)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_relative_link_leads_to_a_file_and_a_heading(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not re.match(r"https?://", link):
            path, _, anchor = link.partition("#")
            target = (page.parent / path).resolve() if path else page
            assert target.exists(), f"{page.name} links to {link}"
            assert not anchor or anchor in headings(target.read_text()), f"{page.name} links to {link}"


@pytest.mark.parametrize("script", ["train.py", "sample.py", "eval_fid.py", "app.py"])
def test_every_flag_stands_on_a_page(script):
    """Catches: a flag that only --help knows."""
    status, told, _ = run_script(script, "--help")
    flags, pages = set(re.findall(r"^  (--[a-z][a-z0-9-]*)", told, re.MULTILINE)), "".join(p.read_text() for p in PAGES)
    assert status == 0 and len(flags) > 5
    assert not [flag for flag in flags if not re.search(rf"{flag}(?![a-z0-9-])", pages)]


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 160


def test_commands_are_found_in_blocks_and_in_the_text():
    """Catches: a pattern that finds no command, so that none is checked."""
    page = (
        "Say `python a.py\n--x 1`.\n```\nsrun torchrun --nnodes 2 \\\n  b.py --y  # why\n$ ls\nN=1 python -m c.d\n```\n"
    )
    assert command_lines(page) == ["torchrun --nnodes 2    b.py --y", "python -m c.d", "python a.py --x 1"]
    assert len(COMMANDS) > 20 and len(makefile_commands()) >= 4


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_names_a_script_and_flags_that_it_has(line, monkeypatch):
    """The script's own parser reads them, and torchrun's parser those of torchrun. Catches: flags that are gone."""
    words = shlex.split(re.sub(r"\$\([^()]*\)", "X", line))  # what the shell would put in the place of $(...)
    if words[0] == "torchrun":
        launch = torchrun_parser().parse_args(words[1:])
        script, flags = launch.training_script, [word for word in launch.training_script_args if word != "--"]
    elif words[1] == "-m":
        script, flags = words[2].replace(".", "/") + ".py", words[3:]
    else:
        script, flags = words[1], words[2:]
    assert (ROOT / script).is_file(), f"no script for: {line}"
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    try:
        status, _, stderr = run_script(script, *flags)
    except Parsed:
        return
    pytest.fail(f"{line}\nended with status {status}: {stderr}")


def test_marked_blocks_are_found_and_others_are_not():
    page = "```\npython a.py\n```\n\n<!-- runnable -->\n```\npython b.py \\\n  --x 1  # why\n\npython -m c.d\n```\n"
    assert runnable_commands(page) == [["python", "b.py", "--x", "1"], ["python", "-m", "c.d"]]
    assert sum(bool(runnable_commands(page.read_text())) for page in PAGES) >= 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if RUNNABLE.search(page.read_text())], ids=lambda page: page.name
)
def test_every_block_that_is_marked_runnable_runs(page, tmp_path, monkeypatch):
    """From its first command to its last, in a folder that holds PHOTOS and nothing else. Catches pages that rot."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "PHOTOS").mkdir()
    for i in range(16):
        noise_picture(80, 100, i).save(tmp_path / "PHOTOS" / f"{i}.jpg")
    for words in runnable_commands(page.read_text()):
        assert words[0] == "python", f"{page.name} marks a block runnable that is not of Python alone: {words}"
        script, flags = (words[2].replace(".", "/") + ".py", words[3:]) if words[1] == "-m" else (words[1], words[2:])
        status, _, stderr = run_script(script, *flags, *SHORT.get(script, "").split())
        if "needs matplotlib" not in stderr or importlib.util.find_spec("matplotlib"):
            assert status == 0, f"{' '.join(words)}: {stderr}"


def test_classes_of_the_emoji_that_a_command_asks_for_are_known():
    """Of every page, and of the Makefile with its demo. Catches a name with a slip, told only after an installation."""
    emoji, found = open_dataset("emoji", 32), 0
    for words in [line.split() for line in COMMANDS if "--classes" in line and "--data" not in line]:
        names = words[words.index("--classes") + 1].split(",")
        assert SomeClasses(emoji, names).classes == [name.rpartition(":")[0] or name for name in names]
        found += 1
    assert found


def test_a_version_that_a_page_names_is_the_one_of_requirements_txt():
    """Another torch, installed first, would be fetched a second time by the line that follows it."""
    pinned = set((ROOT / "requirements.txt").read_text().splitlines())
    named = {name for page in PAGES for name in re.findall(r"[\w-]+==[\w.]+", page.read_text())}
    assert named and named <= pinned


def test_every_recipe_of_the_cluster_page_fits_its_machine(monkeypatch):
    """Planned as the row's own machine: "8 A100, 40 GB". Catches too small a card, and numbers that rot."""
    monkeypatch.setattr("runtime.models.cached_download", None)
    row = r"^\| [^|]+ \| (\d+) A100, (\d+) GB \| `torchrun [^|]*?train.py ([^|`]*)` \| (.*?) \| (.*?) \| (.*?) days \|$"
    rows = re.findall(row, (ROOT / "docs" / "gpus.md").read_text(), re.MULTILINE)
    assert len(rows) >= 6
    for world, memory, flags, *written in rows:
        stdout = planned_run(world, {"80": "a100", "40": "a100-40"}[memory], shlex.split(flags))
        assert "fit" not in stdout.replace("whether it fits is not checked", ""), flags
        gigabytes, seconds, days = numbers_of_the_plan(stdout)
        assert written == [gigabytes, f"{float(seconds):.2f}", days], flags


def planned_run(world, card, flags):
    """What --dry-run prints for some processes on a kind of GPU."""
    status, stdout, stderr = run_script("train.py", *flags, "--dry-run", "--world-size", world, "--gpu", card)
    assert status == 0, stderr
    return stdout


def numbers_of_the_plan(stdout):
    """GB of a process, seconds of a step, days of the run, as --dry-run prints them."""
    lines = (
        "memory per process  ([\\d.]+) GB",
        "one step            ([\\d.]+) s",
        "whole run           ([\\d.]+) days",
    )
    return [re.search(line, stdout)[1] for line in lines]


def test_every_other_number_of_the_plan_on_the_cluster_pages_is_what_it_prints():
    """The excerpt line by line, and what saves memory, for XL on 8 A100."""
    page, details = ((ROOT / "docs" / name).read_text() for name in ("gpus.md", "gpus_details.md"))
    (command,) = re.findall(r"^python train.py (.*) --dry-run --world-size 8 --gpu a100$", page, re.MULTILINE)
    printed = planned_run(8, "a100", shlex.split(command)).splitlines()
    (excerpt,) = re.findall(r"^An excerpt:\n\n```\n(.*?)\n```", page, re.DOTALL | re.MULTILINE)
    assert len(excerpt.splitlines()) >= 6 and set(excerpt.splitlines()) <= set(printed)
    rows = re.findall(r"^\| (?:none|`(--[^`]*)`) \| ([\d.]+) \| ([\d.]+) \|$", details, re.MULTILINE)
    assert len(rows) == 4
    for flags, *written in rows:
        stdout = planned_run(8, "a100", ["--size", "XL", "--repa", "0.5", *shlex.split(flags)])
        assert written == numbers_of_the_plan(stdout)[:2], flags


@pytest.mark.slow
def test_the_script_of_the_cluster_page_goes_from_pictures_to_a_distance_and_goes_on_where_it_stopped(tmp_path):
    """On a CPU, without SLURM: to the end; again with nothing new; longer; and what is wrong stops it."""
    small = "--device cpu --compile off --preview-every 0"
    environment = os.environ | {
        **{"OUT": str(tmp_path / "run"), "GPUS": "1", "NUM": "207", "REFERENCE": "emoji", "TRAIN": small},
        **{"SAMPLE": "--device cpu --steps 2 --batch-size 100", "EVAL": "--features emoji --device cpu"},
        **{"PATH": f"{pathlib.Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
    }

    def submit(**changes):
        command = ["bash", "docs/imagenet.sh"]
        return subprocess.run(command, cwd=ROOT, env=environment | changes, capture_output=True, text=True)

    first = submit(STEPS="4")
    assert first.returncode == 0, first.stderr
    samples = tmp_path / "run" / "samples-4.npz"
    written = samples.stat().st_mtime_ns
    assert "emoji distance" in first.stdout
    again = submit(STEPS="4")
    assert again.returncode == 0 and samples.stat().st_mtime_ns == written and "training" not in again.stdout
    longer = submit(STEPS="6")
    assert "resuming" in longer.stdout and (tmp_path / "run" / "samples-6.npz").exists(), longer.stderr
    broken = submit(STEPS="9", TRAIN="--data nowhere")
    assert broken.returncode == 1 and "has not reached step 9: submit this again" in broken.stderr
    missing = submit(REFERENCE="nowhere.npz")
    assert missing.returncode == 1 and "see docs/gpus.md for its address" in missing.stderr
