"""Signals that stop a run after its current round."""

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

from mocosfl_jax.runtime import hosts


@contextlib.contextmanager
def stop_on_signals() -> Iterator[tuple[Callable[[], bool], list[signal.Signals]]]:
    """Catch SIGINT and SIGTERM: then the yielded function returns True and the list holds the signals.

    A second signal ends the process. With several processes, JAX handles SIGTERM (`hosts.stop_together`), and
    SIGINT is raised again as SIGTERM.
    """
    stop = threading.Event()
    received: list[signal.Signals] = []

    def handle(number: int, frame: FrameType | None) -> None:
        received.append(signal.Signals(number))
        stop.set()
        # os.write, since the signal may have interrupted a print.
        with contextlib.suppress(OSError):  # nobody reads it
            os.write(2, f"\n{received[0].name}: saving after the current round\n".encode())
        for each in signals:
            signal.signal(each, before[each])
        if hosts.several():
            signal.raise_signal(signal.SIGTERM)

    signals = (signal.SIGINT,) if hosts.several() else (signal.SIGINT, signal.SIGTERM)
    before = {each: signal.signal(each, handle) for each in signals}
    try:
        yield hosts.stop_together(stop), received
    finally:
        for each in signals:
            signal.signal(each, before[each])
