"""The processes of a run under torchrun: their numbers, how they meet, and how they decide together.

torchrun starts one process per GPU and tells each its place by environment variables; without it there is one process
and nothing to do. Left out: launching by mpirun or srun directly; start torchrun with them (docs/gpus.md).
"""

import contextlib
import datetime
import os
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


class Processes:
    """The processes of this start: .rank of this one, .local_rank on its machine, .world how many there are."""

    def __init__(self):
        alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
        self.rank, self.local_rank, self.world = (int(os.environ.get(name, value)) for name, value in alone.items())
        self.control = None  # the group for decisions

    def connect(self, device, seconds):
        """Connects the processes for the gradients (NCCL on GPUs, gloo on CPUs) and, over the CPU, for decisions.

        So decisions never make a GPU wait. A process that does not answer within `seconds` is a dist.DistError, here
        and in everything below.
        """
        if self.world == 1:
            return
        limit = datetime.timedelta(seconds=seconds)
        store, backend = self._meeting_point(limit), "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=limit, rank=self.rank, world_size=self.world, store=store)
        self.control = dist.new_group(backend="gloo", timeout=limit)

    def _meeting_point(self, limit):
        """The key-value store through which the processes of this start find each other.

        torchrun's own store outlives --max-restarts, and with it the addresses of dead processes, which a fast rank
        would call (torch 2.13). So rank 0 opens a new store at every start and leaves only its port in torchrun's. Its
        restart count cannot tell the starts apart: each node counts its own failures.
        """
        shared = next(dist.rendezvous("env://", self.rank, self.world, timeout=limit))[0]
        if not dist.is_torchelastic_launched():
            return shared
        address, deadline = os.environ["MASTER_ADDR"], time.monotonic() + limit.total_seconds()
        if self.rank == 0:
            store = dist.TCPStore(address, 0, self.world, True, limit, wait_for_workers=False)
            shared.set("port of this start", str(store.port))
            return store
        while True:
            try:  # a port that does not answer belongs to the start before
                port, patience = int(shared.get("port of this start")), min(limit, datetime.timedelta(seconds=5))
                store = dist.TCPStore(address, port, self.world, False, patience)
                store.set_timeout(limit)
                return store
            except dist.DistError:
                if time.monotonic() > deadline:
                    raise

    def say(self, text):
        """Prints a line once, by rank 0."""
        if self.rank == 0:
            print(text, flush=True)

    def barrier(self):
        """Waits until all ranks are here."""
        if self.control:
            dist.barrier(group=self.control)

    @contextlib.contextmanager
    def rank_0_first(self):
        """Rank 0 runs the block, then the others do: for work whose result rank 0 leaves on the disk."""
        if self.rank > 0:
            self.barrier()
        try:
            yield
        finally:  # if it failed, the others find out themselves
            if self.rank == 0:
                self.barrier()

    def from_rank_0(self, value):
        """The value that rank 0 has (any plain object), on all ranks."""
        values = [value]
        if self.control:
            dist.broadcast_object_list(values, group=self.control)
        return values[0]

    def of_all(self, value):
        """The values of all ranks, in their order."""
        values = [value] * self.world
        if self.control:
            dist.all_gather_object(values, value, group=self.control)
        return values

    def largest(self, number):
        """The largest of the ranks' whole numbers, on all of them."""
        most = torch.tensor(number)
        if self.control:
            dist.all_reduce(most, dist.ReduceOp.MAX, group=self.control)
        return int(most)

    def sum(self, *tensors):
        """Adds up tensors over the ranks, in place, on their device."""
        for tensor in tensors if self.world > 1 else ():
            dist.all_reduce(tensor)

    def share_gradients(self, module, device):
        """The module such that backward() leaves the mean gradient of all ranks. Buffers never change: not sent."""
        if self.world == 1:
            return module
        devices = [device.index] if device.type == "cuda" else None
        return DistributedDataParallel(module, devices, gradient_as_bucket_view=True, forward_sync_buffers=False)

    def close(self):
        """The end, on all ranks."""
        if self.control:
            dist.destroy_process_group()


def only_adding_up(module, wanted):
    """Context: within it, and if `wanted`, backward() adds to this rank's gradients and sends nothing yet."""
    return module.no_sync() if wanted and isinstance(module, DistributedDataParallel) else contextlib.nullcontext()
