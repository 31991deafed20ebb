"""--size auto: what it chooses, that its run is that of the command it prints, and what it refuses."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
from helpers import ROOT, assert_same_run, complaint, last, noise_picture, run_script

from runtime import auto
from runtime.distributed import Processes

# A model of a few thousand numbers, so that the steps that are timed cost nothing. Flags that are given stay.
SMALL = "--hidden-size 32 --num-heads 2 --depth 1 --field-width 8 --field-depth 1 --compile off --device cpu".split()
SMALL += "--precision fp32 --resolution 32 --batch-size 4".split()


@pytest.fixture
def photos(tmp_path):
    """Sixteen pictures of 40 x 48 pixels in one folder."""
    (tmp_path / "photos").mkdir()
    for i in range(16):
        noise_picture(40, 48, i).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def chosen(photos, monkeypatch, seconds, *flags, pictures=16, side=160):
    """The flags that are chosen where a step on 64 images of (resolution, tokens, width) takes seconds(...)."""
    monkeypatch.setattr(auto, "seconds_a_step", lambda config, batch, *_: seconds(config) * batch / 64)
    for i in range(16, pictures):
        (photos / f"{i}.png").write_bytes((photos / "0.png").read_bytes())
    names = sorted(path.name for path in photos.iterdir())
    for i in range(16):  # those that are looked at, by name
        noise_picture(side, side, i).save(photos / names[i * pictures // 16])
    words = [
        "--size",
        "auto",
        "--data",
        str(photos),
        "--dry-run",
        "--device",
        "cpu",
        "--out",
        str(photos / "no"),
        *flags,
    ]
    found = auto.with_size_chosen(Processes(), words)
    assert "auto" not in found
    return dict(zip(found, found[1:] + [""]))


def test_a_faster_machine_gets_larger_pictures_and_a_slower_one_larger_patches(photos, monkeypatch):
    pixels = {}
    for speed in (1e-4, 0.4, 1, 2, 100):

        def cost(config, speed=speed):
            return speed * config.resolution**2 / 64**2 * (2 - config.patch_size / 16)

        flags = chosen(photos, monkeypatch, cost, pictures=300)
        pixels[speed] = flags["--resolution"], flags["--patch-size"]
    small = ("64", "8")  # 720 steps of 64 at speed 1
    assert pixels == {1e-4: ("128", "16"), 0.4: small, 1: small, 2: ("64", "16"), 100: ("64", "16")}


def test_small_pictures_are_not_blown_up_and_few_are_not_seen_for_ever(photos, monkeypatch):
    flags = chosen(photos, monkeypatch, lambda config: 1e-5, side=40)
    assert (flags["--resolution"], flags["--steps"], flags["--batch-size"]) == ("32", "1000", "16")
    assert "--augment" in flags
    more = chosen(photos, monkeypatch, lambda config: 1e-5, pictures=320)
    assert (more["--resolution"], more["--steps"], more["--batch-size"]) == ("128", "2500", "64")


def test_a_longer_time_gives_more_steps_and_flags_that_are_given_stay(photos, monkeypatch, capsys):
    def slow(config):
        return 10.0

    short, long = (chosen(photos, monkeypatch, slow, "--minutes", m, pictures=64) for m in ("20", "60"))
    assert (short["--steps"], long["--steps"]) == ("110", "320")  # of 10 s: 18 and 54 minutes of training
    said = capsys.readouterr().out  # and no 1.2e+02 min
    assert "10 s a step: about 59 min; --steps 640, about 119 min, for better ones" in said
    given = chosen(photos, monkeypatch, slow, "--steps", "7", "--resolution", "96", "--crop", "released", pictures=64)
    assert (given["--steps"], given["--resolution"], given["--patch-size"]) == ("7", "96", "24")
    assert "--augment" not in given and given["--crop"] == "released"


def test_the_run_is_that_of_the_printed_command_and_both_resume_it_without_timing(photos, tmp_path, monkeypatch):
    """To the bit. Catches: a timing that leaves its random numbers to the run, or a second choice."""
    out, other = tmp_path / "run", tmp_path / "other"
    ask = ["train.py", "--size", "auto", "--data", photos, "--steps", "2", "--out", out, *SMALL]
    status, stdout, stderr = run_script(*ask)
    assert status == 0, stderr
    assert "about" in stdout and " min" in stdout and "as given: " in stdout
    printed = shlex.split(re.search(r"^python (train\.py .*)$", stdout, re.MULTILINE)[1])
    explicit = [str(other) if word == str(out) else word for word in printed]
    assert run_script(*explicit)[0] == 0
    assert_same_run(last(out), last(other))

    def no_timing(*arguments):
        raise AssertionError("a run that has begun is timed again")

    monkeypatch.setattr(auto, "seconds_a_step", no_timing)
    for step, words in ((3, ask), (4, printed)):
        status, stdout, stderr = run_script(
            *[str(step) if word == "2" and words[i - 1] == "--steps" else word for i, word in enumerate(words)]
        )
        assert status == 0 and f"resuming {out}" in stdout, stdout + stderr
    assert last(out)["step"] == 4
    (photos / "16.png").write_bytes((photos / "0.png").read_bytes())
    assert "the pictures are not those of the run so far" in complaint(*ask)


@pytest.mark.slow
def test_of_two_starts_at_once_the_second_is_refused_and_chooses_nothing(photos, tmp_path, monkeypatch):
    """Started while the first one times its steps. Catches: an auto.json that is not of the run beside it."""
    ask = ["--size", "auto", "--data", str(photos), "--steps", "2", "--out", str(tmp_path / "run"), *SMALL]
    second, plain = [], auto.seconds_a_step

    def timed(*arguments):
        done = subprocess.run([sys.executable, ROOT / "train.py", *ask], capture_output=True, text=True, timeout=300)
        second.append((done.returncode, done.stderr))
        return plain(*arguments)

    monkeypatch.setattr(auto, "seconds_a_step", timed)
    assert run_script("train.py", *ask)[0] == 0 and last(tmp_path / "run")["step"] == 2
    ((status, stderr),) = second
    assert status == 1 and f"is in use by process {os.getpid()}" in stderr and stderr.count("\n") == 1


def test_what_cannot_be_chosen_for_is_refused_in_a_line(photos, tmp_path, monkeypatch):
    def refused(*flags):
        return complaint("train.py", "--size", "auto", "--minutes", "0.001", *SMALL, *flags)

    out = ("--out", tmp_path / "run")
    assert "--data FOLDER" in refused(*out)
    assert "--init" in refused("--data", photos, "--init", "xl", *out)
    assert "there is no data" in refused("--data", tmp_path / "nowhere", *out)
    assert "cannot be cut" in refused("--data", photos, "--patch-size", "7", *out)
    assert "does nothing without --size auto" in complaint("train.py", "--minutes", "3", *out)
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "auto.json").write_text("[]")
    assert "another --out" in refused("--data", photos, *out)
    (tmp_path / "run" / "auto.json").write_text(json.dumps({"pictures": "others", "flags": {"steps": 5}}))
    (photos / "0.png").write_bytes(b"\x89PNG\r\n")
    assert "0.png is not a readable" in refused("--data", photos, *out)
    (photos / "0.png").unlink()
    assert "has 15: add some" in refused("--data", photos, *out)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "for one process" in refused("--data", photos, *out)


def test_a_dry_run_chooses_and_writes_nothing(photos, tmp_path):
    flags = ["--size", "auto", "--data", photos, "--out", tmp_path / "run", "--dry-run", *SMALL]
    status, stdout, stderr = run_script("train.py", *flags)
    assert status == 0 and "python train.py --" in stdout and "parameters" in stdout, stderr
    assert not (tmp_path / "run").exists()
