"""Where the numbers of a run go: metrics.jsonl and the terminal, and TensorBoard and Weights & Biases if asked for.

    tensorboard --logdir runs          # after train.py --tensorboard, which writes OUT/tensorboard
    wandb sync OUT/wandb/offline-*     # after WANDB_MODE=offline train.py --wandb; online, nothing is left to do

All of them get the same numbers under the same names: loss, loss_by_time (in tenths of t), lr, grad_norm,
images_per_second, mfu (on GPUs that device.PEAKS knows), alignment (with --repa), the scores of --eval-every, and the
previews as pictures. No step is logged twice when a run resumes: lines behind the checkpoint are cut off
metrics.jsonl, TensorBoard drops them (purge_step), and wandb, which goes on under the same run id, keeps the first
value of a step. Left out: histograms of weights, uploading checkpoints.
"""

import contextlib
import datetime
import importlib
import json
import os
import pathlib
import secrets
import sys
import time

import numpy as np
from tqdm import tqdm

from checkpoint import sync_folder


class LogError(RuntimeError):
    """Numbers cannot be logged as asked. One line: what is missing or wrong, and what to do."""


def require(package):
    """Imports an optional package, whose name is also its flag's. LogError, saying how to install it."""
    try:
        return importlib.import_module(package)
    except ImportError:
        raise LogError(f"--{package} needs the package {package}: pip install {package}")


def replace_text(path, text):
    """Writes a small file whole or not at all, as save_checkpoint does."""
    temporary = path.with_name(f"{path.name}.tmp")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    sync_folder(path.parent)


def cut_metrics(path, step):
    """Takes out of metrics.jsonl what comes after `step`, and a last line that a crash cut off.

    A run that goes on from a checkpoint of this step writes those lines again. LogError for lines of something else.
    """
    if not path.exists():
        return
    try:
        lines = path.read_text().splitlines(True)
        kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
    except (ValueError, TypeError, LookupError):
        raise LogError(f"{path} holds lines that are not metrics: repair it, or move it away")
    if kept != lines:
        replace_text(path, "".join(kept))


def flat(values):
    """{name: number} of a line of metrics: a list becomes one number per bin, None (an empty bin) is left out."""
    numbers = {}
    for name, value in values.items():
        if isinstance(value, list):
            bins = enumerate(value)
            numbers |= {f"{name}/{i / len(value):.1f}": v for i, v in bins if v is not None}
        else:
            numbers[name] = value
    return numbers


def save_preview(out, step, image):
    """Keeps a preview (a Pillow image) as OUT/samples.png and as OUT/previews/step-N.png. Raises OSError."""
    (out / "previews").mkdir(exist_ok=True)
    for target in (out / "samples.png", out / "previews" / f"step-{step:08d}.png"):
        image.save(target.with_suffix(".tmp"), "PNG")
        os.replace(target.with_suffix(".tmp"), target)  # whole or not at all


class Log:
    """The log of one run in the folder `out`, from `step` to `steps`. With `out` None, as on ranks above 0, silent.

    For the MFU, flops: of training on one image, and peak: FLOP/s of all GPUs together, or None. settings: a dict of
    plain values that wandb shows beside the run. Raises LogError, OSError.
    """

    def __init__(self, out, step, steps, batch_size, flops=0, peak=None, tensorboard=False, wandb=False,
                 settings=None):  # fmt: skip
        self.out, self.step, self.steps, self.batch_size = out and pathlib.Path(out), step, steps, batch_size
        self.flops, self.peak, self.board, self.run = flops, peak, None, None
        self.since, self.paused = time.perf_counter(), 0.0
        self.bar = tqdm(total=steps, initial=step, disable=out is None or not sys.stderr.isatty(), unit="step",
                        smoothing=0.05)  # fmt: skip
        if out is None:
            return
        cut_metrics(self.out / "metrics.jsonl", step)
        if tensorboard:
            require("tensorboard")
            from torch.utils.tensorboard import SummaryWriter

            self.board = SummaryWriter(self.out / "tensorboard", purge_step=step + 1)
        if wandb:
            self.run = self.start_wandb(require("wandb"), settings)

    def start_wandb(self, wandb, settings):
        """The wandb run of this folder, whose id is kept in OUT/wandb-id. LogError, with wandb's own reason."""
        path = self.out / "wandb-id"
        if not path.exists():
            replace_text(path, secrets.token_hex(8))
        try:
            return wandb.init(dir=self.out, project="pixnerd", name=self.out.resolve().name, config=settings,
                              id=path.read_text().strip(), resume="allow")  # fmt: skip
        except Exception as error:  # noqa: BLE001  no login, no network, a server's refusal: all of them its business
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise LogError(f"--wandb: {reason} (WANDB_MODE=offline goes without an account and a network)")

    def training(self, step, **values):
        """Logs what was gathered since the last call, adds the speed, and shows the loss on the terminal.

        images_per_second leaves out what happened within `pause`. mfu, the model FLOPs utilisation, is the share of
        the GPUs' bf16 peak that went into the arithmetic of training; what --recompute repeats does not count, by
        definition. Where the peak is not known, as on CPUs, the line has no mfu.
        """
        done, elapsed = step - self.step, time.perf_counter() - self.since - self.paused
        self.step, self.since, self.paused = step, time.perf_counter(), 0.0
        speed = done * self.batch_size / elapsed  # images/s over all processes
        values["images_per_second"] = round(speed, 1)
        if self.peak:
            values["mfu"] = round(self.flops * speed / self.peak, 4)
        self.numbers(step, values)
        text = f"loss {values['loss']:.4f}, {speed:.0f} images/s"
        self.bar.set_postfix_str(text)
        if self.out and self.bar.disable:
            left = datetime.timedelta(seconds=round((self.steps - step) * elapsed / done))
            print(f"step {step}/{self.steps}, {text}, {left} left", flush=True)

    def numbers(self, step, values):
        """Logs a dict of numbers (or lists of them) at a step."""
        if self.out is None:
            return
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        if self.board:
            for name, value in flat(values).items():
                self.board.add_scalar(name, value, step)
            self.board.flush()  # what is logged before a checkpoint must not get lost after it
        if self.run:
            self.run.log(flat(values), step=step)

    def picture(self, step, image):
        """Saves a preview (a Pillow image) and logs it."""
        save_preview(self.out, step, image)
        if self.board:
            self.board.add_image("previews", np.asarray(image), step, dataformats="HWC")
            self.board.flush()
        if self.run:
            self.run.log({"previews": require("wandb").Image(image)}, step=step)

    @contextlib.contextmanager
    def pause(self):
        """with log.pause(): time that is not training's, as for saves and previews."""
        start = time.perf_counter()
        yield
        self.paused += time.perf_counter() - start

    def close(self):
        """Ends the bar and the optional logs, which send what is left."""
        self.bar.close()
        if self.board:
            self.board.close()
        if self.run:
            self.run.finish()
