"""One line on stderr in place of what XLA's C++ writes when a process of the run is lost."""

import os
import subprocess
import sys

# When a process of the run dies, XLA ends the others from C++, with a stack trace that Python can neither
# catch nor prevent. What C++ writes passes through a process that says it in one line, once, and leaves out
# what the coordination service has to say besides.
FILTER = """
import re, signal, sys
for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
    signal.signal(each, signal.SIG_IGN)
lost, meeting, err = sys.argv[1].encode(), sys.argv[2].encode(), sys.stderr.buffer
told = quiet = ended = False
for line in sys.stdin.buffer:
    fatal = b"Terminating process because the JAX distributed service" in line
    ours = line.startswith(b"error: ")
    ended = ended or fatal
    if re.match(rb"[IWEF][0-9]{4} ", line):  # a message begins, and may have more lines
        quiet = b"coordination_service" in line or b"preemption_sync_manager.cc" in line
    if fatal or ours:
        if not told:
            err.write(line if ours else meeting if b"RegisterTask" in line or b"DEADLINE" in line else lost)
        told = True
    elif not (quiet or ended):
        err.write(line)
    err.flush()
"""


def filter_stderr(lost: str, meeting: str) -> None:
    """Have what C++ writes to stderr pass through `FILTER`; Python still writes there directly.

    Args:
      lost: the line that is written when another process is lost.
      meeting: the line that is written when the processes do not meet.
    """
    sys.stderr.flush()
    child = subprocess.Popen(
        [sys.executable, "-S", "-E", "-c", FILTER, lost, meeting],
        stdin=subprocess.PIPE,
        start_new_session=True,
    )
    assert child.stdin is not None
    sys.stderr = os.fdopen(os.dup(2), "w", buffering=1)
    os.dup2(child.stdin.fileno(), 2)
    child.stdin.close()
