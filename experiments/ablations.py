"""The claims of the paper, and three ideas since, repeated on a laptop: paired runs, error bars, docs/evidence.md.

    python -m experiments.ablations --list                            # claims, their rows and minutes, what is done
    python -m experiments.ablations --claim decoder --out runs/mine   # one claim anew, with a page of its own
    python -m experiments.ablations --claim decoder --seeds 3         # a fourth seed beside the stored ones
    python -m experiments.ablations --all                             # everything that is not stored yet
    python -m experiments.ablations --page                            # docs/evidence.md and its plots, nothing else

A finished run is one line of docs/evidence/runs.jsonl, and what is stored there is not repeated; another --out starts
from nothing. Lines of several machines are joined by appending them. At the end the page is written anew from all of
them (evidence.py), so no number in it is typed by hand. Two runs of one seed see the same pictures, noise, times and
dropped labels, since these depend on the seed and the number of the sample only (data.py): their difference is of what
was changed. claims.py says what is compared, world.py on what, measures.py by what. Left out: resuming in the middle of
a run, which takes minutes.
"""

import argparse
import copy
import dataclasses
import functools
import importlib.util
import json
import os
import pathlib
import platform
import statistics
import subprocess
import time

import torch

from data import open_dataset
from experiments.benchmark import guided, timings
from experiments.claims import CLAIMS, COSTS, DRAWN, NOT_HERE, ROWS, SHOWN, STEP_COST, TRAINING, USUAL, bases_of
from experiments.evidence import EVIDENCE, PAGE, minutes, strip_file, write_page
from experiments.evidence_plots import write_plots
from experiments.measures import border_ratio, emoji_distance, features, held_out_loss, paired_bootstrap, time_mass
from experiments.world import Study, resized, training_and_held_out, write_split
from model import PixNerd
from pretrained.emoji_classifier import EmojiTeacher
from runtime.distributed import Processes
from runtime.files import UserError, lock_or_wait, run, whole_file
from runtime.flops import forward_flops
from runtime.frequencies import LOSSES
from runtime.gauges import Gauges
from runtime.loader import BatchNumbers, training_batches
from runtime.machine import freeze
from runtime.models import find_model
from runtime.optimizers import make_optimizers
from runtime.options import SEED
from runtime.pictures import picture_grid
from runtime.previews import ema_samples
from runtime.prompts import open_encoder
from samplers import generate, image_noise, time_grid
from train import Student, learning_rate, training_loss, update

CPU = torch.device("cpu")
AT_ONCE = 32  # pictures that are drawn in a batch

# ---- one run ---------------------------------------------------------------------------------------------------------


@functools.cache
def real_emoji(side=32):
    """All drawings, at another side than the 64 pixels that they come in: uint8 (1906, 3, side, side)."""
    return resized(open_dataset("emoji", 64).images, side)


@functools.cache
def real_features():
    """What the emoji distance sees of them: (1906, 64)."""
    return features(real_emoji())


def config_of(name, study):
    """The model that a row of ROWS trains."""
    settings = {key: value for key, value in ROWS[name].items() if key not in TRAINING}
    return dataclasses.replace(study.config, **settings)


def train_row(name, seed, study, data, folder=None):
    """One training run of ROWS: {measurement: value}. folder: where a strip of samples is left, for seed 0."""
    training, (pictures, held_out) = {key: ROWS[name][key] for key in TRAINING if key in ROWS[name]}, data
    repa, projector, lr = training.get("repa", 0.0), training.get("projector", "mlp"), training.get("lr", study.lr)
    weigh, steps = LOSSES[training.get("loss", "plain")], study.steps * training.get("steps_times", 1)
    config = config_of(name, study)
    teacher = EmojiTeacher() if repa else None
    torch.manual_seed(seed)  # for the initial weights
    student = Student(PixNerd(config), max(1, config.depth // 2), teacher.width if teacher else 0, projector)
    ema = copy.deepcopy(student.model).eval().requires_grad_(False)
    optimizers = make_optimizers(student, "adamw", lr)
    gauges, curve = Gauges(Processes(), CPU), []
    numbers = BatchNumbers(0, steps, study.batch_size, study.batch_size)
    start = time.process_time()
    for step, batch in enumerate(training_batches(pictures, numbers, seed, 1.0, 0, CPU), start=1):
        loss, losses, aligned = training_loss(
            student, teacher, batch, 0.1, repa, config.patch_size, weigh, projector == "conv"
        )
        loss.backward()
        gauges.add(batch["t"], losses, aligned, 1)
        now = learning_rate(step - 1, steps, lr, study.warmup, "cosine")
        update(student, ema, optimizers, gauges, step, now, study.ema)
        if step % max(1, steps // 20) == 0:
            curve.append([step, round(gauges.read()["loss"], 5)])
    seconds = time.process_time() - start
    bins = held_out_loss(ema, held_out)
    drawn = torch.cat(list(ema_samples(ema, pictures.labels, study.samples, seed, CPU, "fp32").batches(64)))
    if folder and seed == 0:
        show_strip(drawn, folder / strip_file(name))
    return {
        "loss": sum(mass * loss for mass, loss in zip(time_mass(), bins)),
        "loss_by_time": bins,
        "emoji_distance": emoji_distance(features(drawn), real_features()),
        "border_ratio": border_ratio(drawn, config.patch_size),
        "real_border_ratio": border_ratio(real_emoji(config.resolution), config.patch_size),
        "curve": curve,
        "cpu_seconds": seconds,
        "gflop_per_step": 3 * study.batch_size * forward_flops(config) / 1e9,
        "parameters": sum(p.numel() for p in student.parameters()),
        "steps": steps,
    }


def show_strip(images, path, count=12):
    """Writes `count` of the pictures, evenly chosen and so of all classes, in one row."""
    chosen = images[torch.linspace(0, len(images) - 1, count).long()]
    with whole_file(path) as temporary:
        picture_grid(chosen, count).save(temporary, "png", optimize=True)


def ask(name, count):
    """A model in assets/ and what it is asked for: (model, y (count, ...)), its classes or names as often as they are.

    Text features as its encoder gives them. The model is ready to draw, as in sample.py.
    """
    model = find_model(name)
    if model.class_names is None:
        wanted = open_dataset("emoji", 32, captions=True).labels
        encode = open_encoder(model, None, None, name, CPU).encode
    else:
        wanted, encode = sorted(open_dataset("emoji", 32).labels), torch.tensor
    freeze(model, "fp32")
    return model, encode([wanted[i * len(wanted) // count] for i in range(count)])


def draw_as(name, seed, cache):
    """One way of drawing, of DRAWN: (pictures uint8 (N, 3, H, W), features (N, 64), CPU seconds).

    cache: {model: what `ask` gives} and {(row, seed): what was drawn before}.
    """
    if (name, seed) in cache:
        return cache[name, seed]
    how, images = USUAL | DRAWN[name], []
    model, y = cache[how["model"]]
    solver, size = how["solver"], (how["side"], how["side"])
    times = time_grid(how["evaluations"] // STEP_COST[solver], how["shift"])
    options = {"scale": how["scale"], "interval": (how["low"], 1.0), "grid": how.get("tokens")}
    options |= {"solver": solver.rstrip("234"), "order": int("".join(filter(str.isdigit, solver)) or 2)}
    start = time.process_time()
    for some in torch.arange(len(y)).split(AT_ONCE):
        noise = image_noise(seed, some.tolist(), size)  # (B, 3, H, W)
        images.append(generate(model, y[some], noise, times, **options))
    images, seconds = torch.cat(images), time.process_time() - start
    cache[name, seed] = images, features(images), seconds
    return cache[name, seed]


def draw_row(name, seed, cache, folder=None):
    """What is measured of a way of drawing: {measurement: value}. cache: of `draw_as`. folder: where its strip is left.

    errors: of each picture against the finest, root mean squares in steps of 1/255. against: {base: (difference,
    standard error)} of the emoji distance.
    """
    how, real = USUAL | DRAWN[name], real_features()
    images, seen, seconds = draw_as(name, seed, cache)
    patch = how["side"] // how["tokens"][0] if "tokens" in how else cache[how["model"]][0].config.patch_size
    found = {"cpu_seconds_per_picture": seconds / len(images), "evaluations": how["evaluations"]}
    found |= {"emoji_distance": emoji_distance(seen, real), "border_ratio": border_ratio(images, patch)}
    found |= {"real_border_ratio": border_ratio(real_emoji(how["side"]), patch), "pictures": len(images)}
    if "finest" in how:
        error = images.float() - draw_as(how["finest"], seed, cache)[0].float()  # (N, 3, H, W)
        found["errors"] = [round(e, 3) for e in error.square().flatten(1).mean(1).sqrt().tolist()]  # (N)
    found["against"] = {base: paired_bootstrap(seen, draw_as(base, seed, cache)[1], real) for base in bases_of(name)}
    if folder:
        show_strip(images, folder / strip_file(name))
    return found


def cost_row(name, repeats=3):
    """What one guided evaluation of one picture costs a model of COSTS, in fp32: {measurement: value}."""
    config = COSTS[name]
    model = PixNerd(config)
    x, y = torch.randn(1, 3, config.resolution, config.resolution), torch.zeros(1, dtype=torch.long)
    call = guided(model, x, y, "fp32", False)
    seconds = timings(call, CPU, repeats, time.process_time)
    return {
        "cpu_seconds_per_evaluation": statistics.median(seconds),
        "gflop_per_evaluation": 2 * forward_flops(config) / 1e9,
    }


# ---- what is kept ----------------------------------------------------------------------------------------------------


def machine():
    """The processor, and what computes on it."""
    name = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = lines[0].split(":")[1].strip() if lines else name
    capabilities = torch.backends.cpu.get_cpu_capability()
    return f"{name}, {capabilities}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"


def code_version():
    """The commit of the code, with -dirty where code was changed since, or "unknown"."""

    def git(*words):
        here = pathlib.Path(__file__).parent.parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=False)

    commit = git("rev-parse", "--short=10", "HEAD").stdout.strip()
    # The runs themselves, which are kept in docs/, are no change of the code.
    changed = git("diff", "--quiet", "HEAD", "--", ".", ":!docs").returncode
    return f"{commit}{'-dirty' if changed else ''}" if commit else "unknown"


class Runs:
    """The finished runs, a JSON line each, in `folder`/runs.jsonl. Several processes may add to one file."""

    def __init__(self, folder=EVIDENCE):
        self.path = pathlib.Path(folder) / "runs.jsonl"

    @property
    def records(self):
        """All of them, as the file has them now; blank lines are skipped. UserError at a damaged line."""
        found = []
        for number, line in enumerate(self.path.read_bytes().splitlines() if self.path.exists() else [], start=1):
            if line.strip():
                try:
                    record = json.loads(line)
                    record["row"], record["seed"], record["study"]
                except (ValueError, TypeError, KeyError):
                    raise UserError(f"{self.path}:{number}: not the line of a run: remove it, and the run is repeated")
                found.append(record)
        return found

    def find(self, name, seed, study):
        """The record of a finished run, or None."""
        return next((r for r in self.of(study) if (r["row"], r["seed"]) == (name, seed)), None)

    def of(self, study):
        """The records of a study."""
        return [record for record in self.records if record["study"] == dataclasses.asdict(study)]

    def add(self, record):
        """Appends it, unless another process has finished the same run meanwhile."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "ab+") as file:
            lock_or_wait(file)
            if not any(all(have[key] == record[key] for key in ("row", "seed", "study")) for have in self.records):
                file.seek(max(0, file.seek(0, os.SEEK_END) - 1))
                if file.read() not in (b"", b"\n"):  # lines that were appended by hand may lack the last one's end
                    file.write(b"\n")
                file.write(f"{json.dumps(record)}\n".encode())
                file.flush()
                os.fsync(file.fileno())


def rounded(value):
    """Floats, also in lists and dictionaries, to six digits that count."""
    if isinstance(value, (list, tuple)):
        return [rounded(each) for each in value]
    if isinstance(value, dict):
        return {key: rounded(each) for key, each in value.items()}
    return float(f"{value:.6g}") if isinstance(value, float) else value


def kind_of(name):
    """What a row does: "train", "draw" or "cost"."""
    return "train" if name in ROWS else "cost" if name in COSTS else "draw"


def measured(name, seed, study, cache, folder):
    """{measurement: value} of a row of any kind. cache: what runs of one start share."""
    if name in COSTS:
        return cost_row(name)
    if name in ROWS:
        resolution = config_of(name, study).resolution
        if resolution not in cache:
            cache[resolution] = training_and_held_out(resolution)
        return train_row(name, seed, study, cache[resolution], folder)
    model = (USUAL | DRAWN[name])["model"]
    if model not in cache:
        cache[model] = ask(model, study.sampler_pictures)
    return draw_row(name, seed, cache, folder if name in SIZES else None)


def run_row(name, seed, study, runs, cache):
    """Does a run that is not finished, and keeps its record."""
    if runs.find(name, seed, study):
        return
    begin, folder = time.time(), runs.path.parent
    folder.mkdir(parents=True, exist_ok=True)
    found = rounded(measured(name, seed, study, cache, folder))
    record = {"row": name, "seed": seed, "kind": kind_of(name), "study": dataclasses.asdict(study)} | found
    command = f'python -m experiments.ablations --rows "{name}" --seeds {seed}'
    record |= {"command": command, "machine": machine(), "code": code_version()}
    runs.add(record | {"wall_seconds": round(time.time() - begin, 1), "date": time.strftime("%Y-%m-%d")})
    shown = next(found[key] for key in ("loss", "emoji_distance", "cpu_seconds_per_evaluation") if key in found)
    print(f"{name}, seed {seed}: {shown:.4f}", flush=True)


def do(names, seeds, study, runs):
    """The runs of some rows, all of a seed before the next seed, so that what is done can be compared.

    Rows that draw have one seed, 0: their pictures give their error bars.
    """
    cache = {}
    for seed in dict.fromkeys([0, *seeds]):
        for name in names:
            if seed in seeds if name in ROWS else seed == 0:
                run_row(name, seed, study, runs, cache)


def listing(runs, study, seeds):
    """Each claim with the minutes of its stored runs, its rows, and of each row the seeds that are finished."""
    for key, claim in CLAIMS.items():
        print(f"{key}: {claim.title} ({minutes(claim, runs.of(study)):.0f} minutes stored)")
        for name in claim.rows():
            done = [seed for seed in dict.fromkeys(seeds) if runs.find(name, seed, study)]
            print(f"    {name}: seeds done {done or 'none'}")


def main():
    """The command line."""
    parser = argparse.ArgumentParser(
        description="Repeat the claims of the paper on a laptop. A run that is stored in docs/evidence/ counts as "
        "done; --out runs/mine repeats it. --list says how many minutes each claim took."
    )
    parser.add_argument("--list", action="store_true", help="what there is, how long it took, and what is done")
    parser.add_argument("--claim", nargs="+", choices=CLAIMS, default=[], help="do these")
    parser.add_argument(
        "--rows", nargs="+", choices=[*ROWS, *DRAWN, *COSTS], metavar="ROW", default=[], help="do these runs"
    )
    parser.add_argument("--all", action="store_true", help="do everything")
    parser.add_argument("--page", action="store_true", help="write the page and its plots from what is stored")
    parser.add_argument("--split", action="store_true", help="write experiments/held_out.txt again")
    parser.add_argument("--seeds", nargs="+", type=SEED, default=[0, 1, 2], help="of rows that train (default: 0 1 2)")
    parser.add_argument(
        "--out", default=PAGE.parent, help="folder of evidence.md and evidence/ with the runs (default: docs)"
    )
    args = parser.parse_args()
    runs, study = Runs(pathlib.Path(args.out) / "evidence"), Study()
    if min(args.seeds) < 0:
        raise UserError(f"--seeds {min(args.seeds)}: seeds are 0 or more")
    if args.list:
        return listing(runs, study, args.seeds)
    if args.split:
        return write_split()
    if not (args.claim or args.rows or args.all or args.page):
        parser.error("say what to do: --all, --claim, --rows, --page or --list")
    claims = list(CLAIMS) if args.all else args.claim
    names = args.rows + [name for key in claims for name in CLAIMS[key].rows()]
    do(dict.fromkeys(names), args.seeds, study, runs)
    real = border_ratio(real_emoji())
    plots = importlib.util.find_spec("matplotlib") is not None
    if plots:
        write_plots(CLAIMS, runs.of(study), runs.path.parent)
    write_page(CLAIMS, runs.of(study), study, NOT_HERE, args.out, real)
    left = "" if plots else "; the plots are as before, for want of matplotlib: pip install -r requirements-plots.txt"
    print(f"wrote {pathlib.Path(args.out) / PAGE.name}{left}")


if __name__ == "__main__":
    run(main)
