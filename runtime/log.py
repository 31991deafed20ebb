"""Where the numbers of a run go: metrics.jsonl and the terminal, and TensorBoard and Weights & Biases if asked for.

    tensorboard --logdir runs          # after train.py --tensorboard, which writes OUT/tensorboard
    wandb sync OUT/wandb/offline-*     # after WANDB_MODE=offline train.py --wandb; online, nothing is left to do

All of them get the same numbers under the same names: loss, loss_by_time (in tenths of t), lr, grad_norm,
images_per_second, mfu (on GPUs that machine.PEAKS knows), alignment (with --repa), the scores of --eval-every, and the
previews as pictures. No step is logged twice when a run resumes: lines behind the checkpoint are cut off
metrics.jsonl, TensorBoard drops them (purge_step), and wandb, which resumes the same run id, keeps the first value of a
step. Left out: histograms of weights, uploading checkpoints.
"""

import contextlib
import datetime
import importlib
import json
import os
import pathlib
import secrets
import signal
import time

import numpy as np

from runtime.files import UserError, whole_file
from runtime.pictures import save_picture


def require(package):
    """Imports an optional package, whose name is also its flag's. UserError, saying how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise UserError(f"--{package} needs the package {package}: pip install {package}")


def cut_metrics(path, step):
    """Takes out of metrics.jsonl what comes after `step`, and a last line that a crash cut off: resuming repeats them.

    Returns the steps that have scores of --eval-every. UserError for lines of something else.
    """
    if not path.exists():
        return set()
    try:
        lines = path.read_text().splitlines(True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, TypeError, LookupError):
        raise UserError(f"{path} holds lines that are not metrics: repair it, or move it away")
    if kept != lines:
        with whole_file(path) as temporary:
            temporary.write_text("".join(kept))
    return {line["step"] for line in map(json.loads, kept) if "loss" not in line}


def flat(values):
    """{name: number} of a line of metrics: a list becomes one number per bin, None (an empty bin) is left out."""
    numbers = {name: value for name, value in values.items() if not isinstance(value, list)}
    for name in values.keys() - numbers.keys():
        bins = values[name]
        numbers |= {f"{name}/{i / len(bins):.1f}": value for i, value in enumerate(bins) if value is not None}
    return numbers


def two_digits(number):
    """A speed or a time above 0 as text: whole from 10 on, below that with two significant digits."""
    return f"{number:.0f}" if number >= 10 else f"{number:.2g}"


def is_due(step, every):
    """Is something due at this step that comes every `every` steps (0: never)?"""
    return bool(every) and step > 0 and step % every == 0


class Log:
    """The log of one run in the folder `out`, from the step at which this start begins to `steps`; silent above rank 0.

    For the MFU, flops: of training on one image, and peak: FLOP/s of all GPUs together, 0 where it is not known. Raises
    UserError, OSError.
    """

    def __init__(self, out, processes, step, steps, batch_size, flops=0, peak=0):
        self.out, self.processes, self.writes = pathlib.Path(out), processes, processes.rank == 0
        self.start, self.step, self.steps, self.batch_size, self.compiling = step, step, steps, batch_size, True
        self.flops, self.peak, self.board, self.run = flops, peak, None, None
        self.scored = cut_metrics(self.out / "metrics.jsonl", step) if self.writes else set()
        self.since = time.perf_counter()  # the time of `step`, moved on by pauses

    def send_to(self, tensorboard, wandb, settings):
        """Logs to TensorBoard or Weights & Biases as well, where wanted; settings: plain values that wandb shows.

        OUT/wandb-id keeps the id of the wandb run. UserError, with wandb's own reason.
        """
        if tensorboard and self.writes:
            require("tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard", purge_step=self.step + 1)
        if wandb and self.writes:
            wandb, id_file, name = require("wandb"), self.out / "wandb-id", self.out.resolve().name
            if not id_file.exists():
                with whole_file(id_file) as temporary:
                    temporary.write_text(secrets.token_hex(8))
            run = {"id": id_file.read_text().strip(), "resume": "allow"}
            try:
                self.run = wandb.init(dir=self.out, project="pixnerd", name=name, config=settings, **run)
            except Exception as error:  # noqa: BLE001  no login, no network, a server's refusal
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                raise UserError(f"--wandb: {reason} (WANDB_MODE=offline needs neither account nor network)")

    def training(self, step, values):
        """Logs {name: mean since the last call} with the speed, and prints the loss.

        images_per_second leaves out what happened within `pause`, and is left out itself on a line for nothing but the
        first step of a start, which may compile. mfu, the model FLOPs utilisation, is the share of
        the GPUs' bf16 peak that went into the arithmetic of training; what --recompute repeats does not count, by
        definition. Where the peak is not known, as on CPUs, the line has no mfu.
        """
        now = time.perf_counter()
        done, elapsed = step - self.step, now - self.since
        self.step, self.since = step, now
        start = f"step {step}/{self.steps}, loss {values['loss']:.4f}"
        if step == self.start + 1:
            self.numbers(step, values)
            return self.processes.say(f"{start}, {two_digits(elapsed)} s for the first step, which may compile")
        speed = done * self.batch_size / elapsed  # images/s over all processes
        mfu = {"mfu": round(self.flops * speed / self.peak, 4)} if self.peak else {}
        self.numbers(step, values | {"images_per_second": float(f"{speed:.4g}")} | mfu)
        left = datetime.timedelta(seconds=round((self.steps - step) * elapsed / done))
        pace = f"{two_digits(speed)} images/s" + f", {two_digits(elapsed / done)} s a step" * (elapsed >= done)
        self.processes.say(f"{start}, {pace}, {left} left")

    def numbers(self, step, values):
        """Logs a dict of numbers (or lists of them) at a step."""
        if not self.writes:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
            file.flush()
            os.fsync(file.fileno())  # or a power cut could take lines from before a checkpoint that it left
        if self.board:
            for name, value in flat(values).items():
                self.board.add_scalar(name, value, step)
            self.board.flush()  # what is logged before a checkpoint must not get lost after it
        if self.run:
            self.run.log(flat(values), step=step)

    def wants_picture(self, step, every):
        """Is a preview due? Also at the end, and at the step that was resumed if a kill came before it was drawn."""
        due = self.writes and (is_due(step, every) or every and step == self.steps)
        return bool(due) and (step > self.start or not self._preview(step).exists())

    def _preview(self, step):
        return self.out / "previews" / f"step-{step:08d}.png"

    def picture(self, step, image):
        """Saves a preview (a Pillow image), also as OUT/samples.png, and logs it. Raises OSError."""
        for target in (self.out / "samples.png", self._preview(step)):
            save_picture(target, image)
        if self.board:
            self.board.add_image("previews", np.asarray(image), step, dataformats="HWC")
            self.board.flush()
        if self.run:
            self.run.log({"previews": require("wandb").Image(image)}, step=step)

    def wants_scores(self, step, every):
        """Is an evaluation due? The same on all ranks. Also at the step that was resumed, if it has none."""
        return is_due(step, every) and (step > self.start or self.processes.from_rank_0(step not in self.scored))

    def scores(self, step, values):
        """Logs {name: score} of an evaluation, and prints it."""
        self.numbers(step, values)
        self.processes.say(f"step {step}: " + ", ".join(f"{name} {value:.3f}" for name, value in values.items()))

    @contextlib.contextmanager
    def pause(self):
        """with log.pause(): time that is not training's, as for saves and previews; after every step.

        The first step of a start, which compiles, is not training's either: the speed is that of the steps after it.
        """
        start = time.perf_counter()
        yield
        self.since += time.perf_counter() - start
        if self.compiling:
            self.step, self.since, self.compiling = self.start + 1, time.perf_counter(), False

    def close(self, step, stopped_by=0):
        """Ends the optional logs, which send what is left, and prints how the run ended."""
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()
        samples = f", {self.out}/samples.png" if (self.out / "samples.png").exists() else ""
        text = f"done: {self.out}/last.pt{samples}"
        if stopped_by:
            text = f"stopped by {signal.Signals(stopped_by).name} at step {step}, saved; the same command resumes"
        elif self.start >= self.steps:
            text = f"{self.out} has {step} of {self.steps} steps: nothing to do (more with --steps)"
        self.processes.say(text)
