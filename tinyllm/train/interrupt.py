"""Ctrl-C, SIGTERM and a closed terminal (SIGHUP), turned into a wish that the loop grants after the current step, once everything is saved."""
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

STOPPING = (signal.SIGINT, signal.SIGTERM, *([signal.SIGHUP] if hasattr(signal, "SIGHUP") else []))


class StopRequest:
    """False until a signal has come; then true, with its name in `.reason`."""

    def __init__(self):
        self.reason: str | None = None

    def __bool__(self) -> bool:
        return self.reason is not None


@contextmanager
def stop_on_signal(kinds: Sequence[signal.Signals] = STOPPING) -> Iterator[StopRequest]:
    """Inside this block the first signal of these kinds only sets the request; a second one ends the process as usual.

    What whoever started the process had it ignore stays ignored: SIGHUP under nohup, Ctrl-C for what a script runs in the background.
    Signals belong to the main thread; in any other the request simply never comes.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {}

    def handle(number, frame):
        request.reason = signal.Signals(number).name
        for kind, handler in before.items():
            signal.signal(kind, handler)

    for kind in kinds:
        if signal.getsignal(kind) is not signal.SIG_IGN:
            before[kind] = signal.signal(kind, handle)
    try:
        yield request
    finally:
        for kind, handler in before.items():
            signal.signal(kind, handler)
