"""How a run ends early: a signal reaches one rank, and all ranks agree at the end of a step."""

import contextlib
import dataclasses
import itertools
import signal

HANGUP = getattr(signal, "SIGHUP", None)  # of a closed terminal; Windows has none
STOPPING = (signal.SIGTERM, signal.SIGINT, *([HANGUP] if HANGUP else []))  # of torchrun and schedulers, Ctrl-C


class EvaluationStopped(Exception):
    """Work that can be done again was broken off, on all ranks at once, because the run is to end."""


class Stopping:
    """Once it exists, the signals of STOPPING end no process: they are noted, and `agreed` tells all ranks.

    But for a SIGHUP that is ignored already, as under nohup: such a run is to outlive its terminal.
    """

    def __init__(self, processes):
        self.processes, self.received, self.decision = processes, 0, 0
        for number in STOPPING:
            if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, self._note)

    def _note(self, number, frame):
        self.received = number

    def agreed(self):
        """The signal that any rank has received so far, or 0; the same on all ranks, which must all ask.

        Only a signal changes `received`: one that arrives while the ranks vote counts at the next vote.
        """
        self.decision = self.processes.largest(self.received)
        return self.decision

    def between_batches(self, pictures):
        """The same PictureSet, whose batches end with EvaluationStopped, on all ranks, once a signal came.

        For an evaluation, which may take longer than the time between a scheduler's SIGTERM and its SIGKILL.
        """

        def batches(batch_size, rank=0, world=1):
            own = pictures.batches(batch_size, rank, world)
            for _ in range(0, pictures.count, batch_size * world):  # a rank may have one batch less, but votes as often
                if self.agreed():
                    raise EvaluationStopped
                yield from itertools.islice(own, 1)

        return dataclasses.replace(pictures, batches=pictures.batches and batches)


@contextlib.contextmanager
def signals_blocked():
    """Processes that are started within it never see the signals of STOPPING, which go to all processes of a job."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where no signal goes to all processes of a job
        yield
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
