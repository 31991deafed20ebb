"""How a run ends early: a signal reaches one rank, and all ranks agree at the end of a step."""

import contextlib
import signal

STOPPING = (signal.SIGTERM, signal.SIGINT)  # what torchrun, schedulers and people send to end a run


class Stopping:
    """From its making on, the signals of STOPPING end no process: they are noted, and `agreed` tells all ranks."""

    def __init__(self, processes):
        self.processes, self.received, self.decision = processes, 0, 0
        for number in STOPPING:
            signal.signal(number, self._note)

    def _note(self, number, frame):
        self.received = number

    def agreed(self):
        """The signal that any rank has received so far, or 0; the same on all ranks, which must all ask.

        Only a signal changes `received`: one that arrives while the ranks vote counts at the next vote.
        """
        self.decision = self.processes.largest(self.received)
        return self.decision


@contextlib.contextmanager
def signals_blocked():
    """Processes that are started within it never see the signals of STOPPING, which go to all processes of a job."""
    signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOPPING)
