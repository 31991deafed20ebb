"""How fast is it, against the fastest that this machine multiplies matrices? Each figure as a share of that rate.

    python -m experiments.benchmark                  # training step of a Nano in the shape that others use: a minute
    python -m experiments.benchmark --only L-forward XL-forward guided L-train image memory cost
    python -m experiments.benchmark --only text-Nano-train text-Nano-forward XXL-forward XXL-train   # of sentences
    python -m experiments.benchmark --only loader metrics                # of data and evaluation
    python -m experiments.benchmark --only page       # from a click on the page to the first picture; needs gradio

The yardstick is the best rate of a 4096^3 matrix product in the same run, since machines drift; FLOPs are those of
runtime/flops.py, matrix products only. Each model is measured in a process of its own, so that its peak memory is seen.
"eager" is plain PyTorch, "compiled" has model.compile_blocks(). Forward passes have their weights frozen, as in
sample.py, where a line does not say otherwise. A model whose weights alone exceed the free memory is named and left
out: a training step of XXL holds them five times over, 23.4 GB. Text features are given, not computed by Qwen3.
"""

import argparse
import concurrent.futures
import copy
import dataclasses
import functools
import itertools
import json
import multiprocessing
import os
import pathlib
import random
import re
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request

import torch
from PIL import Image

from data import TrainingSamples, center_crop, open_dataset, random_stream
from eval_fid import frechet_distance, precision_recall
from flow import flow_matching_loss
from model import PRESETS, PixNerdConfig
from runtime.checkpoint import build_model
from runtime.distributed import Processes
from runtime.files import UserError, run
from runtime.flops import forward_flops
from runtime.gauges import Gauges
from runtime.machine import autocast, available_memory, freeze, keep_memory, pick_device, will_compile
from runtime.optimizers import make_optimizers
from runtime.recompute import RECOMPUTE
from samplers import guide
from text_model import PRESETS as TEXT_PRESETS
from text_model import TextPixNerdConfig
from train import Student, update

# The shape in which other implementations state their speed: 47 GFLOP a step at batch 64.
WIDE_NANO = PixNerdConfig(
    num_classes=9, resolution=32, patch_size=8, hidden_size=256, num_heads=4, depth=6, field_depth=2, field_width=32
)
L, XL, XXL, TEXT_NANO = PRESETS["L"], PRESETS["XL"], TEXT_PRESETS["XXL"], TEXT_PRESETS["Nano"]
XXL_512 = dataclasses.replace(XXL, resolution=512)

# ---- time and memory -------------------------------------------------------------------------------------------------


def timings(function, device="cpu", repeats=5, clock=time.perf_counter):
    """Seconds of each of `repeats` calls of function(), after one that does not count: it compiles."""
    wait, seconds = torch.cuda.synchronize if torch.device(device).type == "cuda" else int, []
    for _ in range(1 + repeats):
        wait()
        start = clock()
        function()
        wait()
        seconds.append(clock() - start)
    return seconds[1:]


def matmul_rate(dtype, device, size=4096):
    """Best FLOP/s of a size^3 matrix product in `dtype`: the limit that speeds here are shares of."""
    rate = 0.0
    for n in (size // 8, size):
        if rate and 2 * n**3 / rate > 10:  # seconds: a CPU without instructions for bf16 would be at it for an hour
            break
        a = torch.randn(n, n, device=device).to(dtype)
        rate = 2 * n**3 / min(timings(functools.partial(torch.mm, a, a), device))
    return rate


def peak_memory(device):
    """The most GB at once since the last call, of the GPU's memory or of this process's (Linux only)."""
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    else:
        peak = 1024 * int(re.search(r"VmHWM:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1])
        pathlib.Path("/proc/self/clear_refs").write_text("5")  # resets it
    return peak / 1e9


def in_new_process(function, *args):
    """function(*args) in a process that has held nothing before. UserError where it does not come back."""
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *args).result()
    except concurrent.futures.BrokenExecutor:
        raise UserError(f"the process for {function.__name__} died: more memory is needed than is free")


# ---- models ----------------------------------------------------------------------------------------------------------


def training(model, x, y, precision, compiled, recompute="none"):
    """A function that trains once: forward, backward, and train.update with AdamW."""
    model.call = RECOMPUTE[recompute]
    t, student, gauges = torch.rand(len(x), device=x.device), Student(model), Gauges(Processes(), x.device)
    ema, optimizers = copy.deepcopy(model).requires_grad_(False), make_optimizers(student, "adamw", 1e-4)

    def step():
        with autocast(x.device, precision):
            loss = flow_matching_loss(model(x, t, y), x, torch.ones_like(x))
        loss.backward()
        update(student, ema, optimizers, gauges, 1, 1e-4, 0.999)

    return step


def sampling(model, x, y, precision, compiled, scale=1.0, frozen=True, together=True):
    """A function that asks for velocities in the middle of the path: a pass, or two with guidance by `scale`.

    frozen: as sample.py does. together: the two passes are one batch.
    """
    if frozen:
        freeze(model.eval(), precision, pack=not compiled)
    velocity, t = guide(model, y, scale), torch.tensor(0.5, device=x.device)
    if not together:
        v_y, v_null = guide(model, y, 1.0), guide(model, model.null(y), 1.0)
        velocity = lambda x, t: torch.lerp(v_null(x, t), v_y(x, t), scale)

    @torch.inference_mode()
    def call():
        with autocast(x.device, precision):
            velocity(x, t)

    return call


def measure(config, prepare, batch, precision, compiled, device):
    """(median seconds, peak GB) of the function that prepare(...) makes for a model of either kind."""
    keep_memory()  # as train.py and sample.py do
    torch.manual_seed(0)
    text = isinstance(config, TextPixNerdConfig)
    model = build_model(config).to(device)
    x = torch.randn(batch, 3, config.resolution, config.resolution, device=device)
    shape = (batch, config.text_length, config.text_width) if text else (batch,)
    y = torch.zeros(shape, dtype=torch.float32 if text else torch.long, device=device)
    if compiled:
        model.compile_blocks()
    function = prepare(model, x, y, precision, compiled)
    function()
    peak_memory(device)  # forgets what was needed to prepare
    return statistics.median(timings(function, device)), peak_memory(device)


def check_weights_fit(config, passes, device):
    """UserError where the weights alone do not fit.

    Training (3 passes) holds them five times: with gradients, the optimizer's two averages, and EMA.
    """
    with torch.device("meta"):
        need = 4 * sum(p.numel() for p in build_model(config).parameters()) * (5 if passes == 3 else 1)
    free = available_memory(device)
    if free is not None and need > free:
        raise UserError(f"its weights need {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free")


guided = functools.partial(sampling, scale=3.5)
unfrozen = functools.partial(guided, frozen=False)
two_passes = functools.partial(unfrozen, together=False)
FORWARD, TRAIN = (sampling, 1), (training, 3)  # and how many forward passes that is worth
# The lines of each figure: a name, the model, the batch, and what is measured.
MODELS = {
    "Nano-train": [("training step Nano (6+2 blocks of 256)", WIDE_NANO, 64, *TRAIN)],
    "Nano-forward": [("forward Nano (6+2 blocks of 256)", WIDE_NANO, batch, *FORWARD) for batch in (1, 2)],
    "L-forward": [("forward L/16 at 256", L, batch, *FORWARD) for batch in (1, 2)],
    "XL-forward": [("forward XL/16 at 256", XL, batch, *FORWARD) for batch in (1, 2)],
    "guided": [("guided step XL/16 at 256", XL, 1, guided, 2)],
    "image": [("two passes, not frozen", XL, 1, two_passes, 2), ("one batch, not frozen", XL, 1, unfrozen, 2)],
    "text-Nano-train": [("training step text Nano at 32", TEXT_NANO, 96, *TRAIN)],
    "text-Nano-forward": [("forward text Nano at 32", TEXT_NANO, batch, *FORWARD) for batch in (1, 2)],
    "XXL-forward": [(f"forward XXL/16 at {config.resolution}", config, 1, *FORWARD) for config in (XXL, XXL_512)],
    "XXL-train": [("training step XXL/16 at 256", XXL, 1, *TRAIN)],
    "L-train": [("training step L/16 at 256", L, 2, *TRAIN)],
    "memory": [("--recompute " + how, L, 2, functools.partial(training, recompute=how), 3) for how in RECOMPUTE],
    "cost": [(f"L/16 at {n}", dataclasses.replace(L, resolution=n), 1, *FORWARD) for n in (256, 384, 512, 1024)],
}


# ---- data and evaluation ---------------------------------------------------------------------------------------------


def noise_jpegs(folder, count):
    """Makes a folder of `count` JPEGs of 500x375 pixels. Returns their paths."""
    os.mkdir(folder)
    paths = [f"{folder}/{i}.jpg" for i in range(count)]
    for path in paths:  # noise of this strength takes about the 110 kB of ImageNet's pictures
        channels = [Image.effect_noise((500, 375), 80) for _ in range(3)]
        Image.merge("RGB", channels).save(path, quality=75)
    return paths


def loader(count=32):
    """What one core loads: 500x375 JPEGs to training samples at 256, by parts; clocked in this process alone."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        paths = noise_jpegs(f"{root}/noise", count)
        samples = TrainingSamples(open_dataset(root, 256), seed=0)
        pictures = [Image.open(path).convert("RGB") for path in paths]
        parts = {
            "all": lambda i: samples[i],
            "decoding": lambda i: Image.open(paths[i]).load(),
            "ADM's crop": lambda i: center_crop(pictures[i], 256),
            "noise": lambda i: torch.randn(3, 256, 256, generator=random_stream("noise", i)),
        }
        for name, part in parts.items():
            seconds = min(timings(lambda part=part: [part(i) for i in range(count)], clock=time.process_time)) / count
            print(f"loader, one core, {name:10}: {1e3 * seconds:6.2f} ms an image, {1 / seconds:4.0f} images/s")


def metrics(device, count=10_000, width=2048):
    """Precision and recall of `count` against `count` features, and FID from their statistics, all in float64."""
    real, drawn = (torch.rand(count, width, device=device) for _ in range(2))  # (count, width) each
    moments = real.mean(0), real.T.cov(), drawn.mean(0), drawn.T.cov()
    (balls,) = timings(lambda: precision_recall(real, drawn), device, 1)
    (fid,) = timings(lambda: frechet_distance(*moments), device, 1)
    print(f"precision and recall of {count} and {count}: {balls:.1f} s; FID from their moments: {fid:.1f} s")


# ---- the page --------------------------------------------------------------------------------------------------------


def page(device, clicks=5):
    """Seconds from a click on "Draw" until the first picture has arrived: app.py as it opens, asked by HTTP.

    UserError with app.py's own line where it does not start.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flags = ["--port", str(port), "--device", str(device)]
    with tempfile.TemporaryFile("w+") as complaint:
        command = [sys.executable, str(pathlib.Path(__file__).parent.parent / "app.py"), *flags]
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=complaint, text=True)
        try:
            start = time.perf_counter()
            if not any("The page is at" in line for line in server.stdout):
                server.wait()
                complaint.seek(0)
                raise UserError((complaint.read().strip().splitlines() or ["app.py ended without a word"])[-1])
            print(f"page: served after {time.perf_counter() - start:.1f} s", flush=True)
            seconds, what = zip(*[click(f"http://127.0.0.1:{port}") for _ in range(clicks)])
        finally:
            server.terminate()
            server.wait()
    spread = f"{min(seconds):.1f} to {max(seconds):.1f}, the first one {seconds[0]:.1f}"
    print(f"page: {what[0]}: first picture {statistics.median(seconds):.1f} s after the click ({spread})")


def click(address):
    """Presses "Draw" on the page at an address as a browser does: (seconds until a picture is here, what was asked)."""
    browser = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a proxy does not know this machine
    config = json.load(browser.open(f"{address}/config"))
    parts = {part["id"]: part["props"] for part in config["components"]}
    button = next(i for i, part in parts.items() if part.get("elem_id") == "draw")
    first = next(job["id"] for job in config["dependencies"] if [button, "click"] in job["targets"])
    job = next(job for job in config["dependencies"] if job["trigger_after"] == first)  # after its "Waiting ..."
    values = {parts[i]["elem_id"]: parts[i].get("value") for i in job["inputs"]}  # as they first stand
    session = f"{random.getrandbits(64):x}"
    asked = {"data": [*values.values()], "fn_index": job["id"], "session_hash": session, "trigger_id": button}
    start, kind = time.perf_counter(), {"Content-Type": "application/json"}
    browser.open(urllib.request.Request(f"{address}/gradio_api/queue/join", json.dumps(asked).encode(), kind)).read()
    for line in browser.open(f"{address}/gradio_api/queue/data?session_hash={session}"):
        if picture := re.search(rb'"path": ?"([^"]+/0000[^"]+[.]png)"', line):
            browser.open(f"{address}/gradio_api/file={urllib.parse.quote(picture[1].decode())}").read()
            what = f"{values['num']} pictures, {values['steps']} steps of {values['solver']}, {values['ckpt']}"
            return time.perf_counter() - start, what
    raise UserError(f"the page at {address} drew nothing: its terminal may say why")


def main():
    """Measures the figures that were asked for."""
    parser = argparse.ArgumentParser(description="Speeds as shares of this machine's matrix-multiply rate.")
    figures = [*MODELS, "loader", "metrics", "page"]
    parser.add_argument("--only", nargs="+", choices=figures, default=["Nano-train"], metavar="FIGURE")
    parser.add_argument("--precision", choices=["fp32", "bf16"], help="default: both")
    parser.add_argument("--compile", choices=["auto", "off"], default="auto", help="auto: measured compiled, too")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    if args.only == ["page"]:
        return page(device)
    precisions = [args.precision] if args.precision else ["fp32", "bf16"]
    compilers = [False, True] if will_compile(args.compile, device) else [False]
    rates = [matmul_rate(dtype, device) for dtype in (torch.float32, torch.bfloat16)]
    print(f"{torch.get_num_threads()} threads on {device.type}: 4096^3 product ", end="")
    print("{:.4g} GFLOP/s in fp32, {:.4g} in bf16".format(*(rate / 1e9 for rate in rates)))
    print(f"{'what':64} {'seconds':>8} {'GFLOP':>8} {'GFLOP/s':>8} {'of fp32':>8} {'of bf16':>8}  peak GB")
    for figure in args.only:
        if figure == "loader":
            in_new_process(loader)
        if figure == "metrics":
            metrics(device)
        if figure == "page":
            page(device)
        rows = itertools.product(precisions, compilers, MODELS.get(figure, []))
        for precision, compiled, (name, config, batch, prepare, passes) in rows:
            what = f"{name}, batch {batch}, {precision} {'compiled' if compiled else 'eager'}"
            try:
                check_weights_fit(config, passes, device)
                seconds, peak = in_new_process(measure, config, prepare, batch, precision, compiled, device)
            except UserError as error:
                print(f"{what:64} not measured: {error}", flush=True)
                continue
            flops = passes * batch * forward_flops(config)
            shares = " ".join(f"{flops / seconds / rate:8.2f}" for rate in rates)
            speed = f"{seconds:8.3f} {flops / 1e9:8.1f} {flops / seconds / 1e9:8.1f}"
            print(f"{what:64} {speed} {shares} {peak:8.2f}", flush=True)


if __name__ == "__main__":
    run(main)
