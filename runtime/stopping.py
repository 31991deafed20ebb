"""How a run ends early: a signal is a wish of one rank, which all ranks agree on at the end of a step."""

import contextlib
import signal

STOPPING = (signal.SIGTERM, signal.SIGINT)  # what torchrun, schedulers and people send to end a run


class Stopping:
    """From its making on, the signals of STOPPING end no process: they are noted, and `agreed` tells all ranks."""

    def __init__(self, processes):
        self.processes = processes
        self.wish = 0  # the number of a signal that reached this rank; only a signal changes it
        self.decision = 0  # the last result of `agreed`
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.wish = number

    def agreed(self):
        """The signal that any rank has got so far, or 0; the same on all ranks, which must all ask.

        A signal that arrives while the ranks vote stays noted and counts at the next vote.
        """
        self.decision = self.processes.largest(self.wish)
        return self.decision


@contextlib.contextmanager
def signals_blocked():
    """Processes that are started within it never see the signals of STOPPING, which go to all processes of a job."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
