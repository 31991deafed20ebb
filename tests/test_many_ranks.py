"""64 ranks, as threads of this process that meet in the place of gloo: the same code as on 8 machines with 8 GPUs.

What it cannot show is time and NCCL; what it counts is how often the ranks meet in a step, and who reads the disk.
"""

import os
import signal
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from helpers import TINY, make_class_folder

from data import open_dataset
from runtime.distributed import Processes
from runtime.files import UserError
from runtime.loader import BatchNumbers, micro_batch_size, training_batches
from runtime.shards import Shards
from runtime.stopping import Stopping
from train import open_data

WORLD = 64


class Place:
    """Where the ranks meet: each brings a value and leaves with all of them."""

    def __init__(self, world):
        self.values, self.door = [None] * world, threading.Barrier(world, timeout=60)


class Rank(Processes):
    """One of the ranks; .met counts its meetings."""

    def __init__(self, rank, place):
        self.rank, self.local_rank, self.world = rank, rank % 8, len(place.values)
        self.place, self.control, self.met, self.said = place, None, 0, []

    def of_all(self, value):
        self.met += 1
        self.place.values[self.rank] = value
        self.place.door.wait()
        values = list(self.place.values)
        self.place.door.wait()  # nobody brings the next value before all have read
        return values

    def from_rank_0(self, value):
        return self.of_all(value)[0]

    def largest(self, number):
        return max(self.of_all(number))

    def barrier(self):
        self.of_all(None)

    def say(self, text):
        self.said.append(text)


def together(action, world=WORLD):
    """action(rank) in a thread for each of the ranks: (what they returned or raised as UserError, the ranks)."""
    place = Place(world)
    ranks = [Rank(rank, place) for rank in range(world)]

    def run(rank):
        try:
            return action(rank)
        except UserError as error:
            return error
        except BaseException:
            place.door.abort()
            raise

    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(run, ranks)), ranks


@pytest.mark.parametrize("micro", [0, 2])
def test_64_ranks_take_each_sample_of_a_step_once_and_the_same_as_one_rank(micro):
    """A batch of 256. Catches: numbers computed with the local rank, draws that depend on it."""
    emoji, cpu, step = open_dataset("emoji", 32), torch.device("cpu"), 9  # in the second epoch
    whole = next(training_batches(emoji, BatchNumbers(step, step + 1, 256, 256), 5, 1.0, 0, cpu))

    def one(rank):
        numbers = BatchNumbers(step, step + 1, 256, micro_batch_size(256, micro, WORLD), rank.rank, WORLD)
        return [k for ks in numbers for k in ks], list(training_batches(emoji, numbers, 5, 1.0, 0, cpu))

    found, ranks = together(one)
    assert [k for numbers, _ in found for k in numbers] == list(range(256 * step, 256 * step + 256))
    assert {len(batches) for _, batches in found} == {2 if micro else 1}
    for name, expected in whole.items():
        assert torch.equal(torch.cat([batch[name] for _, batches in found for batch in batches]), expected), name
    assert {rank.met for rank in ranks} == {0}  # nobody asks anybody which samples are his


@pytest.mark.parametrize(
    "asking, step, when", [(0, 3, "before"), (37, 2, "during"), (63, 4, "after"), (12, 0, "before")]
)
def test_64_ranks_leave_at_one_step_whoever_gets_the_signal_and_when(monkeypatch, asking, step, when):
    """Before a vote, after it, and while others wait in it already. Catches: a rank that leaves alone."""
    handlers = {}  # of each thread: only a main thread may set real ones
    monkeypatch.setattr(signal, "signal", lambda number, handler: handlers.update({threading.get_ident(): handler}))

    def loop(rank):
        stopping, votes = Stopping(rank), 0

        def signal_arrives(now):
            if (rank.rank, votes, when) == (asking, step, now):
                handlers[threading.get_ident()](signal.SIGTERM, None)

        def largest(number, plain=rank.largest):
            signal_arrives("during")
            return plain(number)

        rank.largest = largest
        while not stopping.decision and votes < 50:
            signal_arrives("before")
            stopping.agreed()
            signal_arrives("after")
            votes += 1
        return votes, stopping.decision

    found, ranks = together(loop)
    assert set(found) == {(step + (1 if when == "before" else 2), signal.SIGTERM)}
    assert {rank.met for rank in ranks} == {found[0][0]}  # one meeting a step


def test_64_ranks_open_a_folder_that_one_of_them_lists(tmp_path, monkeypatch):
    """The others read its list. Catches: a million files listed 64 times, from one network drive."""
    data, listed, plain = make_class_folder(tmp_path / "data", [(f"c{i}", 2) for i in range(5)]), [], os.scandir

    def scandir(path="."):
        if str(path).startswith(f"{data}{os.sep}"):
            listed.append(threading.get_ident())
        return plain(path)

    def opened(rank):
        how = {"augment": False, "captions": False}
        return (threading.get_ident(), *open_data(str(data), None, None, TINY, how, 0, tmp_path / "run", rank, False))

    (tmp_path / "run").mkdir()
    for place in (data, *data.iterdir()):
        os.utime(place, (1e9, 1e9))  # a folder that has just changed is listed again
    monkeypatch.setattr(os, "scandir", scandir)
    found, ranks = together(opened)
    assert set(listed) == {found[0][0]}
    assert {tuple(dataset.classes) for _, dataset, _ in found} == {("c0", "c1", "c2", "c3", "c4")}
    assert {config.num_classes for *_, config in found} == {5} and {rank.met for rank in ranks} == {2}


def test_when_one_of_64_ranks_sees_other_pictures_all_are_told_the_same(tmp_path):
    for place in ("here", "there"):
        make_class_folder(tmp_path / place, (("cat", 2), ("dog", 3 if place == "there" else 2)))

    def opened(rank):
        spec = tmp_path / ("there" if rank.rank == 41 else "here")
        how = {"augment": False, "captions": False}
        return open_data(str(spec), None, None, TINY, how, 0, tmp_path / f"run{rank.rank}", rank, False)

    found, _ = together(opened)
    assert all(isinstance(error, UserError) and "rank 41 finds other pictures" in str(error) for error in found)


def test_64_ranks_draw_each_shard_of_an_npz_once(tmp_path):
    """130 shards, so that two ranks have three. Catches: a shard that two ranks write, or none."""
    drawn = []

    def draw(rank):
        shards = Shards(tmp_path / "x.npz", 390, (4, 4), 3, {"seed": 0}, rank)
        rank.barrier()  # as a script does, which checks before it draws

        def pictures(numbers, watch):
            drawn.append(numbers[0])
            return torch.stack([torch.full((3, 4, 4), i % 251, dtype=torch.uint8) for i in numbers])

        shards.draw(pictures, 1)
        shards.join(torch.arange(390).numpy())

    together(draw)
    with np.load(tmp_path / "x.npz") as archive:
        assert archive["arr_0"][:, 0, 0, 0].tolist() == [i % 251 for i in range(390)]
    assert sorted(drawn) == list(range(0, 390, 3)) and os.listdir(tmp_path) == ["x.npz"]
