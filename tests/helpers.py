"""What several test files share: a tiny model, folders of pictures, scripts that run as a user starts them, a server.

Nothing here is a test. The fixtures that are built from it stand in conftest.py.
"""

import contextlib
import dataclasses
import http.server
import io
import multiprocessing
import os
import pathlib
import runpy
import signal
import subprocess
import sys
import threading
import zlib

import numpy as np
import torch
from PIL import Image

from model import PixNerd, PixNerdConfig
from text_model import TextPixNerd, TextPixNerdConfig

ROOT = pathlib.Path(__file__).parent.parent

# ---- models ----------------------------------------------------------------------------------------------------------

TINY = PixNerdConfig(
    num_classes=3, resolution=16, patch_size=4, hidden_size=32, num_heads=2, depth=2, field_depth=1, field_width=8
)


def randomised(config, seed=0):
    """A model with a non-zero output layer, so that the output depends on everything before it."""
    torch.manual_seed(seed)
    model = PixNerd(config)
    torch.nn.init.normal_(model.decoder.output.weight, std=0.5)
    return model.eval()


def run_state(step, seed=0):
    """What train.py saves of a run of TINY, without its optimizers; EMA and raw weights differ."""
    from runtime.checkpoint import FORMAT

    return {
        "format": FORMAT,
        "config": dataclasses.asdict(TINY),
        "step": step,
        "class_names": ["a", "b", "c"],
        "model": randomised(TINY, seed).state_dict(),
        "ema": randomised(TINY, seed + 1).state_dict(),
    }


TINY_TEXT = TextPixNerdConfig(
    text_encoder="words",
    text_width=8,
    text_length=4,
    resolution=16,
    patch_size=8,
    hidden_size=32,
    num_heads=2,
    text_depth=1,
    depth=1,
    field_depth=1,
    field_width=8,
    field_ratio=1,
    num_freqs=4,
)


def text_state():
    """A checkpoint of TINY_TEXT, not trained, whose output depends on the text."""
    from pretrained.text_encoders import load_text_encoder
    from runtime.checkpoint import FORMAT

    torch.manual_seed(0)
    model = TextPixNerd(TINY_TEXT)
    torch.nn.init.normal_(model.decoder.output.weight, std=0.5)
    model.null_features.copy_(load_text_encoder("words", 8, 4).null)
    return {"format": FORMAT, "config": dataclasses.asdict(TINY_TEXT), "ema": model.state_dict()}


def inception_recipe(shapes):
    """The weights behind golden/inception.npz: each tensor of {name: shape}, drawn from a seed made of its name."""
    weights = {}
    for name, shape in shapes.items():
        if name.endswith("num_batches_tracked"):
            continue
        random = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(tuple(shape))
        if name.endswith("conv.weight") or name == "fc.weight":
            random *= np.sqrt(2 / np.prod(shape[1:]))  # keeps activations at one scale through 94 layers
        elif name.endswith("running_var"):
            random = 1 + 0.1 * np.abs(random)
        else:
            random = 0.1 * random + name.endswith("bn.weight")
        weights[name] = torch.tensor(random, dtype=torch.float32)
    return weights


# ---- pictures --------------------------------------------------------------------------------------------------------


def noise_picture(height, width, seed=0):
    """A PIL picture of random colours, the same for the same seed."""
    return Image.fromarray(np.random.RandomState(seed).randint(0, 256, (height, width, 3), dtype=np.uint8))


def make_class_folder(root, counts=(("cat", 3), ("dog", 3)), height=32, width=40):
    """A folder of PNG pictures per class, root/cat/0.png and so on; picture i is `i` rows higher. Returns root."""
    for name, count in counts:
        (root / name).mkdir(parents=True)
        for i in range(count):
            noise_picture(height + i, width, i).save(root / name / f"{i}.png")
    return root


# ---- scripts ---------------------------------------------------------------------------------------------------------


def run_script(*arguments):
    """Runs a script of the project (its name and its flags) to its end: (exit status, stdout, stderr).

    In this process, since starting Python and torch takes longer than most of these runs, and with one thread, so that
    equal means equal to the last bit. An exception other than SystemExit, which a user would see as a traceback, fails
    the test that called this.
    """
    stdout, stderr, status, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        sys.argv = [str(ROOT / arguments[0]), *map(str, arguments[1:])]
        with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as leaving:
        if isinstance(leaving.code, str):  # what Python prints on stderr when it leaves with a text
            status, stderr = 1, io.StringIO(stderr.getvalue() + leaving.code)
        else:
            status = leaving.code or 0
    finally:
        sys.argv = argv
        torch.set_num_threads(threads)
        for number, handler in handlers.items():
            signal.signal(number, handler)
    return status, stdout.getvalue(), stderr.getvalue()


def in_a_fork(function):
    """function() in a fork of this process, to be killed or to fill a disk: Python and torch need no second start."""
    process = multiprocessing.get_context("fork").Process(target=function)
    process.start()
    return process


def complaint(*arguments):
    """The one line with which a script answers a mistake of the user."""
    status, stdout, stderr = run_script(*arguments)
    assert status in (1, 2), stdout + stderr
    return stderr.strip().splitlines()[-1]


# The flags of a training run of a tiny model, in float32 on one thread, so that equal means equal to the last bit.
QUICK = [
    *("--hidden-size", "32", "--depth", "2", "--num-heads", "2"),
    *("--patch-size", "16", "--field-width", "8", "--field-depth", "1", "--batch-size", "4", "--precision", "fp32"),
    *("--compile", "off", "--preview-every", "0", "--device", "cpu", "--schedule", "constant"),
    *("--optimizer", "adamw", "--lr", "3e-3"),
]


def command(out, *flags):
    """The arguments of a quick run of train.py."""
    return [str(ROOT / "train.py"), "--out", str(out), *QUICK, *map(str, flags)]


def start(out, *flags):
    """train.py in a process of its own, for runs that are to be killed."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *command(out, *flags)], text=True, env=environment, **pipes)


def train(out, *flags):
    """A quick run of train.py to its end: (exit status, stdout, stderr)."""
    return run_script(*command(out, *flags))


def refuses(out, *flags):
    """The one line with which train.py answers a mistake of the user."""
    return complaint(*command(out, *flags))


def last(out):
    """The checkpoint that a run ended with."""
    from runtime.checkpoint import load_checkpoint

    return load_checkpoint(out / "last.pt")


def assert_same_run(a, b):
    """Two checkpoints have model, EMA, optimizers and step in common, to the bit."""
    assert a["step"] == b["step"]
    for part in ("model", "ema"):
        assert a[part].keys() == b[part].keys()
        assert all(torch.equal(a[part][key], b[part][key]) for key in a[part]), part
    for ours, theirs in zip(a["optimizers"], b["optimizers"], strict=True):
        for index, moments in ours["state"].items():
            assert all(torch.equal(value, theirs["state"][index][key]) for key, value in moments.items())


# ---- a server --------------------------------------------------------------------------------------------------------

BODY = bytes(range(251)) * 4000  # 1 MB; the period 251 shows any shift, which a power of two would hide


class FaultyServer(http.server.ThreadingHTTPServer):
    """Serves `body` at `url`, on this machine's loopback, with the faults that a test switches on."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}/files/weights.pth"
        self.body, self.etag, self.status = BODY, '"v1"', 200
        self.requests = []  # the headers of each request
        self.cuts = []  # after how many bytes each of the next replies breaks off
        self.ranges, self.ignores_if_range, self.align = True, False, 1
        self.redirect, self.endless = None, False  # to another address; bytes for ever, without a length
        self.length = None  # a false Content-Length
        self.stalls = False  # keep a connection open without sending another byte
        self.stalled, self.go_on = threading.Event(), threading.Event()


class _Handler(http.server.BaseHTTPRequestHandler):
    """Answers GET as RFC 9110 says: ETag, Range, If-Range, 206, 416."""

    def do_GET(self):
        server = self.server
        server.requests.append(dict(self.headers))
        if server.status != 200:
            return self.send_error(server.status)
        if server.redirect and self.path != "/elsewhere/weights.pth":
            self.send_response(302)
            self.send_header("Location", server.redirect)
            return self.end_headers()
        body, start, status = server.body, 0, 200
        asked = self.headers.get("Range") if server.ranges else None
        if asked and (self.headers["If-Range"] == server.etag or server.ignores_if_range):
            start, status = int(asked.removeprefix("bytes=").removesuffix("-")), 206
            start -= start % server.align
        if start >= len(body):
            status = 416
        self.send_response(status)
        if server.etag:
            self.send_header("ETag", server.etag)
        if status == 416:
            self.send_header("Content-Range", f"bytes */{len(body)}")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        if status == 206:
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        if not server.endless:
            self.send_header("Content-Length", server.length or str(len(body) - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # until the other side has had enough
            while server.endless:
                self.wfile.write(body)
        if server.endless:
            return
        cut = server.cuts.pop(0) if server.cuts else len(body)
        self.wfile.write(body[start : start + cut])
        self.wfile.flush()
        if server.stalls:
            server.stalled.set()
            server.go_on.wait(30)

    def log_message(self, *args):
        pass
