"""The project on the path, the fixtures that several test files ask for, and the table of `make test-gpu`."""

import json
import pathlib
import sys
import threading
import time

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Two threads at most, so that rounding does not depend on the machine that runs the tests.
torch.set_num_threads(min(2, torch.get_num_threads()))


def pytest_runtest_setup(item):
    """Skips what needs a GPU where there is none; here and not in a fixture, so that all are counted as one reason."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU, where `make test-gpu` runs it")


@pytest.fixture(scope="session", autouse=True)
def emoji_read_once():
    """Hundreds of runs in this process open the emoji; reading them anew would take half of each."""
    from data import Emoji

    plain, read = Emoji.__init__, {}

    def opened(self, resolution, augment=False, captions=False):
        key = resolution, captions
        if key not in read:
            plain(self, resolution, False, captions)
            read[key] = vars(self).copy()
        vars(self).update(read[key], labels=read[key]["labels"].copy(), augment=augment)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Emoji, "__init__", opened)
        yield


START, ROWS = pytest.StashKey(), pytest.StashKey()  # seconds on the clock, and rows of the table


def pytest_configure(config):
    config.stash[START], config.stash[ROWS] = time.perf_counter(), []


@pytest.fixture
def report(request):
    """report(what, measured, beside it): a row of the table that is printed at the end."""
    return lambda *row: request.config.stash[ROWS].append(row)


def pytest_terminal_summary(terminalreporter, config):
    """The table for docs/gpus.md, if a test on a GPU had something to report: also when others failed."""
    if not config.stash[ROWS]:
        return
    card, seconds = torch.cuda.get_device_properties(0), time.perf_counter() - config.stash[START]
    versions = f"PyTorch {torch.__version__}, CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    ended = {kind: terminalreporter.stats.get(kind, []) for kind in ("passed", "failed", "error", "skipped")}
    counts = [", ".join(f"{len(some)} {kind}" for kind, some in ended.items() if some)]
    of_golden = {kind: [test for test in some if "test_gpu.py" not in test.nodeid] for kind, some in ended.items()}
    counts.append(", ".join(f"{len(some)} {kind}" for kind, some in of_golden.items() if some) or "not run")
    lines = [f"{card.name}, {card.total_memory / 1e9:.1f} GB; {versions}, NCCL {nccl}", ""]
    lines += ["| what | measured | beside it |", "|---|---|---|"]
    lines += [f"| {what} | {measured} | {beside} |" for what, measured, beside in config.stash[ROWS]]
    lines += [f"| golden numbers, float32 without TF32 | {counts[1]} | tolerances of tests/golden/README.md |"]
    lines += [f"| all of `make test-gpu` | {counts[0]}, {seconds:.0f} s | planned: at most 600 s |"]
    terminalreporter.write("\n" + "\n".join(lines) + "\n")


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request):
    """Where golden numbers are computed: the CPU and, with `make test-gpu`, a GPU in float32 without TF32."""
    from runtime.machine import full_float32, pick_device

    device = pick_device(request.param)
    with full_float32():
        yield device


@pytest.fixture
def golden():
    """golden("c2i_square")["v"] is a tensor of that file of tests/golden; its README says what each one holds."""

    def read(name, device="cpu"):
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as archive:
            arrays = {key: archive[key] for key in archive.files}
        kept = {key: array for key, array in arrays.items() if array.dtype.kind in "fiu"}
        return {key: torch.from_numpy(array).to(device) for key, array in kept.items()}

    return read


@pytest.fixture
def golden_model(golden):
    """(model, file) of a golden class-conditional model, its weights read through `import_reference`."""
    from model import PixNerd
    from pretrained.released import import_reference

    def build(name, device="cpu"):
        file = golden(name)
        config, state_dict = import_reference({key[2:]: value for key, value in file.items() if key.startswith("w.")})
        model = PixNerd(config)
        model.load_state_dict(state_dict)
        return model.eval().to(device), {key: value.to(device) for key, value in file.items()}

    return build


@pytest.fixture
def folder(tmp_path):
    """Two classes with three pictures each."""
    from helpers import make_class_folder

    return make_class_folder(tmp_path / "data")


@pytest.fixture(scope="session")
def qwen3_folder(tmp_path_factory):
    """The tiny Qwen3 of the golden file, as a folder such as people download."""
    transformers = pytest.importorskip("transformers", reason="needs pip install -r requirements-text.txt")
    folder = tmp_path_factory.mktemp("tiny-qwen3")
    with np.load(ROOT / "tests" / "golden" / "t2i_text.npz") as archive:
        for key in archive.files:
            if key.startswith("file."):
                (folder / key[5:]).write_text(str(archive[key]))
        model = transformers.Qwen3Model(transformers.Qwen3Config(**json.loads(str(archive["config"]))))
        model.load_state_dict({key[2:]: torch.from_numpy(archive[key]) for key in archive.files if key[:2] == "w."})
    model.bfloat16().save_pretrained(folder)
    return folder


@pytest.fixture
def quick_previews(monkeypatch):
    """Previews and the samples of --eval-every in two steps of the solver, where pictures are not looked at."""
    from runtime import previews

    for how in (previews.FOR_SMALL, previews.JUDGED_SMALL):
        monkeypatch.setitem(how, "steps", 2)


@pytest.fixture
def server(monkeypatch):
    """A server of this machine whose faults a test switches on (helpers.FaultyServer); retries follow at once."""
    from helpers import FaultyServer
    from runtime.files import download

    server = FaultyServer()
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    monkeypatch.setenv("no_proxy", "127.0.0.1")  # a proxy of the surroundings must not see these requests
    monkeypatch.setattr(download, "RETRY_WAITS", (0, 0, 0))
    yield server
    server.go_on.set()
    server.shutdown()
    server.server_close()
