"""Head process of the embedded cluster: starts a command and reaps every descendant that loses its parent.

Ray's orphans would otherwise go to process 1, which in many containers reaps nobody: Ray would wait for jobs that
ended long ago, and the process table would show dead raylets for ever. Run as a file; it imports the standard library
only, to stay small.
"""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import time

PR_SET_CHILD_SUBREAPER = 36
ORPHANS_SECONDS = 10.0
POLL_SECONDS = 0.05


def main(command: list[str]) -> int:
    """Run `command`; returns its exit status once it and all orphans have ended, orphans at most 10 s later."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    head = subprocess.Popen(command)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda received, _: head.send_signal(received))
    status, deadline = None, float("inf")
    while time.monotonic() < deadline:
        try:
            pid, wait_status = os.waitpid(-1, os.WNOHANG if status is not None else 0)
        except ChildProcessError:
            break
        if pid == head.pid:
            head.returncode = status = os.waitstatus_to_exitcode(wait_status)
            deadline = time.monotonic() + ORPHANS_SECONDS
        elif pid == 0:
            time.sleep(POLL_SECONDS)
    return status if status is not None and status >= 0 else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
