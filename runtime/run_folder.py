"""The folder of a run: which checkpoint to resume, whether it is the same run, what is saved and pruned.

In it: step-N.pt (N of eight digits; nothing else is ours to prune), last.pt (the newest of them by a second name),
previews/, samples.png, metrics.jsonl.
"""

import dataclasses
import os
import pathlib
import shutil
import socket

import numpy as np

from runtime.checkpoint import FORMAT, check_same, checked_config, load_checkpoint, load_weights, save_checkpoint
from runtime.files import UserError, check_writable, lock_or_refuse, make_folder, sync_folder, whole_file
from runtime.options import BEFORE
from runtime.some_classes import SomeClasses


class RunFolder:
    """The folder `path` (str) of a run of several processes, kept from others while it is in use.

    Raises UserError if it cannot be written, or if another run is using it; the same on all ranks.
    """

    def __init__(self, path, processes, keep=2):
        self.path, self.processes, self.keep = pathlib.Path(path), processes, keep
        self.checkpoint = self.state = None
        if trouble := processes.from_rank_0(self._take() if processes.rank == 0 else None):
            raise UserError(trouble)

    def _take(self):
        """Locks the folder until the end of this process. Returns why that cannot be, or None."""
        try:
            check_writable("--out", self.path, is_folder=True)
        except UserError as error:
            return str(error)
        self.lock = open(self.path / ".lock", "a+")
        try:
            lock_or_refuse(self.lock)
        except BlockingIOError:
            self.lock.seek(0)
            owner = self.lock.read() or "another process"
            return f"--out {self.path} is in use by {owner}: wait for its end, or choose another folder"
        except OSError:  # a file system without locks
            return None
        self.lock.truncate(0)
        self.lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self.lock.flush()
        return None

    def find(self, identity, dataset, accept_changed_data=False, mmap=False):
        """Chooses the checkpoint to resume, if there is one, and checks that it is of this very run.

        Returns the data set, its classes numbered as in the run so far. Rank 0 chooses for all ranks. mmap: read
        the weights straight from the disk's cache, which the processes of a machine share; for a GPU only, since on a
        CPU the optimizer would live in a file that is pruned later. Raises UserError.
        """
        self.identity, self.fingerprint = identity, dataset.fingerprint
        found = load_run(self.path, self.processes.say, mmap) if self.processes.rank == 0 else None
        choice = self.processes.from_rank_0(found and str(found[0]))
        if choice is None:
            return dataset
        path, state = self.checkpoint, self.state = found or (pathlib.Path(choice), load_checkpoint(choice, mmap))
        config = dataclasses.asdict(checked_config(state, path))  # of fields that the file lacks, the defaults
        if "identity" not in state or "optimizers" not in state:
            raise UserError(f"{path} holds weights only, not a run: give it to --init, with another --out")
        check_same(BEFORE | config | state["identity"], identity, path)
        if state["fingerprint"] != self.fingerprint and not accept_changed_data:
            remedy = "restore them, or give --accept-changed-data"
            raise UserError(f"{path}: the pictures are not those of the run so far; {remedy}")
        # Class c must stay the run's class c: renamed folders would change the meaning of every number.
        names, now = state["class_names"], dataset.classes  # None, of captions, whose words are in the fingerprint
        if now == names:
            return dataset
        if sorted(now) == sorted(names):
            self.processes.say("the classes come in another order than in the run so far: numbered as there")
            return SomeClasses(dataset, names)
        gone, new = (", ".join(sorted(set(a) - set(b))[:3]) for a, b in ((names, now), (now, names)))
        remedy = "give the folders their old names, or start another run with --init and another --out"
        raise UserError(f"{path} learned other classes: {gone} is not in the data, {new} is not in the run; {remedy}")

    def restore(self, student, ema, optimizers, weight_decay):
        """Puts the chosen checkpoint into the modules and optimizers. Returns its step, 0 without one."""
        if self.checkpoint is None:
            return 0
        path, state, self.state = self.checkpoint, self.state, None
        load_weights(student.model, state["model"], path)
        load_weights(ema, state["ema"], path)
        if student.projector:
            load_weights(student.projector, state["projector"], path)
        for optimizer, part in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(part)
            for group in optimizer.param_groups:
                group["weight_decay"] = weight_decay  # this start's, as the learning rate
        if self.processes.rank == 0:
            tidy(path)
        self.processes.say(f"resuming {path} at step {state['step']}")
        return state["step"]

    def save(self, step, student, ema, optimizers, dataset):
        """Saves the run at `step`; all ranks wait until it is safe. Raises OSError.

        UserError, on all ranks, which hold the same weights, where a weight is not finite: the update made it so.
        """
        for module in (student, ema):
            if broken := [name for name, tensor in module.state_dict().items() if not tensor.isfinite().all()]:
                remedy = "Resume with a lower --lr, or with --clip 1"
                raise UserError(f"{broken[0]} is not finite after step {step}, which is not saved. {remedy}")
        if self.processes.rank == 0:
            state = {
                "format": FORMAT,
                "config": dataclasses.asdict(student.model.config),
                "class_names": dataset.classes,
                "class_counts": dataset.classes
                and np.bincount(dataset.labels, minlength=len(dataset.classes)).tolist(),
                "identity": self.identity,
                "fingerprint": self.fingerprint,
                "step": step,
                "model": student.model.state_dict(),
                "ema": ema.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "projector": student.projector.state_dict() if student.projector else None,
            }
            save_run(self.path, state, self.keep)
        self.processes.barrier()


def save_run(folder, state, keep=2):
    """Saves state as folder/step-N.pt, also called last.pt, and only then prunes to the newest `keep` (at least 2)."""
    path = pathlib.Path(folder) / f"step-{state['step']:08d}.pt"
    make_folder(path.parent)
    sync_folder(path.parent)  # or a power cut could leave the checkpoint and take a new metrics.jsonl
    save_checkpoint(path, state)
    name_last(path)
    left_over = path.parent.glob(".tmp-step-*.pt")
    for old in [*run_checkpoints(folder)[max(2, keep) :], *left_over]:
        old.unlink(missing_ok=True)


def name_last(path):
    """Gives a run's checkpoint its second name, last.pt: a hard link, which survives moving the folder. OSError."""
    with whole_file(path.with_name("last.pt")) as temporary:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)


def tidy(path):
    """After resuming from `path`: newer files, which are damaged, become step-N.damaged. Raises OSError.

    Or they would count among those to be kept and push out a sound one.
    """
    for newer in run_checkpoints(path.parent):
        if newer.name > path.name:
            newer.rename(newer.with_suffix(".damaged"))
    name_last(path)  # a kill may have come between the save and its second name


def run_checkpoints(folder):
    """The step-N.pt files of a run's folder, N of eight digits, newest first."""
    return sorted(pathlib.Path(folder).glob(f"step-{'[0-9]' * 8}.pt"), reverse=True)


def load_run(folder, warn=print, mmap=False):
    """(path, state) of the newest sound checkpoint in a run's folder (or of a lone last.pt); None where there is none.

    A damaged one is passed over with a warning. All damaged is a UserError, never a silent restart from zero.
    """
    paths = run_checkpoints(folder) or list(pathlib.Path(folder).glob("last.pt"))
    for path in paths:
        try:
            return path, load_checkpoint(path, mmap)
        except UserError as error:
            warn(f"warning: {error}; trying the one before")
    if paths:
        raise UserError(f"all {len(paths)} checkpoints in {folder} are damaged: move them away to start anew")
    return None
