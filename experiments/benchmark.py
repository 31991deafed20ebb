"""How fast is it, against the fastest that this machine multiplies matrices? Each figure as a share of that rate.

    python -m experiments.benchmark                  # training step of a Nano in the shape that others use: a minute
    python -m experiments.benchmark --only L-forward XL-forward guided L-train image memory cost
    python -m experiments.benchmark --only loader metrics                # of data and evaluation

The yardstick is the best rate of a 4096^3 matrix product in the same run, since machines drift; FLOPs are those of
runtime/flops.py, matrix products only. "eager" is plain PyTorch, "compiled" has model.compile_blocks(). A forward pass
in bf16 has its weights frozen, as in sample.py; the figure "image" shows what that and the rest bring, one by one.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import statistics
import tempfile
import time

import torch
from PIL import Image

from data import center_crop, open_dataset, random_stream
from eval_fid import frechet_distance, precision_recall
from flow import flow_matching_loss
from model import PRESETS, PixNerd, PixNerdConfig
from runtime.files import UserError, run
from runtime.flops import forward_flops
from runtime.loader import BatchNumbers, training_batches
from runtime.machine import autocast, compiler_trouble, freeze, keep_memory, pick_device, pick_precision
from runtime.recompute import RECOMPUTE
from samplers import guide, time_grid

CPU = torch.device("cpu")
# The shape in which other implementations state their speed: 47 GFLOP a step at batch 64.
NANO_REFERENCE = PixNerdConfig(
    num_classes=9, resolution=32, patch_size=8, hidden_size=256, num_heads=4, depth=6, field_depth=2, field_width=32
)

# ---- seconds, and what takes them ------------------------------------------------------------------------------------


def timings(function, device, repeats):
    """Seconds of each of `repeats` calls of function(); a GPU is waited for."""
    wait, seconds = torch.cuda.synchronize if torch.device(device).type == "cuda" else int, []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        function()
        wait()
        seconds.append(time.perf_counter() - start)
    return seconds


def typical(function, device, repeats=7):
    """Median seconds of function(), after one call that does not count, two where there are many."""
    warm = 1 if repeats < 7 else 2
    return statistics.median(timings(function, device, warm + repeats)[warm:])


def matmul_rate(dtype, device="cpu", size=4096):
    """Best FLOP/s of a size^3 matrix product in `dtype`: the limit that speeds here are shares of."""
    rate = 0.0
    for n in (size // 8, size):
        if rate and 2 * n**3 / rate > 10:  # seconds: a CPU without instructions for bf16 would be at it for an hour
            break
        a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
        rate = 2 * n**3 / min(timings(lambda: a @ b, device, 6))
    return rate


def make_model(config, device, compiled=False):
    """A model whose weights do not matter, compiled or not."""
    torch.compiler.reset()
    torch.manual_seed(0)
    model = PixNerd(config).to(device)
    if compiled:
        model.compile_blocks()
    return model


def inputs(config, batch, device, side=None):
    """Noisy images of side x side pixels (as trained, if left out), times and classes."""
    x = torch.randn(batch, 3, side or config.resolution, side or config.resolution, device=device)
    return x, torch.rand(batch, device=device), torch.zeros(batch, dtype=torch.long, device=device)


def training_step(model, batch, precision, device, add_up=False):
    """A function that trains the model once: forward, backward, norm of the gradient, AdamW, EMA.

    add_up: gradients stay, as over micro-batches, so that memory before and after a step is the same.
    """
    parameters = list(model.parameters())
    ema = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
    x, t, y = inputs(model.config, batch, device)

    def step():
        with autocast(device, precision):
            loss = flow_matching_loss(model(x, t, y), x, torch.ones_like(x))
        loss.backward()
        torch.nn.utils.get_total_norm([p.grad for p in parameters])
        optimizer.step()
        if not add_up:
            optimizer.zero_grad()
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1e-3)

    return step


def forward_call(model, batch, precision, device, guided=False):
    """A function that asks the model for velocities: plainly, or guided in the middle of the path."""
    x, t, y = inputs(model.config, batch, device)
    velocity = guide(model, y, 3.5) if guided else lambda x, _: model(x, t, y)

    def call():
        with autocast(device, precision):
            return velocity(x, torch.tensor(0.5))

    return call


class Bench:
    """The machine's two rates, and the figures that are printed as shares of them."""

    def __init__(self, device, precisions, compile_too):
        self.device, self.precisions, self.compile_too = device, precisions, compile_too
        self.rates = {"fp32": matmul_rate(torch.float32, device), "bf16": matmul_rate(torch.bfloat16, device)}
        fp32, bf16 = (f"{rate / 1e9:.4g}" for rate in self.rates.values())
        threads = torch.get_num_threads()
        print(f"{threads} threads on {device.type}: 4096^3 product {fp32} GFLOP/s in fp32, {bf16} in bf16")
        print(f"{'what':56} {'seconds':>8} {'GFLOP':>8} {'GFLOP/s':>8} {'of fp32':>8} {'of bf16':>8}")

    def report(self, name, seconds, flops, note=""):
        """One line: seconds, GFLOP, GFLOP/s, shares of the two rates, and what else there is to say."""
        speed = flops / seconds
        shares = " ".join(f"{speed / rate:8.2f}" for rate in self.rates.values())
        print(f"{name:56} {seconds:8.3f} {flops / 1e9:8.1f} {speed / 1e9:8.1f} {shares}{note}", flush=True)

    def ways(self):
        """(its name, precision, compiled?) of each way to measure."""
        compiling = {"eager": False} | ({"compiled": True} if self.compile_too else {})
        return [(f"{p} {how}", p, compiled) for p in self.precisions for how, compiled in compiling.items()]

    def training(self, name, config, batch, repeats=7):
        """A training step."""
        for how, precision, compiled in self.ways():
            step = training_step(make_model(config, self.device, compiled), batch, precision, self.device)
            seconds = typical(step, self.device, repeats)
            self.report(f"{name}, batch {batch}, {how}", seconds, 3 * batch * forward_flops(config))
            del step  # and the model with it, before the next one is made

    @torch.inference_mode()
    def forward(self, name, config, batches=(1, 2), repeats=3, guided=False):
        """A forward pass, or one guided step (which is two of them)."""
        for how, precision, compiled in self.ways():
            model = make_model(config, self.device, compiled).eval()
            freeze(model, precision, pack=not compiled)
            for batch in batches:
                call = forward_call(model, batch, precision, self.device, guided)
                flops = (2 if guided else 1) * batch * forward_flops(config)
                self.report(f"{name}, batch {batch}, {how}", typical(call, self.device, repeats), flops)
            del model, call  # before the next model is made

    def image(self, config=PRESETS["XL"], steps=50, scale=3.5):
        """A guided image, from a plain transcription of the paper to the defaults of sample.py, one change a line.

        Measured over 4 of the steps, two of each kind (guided or not), and multiplied by how many of each there are.
        """
        times = time_grid(steps)[:-1]  # (steps)
        low, high = torch.tensor([0.1, 1.0])
        guided = int(((times > low) & (times < high)).sum())
        print(f"an image of {steps} Euler steps, {guided} of them guided by (0.1, 1.0): measured over 4 steps")
        for precision in self.precisions:
            in_new_process(self.draw, config, steps, guided, scale, precision)

    @torch.inference_mode()
    def draw(self, config, steps, guided, scale, precision):
        """One precision of `image`, in a process of its own: what `keep_memory` changes cannot be changed back."""
        model = make_model(config, self.device).eval()
        x, t, y = inputs(config, 1, self.device)
        whole = None  # seconds of the plain way

        def two_passes(x, t):
            v_null, v_y = model(x, t.expand(1), model.null(y)), model(x, t.expand(1), y)
            return v_null + scale * (v_y - v_null)

        def measure(name, velocity, evaluations):
            nonlocal whole

            def step(t):
                with autocast(self.device, precision):
                    return x + velocity(x, torch.tensor(t, device=self.device)) / steps

            early, late = (typical(lambda: step(t), self.device, 2) for t in (0.0, 0.5))
            seconds = (steps - guided) * early + guided * late
            note = f"  {seconds / whole:.2f} of plain" if whole else ""
            whole = whole or seconds
            self.report(f"an image, {precision}, {name}", seconds, evaluations * forward_flops(config), note)

        measure("plain: two passes each step", two_passes, 2 * steps)
        measure("+ both halves in a batch", guide(model, y, scale, (-1.0, 1.0)), 2 * steps)
        measure("+ guided in the interval", guide(model, y, scale), steps + guided)
        keep_memory()
        measure("+ freed memory kept", guide(model, y, scale), steps + guided)
        if self.compile_too:
            freeze(model, precision, pack=False)
            model.compile_blocks()
            measure("+ weights cast, compiled", guide(model, y, scale), steps + guided)
            del model
            model = make_model(config, self.device).eval()
        freeze(model, precision)
        measure("+ weights cast, packed", guide(model, y, scale), steps + guided)

    def memory(self, config=PRESETS["L"], batch=2):
        """Peak memory and seconds of a training step by --recompute, and the change from "none"."""
        for how, precision, compiled in self.ways():
            seconds, plain = in_new_process(train_in_turns, config, batch, precision, compiled), None
            for recompute in RECOMPUTE:
                peak, of_step = in_new_process(train_and_look, config, batch, recompute, precision, compiled)
                found = {"whole, GB": peak, "of the step, GB": of_step, "time, s": seconds[recompute]}
                plain = plain or found
                parts = [f"{name} {value:.2f} ({value / plain[name] - 1:+.0%})" for name, value in found.items()]
                print(f"training step {how}, batch {batch}, --recompute {recompute:5}: {'; '.join(parts)}", flush=True)

    def cost(self, config=PRESETS["L"], sides=(256, 384, 512, 1024)):
        """How time and memory of a forward pass grow with the picture, as sample.py runs it, each in a new process."""
        precision = self.precisions[-1]
        for side in sides:
            seconds, peak = in_new_process(forward_and_look, config, side, precision)
            flops, note = forward_flops(config, side, side), f"  peak of the process {peak:.2f} GB"
            self.report(f"forward at {side}, {precision} eager", seconds, flops, note)


# ---- processes of their own, for memory ------------------------------------------------------------------------------


def in_new_process(function, *args):
    """function(*args) in a process that has held nothing before. UserError where it does not come back."""
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *args).result()
    except concurrent.futures.BrokenExecutor:
        raise UserError(f"the process for {function.__name__} died: more memory is needed than is free")


def peak_memory(reset=False):
    """The most memory that this process has had at once, in GB: Python, PyTorch, code, weights, all of it.

    reset=True forgets the past: the peak counts from now on. UserError without Linux's /proc.
    """
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 / 1e9 for line in file if line.startswith("VmHWM"))
    except OSError as error:
        raise UserError(f"memory is measured by Linux's /proc, which cannot be used here ({error})")


def train_and_look(config, batch, recompute, precision, compiled):
    """Peak memory of a training step on the CPU in GB: (of the whole process, above what is held before and after).

    Held are PyTorch, weights, gradients, AdamW's two moments, EMA. Freed memory goes back to the system at once, so
    that what is counted is what is in use.
    """
    keep_memory(False)
    model = make_model(config, CPU, compiled)
    model.call = RECOMPUTE[recompute]
    step = training_step(model, batch, precision, CPU, add_up=True)
    step()  # compiles; from now on gradients and moments are there
    peak_memory(reset=True)
    held = peak_memory()
    step()
    return peak_memory(), peak_memory() - held


def train_in_turns(config, batch, precision, compiled, rounds=6):
    """{recompute: median seconds of a training step on the CPU}, taken in turns, since the speed of machines drifts."""
    keep_memory()
    torch._dynamo.config.automatic_dynamic_shapes = False  # all and an eighth of the patches: compiled for each
    model = make_model(config, CPU, compiled)
    step, seconds = training_step(model, batch, precision, CPU, add_up=True), {name: [] for name in RECOMPUTE}
    for _ in range(rounds + 1):
        for recompute in RECOMPUTE:
            model.call = RECOMPUTE[recompute]
            seconds[recompute] += timings(step, CPU, 1)
    return {recompute: statistics.median(values[1:]) for recompute, values in seconds.items()}  # the first compiles


@torch.inference_mode()
def forward_and_look(config, side, precision):
    """(best seconds, peak in GB) of a forward pass of one image of side x side pixels on the CPU."""
    keep_memory()
    model = make_model(config, CPU).eval()
    freeze(model, precision)
    x, t, y = inputs(config, 1, CPU, side)
    peak_memory(reset=True)
    with autocast(CPU, precision):
        return min(timings(lambda: model(x, t, y), CPU, 3)), peak_memory()


# ---- data and evaluation ---------------------------------------------------------------------------------------------


def noise_jpegs(folder, count):
    """Writes JPEGs of 500x375 pixels and about the 110 kB that ImageNet's have, of noise of four sizes; their paths."""
    os.mkdir(folder)
    paths = [f"{folder}/{i}.jpg" for i in range(count)]
    for i, path in enumerate(paths):
        picture = torch.zeros(1, 3, 375, 500)
        for weight, side in ((0.5, 64), (0.25, 16), (0.15, 4), (0.1, 1)):
            coarse = torch.rand(1, 3, 375 // side + 1, 500 // side + 1, generator=random_stream("noise", i, side))
            picture += weight * torch.nn.functional.interpolate(coarse, (375, 500))
        pixels = (picture[0] * 255).byte().permute(1, 2, 0).numpy()  # (375, 500, 3)
        Image.fromarray(pixels).save(path, quality=95)
    return paths


def loader(count=32, rounds=7):
    """What one core loads: 500x375 JPEGs to training batches at 256, beside Pillow's decoding alone, and by parts."""
    with tempfile.TemporaryDirectory() as root:
        paths = noise_jpegs(f"{root}/noise", count)
        size = sum(os.path.getsize(path) for path in paths) / count / 1e3
        pictures, dataset = [Image.open(path).convert("RGB") for path in paths], open_dataset(root, 256)
        what = {
            "decoding": lambda: [Image.open(path).load() for path in paths],
            "ADM's crop": lambda: [center_crop(picture, 256) for picture in pictures],
            "noise": lambda: [torch.randn(3, 256, 256, generator=random_stream("noise", i)) for i in range(count)],
            "all": lambda: list(training_batches(dataset, BatchNumbers(0, 1, count, count), 0, 1.0, 0, CPU)),
        }
        spent, threads = {name: [] for name in what}, torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(rounds):
            for name, function in what.items():
                start = time.process_time()  # of this process only: others may use the core too
                function()
                spent[name].append((time.process_time() - start) / count)
        torch.set_num_threads(threads)
    ms = {name: 1e3 * statistics.median(times) for name, times in spent.items()}
    whole, alone = ms.pop("all"), ms["decoding"]
    print(f"loader, one core, 500x375 JPEGs of {size:.0f} kB to 256: {1e3 / whole:.0f} images/s; ", end="")
    print(f"Pillow's decoding alone {1e3 / alone:.0f}; ratio {alone / whole:.2f}")
    parts = ", ".join(f"{name} {each:.2f}" for name, each in ms.items())
    print(f"of {whole:.2f} ms for an image: {parts}, the rest {whole - sum(ms.values()):.2f}")


def metrics(bench, count=10_000, width=2048):
    """Precision and recall of `count` against `count` features, and FID from their statistics, all in float64."""
    generator = torch.Generator().manual_seed(0)
    real, drawn = (torch.rand(count, width, generator=generator) for _ in range(2))  # (count, width) each
    (seconds,) = timings(lambda: precision_recall(real.to(bench.device), drawn.to(bench.device)), bench.device, 1)
    products = 3 * 2 * count * count * width  # each set against itself, and one against the other
    bench.report(f"precision and recall, {count} against {count}", seconds, products)

    def fid():
        moments = [(features.mean(0), features.T.cov()) for features in (real.double(), drawn.double())]
        frechet_distance(*moments[0], *moments[1])

    print(f"FID from the same features: {timings(fid, bench.device, 1)[0]:.1f} s")


FIGURES = {
    "Nano-train": lambda b: b.training("training step Nano (6+2 blocks of 256)", NANO_REFERENCE, 64),
    "Nano-forward": lambda b: b.forward("forward Nano (6+2 blocks of 256)", NANO_REFERENCE, repeats=7),
    "L-forward": lambda b: b.forward("forward L/16 at 256", PRESETS["L"]),
    "XL-forward": lambda b: b.forward("forward XL/16 at 256", PRESETS["XL"]),
    "guided": lambda b: b.forward("guided step XL/16 at 256", PRESETS["XL"], (1,), guided=True),
    "L-train": lambda b: b.training("training step L/16 at 256", PRESETS["L"], 2, repeats=2),
    "image": lambda b: b.image(),
    "memory": lambda b: b.memory(),
    "cost": lambda b: b.cost(),
    "loader": lambda b: loader(),
    "metrics": lambda b: metrics(b),
}


def main():
    """Measures the figures that were asked for."""
    parser = argparse.ArgumentParser(description="Speeds as shares of this machine's matrix-multiply rate.")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=["Nano-train"], metavar="FIGURE")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32", "both"], default="both")
    parser.add_argument("--compile", choices=["both", "off"], default="both")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    device = pick_device(args.device)
    precisions = ["fp32", "bf16"] if args.precision == "both" else [pick_precision(args.precision, device)]
    trouble = compiler_trouble(device) if args.compile == "both" else "not wanted"
    if trouble:
        print(f"without compilation: {trouble}")
    bench = Bench(device, precisions, not trouble)
    keep_memory()  # as train.py and sample.py do; "image" and "memory" measure in processes of their own
    for name in args.only:
        FIGURES[name](bench)


if __name__ == "__main__":
    run(main)
