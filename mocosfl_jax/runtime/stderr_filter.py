"""Replaces XLA's output on stderr by one line when a process of the run is lost."""

import os
import subprocess
import sys

from mocosfl_jax.runtime.streams import text_stream

# When a process of the run dies, XLA ends the others from C++, with a stack trace that Python can neither
# catch nor prevent. This program runs in a process of its own. It replaces the trace by a single line, drops
# the other messages of the coordination service and passes everything else on.
FILTER = """
import re, signal, sys
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, signal.SIG_IGN)
lost, meeting, err = sys.argv[1].encode(), sys.argv[2].encode(), sys.stderr.buffer
reported = quiet = ended = False
for line in sys.stdin.buffer:
    fatal = b"Terminating process because the JAX distributed service" in line
    ours = line.startswith(b"error: ")
    ended = ended or fatal
    if re.match(rb"[IWEF][0-9]{4} ", line):  # the first line of a message
        quiet = b"coordination_service" in line or b"preemption_sync_manager.cc" in line
    if fatal or ours:
        if not reported:
            err.write(line if ours else meeting if b"RegisterTask" in line or b"DEADLINE" in line else lost)
        reported = True
    elif not (quiet or ended):
        err.write(line)
    err.flush()
"""


def filter_stderr(lost: str, meeting: str) -> None:
    """Send what C++ writes to stderr through `FILTER`. Python still writes to stderr directly.

    Args:
      lost: the line to write when another process is lost.
      meeting: the line to write when the processes do not connect.
    """
    sys.stderr.flush()
    child = subprocess.Popen(
        [sys.executable, "-I", "-S", "-c", FILTER, lost, meeting],  # -I: nothing of the current folder
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin is not None
    sys.stderr = text_stream(os.dup(2), sys.stderr)
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
