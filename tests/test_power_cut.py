"""A power cut at any instant of a save: what the disk may then hold is built and resumed from.

Everything a save asks of the file system is recorded: new names, new contents, renames, links, removals, and each
fsync. For a cut after any number of these, the disk may have lost

    of a file's content    what was written since the file's last fsync: all of it, or the second half
    of a folder's names    any of the changes since the folder's last fsync, in any combination

which is as little as POSIX promises; real file systems keep more.
"""

import itertools
import os
import pathlib
import shutil

import pytest
import torch
from helpers import run_state

from runtime.checkpoint import load_checkpoint
from runtime.distributed import Processes
from runtime.files import whole_file
from runtime.log import Log, cut_metrics
from runtime.run_folder import RunFolder, load_run, save_run, tidy


class Recorder:
    """Records what happens in the folder while the block runs: .begin {name: inode}, .ops in order.

    Ops: ("content", inode, bytes), ("sync", inode), ("name", name, inode), ("rename", name, new, inode),
    ("remove", name) and ("sync folder",). Contents and new names are found by looking before every other op.
    """

    def __init__(self, folder, monkeypatch):
        self.folder, self.ops, self.monkeypatch = folder, [], monkeypatch

    def __enter__(self):
        self.names, self.contents = {}, {}
        self.look()
        self.begin, self.old, self.ops = dict(self.names), dict(self.contents), []
        for call, record in (("replace", self.rename), ("link", self.link), ("unlink", self.remove)):
            self.monkeypatch.setattr(os, call, self.recorded(getattr(os, call), record))
        self.monkeypatch.setattr(os, "rename", os.replace)
        self.monkeypatch.setattr(os, "fsync", self.recorded(os.fsync, self.sync))
        return self

    def __exit__(self, *error):
        self.look()
        self.monkeypatch.undo()

    def recorded(self, plain, record):
        def call(*args, **kwargs):
            self.look()
            paths = [pathlib.Path(arg).name if isinstance(arg, (str, os.PathLike)) else arg for arg in args]
            inode = self.names.get(paths[0])
            result = plain(*args, **kwargs)
            record(*paths, inode)
            return result

        return call

    def look(self):
        for entry in sorted(os.scandir(self.folder), key=lambda entry: entry.name):
            inode, content = entry.inode(), pathlib.Path(entry.path).read_bytes() if entry.is_file() else b""
            if self.names.get(entry.name) != inode:
                self.names[entry.name] = inode
                self.ops.append(("name", entry.name, inode))
            if self.contents.get(inode) != content:
                self.contents[inode] = content
                self.ops.append(("content", inode, content))

    def rename(self, name, new, inode):
        self.names[new] = self.names.pop(name)
        self.ops.append(("rename", name, new, inode))

    def link(self, name, new, inode):
        self.names[new] = inode
        self.ops.append(("name", new, inode))

    def remove(self, name, inode):
        if self.names.pop(name, None) is not None:
            self.ops.append(("remove", name))

    def sync(self, descriptor, _):
        inode = os.fstat(descriptor).st_ino
        self.ops.append(("sync folder",) if inode == self.folder.stat().st_ino else ("sync", inode))

    def disks(self):
        """Yields {name: bytes} of every disk that a cut may leave, each once."""
        seen = set()
        for cut in range(len(self.ops) + 1):
            sound, lost, changes, pending = dict(self.old), {}, [], []
            for op, *what in self.ops[:cut]:
                if op == "content":
                    lost.setdefault(what[0], []).append(what[1])
                elif op == "sync" and what[0] in lost:
                    sound[what[0]] = lost.pop(what[0])[-1]
                elif op == "sync folder":
                    changes, pending = changes + pending, []
                elif op in ("name", "rename", "remove"):
                    pending.append((op, *what))
            for kept in itertools.product((False, True), repeat=len(pending)):
                names = dict(self.begin)
                for op, *what in changes + list(itertools.compress(pending, kept)):
                    if op != "name":
                        names.pop(what[0], None)
                    if op != "remove":
                        names[what[-2]] = what[-1]
                for share in (0, 0.5, 1):
                    contents = dict(sound)
                    for inode, versions in lost.items():
                        before = sound.get(inode, b"")
                        longer = versions[-1][len(before) :] if versions[-1].startswith(before) else versions[-1]
                        start = before if versions[-1].startswith(before) else b""
                        contents[inode] = start + longer[: int(share * len(longer))]
                    disk = {name: contents.get(inode, b"") for name, inode in names.items()}
                    if (key := tuple(sorted(disk.items()))) not in seen:
                        seen.add(key)
                        yield disk


def written(folder, disk):
    """The disk as a folder; files of one content are one file by several names, as the links of a run are."""
    folder.mkdir()
    for name, content in disk.items():
        (folder / name).write_bytes(content)
    return folder


def same(a, b):
    return a["step"] == b["step"] and all(torch.equal(a["model"][key], b["model"][key]) for key in a["model"])


@pytest.mark.parametrize("links", [True, False])
def test_after_a_power_cut_in_a_save_the_run_goes_on_from_it_or_from_the_save_before(tmp_path, monkeypatch, links):
    """And the numbers of its metrics up to there are on the disk too.

    Catches: a rename before the fsync, pruning before the folder's fsync, metrics that are not synced.
    """
    out, states = tmp_path / "run", {step: run_state(step, seed=step) for step in (1, 2, 3, 4)}
    out.mkdir()
    for step in (1, 2):
        save_run(out, states[step])
    log = Log(out, Processes(), 0, 4, 8)
    for step in (1, 2):
        log.numbers(step, {"loss": step / 3})
    if not links:
        monkeypatch.setattr(os, "link", lambda *_: (_ for _ in ()).throw(OSError("no hard links here")))
    with Recorder(out, monkeypatch) as recorder:
        log.numbers(3, {"loss": 1.0})
        save_run(out, states[3])
    saved = max(i for i, op in enumerate(recorder.ops) if op == ("sync folder",))
    assert saved > 3 and ("remove", "step-00000001.pt") in recorder.ops
    disks = list(recorder.disks())
    assert len(disks) >= 10
    reached = set()
    for i, disk in enumerate(disks):
        folder = written(tmp_path / f"disk{i}", disk)
        path, state = load_run(folder, warn=lambda line: None)
        assert state["step"] in (2, 3) and same(state, states[state["step"]]), sorted(disk)
        reached.add(state["step"])
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        cut_metrics(folder / "metrics.jsonl", state["step"])
        kept = (folder / "metrics.jsonl").read_text().splitlines()
        assert len(kept) == state["step"] and kept == lines[: len(kept)]
        tidy(path)
        assert same(load_checkpoint(folder / "last.pt"), state)
        save_run(folder, states[4])  # and the run goes on
        assert load_run(folder)[1]["step"] == 4 and not list(folder.glob(".tmp-*.pt"))
    assert reached == {2, 3}
    assert same(load_run(written(tmp_path / "end", disks[-1]))[1], states[3])


def test_after_a_power_cut_in_the_first_save_of_a_run_there_is_all_of_it_or_nothing(tmp_path, monkeypatch):
    """And the same command can start. Catches: half a checkpoint, which would be an error and no start at all."""
    out, state = tmp_path / "run", run_state(1)
    out.mkdir()
    log = Log(out, Processes(), 0, 4, 8)
    with Recorder(out, monkeypatch) as recorder:
        log.numbers(1, {"loss": 0.5})
        save_run(out, state)
    reached, disks = set(), list(recorder.disks())
    for i, disk in enumerate(disks):
        folder = written(tmp_path / f"disk{i}", disk)
        found = load_run(folder, warn=lambda line: None)
        assert found is None or same(found[1], state), sorted(disk)
        cut_metrics(folder / "metrics.jsonl", 1 if found else 0)
        lines = (folder / "metrics.jsonl").read_text() if (folder / "metrics.jsonl").exists() else ""
        assert lines.count("\n") == (found is not None)
        reached.add(found is not None)
    assert reached == {False, True} and same(load_run(written(tmp_path / "end", disks[-1]))[1], state)


def test_a_power_cut_after_the_start_of_a_run_leaves_its_folder(tmp_path, monkeypatch):
    """Catches: checkpoints that are synced, in a folder whose own name is not."""
    for inside in (tmp_path, tmp_path / "runs"):
        with Recorder(inside, monkeypatch) as recorder:
            RunFolder(tmp_path / "runs" / "one", Processes())
        made = [i for i, (op, *what) in enumerate(recorder.ops) if op == "name" and what[0] in ("runs", "one")]
        assert made and ("sync folder",) in recorder.ops[made[-1] :]
        shutil.rmtree(tmp_path / "runs")
        (tmp_path / "runs").mkdir()


def test_after_a_power_cut_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch):
    """For all else that is written whole: pictures, films, arrays, reports."""
    (tmp_path / "out").mkdir()
    target = tmp_path / "out" / "report.json"
    target.write_bytes(b"old")
    with Recorder(tmp_path / "out", monkeypatch) as recorder, whole_file(target) as temporary:
        temporary.write_bytes(b"the new one")
    disks = list(recorder.disks())
    assert {disk["report.json"] for disk in disks} == {b"old", b"the new one"} and len(disks) > 4


def test_the_replay_finds_a_save_without_fsync(tmp_path, monkeypatch):
    """What this file would miss otherwise: the same rename, its content not synced, may leave half a file."""
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "a").write_bytes(b"old")
    with Recorder(tmp_path / "out", monkeypatch) as recorder:
        (tmp_path / "out" / "b").write_bytes(b"new!")
        os.replace(tmp_path / "out" / "b", tmp_path / "out" / "a")
    assert {disk["a"] for disk in recorder.disks()} == {b"old", b"", b"ne", b"new!"}
