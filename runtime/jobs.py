"""One long computation at a time, beside a server that goes on answering: app.py's queue of jobs ends here."""

import contextlib
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
    messages, closed = queue.SimpleQueue(), threading.Event()

    def send(message, needed=True):
        if closed.is_set():
            raise Stopped
        if needed or messages.empty():
            messages.put((message, None))

    yield from _messages(lambda: job(send), messages.get, messages.put, ONE_AT_A_TIME, closed.set)


def in_step(jobs):
    """Yields lists of what each job(send) sends next, and raises what one of them raises; then the others end, too.

    Each runs in a thread of its own, but only while its next message is waited for: they compute in turn, never at
    once. ValueError where they do not send equally often.
    """
    with contextlib.ExitStack() as stack:
        yield from map(list, zip(*[stack.enter_context(contextlib.closing(_paused(job))) for job in jobs], strict=True))


def _paused(job):
    """Yields what job(send) sends; it only goes on once its next message is asked for."""
    messages, go_on, closed = queue.SimpleQueue(), threading.Semaphore(0), threading.Event()

    def wait():
        go_on.acquire()
        if closed.is_set():
            raise Stopped

    def work():
        wait()
        job(lambda message: (messages.put((message, None)), wait()))

    def take():
        go_on.release()
        return messages.get()

    def close():
        closed.set()
        go_on.release()

    yield from _messages(work, take, messages.put, contextlib.nullcontext(), close)


def _messages(work, take, put, lock, close):
    """Runs work() in a thread, under the lock, and yields each message that take() returns as (message, None)."""
    end = object()

    def run():
        error = None
        try:
            with lock:
                work()
        except Exception as caught:  # noqa: BLE001  raised again below, where the caller is
            error = caught
        put((end, error))

    threading.Thread(target=run, daemon=True).start()
    try:
        while True:
            message, error = take()
            if error is not None:
                raise error
            if message is end:
                return
            yield message
    finally:
        close()
