"""The flags of train.py: recipes, ranges, what makes a run another run, and where ImageNet is looked for."""

import argparse
import dataclasses
import re

import pytest
from helpers import refuses

from model import PRESETS, PixNerdConfig
from runtime.options import OPTIONS, class_names, identity, parse_args


def test_every_setting_of_the_model_is_a_flag_and_part_of_the_run():
    """From the fields of the configuration. Catches: a new field that cannot be chosen, or that resuming overlooks."""
    for field in dataclasses.fields(PixNerdConfig):
        if field.name == "num_classes":  # the data decide
            continue
        choices = field.metadata["choices"]
        value = (
            next(c for c in choices if c != getattr(PRESETS["Nano"], field.name))
            if choices
            else 2 * getattr(PRESETS["Nano"], field.name)
        )
        args = parse_args([f"--{field.name.replace('_', '-')}", str(value)])
        assert getattr(args.config, field.name) == value
        assert identity(args, args.config)[field.name] == value != identity(parse_args([]), PRESETS["Nano"])[field.name]


def test_what_makes_a_run_another_run_is_marked_in_the_table():
    """As the runs so far have it in their checkpoints: what changes the samples, the loss or the optimizer's state."""
    marked = {option.name for option in OPTIONS if option.same_run}
    assert marked == {
        *("classes", "crop", "augment", "exif", "batch-size", "optimizer", "drop-label", "shift", "repa", "repa-block"),
        *("seed", "repa-projector", "loss"),
    }
    args = parse_args(["--repa", "0.5", "--dino", "emoji", "--classes", "food, flags"])
    found = identity(args, args.config)
    assert found["dino"] == "emoji" and found["classes"] == ["food", "flags"] and found["batch_size"] == 64


def test_flags_that_are_left_out_take_the_recipe_of_the_size(tmp_path, monkeypatch):
    monkeypatch.setenv("IMAGENET", str(tmp_path))
    nano, xl = parse_args([]), parse_args(["--size", "XL"])
    assert (nano.optimizer, nano.lr, nano.steps, nano.ema, nano.data) == ("muon", 1e-2, 1450, 0.99, "emoji")
    assert (xl.optimizer, xl.lr, xl.steps, xl.ema, xl.batch_size) == ("adamw", 1e-4, 800_000, 0.9999, 256)
    assert (nano.exif, xl.exif) == ("respect", "ignore")  # photographs are turned upright, but not in ADM's preparation
    assert parse_args(["--log-every", "0"]).log_every == 0  # zero is a value, not a flag left out


def test_imagenet_is_the_folder_of_the_variable_or_the_one_beside_us(tmp_path, monkeypatch):
    """`torchrun train.py --size XL` as typed; where there is neither, one line has both remedies."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("IMAGENET", raising=False)
    line = refuses(tmp_path / "run", "--size", "XL")
    assert "imagenet/train is not here" in line and "--data FOLDER" in line and "IMAGENET" in line
    (tmp_path / "imagenet" / "train").mkdir(parents=True)
    assert parse_args(["--size", "L"]).data == "imagenet/train"
    monkeypatch.setenv("IMAGENET", str(tmp_path / "imagenet"))
    assert parse_args(["--size", "L"]).data == str(tmp_path / "imagenet")
    assert parse_args(["--size", "L", "--data", "emoji"]).data == "emoji"


REFUSED = """
    --lr nan | --lr -1 | --lr 0 | --weight-decay -1 | --clip -1 | --clip nan | --warmup -1 | --workers -1 |
    --seed 9223372036854775808 | --shift inf | --shift nan | --ema 1 | --drop-label nan | --repa -1 | --timeout 0 |
    --timeout 1e15 | --epochs 1e308 | --epochs 0 | --save-every -1 | --log-every -1 | --preview-every -2 |
    --eval-every -1 | --eval-every 9 --eval-num 1 | --keep 0 | --micro-batch 0 | --depth 0 | --batch-size 0 |
    --steps 0 | --steps 99999999999999999999 | --dino x.pth | --eval-ref x.npz | --inception x.pth |
    --eval-every 5 --inception x.pth | --patch-size 99999999999999999999999 | --lr 1e39 | --weight-decay 1e10 |
    --clip 1e300 | --repa 1e10 | --repa inf | --shift 1e-300 | --shift 1e9 | --bandwidth 1e300 | --minutes 1e300 |
    --workers 1025 | --eval-num 2000001 | --steps 100000000 | --epochs 1e8 | --num-classes 1000001 | --depth 1001 |
    --field-depth 1001 | --resolution 65544 | --hidden-size 65552 | --num-heads 65537 | --num-freqs 9007199254740992
"""


@pytest.mark.parametrize("flags", [flags.strip() for flags in REFUSED.split("|")])
def test_flags_out_of_range_or_without_effect_are_refused_by_name(tmp_path, flags):
    message = refuses(tmp_path / "run", *flags.split())
    assert flags.split()[-2] in message and not (tmp_path / "run").exists()


@pytest.mark.parametrize("flags", ["--text-depth 1001", "--text-length 65537", "--depth 1001"])
def test_so_are_those_of_a_text_model(tmp_path, flags):
    assert flags.split()[0] in refuses(tmp_path / "run", "--text-encoder", "words", *flags.split())


def test_every_number_of_a_run_has_an_end_in_both_directions():
    """From the table, so that no flag is forgotten. Catches: a type without a range, or one that lets infinity in."""
    numbers = [option for option in OPTIONS if callable(option.type) and option.type not in (str, bool)]
    assert len(numbers) > 25 and not [option.name for option in OPTIONS if option.type in (int, float)]
    for option in numbers:
        for text in ("inf", "-inf", "nan", "1e300", "-1e300", "9" * 25, "-" + "9" * 25):
            with pytest.raises((argparse.ArgumentTypeError, ValueError)):
                option.type(text)


def test_help_names_the_default_of_each_recipe(capsys):
    with pytest.raises(SystemExit):
        parse_args(["--help"])
    text = re.sub(r"\s+", " ", capsys.readouterr().out)
    assert "learning rate (default: 0.0001; emoji: 0.01;" in text and "--field-norm {none,first,both,output}" in text


def test_names_of_classes_are_separated_by_commas():
    assert class_names(None) is None and class_names("food-fruit:4, sky & weather") == ["food-fruit:4", "sky & weather"]
    assert class_names('"salt, pepper":2,oil') == ["salt, pepper:2", "oil"]
