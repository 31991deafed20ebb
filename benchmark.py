"""How fast is it, against the fastest that this machine multiplies matrices? Each figure as a share of that rate.

    python benchmark.py                  # training step of a Nano in the shape that others use: a minute
    python benchmark.py --only L-forward XL-forward guided L-train image memory cost
    python benchmark.py --only loader metrics                # of data and evaluation
    python benchmark.py --list

The yardstick is the best rate of a 4096^3 matrix product in the same run, since machines drift; FLOPs are those of
`count_flops`, matrix products only. "eager" is plain PyTorch, "compiled" has model.compile_blocks(). A forward pass in
bf16 has its weights frozen, as in sample.py; the figure "image" shows what that and the rest bring, one by one.
"""

import argparse
import concurrent.futures
import functools
import multiprocessing
import os
import statistics
import sys
import tempfile
import time

import torch
from PIL import Image

import eval_fid
from data import BatchNumbers, center_crop, keyed_generator, open_dataset, training_batches
from device import (DeviceError, autocast, compiler_trouble, freeze, keep_memory, matmul_rate, pick_device,
                    pick_precision, synchronize)  # fmt: skip
from flow import flow_matching_loss
from model import PRESETS, RECOMPUTE, PixNerd, PixNerdConfig, count_flops
from samplers import guide, time_grid

# The shape in which other implementations state their speed: 47 GFLOP a step at batch 64.
NANO_REFERENCE = PixNerdConfig(num_classes=9, resolution=32, patch_size=8, hidden_size=256, num_heads=4, depth=6,
                               field_depth=2, field_width=32)  # fmt: skip


class Bench:
    """The machine's two rates, and how to print a measurement as a share of them."""

    def __init__(self, device, precisions, compile_too):
        self.device, self.precisions, self.compile_too = device, precisions, compile_too
        self.rates = {"fp32": matmul_rate(torch.float32, device), "bf16": matmul_rate(torch.bfloat16, device)}
        print(f"{torch.get_num_threads()} threads on {device.type}: 4096^3 product "
              f"{self.rates['fp32'] / 1e9:.0f} GFLOP/s in fp32, {self.rates['bf16'] / 1e9:.0f} in bf16")  # fmt: skip
        print(f"{'what':56} {'seconds':>8} {'GFLOP':>8} {'GFLOP/s':>8} {'of fp32':>8} {'of bf16':>8}")

    def report(self, name, seconds, flops, note=""):
        """One line: seconds, GFLOP, GFLOP/s, shares of the two rates, and what else there is to say."""
        speed = flops / seconds
        print(f"{name:56} {seconds:8.3f} {flops / 1e9:8.1f} {speed / 1e9:8.1f} {speed / self.rates['fp32']:8.2f} "
              f"{speed / self.rates['bf16']:8.2f}{note}", flush=True)  # fmt: skip

    def time(self, function, repeats=7):
        """Median seconds of function() after a call that does not count, two where there are many."""
        times, warm = [], 1 if repeats < 7 else 2
        for _ in range(repeats + warm):
            synchronize(self.device)
            start = time.perf_counter()
            function()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[warm:])

    def variants(self):
        """(precision, compiled?) pairs to measure."""
        return [(precision, compiled) for precision in self.precisions for compiled in (False, True)
                if not compiled or self.compile_too]  # fmt: skip

    def model(self, config, compiled):
        """A model with weights that do not matter, compiled or not."""
        torch.compiler.reset()
        torch.manual_seed(0)
        model = PixNerd(config).to(self.device)
        if compiled:
            model.compile_blocks()
        return model

    def inputs(self, config, batch, resolution=None):
        """Noisy images, times and classes."""
        side = resolution or config.resolution
        return (torch.randn(batch, 3, side, side, device=self.device), torch.rand(batch, device=self.device),
                torch.zeros(batch, dtype=torch.long, device=self.device))  # fmt: skip

    def training(self, name, config, batch, repeats=7):
        """A training step: forward, backward, AdamW, EMA."""
        for precision, compiled in self.variants():
            self.train(name, config, batch, repeats, precision, compiled)

    def train(self, name, config, batch, repeats, precision, compiled):
        """One variant of `training`; its model is gone when the next one is made."""
        model = self.model(config, compiled)
        parameters = list(model.parameters())
        ema = [p.detach().clone() for p in parameters]
        optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        x, t, y = self.inputs(config, batch)

        def step():
            with autocast(self.device, precision):
                loss = flow_matching_loss(model(x, t, y), x, torch.ones_like(x))
            loss.backward()
            torch.nn.utils.get_total_norm([p.grad for p in parameters])
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                torch._foreach_lerp_(ema, parameters, 1e-3)

        how = f"{precision} {'compiled' if compiled else 'eager'}"
        self.report(f"{name}, batch {batch}, {how}", self.time(step, repeats), 3 * batch * count_flops(config))

    @torch.inference_mode()
    def forward(self, name, config, batches=(1, 2), repeats=3, guided=False):
        """A forward pass, or one guided step (which is two of them)."""
        for precision, compiled in self.variants():
            self.infer(name, config, batches, repeats, guided, precision, compiled)

    def infer(self, name, config, batches, repeats, guided, precision, compiled):
        """One variant of `forward`; its model is gone when the next one is made."""
        model = self.model(config, compiled).eval()
        freeze(model, precision, pack=not compiled)
        for batch in batches:
            x, t, y = self.inputs(config, batch)
            velocity = guide(model, y, 3.5)

            def run():
                with autocast(self.device, precision):
                    return velocity(x, torch.tensor(0.5)) if guided else model(x, t, y)

            how = f"{precision} {'compiled' if compiled else 'eager'}"
            flops = (2 if guided else 1) * batch * count_flops(config)
            self.report(f"{name}, batch {batch}, {how}", self.time(run, repeats), flops)

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
        model = self.model(config, compiled=False).eval()
        x, t, y = self.inputs(config, 1)
        nobody = torch.full_like(y, config.num_classes)

        def two_passes(x, t):
            v_none, v_class = model(x, t.expand(1), nobody), model(x, t.expand(1), y)
            return v_none + scale * (v_class - v_none)

        def measure(name, velocity, evaluations, plain=None):
            def step(t):
                with autocast(self.device, precision):
                    return x + velocity(x, torch.tensor(t, device=self.device)) / steps

            early, late = self.time(lambda: step(0.0), 2), self.time(lambda: step(0.5), 2)
            seconds = (steps - guided) * early + guided * late
            note = f"  {seconds / plain:.2f} of plain" if plain else ""
            self.report(f"an image, {precision}, {name}", seconds, evaluations * count_flops(config), note)
            return seconds

        model.decoder.forward = functools.partial(plain_field, model.decoder)
        plain = measure("plain: two passes each step", two_passes, 2 * steps)
        del model.decoder.forward
        measure("+ encoding embedded once", two_passes, 2 * steps, plain)
        measure("+ both halves in a batch", guide(model, y, scale, (-1.0, 1.0)), 2 * steps, plain)
        ours = guide(model, y, scale)
        measure("+ guided in the interval", ours, steps + guided, plain)
        keep_memory()
        measure("+ freed memory kept", ours, steps + guided, plain)
        if self.compile_too:
            freeze(model, precision, pack=False)
            model.compile_blocks()
            measure("+ weights cast, compiled", ours, steps + guided, plain)
            del model, ours
            model = self.model(config, compiled=False).eval()
        freeze(model, precision)
        measure("+ weights cast, packed", guide(model, y, scale), steps + guided, plain)

    def memory(self, config=PRESETS["L"], batch=2):
        """Peak memory and seconds of training steps in fp32 that make activations again, in new processes."""
        for compiled in (False, True)[: 1 + self.compile_too]:
            seconds = in_new_process(train_in_turns, config, batch, compiled)
            first = None
            for recompute in RECOMPUTE:
                found = in_new_process(train_and_look, config, batch, recompute, compiled)
                found["time", "s"] = seconds[recompute]
                first = first or found
                how = "compiled" if compiled else "eager"
                print(f"training step fp32, {how}, batch {batch}, --recompute {recompute:5}: "
                      + "; ".join(f"{name} {value:.2f} {unit} ({value / first[name, unit] - 1:+.0%})"
                                  for (name, unit), value in found.items()), flush=True)  # fmt: skip

    def cost(self, config=PRESETS["L"], sides=(256, 384, 512, 1024)):
        """How time and memory of a forward pass grow with the picture, as sample.py runs it, each in a new process."""
        precision = self.precisions[-1]
        for side in sides:
            seconds, peak = in_new_process(forward_and_look, config, side, precision)
            self.report(f"forward at {side}, {precision} eager", seconds, count_flops(config, side, side),
                        f"  peak of the process {peak:.2f} GB")  # fmt: skip


# ---- processes of their own, for memory ------------------------------------------------------------------------------


def in_new_process(function, *args):
    """function(*args) in a process that has held nothing before. DeviceError where it does not come back."""
    context = multiprocessing.get_context("spawn")
    try:
        with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
            return pool.submit(function, *args).result()
    except concurrent.futures.BrokenExecutor:
        raise DeviceError(f"the process for {function.__name__} died: more memory is needed than is free")


def peak_memory(reset=False):
    """The most memory that this process has had at once, in GB: Python, PyTorch, code, weights, all of it.

    reset=True forgets the past: the peak counts from now on. DeviceError without Linux's /proc.
    """
    try:
        if reset:
            with open("/proc/self/clear_refs", "w") as file:
                file.write("5")
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 / 1e9 for line in file if line.startswith("VmHWM"))
    except OSError as error:
        raise DeviceError(f"memory is measured by Linux's /proc, which is not to be had here ({error})")


def trainer(config, batch, compiled):
    """(model, step): a model and a function that trains it in fp32 on the CPU: forward, backward, AdamW and EMA."""
    torch.manual_seed(0)
    model = PixNerd(config)
    if compiled:
        model.compile_blocks()
    parameters = list(model.parameters())
    optimizer, ema = torch.optim.AdamW(parameters, fused=True), [p.detach().clone() for p in parameters]
    x, y = torch.randn(batch, 3, config.resolution, config.resolution), torch.zeros(batch, dtype=torch.long)

    def step():
        flow_matching_loss(model(x, torch.full((batch,), 0.5), y), x, torch.ones_like(x)).backward()
        optimizer.step()  # gradients add up, as over micro-batches
        with torch.no_grad():
            torch._foreach_lerp_(ema, parameters, 1e-3)

    return model, step


def train_and_look(config, batch, recompute, compiled):
    """{(what, "GB"): peak memory of a training step}: "whole" of the process, "of the step" above what is held anyway.

    That is what is there before and after it: PyTorch, weights, gradients, AdamW's two moments, EMA. Freed memory goes
    back to the system at once, so that what is counted is what is in use.
    """
    keep_memory(False)
    model, step = trainer(config, batch, compiled)
    model.recompute = recompute
    step()  # compiles; from now on gradients and moments are there
    peak_memory(reset=True)
    held = peak_memory()  # now
    step()
    return {("whole", "GB"): peak_memory(), ("of the step", "GB"): peak_memory() - held}


def train_in_turns(config, batch, compiled, rounds=6):
    """{recompute: median of the seconds of a training step}, taken in turns, since the speed of machines drifts."""
    keep_memory()
    torch._dynamo.config.automatic_dynamic_shapes = False  # all and an eighth of the patches: compiled for each
    model, step = trainer(config, batch, compiled)
    seconds = {recompute: [] for recompute in RECOMPUTE}
    for turn in range(rounds + 1):
        for recompute in RECOMPUTE:
            model.recompute = recompute
            start = time.perf_counter()
            step()
            if turn:  # the first one compiles
                seconds[recompute].append(time.perf_counter() - start)
    return {recompute: statistics.median(values) for recompute, values in seconds.items()}


@torch.inference_mode()
def forward_and_look(config, side, precision, repeats=3):
    """(seconds, peak in GB) of a forward pass of one image of side x side pixels on the CPU."""
    keep_memory()
    torch.manual_seed(0)
    model = PixNerd(config).eval()
    freeze(model, precision)
    x, t, y = torch.randn(1, 3, side, side), torch.rand(1), torch.zeros(1, dtype=torch.long)
    peak_memory(reset=True)
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        with autocast(torch.device("cpu"), precision):
            model(x, t, y)
        seconds.append(time.perf_counter() - start)
    return min(seconds), peak_memory()


def plain_field(field, rgb, s, size):
    """The neural field written down as in the paper: each pixel's colour and encoding are joined, then embedded."""
    places = field.encode(*size).expand(len(rgb), -1, -1)  # (N, P2, E)
    z = field.embed(torch.cat([rgb, places], dim=-1))  # (N, P2, Dp)
    for block in field.blocks:
        z = block(z, block.to_weights(s))  # (N, P2, Dp)
    return field.output(field.norm(z))  # (N, P2, C)


# ---- data ------------------------------------------------------------------------------------------------------------


def loader(count=32, rounds=7):
    """What one core loads: 500x375 JPEGs to training batches at 256, beside Pillow's decoding alone, and by parts.

    Once as in a first epoch, and once with crops that an earlier epoch kept (--cache-crops).
    """
    with tempfile.TemporaryDirectory() as root, tempfile.TemporaryDirectory() as kept:
        os.mkdir(f"{root}/noise")
        paths = [f"{root}/noise/{i}.jpg" for i in range(count)]
        for i, path in enumerate(paths):  # noise of four sizes, about the 110 kB that ImageNet has
            parts = [weight * torch.nn.functional.interpolate(
                torch.rand(1, 3, 375 // side + 1, 500 // side + 1, generator=keyed_generator(i, side)), (375, 500))
                for weight, side in ((0.5, 64), (0.25, 16), (0.15, 4), (0.1, 1))]  # fmt: skip
            pixels = (sum(parts)[0] * 255).byte().permute(1, 2, 0).numpy()  # (375, 500, 3)
            Image.fromarray(pixels).save(path, quality=95)
        size = sum(os.path.getsize(path) for path in paths) / count / 1e3
        pictures = [Image.open(path) for path in paths]
        [picture.load() for picture in pictures]

        def load(dataset):
            return list(training_batches(dataset, BatchNumbers(0, 1, count, count), 0, 0.1, 1.0, 0, False))

        decoded, cached = open_dataset(root, 256), open_dataset(root, 256, crops=kept)
        load(cached)  # each picture once
        what = {
            "decoding": lambda: [Image.open(path).load() for path in paths],
            "ADM's crop": lambda: [center_crop(picture, 256) for picture in pictures],
            "noise": lambda: [torch.randn(3, 256, 256, generator=keyed_generator(i)) for i in range(count)],
            "all": lambda: load(decoded),
            "with kept crops": lambda: load(cached),
        }
        spent = {name: [] for name in what}
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for _ in range(rounds):
            for name, function in what.items():
                start = time.process_time()  # of this process only: others may use the core too
                function()
                spent[name].append((time.process_time() - start) / count)
        torch.set_num_threads(threads)
    seconds = {name: statistics.median(times) for name, times in spent.items()}
    whole, again = seconds.pop("all"), seconds.pop("with kept crops")
    print(f"loader, one core, 500x375 JPEGs of {size:.0f} kB to 256: {1 / whole:.0f} images/s; Pillow's decoding "
          f"alone {1 / seconds['decoding']:.0f}; ratio {seconds['decoding'] / whole:.2f}")  # fmt: skip
    print(f"with crops kept by an earlier epoch: {1 / again:.0f} images/s; ratio {seconds['decoding'] / again:.2f}")
    parts = ", ".join(f"{name} {1e3 * each:.2f}" for name, each in seconds.items())
    print(f"of {1e3 * whole:.2f} ms for an image: {parts}, the rest {1e3 * (whole - sum(seconds.values())):.2f}")


# ---- evaluation ------------------------------------------------------------------------------------------------------


def metrics(bench, count=10_000, width=2048):
    """Precision and recall of `count` against `count` features, and FID from their statistics, all in float64."""
    generator = torch.Generator().manual_seed(0)
    real, drawn = (torch.rand(count, width, generator=generator) for _ in range(2))  # (count, width) each
    start = time.perf_counter()
    eval_fid.precision_recall(real.to(bench.device), drawn.to(bench.device))
    found = time.perf_counter()
    products = 3 * 2 * count * count * width  # each set against itself, and one against the other
    bench.report(f"precision and recall, {count} against {count}", found - start, products)
    statistics_of = [eval_fid.Statistics(width), eval_fid.Statistics(width)]
    for collected, features in zip(statistics_of, (real, drawn)):
        collected.update(features)
    eval_fid.frechet_distance(*statistics_of[0].mean_cov(), *statistics_of[1].mean_cov())
    print(f"FID from the same features: {time.perf_counter() - found:.1f} s")


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
}  # fmt: skip


def main():
    """Measures the figures that were asked for."""
    parser = argparse.ArgumentParser(description="Speeds as shares of this machine's matrix-multiply rate.")
    parser.add_argument("--only", nargs="+", choices=FIGURES, default=["Nano-train"], metavar="FIGURE")
    parser.add_argument("--list", action="store_true", help="name the figures and stop")
    parser.add_argument("--precision", choices=["auto", "bf16", "fp32", "both"], default="both")
    parser.add_argument("--compile", choices=["both", "off"], default="both")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    if args.list:
        return print("\n".join(FIGURES))
    device = pick_device(args.device)
    precisions = ["fp32", "bf16"] if args.precision == "both" else [pick_precision(args.precision, device)]
    trouble = compiler_trouble(device) if args.compile == "both" else "not wanted"
    if trouble:
        print(f"without compilation: {trouble}")
    bench = Bench(device, precisions, not trouble)
    keep_memory()  # as train.py and sample.py do; "image" and "memory" measure in processes of their own
    for name in args.only:
        FIGURES[name](bench)
    default = "eager" if compiler_trouble(device) else "compiled"
    print(f"the defaults of train.py here: {pick_precision('auto', device)}, {default}")


if __name__ == "__main__":
    try:
        main()
    except DeviceError as error:
        sys.exit(f"benchmark.py: {error}")
