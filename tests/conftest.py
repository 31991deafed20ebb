"""The project on the path, and the fixtures that several test files ask for by name."""

import json
import pathlib
import sys
import threading

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


@pytest.fixture
def golden():
    """golden("c2i_square")["v"] is a tensor of that file of tests/golden; its README says what each one holds."""

    def read(name):
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files if archive[key].dtype.kind in "fiu"}

    return read


@pytest.fixture
def golden_model(golden):
    """(model, file) of a golden class-conditional model, its weights read through `import_reference`."""
    from model import PixNerd
    from pretrained.released import import_reference

    def build(name):
        file = golden(name)
        config, state_dict = import_reference({key[2:]: value for key, value in file.items() if key.startswith("w.")})
        model = PixNerd(config)
        model.load_state_dict(state_dict)
        return model.eval(), file

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
    """Previews and the samples of --eval-every in two steps of the solver, for runs whose pictures nobody looks at."""
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
