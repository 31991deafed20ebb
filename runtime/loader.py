"""The training batches: which samples each rank gets, and the processes that prepare them ahead of time."""

import atexit
import multiprocessing
import os
import time

import torch

from data import TrainingSamples
from runtime.files import UserError
from runtime.stopping import signals_blocked


class BatchNumbers:
    """The sample numbers of each micro-batch of one rank, from `step` to `steps`: what the loader fetches, in order."""

    def __init__(self, step, steps, batch_size, micro_batch, rank=0, world=1):
        self.parts = batch_size // world // micro_batch  # micro-batches in a step of one rank
        self.starts = [rank * batch_size // world + part * micro_batch for part in range(self.parts)]
        self.steps, self.batch_size, self.micro_batch = range(step, steps), batch_size, micro_batch

    def __iter__(self):
        for first in (step * self.batch_size + start for step in self.steps for start in self.starts):
            yield list(range(first, first + self.micro_batch))


def micro_batch_size(batch_size, micro_batch, world):
    """Images in one forward pass of a rank: all of its share of a step, unless --micro-batch says fewer. UserError."""
    if batch_size % world:
        raise UserError(f"--batch-size {batch_size} cannot be shared equally by {world} processes")
    share = batch_size // world
    if share % (micro_batch or share):
        raise UserError(f"--micro-batch {micro_batch} does not divide the {share} images of a process")
    return micro_batch or share


def training_batches(dataset, numbers, seed, shift, workers, device, encode=None):
    """Yields the batches that `numbers` lists, on the device: image, y, noise, t, u (data.TrainingSamples).

    encode: turns a list of captions into y (B, M, E); None for classes. workers: processes that prepare them ahead of
    time (0: this one; None: as many as pay). A killed worker is a RuntimeError that names it.
    """
    if workers is None:
        workers = 0 if dataset.in_memory else min(8, os.cpu_count() or 1)
    how = {"num_workers": workers, "prefetch_factor": 4 if workers else None, "pin_memory": device.type == "cuda"}
    loader = torch.utils.data.DataLoader(TrainingSamples(dataset, seed, shift), batch_sampler=numbers, **how)
    before = set(multiprocessing.active_children())
    with signals_blocked():  # workers inherit that: one that died of SIGTERM would take its rank along before the save
        batches = iter(loader)
    # So Python's SIGTERM at its end cannot reach them either: one that hangs in a read would keep it from ending.
    for worker in set(multiprocessing.active_children()) - before:
        atexit.register(worker.kill)  # nothing happens to one that has ended
    try:
        for batch in batches:
            if encode:
                batch["y"] = encode(batch["y"])  # here and not in the workers, which have no GPU
            yield {key: value.to(device, non_blocking=True) for key, value in batch.items()}
    except (RuntimeError, OSError, EOFError):
        time.sleep(1)  # of a killed worker, its broken connection is seen first; now torch's handler names it
        raise
