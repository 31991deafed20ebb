"""Shared by all tests: the project on the path, and golden files of the public implementation, read once."""

import pathlib
import sys

import numpy as np
import pytest
import torch

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

# Two threads at most, so that timings and rounding do not depend on the machine that runs the tests.
torch.set_num_threads(min(2, torch.get_num_threads()))


@pytest.fixture
def golden():
    """golden("c2i_square")["v"] is a tensor of that file; names with a dot are read the same way."""

    def read(name):
        with np.load(ROOT / "tests" / "golden" / f"{name}.npz") as archive:
            return {key: torch.from_numpy(archive[key]) for key in archive.files if archive[key].dtype.kind in "fiu"}

    return read


@pytest.fixture
def golden_model(golden):
    """(model, file) of a golden class-conditional model, its weights read through `import_reference`."""
    from checkpoint import import_reference
    from model import PixNerd

    def build(name):
        file = golden(name)
        config, state_dict = import_reference({key[2:]: value for key, value in file.items() if key.startswith("w.")})
        model = PixNerd(config)
        model.load_state_dict(state_dict)
        return model.eval(), file

    return build
