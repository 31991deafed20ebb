"""Training on captions: train.py with a text encoder, from the folder of pictures to the checkpoint."""

import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from helpers import assert_same_run, command, last, noise_picture, refuses, run_script, start, train
from PIL import Image

import text_model
from pretrained import text_encoders
from pretrained.text_encoders import Cached, load_text_encoder
from runtime.checkpoint import load_model
from runtime.files import UserError
from runtime.options import RECIPES, identity, parse_args
from runtime.plan import Plan, training_flops
from samplers import generate, image_noise, time_grid
from text_model import TextPixNerdConfig

TEXT = [
    *("--text-encoder", "words", "--resolution", "16", "--patch-size", "8", "--hidden-size", "32", "--num-heads", "2"),
    *("--depth", "2", "--text-length", "4", "--num-freqs", "4"),
]


@pytest.fixture
def captioned(tmp_path):
    """Eight pictures with captions."""
    folder = tmp_path / "data"
    folder.mkdir()
    for i in range(8):
        noise_picture(20, 24, i).save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"picture number {i}")
    return folder


def run(out, data, *flags):
    status, stdout, stderr = train(out, "--data", data, *TEXT, *flags)
    assert status == 0, stderr
    return last(out)


def test_a_run_learns_from_captions_and_its_checkpoint_knows_its_encoder(tmp_path, captioned):
    state = run(tmp_path / "run", captioned, "--steps", 3)
    model = load_model(tmp_path / "run" / "last.pt")
    assert model.config.text_encoder == "words" and model.config.text_length == 4 and state["step"] == 3
    assert state["class_names"] is None and torch.equal(model.null_features, load_text_encoder("words", 64, 4).null)


def test_a_killed_run_resumes_to_the_bit_and_world_and_workers_change_nothing(tmp_path, captioned):
    whole = run(tmp_path / "whole", captioned, "--steps", 4)
    run(tmp_path / "parts", captioned, "--steps", 2)
    assert_same_run(run(tmp_path / "parts", captioned, "--steps", 4), whole)
    assert_same_run(run(tmp_path / "workers", captioned, "--steps", 4, "--workers", 2), whole)


def test_a_run_is_not_resumed_with_an_encoder_of_other_weights(tmp_path, captioned, qwen3_folder):
    """Its name stays the same, so the features of the empty text have to tell."""
    from transformers import Qwen3Model

    folder = shutil.copytree(qwen3_folder, tmp_path / "encoder")
    flags = ["--data", captioned, *TEXT, "--text-encoder", folder, "--text-width", 32]
    assert train(tmp_path / "run", *flags, "--steps", 1)[0] == 0
    assert train(tmp_path / "run", *flags, "--steps", 2)[0] == 0
    other = Qwen3Model.from_pretrained(folder)
    with torch.no_grad():
        other.norm.weight.copy_(other.norm.weight.roll(1))
    other.save_pretrained(folder)
    line = refuses(tmp_path / "run", *flags, "--steps", 3)
    assert f"{tmp_path / 'run' / 'step-00000002.pt'} was trained with other weights of qwen3-32x2" in line
    assert last(tmp_path / "run")["step"] == 2


@pytest.mark.slow
def test_a_run_on_captions_that_is_killed_in_the_middle_ends_as_one_that_is_not(tmp_path, captioned):
    whole = run(tmp_path / "whole", captioned, "--steps", 40)
    flags = ["--data", captioned, *TEXT, "--steps", 40, "--save-every", 5]
    process = start(tmp_path / "killed", *flags)
    while not list((tmp_path / "killed").glob("step-*.pt")) and process.poll() is None:
        pass
    process.kill()
    process.communicate()
    assert_same_run(run(tmp_path / "killed", captioned, "--steps", 40, "--save-every", 5), whole)


@pytest.mark.slow
def test_two_processes_train_on_captions_as_one_does(tmp_path, captioned):
    """Each encodes the captions of its own samples. Sums over ranks round differently, so nearly equal."""
    one = run(tmp_path / "one", captioned, "--steps", 3)
    flags = [*command(tmp_path / "two", "--data", captioned, *TEXT, "--steps", 3)]
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", *flags]
    done = subprocess.run(
        torchrun, capture_output=True, text=True, timeout=600, env=os.environ | {"OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    two = last(tmp_path / "two")
    for key, tensor in one["model"].items():
        torch.testing.assert_close(two["model"][key], tensor, atol=1e-5, rtol=1e-4)


def test_changed_captions_do_not_resume_without_a_word(tmp_path, captioned):
    run(tmp_path / "run", captioned, "--steps", 1)
    (captioned / "3.txt").write_text("another text")
    line = refuses(tmp_path / "run", "--data", captioned, *TEXT, "--steps", 2)
    assert "the pictures are not those of the run so far" in line and "--accept-changed-data" in line


@pytest.mark.slow
def test_a_text_model_learns_four_captions_by_heart(tmp_path):
    """From the same noise, each caption draws its own picture. Catches a condition that does not reach the image."""
    colours = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255), "a white picture": (255, 255, 255)}
    for name, colour in colours.items():
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "data" / f"{name}.png")
        (tmp_path / "data" / f"{name}.txt").write_text(name)
    run(tmp_path / "run", tmp_path / "data", "--steps", 400, "--lr", "5e-3", "--ema", "0.95")
    model, encoder = load_model(tmp_path / "run" / "last.pt"), load_text_encoder("words", 64, 4)
    noise = image_noise(0, [0], (16, 16)).repeat(4, 1, 1, 1)
    pictures = generate(model, encoder.encode(list(colours)), noise, time_grid(10), scale=1.0)  # (4, 3, 16, 16)
    means, wanted = pictures.float().mean((2, 3)), torch.tensor(list(colours.values())).float()  # (4, 3) each
    assert torch.cdist(means, wanted).argmin(1).tolist() == [0, 1, 2, 3]


def test_previews_show_captions(tmp_path, captioned, quick_previews):
    run(tmp_path / "run", captioned, "--steps", 1, "--preview-every", 1)
    assert (tmp_path / "run" / "samples.png").exists()


def test_another_set_of_captions_starts_from_a_text_models_weights(tmp_path, captioned):
    first = run(tmp_path / "one", captioned, "--steps", 2)
    (captioned / "0.txt").write_text("other words")
    second = run(tmp_path / "two", captioned, "--steps", 1, "--lr", "1e-9", "--init", tmp_path / "one" / "last.pt")
    assert torch.allclose(second["model"]["text_embed.weight"], first["ema"]["text_embed.weight"], atol=1e-6)
    line = refuses(tmp_path / "three", "--init", tmp_path / "one" / "last.pt", "--steps", 1)
    assert "draws from text, and this run is to draw from classes" in line


def test_a_text_model_of_another_resolution_starts_from_the_weights(tmp_path, captioned):
    """As the released 512 from 256: no weight depends on the number of tokens."""
    first = run(tmp_path / "small", captioned, "--steps", 2)["ema"]
    flags = ["--resolution", 32, "--lr", "1e-9", "--init", tmp_path / "small" / "last.pt"]
    second = run(tmp_path / "large", captioned, "--steps", 1, *flags)
    assert load_model(tmp_path / "large" / "last.pt").config.resolution == 32
    assert first.keys() == second["model"].keys()
    assert all(torch.allclose(second["model"][name], first[name], atol=1e-6) for name in first)


def test_a_plan_with_kept_features_reads_each_caption_once(tmp_path):
    """200 steps of 96 over 1,281,167 captions see none twice; 200,000 see each 15 times."""

    def share(*flags):
        status, stdout, stderr = run_script("train.py", "--recipe", "text-256", "--batch-size", 96, "--dry-run", *flags)
        assert status == 0, stderr
        (line,) = [line for line in stdout.splitlines() if line.startswith("text encoder")]
        return int(re.search(r"(\d+)% of the step", line)[1]), stdout

    whole, text = share()
    assert whole >= 15 and "(--cache-text FOLDER encodes each caption once)" in text
    kept, text = share("--cache-text", tmp_path / "cache")
    assert 0 < kept <= whole / 10 and "(--cache-text keeps 672 GB of features)" in text
    assert share("--cache-text", tmp_path / "cache", "--steps", 200)[0] == whole
    assert not (tmp_path / "cache").exists()  # a plan writes nothing


def test_held_out_captions_leave_the_run(tmp_path, captioned):
    (tmp_path / "list.txt").write_text("picture number 3\n")
    run(tmp_path / "run", captioned, "--steps", 1, "--hold-out", tmp_path / "list.txt")
    line = refuses(tmp_path / "run", "--data", captioned, *TEXT, "--steps", 2)
    assert "the pictures are not those of the run so far" in line


def test_an_uncaptioned_picture_is_refused_or_skipped_and_counted(tmp_path, captioned):
    (captioned / "3.txt").unlink()
    line = refuses(tmp_path / "run", "--data", captioned, *TEXT, "--steps", 1)
    assert "1 picture without a caption (3.png)" in line and "--skip-uncaptioned" in line
    status, stdout, stderr = train(tmp_path / "run", "--data", captioned, *TEXT, "--steps", 1, "--skip-uncaptioned")
    assert status == 0 and "left out, without a caption or a picture: 1 file" in stdout + stderr


# ---- features on disk ------------------------------------------------------------------------------------------------


class Counting:
    """An encoder that counts the captions it is asked for."""

    name, width, length, device = "words", 8, 4, "cpu"

    def __init__(self, null=0.0):
        self.null, self.asked = torch.full((4, 8), null), []

    def encode(self, texts):
        self.asked += texts
        return torch.stack([torch.full((4, 8), float(len(text))) for text in texts])


def test_each_caption_is_encoded_once_and_read_from_then_on(tmp_path):
    for encoder, expected in ((Counting(), ["one", "three"]), (Counting(), []), (Counting(null=1.0), ["one", "three"])):
        cached = Cached(encoder, tmp_path / "cache")
        features = cached.encode(["one", "three", "one"])
        assert encoder.asked == expected  # one of another null is another encoder
        assert features[:, 0, 0].tolist() == [3, 5, 3] and features.shape == (3, 4, 8)


def test_a_damaged_feature_file_is_named(tmp_path):
    cached = Cached(Counting(), tmp_path)
    cached.encode(["one"])
    cached.path("one").write_bytes(b"damaged")
    with pytest.raises(UserError, match=cached.path("one").name):
        cached.encode(["one"])


def test_training_with_kept_features_is_training(tmp_path, captioned):
    """Qwen3's are bf16 already; those of words are +-1 sums, so here the loss differs a little."""
    flags = ["--data", captioned, *TEXT, "--steps", 2]
    assert train(tmp_path / "run", *flags, "--cache-text", tmp_path / "cache")[0] == 0
    assert len(list((tmp_path / "cache").rglob("*.pt"))) == 8


def test_a_folder_for_features_is_tried_before_anything_is_encoded(tmp_path, captioned, monkeypatch):
    """And before the encoder is loaded, which takes minutes of the large one."""
    flags = ["--data", captioned, *TEXT, "--steps", 2, "--text-encoder", captioned]
    monkeypatch.setattr(text_encoders, "Qwen3", None)
    line = refuses(tmp_path / "other", *flags, "--cache-text", captioned / "0.txt")
    assert f"--cache-text {captioned / '0.txt'} cannot be written" in line


# ---- flags and plans -------------------------------------------------------------------------------------------------


def test_recipes_are_the_released_ones():
    """REFERENCE: the table of the three training stages of the text-to-image model."""
    wanted = {
        "text-256": dict(lr=2e-4, beta2=0.95, shift=2.0, batch_size=1536, steps=200_000, resolution=256),
        "text-512": dict(lr=1e-4, beta2=0.95, shift=4.0, batch_size=512, steps=80_000, resolution=512),
        "text-sft": dict(lr=1e-5, beta2=0.999, shift=4.0, steps=60_000, resolution=512),
    }
    for recipe, values in wanted.items():
        args = parse_args(["--recipe", recipe, "--data", "x"])
        assert args.size == "XXL" and args.config.text_encoder == "qwen3"
        values |= dict(clip=1.0, repa=0.5, repa_block=6, ema=0.9999, weight_decay=0.0, warmup=0, schedule="constant")
        for name, value in values.items():
            assert getattr(args.config, name, getattr(args, name, None)) == value, (recipe, name)


def test_a_text_model_is_chosen_by_its_size_its_encoder_or_its_recipe():
    assert parse_args(["--size", "XXL", "--data", "x"]).recipe == "text-256"
    assert parse_args(["--text-encoder", "words"]).config == text_model.PRESETS["Nano"]
    assert parse_args(["--recipe", "emoji-text"]).config == text_model.PRESETS["Nano"]
    qwen3 = parse_args(["--text-encoder", "qwen3"]).config
    assert (qwen3.text_width, qwen3.text_length, qwen3.hidden_size) == (2048, 128, 160)
    assert parse_args(["--size", "XXL", "--data", "x", "--text-encoder", "words"]).config.text_width == 64


def test_each_setting_of_a_text_model_is_a_flag_and_part_of_the_run():
    for name in ("text_encoder", "text_width", "text_length", "text_depth", "resolution", "num_freqs"):
        value = "qwen3" if name == "text_encoder" else 2 * getattr(text_model.PRESETS["Nano"], name)
        args = parse_args(["--recipe", "emoji-text", f"--{name.replace('_', '-')}", str(value)])
        assert getattr(args.config, name) == value == identity(args, args.config)[name]


@pytest.mark.parametrize(
    "flags, complaint",
    [
        ("--size S --text-encoder words", "--size S reads no text: choose Nano or XXL"),
        ("--classes food --text-encoder words", "--classes is for models of classes"),
        ("--cache-text x", "--cache-text is for models of text"),
        ("--text-depth 2", "--text-depth is not a setting of this kind of model"),
        ("--decoder linear --text-encoder words", "--decoder is not a setting of this kind of model"),
        ("--crop released", "--crop is for pictures of a folder"),
        ("--size XXL", "learns from captions: give --data FOLDER"),
        ("--text-encoder nowhere", "--text-encoder nowhere: there is no such folder"),
    ],
)
def test_flags_that_do_not_go_together_are_refused_by_name(tmp_path, flags, complaint):
    assert complaint in refuses(tmp_path / "run", *flags.split())


def test_a_plan_counts_the_text_encoder():
    """361 GFLOP a caption, 3.4 GB of weights; words cost nothing."""
    words, qwen3 = (TextPixNerdConfig(text_encoder=name) for name in ("words", "qwen3"))
    assert training_flops(qwen3) - training_flops(words) == pytest.approx(361e9, rel=0.01)
    assert Plan(qwen3, 96).weights - Plan(words, 96).weights == pytest.approx(3.44e9, rel=0.01)
    assert training_flops(qwen3, encoded=0.1) - training_flops(words) == pytest.approx(36.1e9, rel=0.01)
    assert set(RECIPES) == {"imagenet", "emoji", "emoji-text", "text-256", "text-512", "text-sft"}
