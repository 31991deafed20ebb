"""How fast is it, against the fastest that this machine multiplies matrices? Each figure as a share of that rate.

    python benchmark.py                  # training step of Nano, the defaults of train.py: a minute
    python benchmark.py --only L-forward XL-forward guided L-train cost
    python benchmark.py --list

The yardstick is the best rate of a 4096^3 matrix product in the same run, since machines drift; FLOPs are those of
`count_flops`, matrix products only. "eager" is plain PyTorch, "compiled" has model.compile_blocks().
"""

import argparse
import os
import statistics
import sys
import tempfile
import time

import torch
from PIL import Image

from data import BatchNumbers, center_crop, keyed_generator, open_dataset, training_batches
from device import DeviceError, autocast, compiler_trouble, matmul_rate, pick_device, pick_precision, synchronize
from flow import flow_matching_loss
from model import PRESETS, PixNerd, PixNerdConfig, count_flops
from samplers import guide

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
        print(f"{'what':44} {'seconds':>8} {'GFLOP':>8} {'GFLOP/s':>8} {'of fp32':>8} {'of bf16':>8}")

    def report(self, name, seconds, flops):
        """One line: seconds, GFLOP, GFLOP/s, and shares of the two rates."""
        speed = flops / seconds
        print(f"{name:44} {seconds:8.3f} {flops / 1e9:8.1f} {speed / 1e9:8.1f} {speed / self.rates['fp32']:8.2f} "
              f"{speed / self.rates['bf16']:8.2f}", flush=True)  # fmt: skip

    def time(self, function, repeats=7):
        """Median seconds of function() after two calls that do not count."""
        times = []
        for _ in range(repeats + 2):
            synchronize(self.device)
            start = time.perf_counter()
            function()
            synchronize(self.device)
            times.append(time.perf_counter() - start)
        return statistics.median(times[2:])

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
                torch._foreach_lerp_(ema, parameters, 1e-3)

            how = f"{precision} {'compiled' if compiled else 'eager'}"
            self.report(f"{name}, batch {batch}, {how}", self.time(step, repeats), 3 * batch * count_flops(config))

    @torch.inference_mode()
    def forward(self, name, config, batches=(1, 2), repeats=3, guided=False, resolution=None):
        """A forward pass, or one guided step (which is two of them)."""
        for precision, compiled in self.variants():
            model = self.model(config, compiled).eval()
            for batch in batches:
                x, t, y = self.inputs(config, batch, resolution)
                velocity = guide(model, y, 3.5)

                def run():
                    with autocast(self.device, precision):
                        return velocity(x, torch.tensor(0.5)) if guided else model(x, t, y)

                how = f"{precision} {'compiled' if compiled else 'eager'}"
                flops = (2 if guided else 1) * batch * count_flops(config, resolution, resolution)
                self.report(f"{name}, batch {batch}, {how}", self.time(run, repeats), flops)


def loader(count=32, rounds=7):
    """What one core loads: 500x375 JPEGs to training batches at 256, beside Pillow's decoding alone, and by parts."""
    with tempfile.TemporaryDirectory() as root:
        os.mkdir(f"{root}/noise")
        paths = [f"{root}/noise/{i}.jpg" for i in range(count)]
        for i, path in enumerate(paths):  # noise of four sizes, about the 110 kB that ImageNet has
            parts = [weight * torch.nn.functional.interpolate(
                torch.rand(1, 3, 375 // side + 1, 500 // side + 1, generator=keyed_generator(i, side)), (375, 500))
                for weight, side in ((0.5, 64), (0.25, 16), (0.15, 4), (0.1, 1))]  # fmt: skip
            pixels = (sum(parts)[0] * 255).byte().permute(1, 2, 0).numpy()  # (375, 500, 3)
            Image.fromarray(pixels).save(path, quality=95)
        size = sum(os.path.getsize(path) for path in paths) / count / 1e3
        dataset, pictures = open_dataset(root, 256), [Image.open(path) for path in paths]
        [picture.load() for picture in pictures]
        what = {
            "decoding": lambda: [Image.open(path).load() for path in paths],
            "ADM's crop": lambda: [center_crop(picture, 256) for picture in pictures],
            "noise": lambda: [torch.randn(3, 256, 256, generator=keyed_generator(i)) for i in range(count)],
            "all": lambda: list(training_batches(dataset, BatchNumbers(0, 1, count, count), 0, 0.1, 1.0, 0, False)),
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
    whole = seconds.pop("all")
    print(f"loader, one core, 500x375 JPEGs of {size:.0f} kB to 256: {1 / whole:.0f} images/s; Pillow's decoding "
          f"alone {1 / seconds['decoding']:.0f}; ratio {seconds['decoding'] / whole:.2f}")  # fmt: skip
    parts = ", ".join(f"{name} {1e3 * each:.2f}" for name, each in seconds.items())
    print(f"of {1e3 * whole:.2f} ms for an image: {parts}, the rest {1e3 * (whole - sum(seconds.values())):.2f}")


FIGURES = {
    "Nano-train": lambda b: b.training("training step Nano (6+2 blocks of 256)", NANO_REFERENCE, 64),
    "L-forward": lambda b: b.forward("forward L/16 at 256", PRESETS["L"]),
    "XL-forward": lambda b: b.forward("forward XL/16 at 256", PRESETS["XL"]),
    "guided": lambda b: b.forward("guided step XL/16 at 256", PRESETS["XL"], (1,), guided=True),
    "L-train": lambda b: b.training("training step L/16 at 256", PRESETS["L"], 2, repeats=2),
    "cost": lambda b: [b.forward(f"forward L/16 at {side}", PRESETS["L"], (1,), resolution=side)
                       for side in (256, 384, 512, 1024)],
    "loader": lambda b: loader(),
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
    trouble = compiler_trouble() if args.compile == "both" else "not wanted"
    if trouble:
        print(f"without compilation: {trouble}")
    bench = Bench(device, precisions, not trouble)
    for name in args.only:
        FIGURES[name](bench)
    print(f"the defaults of train.py here: {pick_precision('auto', device)}, {'eager' if trouble else 'compiled'}")


if __name__ == "__main__":
    try:
        main()
    except DeviceError as error:
        sys.exit(f"benchmark.py: {error}")
