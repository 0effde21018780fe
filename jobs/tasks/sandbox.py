"""Running programs that a model wrote: each in a process of its own, with limits, apart where that can be.

The process has an empty temporary folder as its working folder, no variables of ours, and limits of time, memory and
files that it cannot raise. Where the kernel lets us (`CLONE_NEWUSER`, `CLONE_NEWNET`, `CLONE_NEWPID`) it has a network
without interfaces and sees no process but its own. It can read and write the files that the user can: run evaluations
of programs in a container on a machine where that matters.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass

SECONDS = 5.0
MEMORY_BYTES = 512 * 2**20
FILE_BYTES = 2**20
# Run by `python -I`, which needs nothing of ours. What the program prints goes nowhere; that it came to its end is told
# by a word that is not among its names.
LAUNCHER = """
import ctypes, json, os, resource, sys
task = json.load(sys.stdin)
told, nothing = os.dup(1), os.open(os.devnull, os.O_RDWR)
for stream in range(3):
    os.dup2(nothing, stream)
try:
    libc = ctypes.CDLL(None, use_errno=True)
    apart = libc.unshare(0x10000000 | 0x20000000 | 0x40000000) == 0
except (OSError, AttributeError):
    libc, apart = None, False
child = os.fork()
if child:
    os.close(told)
    os.waitpid(child, 0)
    os._exit(0)
if libc is not None and hasattr(libc, "prctl"):
    libc.prctl(1, 9)
for name, most in task["limits"].items():
    number = getattr(resource, name)
    hard = resource.getrlimit(number)[1]
    most = most if hard == resource.RLIM_INFINITY else min(most, hard)
    resource.setrlimit(number, (most, most))
word, program, error = task["word"], task["program"], None
try:
    exec(compile(program, "program", "exec"), {"__name__": "program"})
except BaseException as raised:
    error = type(raised).__name__
os.write(told, json.dumps({"word": word, "error": error, "apart": apart}).encode())
os._exit(0)
"""


@dataclass(frozen=True)
class Outcome:
    """How a program ended: `error` is None for one that came to its end, else what was raised, or how it was ended.

    `apart`: whether it had no network and no sight of other processes; None where it was ended before it could say.
    """

    error: str | None
    apart: bool | None

    @property
    def passed(self) -> bool:
        """Whether the program came to its end without an exception, an exit or a limit."""
        return self.error is None


def run_program(program: str, seconds: float = SECONDS, memory_bytes: int = MEMORY_BYTES) -> Outcome:
    """Run `program` for at most `seconds` of wall time; a program that leaves by `sys.exit` or `os._exit` fails."""
    word = secrets.token_hex(16)
    limits = {
        "RLIMIT_CPU": int(seconds) + 1,
        "RLIMIT_AS": memory_bytes,
        "RLIMIT_FSIZE": FILE_BYTES,
        "RLIMIT_NOFILE": 64,
        "RLIMIT_CORE": 0,
    }
    task = json.dumps({"program": program, "word": word, "limits": limits})
    with tempfile.TemporaryDirectory(prefix="telar-program-") as folder:
        process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", LAUNCHER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "HOME": folder, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            start_new_session=True,
        )
        try:
            said, _ = process.communicate(task.encode(), timeout=seconds)
        except subprocess.TimeoutExpired:
            return Outcome(f"not done after {seconds:g} s", None)
        finally:
            _end(process)
    return _outcome(said, word)


def run_programs(programs: Sequence[str], seconds: float = SECONDS) -> list[Outcome]:
    """Outcomes in the programs' order; as many run at a time as there are cores, equal ones once."""
    different = list(dict.fromkeys(programs))
    with ThreadPoolExecutor(os.cpu_count() or 1, thread_name_prefix="sandbox") as pool:
        found = dict(zip(different, pool.map(lambda each: run_program(each, seconds), different), strict=True))
    return [found[program] for program in programs]


def _outcome(said: bytes, word: str) -> Outcome:
    """What the launcher said, the only thing there is to trust; anything else is a program that was ended."""
    try:
        found = json.loads(said)
    except ValueError:
        found = None
    if not isinstance(found, dict) or found.get("word") != word:
        return Outcome("ended before its end", None)
    return Outcome(found["error"], found["apart"])


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill what is left of the program's session, and wait for it."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe is not None:
            pipe.close()
