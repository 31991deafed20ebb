"""Nothing that was saved is lost, nothing wrong is loaded, and the released names are read and written."""

import dataclasses
import errno
import gc
import os
import pickle
import random
import resource
import signal
import subprocess
import sys
import weakref
import zipfile

import pytest
import torch
from helpers import ROOT, TINY, in_a_fork, randomised, run_script, run_state

from model import PixNerdConfig
from pretrained.released import export_reference
from runtime import checkpoint
from runtime.checkpoint import FORMAT, load_checkpoint, load_model, save_checkpoint, start_from
from runtime.files import UserError
from runtime.run_folder import load_run, save_run, tidy


def test_what_was_saved_is_loaded(tmp_path):
    state = {"a": torch.randn(3, 4), "b": [1, 2.5, "x"], "c": {"d": torch.arange(5)}}
    save_checkpoint(tmp_path / "new" / "x.pt", state)
    loaded = load_checkpoint(tmp_path / "new" / "x.pt")
    assert torch.equal(loaded["a"], state["a"]) and torch.equal(loaded["c"]["d"], state["c"]["d"])
    assert loaded["b"] == state["b"]
    assert os.listdir(tmp_path / "new") == ["x.pt"]


def test_load_model_takes_the_ema_or_the_raw_weights(tmp_path):
    state = run_state(1)
    save_checkpoint(tmp_path / "x.pt", state)
    for weights, key in (("ema", "ema"), ("raw", "model")):
        model = load_model(tmp_path / "x.pt", weights)
        assert not model.training and model.class_names == ["a", "b", "c"]
        assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in state[key].items())
    v = model(torch.zeros(1, 3, 16, 16), torch.zeros(1), torch.zeros(1, dtype=torch.long))
    assert v.isfinite().all()  # buffers are there although the model was made without storage


# ---- a run's folder --------------------------------------------------------------------------------------------------


def test_runs_keep_the_newest_and_last_pt_is_one_of_them(tmp_path):
    for step in (10, 20, 30):
        save_run(tmp_path, run_state(step, seed=step), keep=1)  # at least two are kept all the same
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "step-00000020.pt", "step-00000030.pt"]
    assert not (tmp_path / "last.pt").is_symlink()
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 30


def test_a_truncated_newest_checkpoint_falls_back_with_a_warning(tmp_path):
    save_run(tmp_path, run_state(10))
    save_run(tmp_path, run_state(20))
    newest = tmp_path / "step-00000020.pt"
    whole, warnings = newest.read_bytes(), []
    for cut in [0, 1, 100, len(whole) // 2, len(whole) - 30, len(whole) - 1]:
        newest.write_bytes(whole[:cut])
        path, state = load_run(tmp_path, warnings.append)
        assert state["step"] == 10 and "step-00000020.pt" in warnings[-1]
        with pytest.raises(UserError, match="step-00000020.pt"):  # named explicitly, it is an error
            load_model(newest)


def test_flipped_bits_are_rejected(tmp_path):
    """Anywhere in the tensors, of which torch.load alone would notice none."""
    path = tmp_path / "x.pt"
    save_checkpoint(path, run_state(1))
    whole, dice = path.read_bytes(), random.Random(0)
    with zipfile.ZipFile(path) as archive:
        records = [entry for entry in archive.infolist() if entry.file_size > 500]
    for _ in range(40):
        entry = dice.choice(records)
        place = entry.header_offset + 200 + dice.randrange(entry.file_size - 200)
        path.write_bytes(whole[:place] + bytes([whole[place] ^ (1 << dice.randrange(8))]) + whole[place + 1 :])
        with pytest.raises(UserError):
            load_checkpoint(path)


@pytest.mark.parametrize("mmap", [pytest.param(False, marks=pytest.mark.slow), True])
def test_bits_flipped_around_the_tensors_are_rejected_or_harmless(tmp_path, mmap):
    """One flip in every byte of a small file: names, sizes, flags, the directory at its end.

    Catches: a record that has become a folder, of which torch reads nothing and returns whatever is in memory, and
    errors of the zip reader that are not UserErrors, at which a run would end in place of falling back.
    """
    path, state = tmp_path / "x.pt", {"step": 3, "ema": {"a": torch.arange(40.0)}, "names": ["b", 2.5]}
    save_checkpoint(path, state)
    whole, dice, refused = path.read_bytes(), random.Random(1), 0
    folder_bit = whole.index(b"PK\1\2") + 38  # of the first record in the directory: its external attributes
    for place, flip in [*((place, 1 << dice.randrange(8)) for place in range(len(whole))), (folder_bit, 0x10)]:
        path.write_bytes(whole[:place] + bytes([whole[place] ^ flip]) + whole[place + 1 :])
        try:
            loaded = load_checkpoint(path, mmap)
        except UserError:
            refused += 1
            continue
        assert (loaded["step"], loaded["names"]) == (3, ["b", 2.5]), place
        assert torch.equal(loaded["ema"]["a"], state["ema"]["a"]), place
    assert refused > len(whole) / 3  # the rest is padding, and times of files


def test_a_damaged_file_does_not_count_among_those_that_are_kept(tmp_path):
    """Passed over, it lies ahead of the run. Catches: pruning the last sound one, or the one just written, for it."""
    for step in (4, 6):
        save_run(tmp_path, run_state(step))
    (tmp_path / "step-00000006.pt").write_bytes(b"rubbish")
    path, state = load_run(tmp_path, lambda _: None)
    assert state["step"] == 4
    tidy(path)
    assert load_checkpoint(tmp_path / "last.pt")["step"] == 4
    save_run(tmp_path, run_state(8))
    assert sorted(os.listdir(tmp_path)) == ["last.pt", "step-00000004.pt", "step-00000006.damaged", "step-00000008.pt"]
    (tmp_path / "step-00000008.pt").write_bytes(b"rubbish")
    assert load_run(tmp_path, lambda _: None)[1]["step"] == 4


def test_a_folder_with_last_pt_alone_is_resumed(tmp_path):
    save_run(tmp_path, run_state(10))
    (tmp_path / "step-00000010.pt").unlink()
    path, state = load_run(tmp_path)
    assert path.name == "last.pt" and state["step"] == 10
    path.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="all 1 checkpoints"):
        load_run(tmp_path, lambda _: None)


def test_all_checkpoints_corrupt_is_an_error(tmp_path):
    for step in (10, 20):
        save_run(tmp_path, run_state(step))
    for path in tmp_path.glob("*.pt"):
        path.write_bytes(b"rubbish")
    with pytest.raises(UserError, match="all 2 checkpoints"):
        load_run(tmp_path, lambda _: None)
    assert load_run(tmp_path / "empty") is None


class Bomb:
    """Unpickling this would touch a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_pickled_code_is_refused_and_does_not_run(tmp_path):
    torch.save({"format": FORMAT, "config": Bomb(tmp_path / "touched")}, tmp_path / "evil.pt")
    for command in (
        ("sample.py", "--ckpt", tmp_path / "evil.pt"),
        ("runtime/checkpoint.py", "export", tmp_path / "evil.pt", "y"),
        ("train.py", "--init", tmp_path / "evil.pt", "--out", tmp_path / "run"),
    ):
        status, _, stderr = run_script(*command)
        assert status == 1 and "refused" in stderr and "\n" not in stderr, stderr
    os.rename(tmp_path / "evil.pt", tmp_path / "step-00000001.pt")
    with pytest.raises(UserError, match="all 1 checkpoints"):
        load_run(tmp_path, lambda _: None)
    assert not (tmp_path / "touched").exists()


def test_old_and_foreign_files_are_named_as_such(tmp_path):
    torch.save({"a": torch.ones(1)}, tmp_path / "legacy.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "text.pt").write_text("weights, honestly")
    (tmp_path / "pickle.pt").write_bytes(pickle.dumps({"a": 1}))
    with zipfile.ZipFile(tmp_path / "zip.pt", "w") as archive:
        archive.writestr("readme.txt", "not weights")
    save_checkpoint(tmp_path / "list.pt", [1, 2])
    save_checkpoint(tmp_path / "future.pt", {"format": "pixnerd 99", "config": {}})
    save_checkpoint(tmp_path / "other.pt", {"state_dict": {"conv1.weight": torch.ones(2)}})
    save_checkpoint(tmp_path / "numbered.pt", {0: torch.ones(1)})
    save_checkpoint(tmp_path / "listed.pt", {"state_dict": [1, 2]})
    save_checkpoint(tmp_path / "number.pt", {"state_dict": {"s_embedder.proj.weight": 3}})
    save_checkpoint(tmp_path / "no-config.pt", {"format": FORMAT, "config": None, "ema": {}})
    save_checkpoint(tmp_path / "no-table.pt", run_state(1) | {"ema": [1]})
    save_checkpoint(
        tmp_path / "whole-numbers.pt",
        run_state(1) | {"ema": {key: tensor.int() for key, tensor in run_state(1)["ema"].items()}},
    )
    save_checkpoint(tmp_path / "no-tensors.pt", run_state(1) | {"ema": dict.fromkeys(run_state(1)["ema"], 3)})
    for path in tmp_path.glob("*.pt"):
        with pytest.raises(UserError, match=path.name) as error:
            load_model(path)
        assert "\n" not in str(error.value)
    with pytest.raises(FileNotFoundError, match="there is no checkpoint"):
        load_model(tmp_path / "absent.pt")
    with pytest.raises(FileNotFoundError, match="is a folder: name the file in it"):
        load_model(tmp_path)


def test_a_full_disk_keeps_the_previous_file_and_tells_the_true_reason(tmp_path):
    """A file-size limit stands for the disk: the write fails with EFBIG half-way through. Nothing keeps the state."""
    path, told = tmp_path / "x.pt", tmp_path / "told"

    def fill_the_disk():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        state = {"a": torch.zeros(100_000)}
        kept = weakref.ref(state["a"])
        try:
            save_checkpoint(path, state)
        except OSError as error:
            told.write_text(f"{error.errno}")
        del state
        gc.collect()
        assert kept() is None

    save_checkpoint(path, {"a": torch.zeros(10)})
    child = in_a_fork(fill_the_disk)
    child.join()
    assert child.exitcode == 0 and int(told.read_text()) == errno.EFBIG  # not a RuntimeError of the zip writer
    assert sorted(os.listdir(tmp_path)) == ["told", "x.pt"]
    assert load_checkpoint(tmp_path / "x.pt")["a"].shape == (10,)


def test_left_over_temporary_files_are_ignored_and_removed(tmp_path):
    save_run(tmp_path, run_state(10))
    (tmp_path / ".tmp-step-00000011.pt").write_bytes(b"half a checkpoint")
    (tmp_path / ".tmp-last.pt").write_bytes(b"half a checkpoint")
    assert load_run(tmp_path)[1]["step"] == 10
    save_run(tmp_path, run_state(20))
    assert not list(tmp_path.glob(".tmp-*"))


def test_missing_superfluous_and_misshapen_weights_are_named(tmp_path):
    def broken(change):
        state = run_state(1)
        change(state["ema"])
        save_checkpoint(tmp_path / "x.pt", state)
        with pytest.raises(UserError) as error:
            load_model(tmp_path / "x.pt")
        return str(error.value)

    assert "lacks the weight patch_embed.bias" in broken(lambda ema: ema.pop("patch_embed.bias"))
    assert "has the weight extra" in broken(lambda ema: ema.update(extra=torch.ones(1)))
    assert "patch_embed.bias has shape (3,)" in broken(lambda ema: ema.update({"patch_embed.bias": torch.ones(3)}))


# ---- export ----------------------------------------------------------------------------------------------------------


def test_export_command_keeps_ema_and_configuration_only(tmp_path, monkeypatch, capsys):
    save_checkpoint(tmp_path / "x.pt", run_state(7))
    for flags, tolerance in (([], 0), (["--half"], 1e-3), (["--reference"], 0)):
        target = tmp_path / "out.pt"
        monkeypatch.setattr(sys, "argv", ["checkpoint", "export", str(tmp_path / "x.pt"), str(target), *flags])
        checkpoint.main()
        a, b = load_model(tmp_path / "x.pt").state_dict(), load_model(target).state_dict()
        assert all((a[key] - b[key]).abs().max() <= tolerance for key in a)
        assert "step" not in load_checkpoint(target) and "model" not in load_checkpoint(target)


def test_half_is_refused_for_numbers_that_it_cannot_hold(tmp_path, monkeypatch):
    """Catches: an exported file with infinite weights, which draws nothing."""
    state = run_state(1)
    state["ema"]["class_embed.weight"][1, 2] = 7e4
    save_checkpoint(tmp_path / "run.pt", state)
    export = ["checkpoint", "export", str(tmp_path / "run.pt"), str(tmp_path / "half.pt"), "--half"]
    monkeypatch.setattr("sys.argv", export)
    with pytest.raises(UserError, match="--half: class_embed.weight has numbers beyond float16's 65,504"):
        checkpoint.main()
    assert not (tmp_path / "half.pt").exists()


@pytest.mark.slow
def test_loading_a_large_file_needs_the_memory_of_its_ema_only(tmp_path):
    """A 190 MB file of which 32 MB are wanted, read in a process of its own: peak memory grows by less than 60 MB."""
    tensors = {f"denoiser.junk{i}": torch.zeros(20_000_000) for i in range(2)}
    small = {
        f"ema_denoiser.{key}": value
        for key, value in export_reference(randomised(dataclasses.replace(TINY, num_classes=250_000))).items()
    }
    save_checkpoint(tmp_path / "big.ckpt", {"state_dict": tensors | small})
    code = (
        "import resource, sys\nfrom runtime import checkpoint\n"
        "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "before = peak(); model = checkpoint.load_model(sys.argv[1])\n"
        "model.class_embed.weight.sum(); print(peak() - before)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "big.ckpt"], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    kilobytes = int(done.stdout) * (1024 if sys.platform == "linux" else 1) / 1024
    assert kilobytes < 60_000


# ---- starting from another checkpoint --------------------------------------------------------------------------------


OTHER = {"prediction": "clean", "decoder": "linear", "field_norm": "none", "encoding": "sincos"} | {
    "patch_size": 8,
    "hidden_size": 64,
    "num_heads": 4,
    "depth": 1,
    "field_depth": 2,
    "field_width": 4,
    "field_ratio": 3,
    "num_freqs": 4,
}


@pytest.mark.parametrize("field", dataclasses.fields(PixNerdConfig), ids=lambda field: field.name)
def test_every_setting_of_a_model_must_agree_under_init_unless_it_is_marked(tmp_path, field):
    """Also one whose change no shape tells. Catches: a setting added to the configuration and forgotten here."""
    save_checkpoint(tmp_path / "x.pt", run_state(1))
    if field.metadata["fine_tuning"]:
        config = dataclasses.replace(TINY, **{field.name: 2 * getattr(TINY, field.name)})
        assert "starting from" in start_from(randomised(config), tmp_path / "x.pt", ["a", "b", "c"])
    else:
        config = dataclasses.replace(TINY, **{field.name: OTHER[field.name]})
        with pytest.raises(UserError, match=f"was trained with {field.name}=.*but this run asks for"):
            start_from(randomised(config), tmp_path / "x.pt", ["a", "b", "c"])
