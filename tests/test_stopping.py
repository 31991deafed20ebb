"""A signal is never lost, and numbers that are not finite stop the run before they reach the weights."""

import contextlib
import dataclasses
import os
import signal

import pytest
import torch

from runtime.distributed import Processes
from runtime.files import UserError
from runtime.gauges import Gauges
from runtime.picture_sets import PictureSet
from runtime.stopping import STOPPING, EvaluationStopped, Stopping, signals_blocked


@pytest.fixture
def handlers():
    """The handlers of before come back."""
    before = {number: signal.getsignal(number) for number in STOPPING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_a_signal_that_arrives_during_the_vote_counts_at_the_next_one(handlers):
    """Two ranks; the other received none. Catches: the old decision, 0, written over a signal that has just come."""

    class Vote(Processes):
        def largest(self, number):
            if not votes:
                os.kill(os.getpid(), signal.SIGTERM)  # while this rank waits for the others
            votes.append(number)
            return number

    votes = []
    stopping = Stopping(Vote())
    assert stopping.agreed() == 0
    assert stopping.agreed() == signal.SIGTERM == stopping.decision
    assert votes == [0, signal.SIGTERM]


def test_a_process_that_was_started_with_signals_blocked_never_sees_them(handlers):
    with signals_blocked():
        assert set(STOPPING) <= signal.pthread_sigmask(signal.SIG_BLOCK, [])
    assert not set(STOPPING) & signal.pthread_sigmask(signal.SIG_BLOCK, [])


def test_a_hangup_that_is_ignored_stays_ignored(handlers):
    """`nohup python train.py` outlives its terminal; without nohup, a closed terminal saves and ends the run."""
    for before, wish in ((signal.SIG_IGN, 0), (signal.SIG_DFL, signal.SIGHUP)):
        signal.signal(signal.SIGHUP, before)
        stopping = Stopping(Processes())
        os.kill(os.getpid(), signal.SIGHUP)
        assert stopping.agreed() == wish


@pytest.mark.parametrize("count", [0, 5, 40, 41, 50, 64, 65])
def test_ranks_vote_equally_often_within_an_evaluation_and_end_it_together(handlers, count):
    """Five ranks in batches of 8. Catches: a rank with one batch less that votes once less, and the others wait."""

    class Vote(Processes):
        def largest(self, number):
            votes.append(number)
            return signal.SIGTERM if len(votes) > until else 0

    def batches(batch_size, rank=0, world=1):
        yield from range(rank * batch_size, count, world * batch_size)

    pictures = PictureSet("some", count, (8, 8), batches, {})
    voted, drawn = set(), []
    for rank in range(5):
        votes, until = [], 99
        drawn += Stopping(Vote()).between_batches(pictures).batches(8, rank, 5)
        voted.add(len(votes))
        votes, until = [], 1
        with pytest.raises(EvaluationStopped) if count > 40 else contextlib.nullcontext():
            assert len(list(Stopping(Vote()).between_batches(pictures).batches(8, rank, 5))) <= 1
    assert sorted(drawn) == list(range(0, count, 8)) and voted == {-(-count // 40)}
    assert Stopping(Vote()).between_batches(dataclasses.replace(pictures, batches=None)).batches is None


def test_gauges_are_means_and_begin_anew_after_each_reading():
    gauges = Gauges(Processes(), torch.device("cpu"))
    for losses in ([1.0, 3.0], [5.0, 7.0]):
        gauges.add(torch.tensor([0.05, 1.0]), torch.tensor(losses), torch.tensor(0.5), weight=0.5)
        gauges.add(torch.tensor([0.05]), torch.tensor([2.0]), torch.tensor(1.5), weight=0.5)
        assert gauges.broken(1, torch.tensor(4.0)) == 0
    read = gauges.read()
    assert read["loss"] == pytest.approx((1 + 3 + 5 + 7 + 2 + 2) / 6) and read["grad_norm"] == 4
    assert read["alignment"] == pytest.approx(1.0)
    assert read["loss_by_time"] == [2.5, *[None] * 8, 5.0]  # (1 + 5 + 2 + 2) / 4 and, with t = 1 in the last bin, 5
    gauges.add(torch.tensor([0.5]), torch.tensor([9.0]), None, weight=1.0)
    gauges.broken(3, torch.tensor(1.0))
    assert gauges.read()["loss"] == 9


@pytest.mark.parametrize("loss, norm, what", [(float("nan"), 1.0, "loss"), (1.0, float("inf"), "gradient")])
def test_the_first_number_that_is_not_finite_is_remembered_with_its_step(loss, norm, what):
    """From then on every step is broken, though later numbers are sound again."""
    gauges = Gauges(Processes(), torch.device("cpu"))
    gauges.add(torch.tensor([0.5]), torch.tensor([1.0]), None, 1.0)
    assert gauges.broken(6, torch.tensor(1.0)) == 0
    gauges.add(torch.tensor([0.5]), torch.tensor([loss]), None, 1.0)
    assert gauges.broken(7, torch.tensor(norm)) == 1
    assert gauges.broken(8, torch.tensor(1.0)) == 1
    with pytest.raises(UserError, match=rf"the {what} .*at step 7; nothing after it was kept"):
        gauges.read()
