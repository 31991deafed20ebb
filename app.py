"""The same as sample.py, as a web page: draw pictures, watch one form, look inside its patches (sections 3.2 and 4.5).

    make page                                       # set up, open the page on the models of this repository
    python app.py --ckpt runs/x/last.pt,xl          # offers these too; released ones are downloaded once
    python app.py --ckpt runs/x/last.pt --baseline runs/linear/last.pt    # beside a model with a linear decoder

One job at a time; others wait in a short queue. The page is served to this machine alone (--host), and asks no other.
Left out: accounts, and whatever else a page on the internet needs.
"""

import argparse
import contextlib
import os
import signal
import tempfile

import torch

from data import to_uint8
from runtime.asked import Served, controls_of, read
from runtime.controls import a_number
from runtime.files import UserError, run
from runtime.inside import DENSITIES, Inside, comparable, recorded_tokens, replayed_tokens
from runtime.jobs import in_step
from runtime.machine import keep_memory, pick_device
from runtime.models import SHIPPED_FILES, find_model
from runtime.options import POSITIVE, number
from runtime.page import build, check_address, serve
from runtime.pictures import film_frame, picture_grid, save_film, save_picture, save_singles
from sample import draw, settings_of
from samplers import generate, image_noise

PORT = number(int, lambda value: 1 <= value <= 65_535, "a port, 1 to 65,535")

# ---- jobs: what they send is {part of the page: its new value} -------------------------------------------------------


def settings(asked):
    """What the files of a job say of their pictures, as sample.py's do."""
    return settings_of(asked.flags, asked.served.hash, asked.served.device, asked.size)


def draw_by(solver, asked, watch):
    """The pictures that are asked for, by one solver: uint8 (N, 3, H, W). watch: of `generate`."""
    model, flags = asked.served.model, asked.flags
    how = asked.how | {"solver": solver, "watch": watch, "seed": flags["seed"], "temperature": flags["temperature"]}
    return draw(model, asked.y, range(len(asked.y)), asked.size, **how)


def how_far(asked, solvers, step, t):
    """The status of a job after a step."""
    return {"status": f"{', '.join(solvers)}: step {step} of {asked.flags['steps']}, time {float(t):.2f}"}


def draw_job(send, folder, asked):
    """Pictures, each in a file of its own and all in one."""
    solvers = asked.solvers[:1]
    images = draw_by(*solvers, asked, lambda step, t, *_: send(how_far(asked, solvers, step, t), needed=False))
    save_singles(folder / "singles", images, [asked.title] * len(images), settings(asked))
    save_picture(folder / "pixnerd.png", picture_grid(images), settings(asked))
    files = [(str(file), f"{asked.title} {i}") for i, file in enumerate(sorted((folder / "singles").iterdir()))]
    sheet = {"value": str(folder / "pixnerd.png"), "interactive": True}
    send({"gallery": files, "sheet": sheet, "command": asked.command})


def watch_job(send, folder, asked):
    """A film of every step, by one solver or by several from the same noise, which take each step in turn."""

    def by(solver):
        def job(tell):
            draw_by(solver, asked, lambda step, t, x_t, x: tell((step, t, torch.stack([to_uint8(x_t), to_uint8(x)]))))

        return job

    frames, labels = [], []
    with contextlib.closing(in_step([by(solver) for solver in asked.solvers])) as steps:
        for told in steps:  # (step, time, uint8 (2, N, 3, H, W)) of each solver
            frames.append(film_frame([pair.cpu() for _, _, pair in told], asked.solvers))
            labels.append("Step {}, time {:.2f}".format(*told[0][:2]))
            send(how_far(asked, asked.solvers, *told[0][:2]) | {"frame": frames[-1]}, needed=False)
    save_film(folder / "film.gif", frames, settings=settings(asked))
    last = len(frames) - 1
    moment = {"value": last, "maximum": last, "interactive": True, "label": labels[-1]}
    watched = [*zip(labels, frames)]
    send({"film": str(folder / "film.gif"), "moment": moment, "watched": watched, "frame": frames[-1]})


def look_job(send, asked, baseline, number):
    """One picture, then the same one with its fields asked for more pixels, and by a linear decoder if there is one."""
    number = a_number("picture", number, 0, asked.flags["num"] - 1)
    model, solver, flags = asked.served.model, asked.solvers[0], asked.flags
    if model.config.decoder == "linear" or solver == "euler-maruyama":
        raise UserError("only a neural field can be looked into, and only with a --solver that adds no noise")
    noise = flags["temperature"] * image_noise(flags["seed"], [number], asked.size).to(asked.y.device)  # (1, 3, H, W)
    states, pictures = [], []

    def paint(model, noise, keep=False, **how):
        def told(step, t, x_t, x):
            if keep:
                states.append((t, x_t))
            send({"status": f"{noise.shape[-2]}x{noise.shape[-1]} pixels: step {step}"}, needed=False)

        images = generate(model, asked.y, noise, solver=solver, watch=told, **asked.how | how)  # (1, 3, H, W)
        pictures.append(images[0].cpu())

    with recorded_tokens(model) as tokens:
        paint(model, noise, keep=True)
    for factor in DENSITIES[1:]:
        with replayed_tokens(model, tokens):
            paint(model, noise.repeat_interleave(factor, -1).repeat_interleave(factor, -2), grid=asked.grid)
    if baseline is not None and comparable(baseline.config, model.config) and asked.how["grid"] is None:
        paint(baseline, noise)
    how = {"grid": asked.how["grid"]} if asked.how["grid"] else {}
    looked = Inside(model, asked.y, asked.grid, how, asked.served.precision, states, pictures)
    step, row, column = flags["steps"] // 2, asked.grid[0] // 2, asked.grid[1] // 2
    send(looked.patch(row, column, step) | {"looked": looked, "row": row, "column": column, "time": step})


def jobs_of(models, limit, baseline=None):
    """What the buttons start, as `page.build` takes it: functions of (send, folder, *values of the controls)."""

    def asked(send, values, **what):
        job = read(models, values, limit, **what)
        send({"status": f"This takes about {job.seconds:.0f} s."})
        return job

    return {
        "draw": lambda send, folder, *values: draw_job(send, folder, asked(send, values)),
        "watch": lambda send, folder, *values: watch_job(send, folder, asked(send, values, film=True)),
        "look": lambda send, _, *values: look_job(send, asked(send, values[:-1], inside=True), baseline, values[-1]),
    }


def main():
    """Reads the flags, loads the models, and serves the page until it is stopped."""
    parser = argparse.ArgumentParser(description="PixNerd as a web page.")
    add = parser.add_argument
    add("--ckpt", default="", help="more models: files, xl, xl-512, xxl; several with commas")
    add("--text-encoder", help="folder of a text model's Qwen3, if it is not to be downloaded")
    add("--baseline", help="a checkpoint with a linear decoder, drawn beside the patches of a field")
    add("--limit", type=POSITIVE, default=600.0, help="seconds that a job may take, as estimated (default: 600)")
    add("--device", default="auto", help="auto, cuda, mps or cpu")
    add("--host", default="127.0.0.1", help="address to serve at (default: 127.0.0.1, this machine alone)")
    add("--port", type=PORT, default=7860)
    add("--open", action="store_true", help="open the page in the browser")
    args = parser.parse_args()
    check_address(args.host, args.port)  # before the models are loaded, which may take minutes
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that temporary files are removed
    device = pick_device(args.device)
    shipped = [name for name, (path, _) in SHIPPED_FILES.items() if path.exists()]
    given = [name for name in reversed(args.ckpt.split(",")) if name]  # the user's last comes first
    models = {}
    for name in dict.fromkeys([*given, *shipped]):
        print(f"Loading {name} ...", flush=True)
        models[name] = Served(name, args.text_encoder, device)
    if not models:
        raise UserError("there is no model in assets/: name one with --ckpt")
    baseline = find_model(args.baseline).to(device) if args.baseline else None
    if baseline is not None and baseline.config.decoder != "linear":
        raise UserError(f"--baseline {args.baseline} has no linear decoder: train one by train.py --decoder linear")

    keep_memory()  # only now: what was freed while the weights were sorted would be kept, as much as they take
    for served in models.values():
        served.measure()

    jobs = jobs_of(models, args.limit, baseline)
    with tempfile.TemporaryDirectory() as folder:
        os.environ["GRADIO_TEMP_DIR"], tempfile.tempdir = f"{folder}/served", folder
        serve(build(list(models), jobs, lambda name: controls_of(models[name])), args.host, args.port, args.open)


if __name__ == "__main__":
    run(main)
