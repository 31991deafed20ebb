"""The processes of a run under torchrun: who this one is, and how they find each other.

torchrun starts one process per GPU and tells each its place by environment variables; without it there is one process
and nothing to do. Left out: launching by mpirun or srun directly; start torchrun with them (README, "On GPUs").
"""

import datetime
import os
import time

import torch.distributed as dist


def place():
    """(rank, local_rank, world): the number of this process, its number on this machine, and how many there are."""
    alone = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1}
    return tuple(int(os.environ.get(name, value)) for name, value in alone.items())


def join(rank, world, device, seconds):
    """Connects the processes for the gradients (NCCL on GPUs, gloo on CPUs). -> the group for decisions, or None.

    Decisions that all ranks must share travel over the CPU, so that they never make a GPU wait.
    Raises dist.DistError if another process does not answer within `seconds`.
    """
    if world == 1:
        return None
    limit = datetime.timedelta(seconds=seconds)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=limit, rank=rank, world_size=world,
                            store=_meeting_point(rank, world, limit))  # fmt: skip
    return dist.new_group(backend="gloo", timeout=limit)


def _meeting_point(rank, world, limit):
    """The key-value store through which the processes of this start find each other.

    torchrun's own store outlives --max-restarts, and with it the addresses of the dead, which a fast rank would call
    (torch 2.13). So rank 0 opens a new store at every start and leaves only its port in torchrun's. Its restart count
    cannot tell the starts apart: each node counts its own failures.
    """
    shared = next(dist.rendezvous("env://", rank, world, timeout=limit))[0]
    if not dist.is_torchelastic_launched():
        return shared
    address, deadline = os.environ["MASTER_ADDR"], time.monotonic() + limit.total_seconds()
    if rank == 0:
        store = dist.TCPStore(address, 0, world, True, limit, wait_for_workers=False)
        shared.set("port of this start", str(store.port))
        return store
    while True:
        try:  # a port that nobody answers belongs to the start before
            port, patience = int(shared.get("port of this start")), min(limit, datetime.timedelta(seconds=5))
            store = dist.TCPStore(address, port, world, False, patience)
            store.set_timeout(limit)
            return store
        except dist.DistError:
            if time.monotonic() > deadline:
                raise
