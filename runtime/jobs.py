"""One long computation at a time, beside a server that goes on answering: app.py's queue of jobs ends here."""

import queue
import threading

ONE_AT_A_TIME = threading.Lock()  # two jobs would share the cores, and their memory was estimated for each alone


class Stopped(Exception):
    """Raised inside of a job where it reports, when nobody listens any more."""


def listen(job):
    """Yields what job(send) reports by send(message), as it comes, and raises what the job raises.

    The job runs in a thread of its own. Closing this generator makes its next `send` raise Stopped. With
    send(message, needed=False), a message is dropped where the one before it has not been taken yet.
    """
    messages, closed, end = queue.SimpleQueue(), threading.Event(), object()

    def send(message, needed=True):
        if closed.is_set():
            raise Stopped
        if needed or messages.empty():
            messages.put((message, None))

    def run():
        error = None
        try:
            with ONE_AT_A_TIME:
                job(send)
        except Exception as caught:  # noqa: BLE001  raised again below, where the caller is
            error = caught
        messages.put((end, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            message, error = messages.get()
            if error is not None:
                raise error
            if message is end:
                return
            yield message
    finally:
        closed.set()
