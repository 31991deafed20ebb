"""The training loop as a user starts it: it learns, it resumes exactly, and mistakes get one line."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from helpers import (
    ROOT,
    TINY,
    assert_same_run,
    command,
    last,
    noise_picture,
    randomised,
    refuses,
    run_script,
    start,
    train,
)
from PIL import Image

from data import TrainingSamples, from_uint8, open_dataset
from experiments.plot import read_run
from flow import alignment_loss, flow_matching_loss, interpolate, sample_time
from model import Block, PixNerd
from neural_field import NeuralField
from pretrained.inception import InceptionV3
from runtime import crops, previews, recompute
from runtime.checkpoint import build_model, checked_config, load_checkpoint, save_checkpoint
from runtime.frequencies import by_frequency
from runtime.log import Log
from runtime.options import OPTIONS
from train import ConvProjector, Student, learning_rate, training_loss, update


# ---- one step, by hand -----------------------------------------------------------------------------------------------


def a_batch():
    """Four samples of the emoji with their numbers, as the loader makes them."""
    samples = TrainingSamples(open_dataset("emoji", 32), seed=0)
    return torch.utils.data.default_collate([samples[k] for k in range(4)])


class Teacher(torch.nn.Module):
    """Tokens that are a fixed function of the image: 16 tokens of 5 numbers."""

    width = 5

    def forward(self, images, student_patch):
        assert student_patch == 8 and 0 <= images.min() and images.max() <= 1
        return (
            torch.nn.functional.avg_pool2d(images, student_patch).flatten(2).transpose(1, 2) @ torch.ones(3, 5).tril()
        )


NANO = dataclasses.replace(TINY, num_classes=9, resolution=32, patch_size=8)


def a_student(teacher_width=0):
    """A student whose model's velocity is not zero."""
    torch.manual_seed(0)
    student = Student(PixNerd(NANO), repa_block=1, teacher_width=teacher_width)
    torch.nn.init.normal_(student.model.decoder.output.weight, std=0.5)
    return student


def test_training_loss_is_flow_matching_of_the_mixed_image_plus_weighted_alignment():
    """Written out. Catches: the wrong weight, the clean image given to the model, features of another block."""
    batch, student, teacher = a_batch(), a_student(teacher_width=5), Teacher()
    x, noise, t = from_uint8(batch["image"]), batch["noise"], batch["t"]
    loss, per_image, alignment = training_loss(student, teacher, batch, drop_label=0.0, repa=0.5, patch_size=8)
    v, tokens = student.model(interpolate(x, noise, t), t, batch["y"], features_at=1)
    torch.testing.assert_close(per_image, (v - (x - noise)).square().mean((1, 2, 3)))
    expected = alignment_loss(student.projector(tokens), teacher(batch["image"] / 255, 8))
    torch.testing.assert_close(alignment, expected)
    torch.testing.assert_close(loss, flow_matching_loss(v, x, noise) + 0.5 * expected)


def test_the_convolutional_projector_sees_the_neighbours_of_a_token_in_the_image():
    """By a naive loop. Catches tokens laid out column by column, and a kernel that is mirrored."""
    torch.manual_seed(0)
    projector = ConvProjector(6, 5, (2, 3))
    tokens = torch.randn(2, 6, 6)
    kernel, found = projector.weight, projector(tokens)  # (5, 6, 3, 3), (2, 6, 5)
    for row, column in itertools.product(range(2), range(3)):
        expected = projector.bias.expand(2, 5)
        for down, across in itertools.product((-1, 0, 1), (-1, 0, 1)):
            if 0 <= row + down < 2 and 0 <= column + across < 3:
                neighbour = tokens[:, (row + down) * 3 + column + across]
                expected = expected + neighbour @ kernel[:, :, down + 1, across + 1].T
        torch.testing.assert_close(found[:, row * 3 + column], expected)


def test_the_training_loss_of_irepa_and_of_frequencies_is_made_of_the_two_losses():
    """Written out. Catches a switch that does not arrive."""
    batch, teacher = a_batch(), Teacher()
    torch.manual_seed(0)
    student = Student(randomised(NANO), repa_block=1, teacher_width=5, projector="conv")
    x, noise, t = from_uint8(batch["image"]), batch["noise"], batch["t"]
    loss, per_image, alignment = training_loss(student, teacher, batch, 0.0, 0.5, 8, by_frequency, True)
    v, tokens = student.model(interpolate(x, noise, t), t, batch["y"], features_at=1)
    flow_loss = flow_matching_loss(v, x, noise, weigh=by_frequency)
    expected = alignment_loss(student.projector(tokens), teacher(batch["image"] / 255, 8), spatial=True)
    torch.testing.assert_close(loss, flow_loss + 0.5 * expected)
    assert abs(flow_loss - flow_matching_loss(v, x, noise)) > 1e-3
    assert abs(expected - alignment_loss(student.projector(tokens), teacher(batch["image"] / 255, 8))) > 1e-3


def test_a_run_from_before_a_choice_existed_is_no_run_of_another_choice(tmp_path):
    """Catches a run that resumes under another loss, since its checkpoint does not name the loss."""
    out = tmp_path / "run"
    assert train(out, "--steps", 1)[0] == 0
    state = last(out)
    for name in ("loss", "repa_projector", "prediction"):
        del state["identity"][name]
    del state["config"]["prediction"]
    for path in (out / "step-00000001.pt", out / "last.pt"):
        save_checkpoint(path, state)
    assert "loss='plain'" in refuses(out, "--steps", 2, "--loss", "frequency")
    assert "prediction='velocity'" in refuses(out, "--steps", 2, "--prediction", "clean")
    assert train(out, "--steps", 2)[0] == 0


def test_a_model_of_clean_images_trains_previews_resumes_and_samples(tmp_path, quick_previews):
    """Through the scripts: its configuration is in the file, and sample.py needs no flag."""
    out = tmp_path / "run"
    flags = ("--prediction", "clean", "--loss", "frequency", "--preview-every", 2)
    assert train(out, "--steps", 1, *flags)[0] == 0
    assert train(out, "--steps", 2, *flags)[0] == 0
    assert (out / "samples.png").exists() and last(out)["config"]["prediction"] == "clean"
    assert "prediction='clean'" in refuses(out, "--steps", 3, "--loss", "frequency")
    flags = ("--num", 1, "--steps", 2, "--out", tmp_path / "x.png")
    status, _, stderr = run_script("sample.py", "--ckpt", out / "last.pt", "--class", 0, *flags)
    assert status == 0, stderr


def test_labels_are_dropped_where_the_sample_s_number_says_so():
    """A share `drop_label` of them, the same samples for any batch. Catches: y dropped for the whole batch."""
    batch, student = a_batch(), a_student()
    batch["u"] = torch.tensor([0.05, 0.2, 0.6, 0.9])
    for share, dropped in ((0.0, []), (0.3, [0, 1]), (1.0, [0, 1, 2, 3])):
        seen = []
        hook = student.model.class_embed.register_forward_pre_hook(lambda module, args: seen.append(args[0].tolist()))
        training_loss(student, None, batch, share)
        hook.remove()
        assert seen == [[9 if i in dropped else int(y) for i, y in enumerate(batch["y"])]]


def test_update_takes_one_adamw_step_and_moves_the_average():
    """Of plain numbers: the first step of AdamW is the rate times the sign; the average moves by 1 - decay of it."""
    student = a_student()
    ema = [p.detach().clone() for p in student.model.parameters()]
    before = [p.detach().clone() for p in student.model.parameters()]
    average = torch.nn.ParameterList(ema)
    loss = training_loss(student, None, a_batch())[0]
    loss.backward()
    signs = [p.grad.sign() for p in student.parameters()]
    optimizer = torch.optim.AdamW(student.parameters(), lr=1.0, eps=1e-30, weight_decay=0.0, fused=True)
    update(student, average, [optimizer], NoGauges(), step=1, lr=1e-2, decay=0.75)
    for old, new, sign, mean in zip(before, student.model.parameters(), signs, average):
        torch.testing.assert_close(new, old - 1e-2 * sign)
        torch.testing.assert_close(mean, 0.75 * old + 0.25 * new)


class NoGauges:
    """Nothing is ever broken."""

    def broken(self, step, norm):
        return torch.zeros(())


def test_update_clips_the_gradient_to_its_norm():
    student = a_student()
    training_loss(student, None, a_batch())[0].backward()
    seen = []

    class Look(torch.optim.SGD):
        def step(self):
            seen.append(torch.nn.utils.get_total_norm([p.grad for p in student.parameters()]).item())

    update(student, student.model, [Look(student.parameters(), 1.0)], NoGauges(), 1, lr=1.0, decay=0.9, clip=1e-3)
    assert seen == [pytest.approx(1e-3, rel=1e-3)]


def test_learning_rate_rises_then_stays_or_falls_as_a_cosine():
    assert [learning_rate(step, 10, 8.0, warmup=3) for step in (0, 1, 3, 9)] == [2, 4, 8, 8]
    assert learning_rate(5, 10, 8.0, schedule="cosine") == pytest.approx(4)
    assert learning_rate(10, 10, 8.0, schedule="cosine") == pytest.approx(0)


# ---- it learns -------------------------------------------------------------------------------------------------------


def test_one_batch_is_overfitted():
    """Four pictures with fixed noise and times: the loss falls to a twentieth. Catches detached or dead parameters."""
    torch.manual_seed(0)
    x = from_uint8(torch.stack([open_dataset("emoji", 32)[200 * i][0] for i in range(4)]))
    noise, t, y = torch.randn_like(x), sample_time(4), torch.arange(4) % 3
    model = PixNerd(dataclasses.replace(TINY, hidden_size=64, num_heads=4, resolution=32, patch_size=8, field_width=16))
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(100):
        loss = flow_matching_loss(model(interpolate(x, noise, t), t, y), x, noise)
        optimizer.zero_grad()
        loss.backward()
        assert all(p.grad is not None for p in model.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 20, losses[-1]


@pytest.mark.parametrize(
    "choice",
    [
        ["--field-norm", "none"],
        ["--field-norm", "first"],
        ["--field-norm", "both"],
        ["--encoding", "sincos"],
        ["--decoder", "linear"],
        ["--field-depth", "3"],
        ["--field-ratio", "3"],
        ["--depth", "3"],
        ["--augment"],
    ],
    ids="=".join,
)
def test_each_of_the_papers_choices_trains_another_model_and_samples_it(tmp_path, plain_choices, choice):
    """Compared with the run without it, from the same seed. Catches: a flag that is read and then forgotten."""
    state, drawn = trained_and_drawn(tmp_path / "run", *choice)
    assert not np.array_equal(drawn, plain_choices[1]) and not same_weights(state, plain_choices[0])


@pytest.fixture(scope="module")
def plain_choices(tmp_path_factory):
    """`trained_and_drawn` with none of them."""
    return trained_and_drawn(tmp_path_factory.mktemp("plain"))


def trained_and_drawn(out, *choice):
    """(weights after two steps with these flags, the picture (36, 36, 3) that sample.py draws with them)."""
    assert train(out, "--steps", 2, "--lr", "0.1", *choice)[0] == 0
    how = ("--class", "flags", "--num", 1, "--steps", 2, "--out", out / "x.png", "--device", "cpu")
    status, _, stderr = run_script("sample.py", "--ckpt", out / "last.pt", *how)
    assert status == 0, stderr
    drawn = np.asarray(Image.open(out / "x.png"))
    assert drawn.shape == (36, 36, 3)
    return last(out)["model"], drawn


def same_weights(one, other):
    """Whether two state dicts have the same names and, to the bit, the same numbers."""
    return one.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in one.items())


def test_recompute_keeps_the_loss_and_is_done(tmp_path, monkeypatch):
    """Field and blocks of both steps pass through activation checkpointing. Catches a flag that changes nothing."""
    asked, flags = [], ("--steps", 2, "--log-every", 1)
    assert train(tmp_path / "plain", *flags)[0] == 0
    plain = recompute.checkpoint
    monkeypatch.setattr(recompute, "checkpoint", lambda part, *a, **k: asked.append(type(part)) or plain(part, *a, **k))
    assert train(tmp_path / "run", *flags, "--recompute", "all")[0] == 0
    assert asked.count(Block) == 2 * 2 and NeuralField in asked
    losses = [[line["loss"] for line in read_run(tmp_path / out)] for out in ("run", "plain")]
    assert len(losses[0]) == 2 and losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_clip_limits_what_a_step_changes(tmp_path):
    """A gradient of length 1e-12 is far below Adam's epsilon of 1e-8, so that the weights stay as they were."""
    moved = {}
    for clip in (0, 1e-12):
        assert train(tmp_path / f"{clip}", "--steps", 1, "--warmup", 0, "--clip", clip)[0] == 0
        state = last(tmp_path / f"{clip}")
        torch.manual_seed(0)  # the default of --seed
        first = build_model(checked_config(state, "")).state_dict()
        moved[clip] = max((value - first[key]).abs().max() for key, value in state["model"].items())
    assert moved[0] > 1e-3 and moved[1e-12] < 1e-6


def test_beta2_is_the_share_of_the_old_average_of_squares(tmp_path):
    """After one step, that average is (1 - beta2) g^2, with the same gradient g."""
    squares = []
    for beta2 in ("0.75", "0.5"):
        assert train(tmp_path / beta2, "--steps", 1, "--beta2", beta2)[0] == 0
        (optimizer,) = last(tmp_path / beta2)["optimizers"]
        squares.append({index: moments["exp_avg_sq"] for index, moments in optimizer["state"].items()})
    assert max(value.max() for value in squares[0].values()) > 0
    for index, value in squares[0].items():
        torch.testing.assert_close(2 * value, squares[1][index])


def test_exif_decides_whether_photographs_are_trained_on_upright(tmp_path):
    """Turned pictures that are to be respected train as the upright ones do, to the bit, and others do not."""
    turned = Image.Exif()
    turned[0x0112] = 6  # lies on its side
    for folder in ("upright", "turned"):
        (tmp_path / folder / "cat").mkdir(parents=True)
    for i in range(4):
        picture = noise_picture(32, 32, i)
        picture.save(tmp_path / "upright" / "cat" / f"{i}.png")
        sideways = picture.transpose(Image.Transpose.ROTATE_90)
        sideways.save(tmp_path / "turned" / "cat" / f"{i}.png", exif=turned)
    found = {}
    for folder, exif in (("upright", "respect"), ("turned", "respect"), ("turned", "ignore")):
        out = tmp_path / f"{folder}-{exif}"
        assert train(out, "--steps", 2, "--data", tmp_path / folder, "--exif", exif, "--workers", 0)[0] == 0
        found[folder, exif] = last(out)["model"]
    assert same_weights(found["upright", "respect"], found["turned", "respect"])
    assert not same_weights(found["upright", "respect"], found["turned", "ignore"])


def test_repa_projector_is_three_linear_layers_or_a_convolution(tmp_path):
    """And what is aligned trains another model. Shapes: from 32 numbers of a token to 128 of the emoji's teacher."""
    flags, shapes, states = (
        ("--steps", 2, "--repa", 0.5, "--repa-block", 1, "--dino", "emoji", "--patch-size", 8),
        {},
        [],
    )
    for projector in ("mlp", "conv"):
        assert train(tmp_path / projector, *flags, "--repa-projector", projector)[0] == 0
        state = last(tmp_path / projector)
        shapes[projector] = [tuple(value.shape) for name, value in state["projector"].items() if "weight" in name]
        states.append(state["model"])
    assert shapes == {"mlp": [(32, 32), (32, 32), (128, 32)], "conv": [(128, 32, 3, 3)]}
    assert not same_weights(*states)


def test_the_average_keeps_no_graph(tmp_path, monkeypatch):
    """Averaged under autograd, it would hold on to one more piece of graph in every step: gigabytes in a long run."""
    averages = []

    def look(ema, *_):
        averages.append([p for p in ema.parameters() if p.requires_grad or p.grad_fn])
        return Image.new("RGB", (8, 8))

    monkeypatch.setattr(previews, "preview", look)  # train.py is run anew, and imports this
    status, _, stderr = train(tmp_path / "run", "--steps", 2, "--preview-every", 1)
    assert status == 0, stderr
    assert averages == [[], []]


def test_metrics_previews_and_dry_run(tmp_path, quick_previews):
    out = tmp_path / "run"
    status, stdout, stderr = train(out, "--steps", 4, "--log-every", 2, "--preview-every", 2)
    assert status == 0, stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    for line in lines:
        assert math.isfinite(line["loss"]) and len(line["loss_by_time"]) == 10 and line["images_per_second"] > 0
    assert sorted(os.listdir(out / "previews")) == ["step-00000002.png", "step-00000004.png"]
    assert (out / "samples.png").read_bytes() == (out / "previews" / "step-00000004.png").read_bytes()
    assert stdout.count("images/s") == 2  # not a terminal: one line per log step, no progress bar
    status, stdout, _ = train(tmp_path / "dry", "--dry-run")
    assert status == 0 and not (tmp_path / "dry").exists()
    for word in ("parameters", "GFLOP per image", "images per epoch", "memory"):
        assert word in stdout


def test_the_average_follows_the_weights(tmp_path):
    """EMA after a step = 0.9 EMA before + 0.1 weights after. Catches: an average that is never taken."""
    after = [
        train(tmp_path / str(steps), "--steps", steps, "--ema", "0.9")[0] or last(tmp_path / str(steps))
        for steps in (1, 2)
    ]
    for key, value in after[1]["ema"].items():
        torch.testing.assert_close(value, 0.9 * after[0]["ema"][key] + 0.1 * after[1]["model"][key])
    assert not torch.equal(after[0]["ema"]["decoder.output.bias"], after[0]["model"]["decoder.output.bias"])


def test_the_loss_is_told_by_time_and_the_cosine_falls_to_zero(tmp_path):
    """The bins that hold a number are those of the four samples' times, and no others."""
    out = tmp_path / "run"
    assert train(out, "--steps", 4, "--schedule", "cosine", "--log-every", 1)[0] == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    samples = TrainingSamples(open_dataset("emoji", 32), seed=0)
    for step, line in enumerate(lines):
        times = {int(samples[4 * step + slot]["t"] * 10) for slot in range(4)}
        assert {place for place, loss in enumerate(line["loss_by_time"]) if loss is not None} == times
        assert line["lr"] == pytest.approx(3e-3 * min(1, (step + 1) / 21) * (1 + math.cos(math.pi * step / 4)) / 2)


# ---- it survives -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """A run of 8 steps in one go."""
    out = tmp_path_factory.mktemp("whole") / "run"
    status, _, stderr = train(out, "--steps", 8, "--save-every", 3)
    assert status == 0, stderr
    return out


def test_stopped_and_resumed_many_times_equals_one_go(uninterrupted, tmp_path, monkeypatch):
    """Stopped by SIGTERM after each line of the log, and started again until it is through."""
    plain, out = Log.training, tmp_path / "run"

    def stop_after(*args):
        plain(*args)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(Log, "training", stop_after)
    for starts in itertools.count(1):
        status, stdout, stderr = train(out, "--steps", 8, "--save-every", 3, "--log-every", 1)
        assert status == 0, stderr
        if last(out)["step"] == 8:
            break
        assert "stopped by SIGTERM" in stdout
    assert starts > 2
    assert_same_run(last(out), last(uninterrupted))
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


@pytest.mark.slow
def test_killed_while_training_resumes_exactly(uninterrupted, tmp_path):
    out = tmp_path / "run"
    process = start(out, "--steps", 8, "--save-every", 1)
    deadline = time.monotonic() + 60
    while not list(out.glob("step-*.pt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.communicate()
    status, _, stderr = train(out, "--steps", 8, "--save-every", 3)
    assert status == 0, stderr
    assert_same_run(last(out), last(uninterrupted))


@pytest.mark.slow
@pytest.mark.parametrize("stderr", [subprocess.PIPE, subprocess.STDOUT])
def test_training_goes_on_to_its_checkpoint_when_the_reader_of_its_output_leaves(tmp_path, uninterrupted, stderr):
    """`python train.py | head -1`, also with `2>&1`. Catches a BrokenPipeError that takes unsaved steps with it."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    training = [sys.executable, *command(tmp_path / "run", "--steps", 8, "--log-every", 1)]
    process = subprocess.Popen(training, stdout=subprocess.PIPE, stderr=stderr, text=True, env=environment)
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read() if process.stderr else ""
    assert (process.wait(120), errors) == (0, "")
    assert_same_run(last(tmp_path / "run"), last(uninterrupted))


@pytest.mark.slow
def test_training_and_drawing_with_a_closed_output_do_their_work(tmp_path):
    """As in `train.py >&-`, where Python has no stdout. Catches: a traceback in the place of a checkpoint."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    draw = ["--ckpt", tmp_path / "run" / "last.pt", "--class", "flags", "--steps", 2, "--out", tmp_path / "x.png"]
    for line in (command(tmp_path / "run", "--steps", 1), [ROOT / "sample.py", *draw, "--compile", "off"]):
        shell = ["sh", "-c", 'exec "$@" >&-', "sh", sys.executable, *map(str, line)]
        done = subprocess.run(shell, env=environment, stderr=subprocess.PIPE, text=True, timeout=300)
        assert (done.returncode, done.stderr) == (0, "")
    assert last(tmp_path / "run")["step"] == 1 and Image.open(tmp_path / "x.png").size


def test_resumes_exactly_with_muon_too(tmp_path):
    """Its averages are in the checkpoint; and a run with the other optimizer is refused as another run."""
    assert train(tmp_path / "whole", "--optimizer", "muon", "--steps", 4)[0] == 0
    out = tmp_path / "parts"
    for steps in (2, 4):
        status, _, stderr = train(out, "--optimizer", "muon", "--steps", steps)
        assert status == 0, stderr
    assert len(last(out)["optimizers"]) == 2
    assert_same_run(last(out), last(tmp_path / "whole"))
    assert "optimizer" in refuses(out, "--steps", 6)


def test_workers_and_micro_batches_change_nothing(uninterrupted, tmp_path):
    """Workers to the bit; micro-batches add gradients in another order, so to rounding."""
    out = tmp_path / "workers"
    assert train(out, "--steps", 5, "--workers", 2)[0] == 0
    assert train(out, "--steps", 8)[0] == 0
    assert_same_run(last(out), last(uninterrupted))
    out = tmp_path / "micro"
    assert train(out, "--steps", 8, "--micro-batch", 2)[0] == 0
    for key, value in last(uninterrupted)["model"].items():
        torch.testing.assert_close(last(out)["model"][key], value, atol=1e-4, rtol=1e-3)


def test_what_a_kill_after_the_last_save_left_undone_is_made_up_for(tmp_path, quick_previews):
    """The second name of the checkpoint, and the preview. Catches: "nothing to do" beside a stale last.pt."""
    out, flags = tmp_path / "run", ("--preview-every", 2)
    for steps in (2, 4):
        assert train(out, "--steps", steps, *flags)[0] == 0
    (out / "last.pt").unlink()
    os.link(out / "step-00000002.pt", out / "last.pt")
    picture = (out / "previews" / "step-00000004.png").read_bytes()
    (out / "previews" / "step-00000004.png").unlink()
    assert "nothing to do" in train(out, "--steps", 4, *flags)[1]
    assert last(out)["step"] == 4
    assert (out / "previews" / "step-00000004.png").read_bytes() == picture


def test_another_weight_decay_counts_from_the_next_step_on(tmp_path):
    """As another --lr does. Catches: the one that came with the optimizer's state."""
    for name, flags in (("same", ()), ("other", ("--weight-decay", 0.5))):
        assert train(tmp_path / name, "--steps", 1)[0] == 0
        assert train(tmp_path / name, "--steps", 2, *flags)[0] == 0
    weights = [last(tmp_path / name)["model"]["patch_embed.weight"] for name in ("same", "other")]
    before = load_checkpoint(tmp_path / "same" / "step-00000001.pt")["model"]["patch_embed.weight"]
    rate = 3e-3 * 2 / 21  # of the second step of the warm-up
    torch.testing.assert_close(weights[1], weights[0] - rate * 0.5 * before, atol=1e-7, rtol=1e-5)


def test_init_is_for_the_start_only_and_refuses_another_function(tmp_path):
    source, out = tmp_path / "source", tmp_path / "run"
    assert train(source, "--steps", 1, "--field-norm", "none")[0] == 0
    start_file = tmp_path / "start.pt"
    os.rename(source / "last.pt", start_file)
    assert "field_norm='none'" in refuses(out, "--steps", 1, "--init", start_file)  # the shapes are the same
    flags = ("--field-norm", "none", "--init", start_file)
    assert "prediction='velocity'" in refuses(out, "--steps", 1, "--prediction", "clean", *flags)
    assert "starting from" in train(out, "--steps", 1, *flags)[1]
    start_file.unlink()
    status, stdout, stderr = train(out, "--steps", 2, *flags)
    assert status == 0 and "resuming" in stdout and "starting from" not in stdout, stderr


def test_weights_alone_are_no_run_to_go_on_with(tmp_path):
    out = tmp_path / "run"
    assert train(out, "--steps", 1)[0] == 0
    (out / "step-00000001.pt").unlink()
    save_checkpoint(out / "last.pt", {key: last(out)[key] for key in ("format", "config", "ema")})
    assert "weights only" in refuses(out, "--steps", 2)


def test_resuming_a_finished_run_does_nothing(uninterrupted):
    before = (uninterrupted / "last.pt").stat().st_mtime_ns
    status, stdout, _ = train(uninterrupted, "--steps", 8, "--save-every", 3)
    assert status == 0 and "nothing to do" in stdout
    assert (uninterrupted / "last.pt").stat().st_mtime_ns == before


def test_epochs_are_steps_that_resuming_does_not_change(folder, tmp_path):
    """Six pictures, four a step: two epochs are three steps, also when asked for again; three are five."""
    out = tmp_path / "run"
    assert train(out, "--data", folder, "--epochs", 2)[0] == 0
    assert last(out)["step"] == 3
    assert "3 of 3 steps: nothing to do" in train(out, "--data", folder, "--epochs", 2)[1]
    assert train(out, "--data", folder, "--epochs", 3)[0] == 0
    assert last(out)["step"] == 5
    assert "--epochs: 0 is not above 0" in refuses(out, "--epochs", 0)
    assert "--epochs and --steps both say how long" in refuses(out, "--steps", 3, "--epochs", 1)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_it_sound(tmp_path, optimizer):
    out = tmp_path / "run"
    assert train(out, "--optimizer", optimizer, "--steps", 2)[0] == 0
    message = refuses(out, "--optimizer", optimizer, "--steps", 9, "--lr", "1e9", "--log-every", 1)
    assert "finite on rank 0 at step" in message
    assert last(out)["step"] == 2
    assert all(value.isfinite().all() for value in last(out)["model"].values())


def test_weights_that_an_update_made_infinite_are_not_saved(tmp_path, monkeypatch):
    """The loss and the gradient of the last step were finite. Catches: a last.pt of NaN and exit status 0."""
    assert train(tmp_path / "run", "--steps", 2)[0] == 0
    (lr,) = [option for option in OPTIONS if option.name == "lr"]
    monkeypatch.setattr(lr, "type", float)  # without its range
    line = refuses(tmp_path / "run", "--steps", 3, "--lr", "1e39")
    assert "is not finite after step 3, which is not saved. Resume with a lower --lr" in line
    assert last(tmp_path / "run")["step"] == 2


def test_a_checkpoint_of_another_configuration_names_the_field(uninterrupted):
    for flags, field, old, new in (
        (["--field-width", 4], "field_width", 8, 4),
        (["--seed", 5], "seed", 0, 5),
        (["--batch-size", 8], "batch_size", 4, 8),
        (["--resolution", 64], "resolution", 32, 64),
        (["--field-norm", "both"], "field_norm", "'output'", "'both'"),
        (["--patch-size", 8], "patch_size", 16, 8),
        (["--hidden-size", 64], "hidden_size", 32, 64),
        (["--depth", 3], "depth", 2, 3),
        (["--decoder", "linear"], "decoder", "'field'", "'linear'"),
        (["--field-depth", 2], "field_depth", 1, 2),
        (["--field-ratio", 2], "field_ratio", 1, 2),
        (["--encoding", "sincos"], "encoding", "'dct'", "'sincos'"),
        (["--num-freqs", 4], "num_freqs", 6, 4),
        (["--augment"], "augment", False, True),
        (["--optimizer", "muon"], "optimizer", "'adamw'", "'muon'"),
        (["--drop-label", 0.5], "drop_label", 0.1, 0.5),
        (["--shift", 2], "shift", 1.0, 2.0),
    ):
        message = refuses(uninterrupted, "--steps", 9, *flags)
        assert f"{field}={old}" in message and str(new) in message


def test_changed_data_is_refused_unless_accepted(folder, tmp_path, monkeypatch):
    """And before any picture is prepared. Catches: minutes of scaling pictures, and only then the line."""
    out, flags = tmp_path / "run", ("--data", folder)
    assert train(out, "--steps", 1, *flags)[0] == 0
    Image.new("RGB", (32, 32)).save(folder / "cat" / "more.png")
    with monkeypatch.context() as patch:
        patch.setattr(crops, "keep_in_memory", None)
        assert "--accept-changed-data" in refuses(out, "--steps", 2, *flags)
    assert train(out, "--steps", 2, "--accept-changed-data", *flags)[0] == 0


# ---- mistakes --------------------------------------------------------------------------------------------------------


def test_an_output_that_cannot_be_written_stops_before_training(tmp_path):
    (tmp_path / "file").write_text("in the way")
    assert "cannot be written" in refuses(tmp_path / "file", "--steps", 1)
    assert (tmp_path / "file").read_text() == "in the way"


def test_class_folders_of_another_number_are_refused_before_step_1(folder, tmp_path):
    out = tmp_path / "run"
    assert train(out, "--steps", 1, "--data", folder)[0] == 0
    (folder / "eel").mkdir()
    Image.new("RGB", (32, 32)).save(folder / "eel" / "0.png")
    assert "num_classes=2" in refuses(out, "--steps", 2, "--data", folder)
    for wanted in (2, 4):  # one fewer, one more
        message = refuses(tmp_path / "new", "--steps", 1, "--data", folder, "--num-classes", wanted)
        assert f"has 3 classes, not --num-classes {wanted}" in message
    shutil.rmtree(folder / "eel")
    for picture in (folder / "dog").iterdir():
        picture.rename(folder / "cat" / f"dog {picture.name}")
    (folder / "dog").rmdir()
    assert "num_classes=2" in refuses(out, "--steps", 2, "--data", folder)


def test_bad_data_sets_are_named(folder, tmp_path):
    out = tmp_path / "run"
    assert "nowhere" in refuses(out, "--data", tmp_path / "nowhere")
    few = refuses(out, "--data", folder, "--batch-size", 8)
    remedy = "use --batch-size 6 or less, add pictures, or let them come more often, as in --classes cat:4"
    assert few.endswith(f"{folder} has 6 images per epoch, fewer than --batch-size 8: {remedy}")
    flat = refuses(out, "--data", folder / "dog", "--batch-size", 8)
    remedy = "use --batch-size 3 or less, add pictures"
    assert flat.endswith(f"{folder / 'dog'} has 3 images per epoch, fewer than --batch-size 8: {remedy}")
    (folder / "dog" / "0.png").write_bytes(b"")
    for workers in (0, 1):
        assert "0.png" in refuses(out, "--data", folder, "--steps", 9, "--workers", workers)
    (folder / "empty").mkdir()
    assert "empty holds no" in refuses(out, "--data", folder)


def test_the_demo_learns_some_classes_with_a_small_teacher(tmp_path):
    """The kind of flags of `make demo`: alignment falls, the checkpoint knows its classes, resuming needs the same."""
    out = tmp_path / "run"
    flags = ["--patch-size", 8, "--repa", 0.5, "--repa-block", 2, "--dino", "emoji", "--log-every", 10]
    status, _, stderr = train(out, "--steps", 20, "--classes", "smileys, food", *flags)
    assert status == 0, stderr
    first, then = [json.loads(line)["alignment"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert then < first - 0.1, (first, then)
    assert last(out)["class_names"] == ["smileys", "food"] and last(out)["projector"]["4.weight"].shape == (128, 32)
    assert "classes=['smileys', 'food'], but this run asks for None" in refuses(out, "--steps", 21, *flags)
    for classes in ("food,smileys", "travel,flags"):  # as many, so that only the names tell
        message = refuses(out, "--steps", 21, "--classes", classes, "--accept-changed-data", *flags)
        assert "was trained with classes=['smileys', 'food']" in message
    # Another teacher is refused before it is fetched.
    flags[-3] = tmp_path / "nowhere.pth"
    assert "dino='emoji'" in refuses(out, "--steps", 21, "--classes", "smileys,food", *flags)


def test_classes_and_the_small_teacher_are_refused_where_they_mean_nothing(folder, tmp_path):
    new, teacher = tmp_path / "new", ["--repa", 0.5, "--repa-block", 2, "--dino", "emoji"]
    assert "'cars' is not a class" in refuses(new, "--classes", "food,cars")
    message = refuses(new, "--classes", "food-fruit", "--batch-size", 64)
    assert "--classes food-fruit has 20 images per epoch, fewer than --batch-size 64" in message
    assert "--classes food-fruit has 1 classes" in refuses(new, "--classes", "food-fruit", "--num-classes", 9)
    for nothing in ("", "food,"):
        assert "'' is not a class" in refuses(new, "--classes", nothing)
    assert "in patches of 8 only, not emoji at 32 in patches of 16" in refuses(new, *teacher)
    assert "--dino emoji knows --data emoji" in refuses(new, *teacher, "--data", folder, "--patch-size", 8)
    message = refuses(new, "--classes", "cat", "--data", tmp_path / "elsewhere", "--dry-run")
    assert "planned only where the data are" in message
    assert not list(new.rglob("*.p*"))  # no checkpoint, no picture


def test_starting_from_other_classes_makes_their_embedding_anew(tmp_path):
    """As many classes, other names: their vectors would mean something else. Catches: taking them over silently."""
    source = tmp_path / "source"
    assert train(source, "--steps", 1, "--classes", "smileys,food")[0] == 0
    embedding = last(source)["ema"]["class_embed.weight"]
    for classes, same in (("smileys,food", True), ("food,smileys", False), ("travel,flags", False)):
        out = tmp_path / classes
        flags = ["--seed", 1, "--lr", 1e-12, "--init", source / "last.pt", "--classes", classes]
        status, text, stderr = train(out, "--steps", 1, *flags)
        assert status == 0, stderr
        assert ("another order: a new one is trained" in text) is not same
        assert torch.allclose(last(out)["model"]["class_embed.weight"], embedding, atol=1e-6) is same


def test_small_previews_are_guided_early_and_large_ones_as_in_the_paper(monkeypatch):
    """Steps, noise and guided times of a preview, by what the model is asked. FID's samples stay the paper's way."""
    asked = []
    monkeypatch.setattr(PixNerd, "forward", lambda self, x, t, y: asked.append((len(x), float(t[0]), x)) or 0 * x)
    for resolution, steps, guided_from in ((32, 30, 0.0), (128, 20, 0.1)):
        asked.clear()
        model = PixNerd(dataclasses.replace(TINY, num_classes=1, resolution=resolution, patch_size=8))
        previews.preview(model, torch.zeros(8, dtype=torch.long), 0, torch.device("cpu"), "fp32")
        assert len(asked) == steps
        for batch, t, _ in asked:
            assert batch == (16 if t > np.float32(guided_from) else 8), t
        assert abs(asked[0][2].std() - (0.7 if resolution == 32 else 1.0)) < 0.01


def test_evaluations_that_cannot_run_are_refused_at_the_start(tmp_path):
    out = tmp_path / "run"
    assert "--eval-num must be at least 128" in refuses(out, "--eval-every", 1, "--eval-num", 100)
    assert "nowhere.npz" in refuses(out, "--eval-every", 1, "--eval-ref", tmp_path / "nowhere.npz")
    flags = ("--eval-every", 1, "--eval-ref", "emoji", "--inception", tmp_path / "nowhere.pth")
    assert "nowhere.pth" in refuses(out, *flags)
    assert not out.exists()


def test_impossible_flags_are_named(tmp_path):
    out = tmp_path / "run"
    assert "cut into patches of 5" in refuses(out, "--patch-size", 5)
    assert "--micro-batch 3" in refuses(out, "--micro-batch", 3)
    assert "--device nonsense" in refuses(out, "--device", "nonsense")
    assert "32 or 64, not 48" in refuses(out, "--resolution", 48)
    assert not list(out.glob("*.pt"))


@pytest.mark.slow
def test_without_a_compiler_it_says_so_in_one_line_and_goes_on(tmp_path):
    out = tmp_path / "run"
    process = subprocess.run(
        [sys.executable, *command(out, "--compile", "auto", "--steps", 1)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ
        | {"CXX": "/nonexistent/g++", "PATH": "/nonexistent", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")},
    )
    assert process.returncode == 0, process.stderr
    assert process.stdout.count("not compiling") == 1
    assert last(out)["step"] == 1


@pytest.mark.slow
def test_training_makes_the_loss_on_the_emoji_fall(tmp_path):
    """Nano's field and recipe, 45 steps of 16 images: measured 0.59 to 0.65 over the last 15, 1.45 in the first."""
    shape = ("--patch-size", 8, "--field-width", 32, "--field-depth", 2)
    recipe = ("--optimizer", "muon", "--lr", 1e-2, "--batch-size", 16, "--steps", 45, "--log-every", 15)
    status, _, stderr = train(tmp_path / "run", *shape, *recipe)
    assert status == 0, stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert 1.2 < losses[0] < 2.0 and losses[-1] < 0.75, losses


@pytest.mark.slow
def test_evaluation_while_training_logs_the_emoji_distance_and_fid(tmp_path):
    """Of EMA samples, into the metrics file; and only with a reference where there is no distance of our own."""
    out = tmp_path / "run"
    status, _, stderr = train(out, "--steps", 1, "--eval-every", 1, "--eval-num", 128)
    assert status == 0, stderr
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 1 and lines[-1]["emoji_distance"] > 10  # an untrained model is far away

    torch.manual_seed(0)
    torch.save(InceptionV3().state_dict(), tmp_path / "inception.pth")
    np.savez(tmp_path / "reference.npz", arr_0=np.random.RandomState(0).randint(0, 256, (6, 32, 32, 3), dtype=np.uint8))
    status, _, stderr = train(
        tmp_path / "fid",
        "--steps",
        1,
        "--eval-every",
        1,
        "--eval-num",
        6,
        "--eval-ref",
        tmp_path / "reference.npz",
        "--inception",
        tmp_path / "inception.pth",
    )
    assert status == 0, stderr
    scores = json.loads((tmp_path / "fid" / "metrics.jsonl").read_text().splitlines()[-1])
    assert scores["fid"] > 0 and scores["inception_score"] >= 1
    missing = refuses(tmp_path / "x", "--eval-every", 1, "--resolution", 64)
    assert (
        "--eval-ref is missing; none is published for 64 pixels, and eval_fid.py REAL SAMPLES --save-stats" in missing
    )
