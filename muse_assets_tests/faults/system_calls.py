"""The system calls of a piece of work, listed by strace, and one of them made to fail or to kill.

Here: a forked child of this warm process (a new Python with FAISS takes a second, a fork milliseconds) that
waits until strace is attached, and what it said at its end. Not here: what should hold afterwards.
"""

from __future__ import annotations

import json
import mmap
import os
import re
import select
import signal
import subprocess
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from muse_assets.failures import MuseError
from muse_assets_tests.faults.tools import require_tool

_SECONDS = 60
_REPORT_BYTES = 1 << 16
_LINE = re.compile(r"^(?:\d+ +)?(\w+)\((.*)$")

# How often these come depends on the heap's state; a kill at one is a kill at the call after it.
_IN_MEMORY = {"brk", "mmap", "munmap", "mremap", "madvise", "mprotect", "exit_group"}

FALLIBLE = {
    "openat": ("EIO", "ENOSPC", "EROFS"),
    "write": ("EIO", "ENOSPC", "EFBIG"),
    "fallocate": ("EIO", "ENOSPC", "EFBIG"),
    "ftruncate": ("EIO", "EFBIG"),
    "fsync": ("EIO", "ENOSPC"),
    "rename": ("EIO", "ENOSPC", "EROFS"),
    "link": ("EIO", "ENOSPC", "EROFS"),
    "linkat": ("EIO", "ENOSPC", "EROFS"),
    "unlink": ("EIO", "EROFS"),
    "mkdir": ("EIO", "ENOSPC", "EROFS"),
    "fchmod": ("EIO", "EROFS"),
    "chmod": ("EIO", "EROFS"),
    "read": ("EIO",),
    "pread64": ("EIO",),
    "getdents64": ("EIO",),
    "stat": ("EIO",),
    "fstat": ("EIO",),
    "newfstatat": ("EIO",),
    "lseek": ("EIO",),
    "flock": ("EIO", "ENOLCK"),
    "close": ("EIO",),
}
"""The calls a disk can fail, and with what."""


@dataclass(frozen=True)
class Call:
    """The `nth` call of that name, from 1. arguments: as strace printed them."""

    name: str
    nth: int
    arguments: str = ""

    def __str__(self) -> str:
        return f"{self.name} {self.nth}"


@dataclass(frozen=True)
class Ended:
    """How the child ended. status: exit status, negative for a signal. said: what the work returned, or the
    words of its failure. failure: the exception's type; empty if there was none. expected: whether the
    failure is a MuseError. injected: how often strace injected an error.
    """

    status: int
    said: str = ""
    failure: str = ""
    expected: bool = False
    injected: int = 0


def calls_of(work: Callable[[], str], log: Path) -> list[Call]:
    """The system calls of the work that reach beyond its own memory, in order; it has to succeed.

    Run the work once before: what Python loads or compiles the first time would be counted too.
    """
    ended = _traced(work, log, "--trace=all", "--decode-fds=path")
    assert (ended.status, ended.failure) == (0, ""), ended
    seen: Counter[str] = Counter()
    calls = []
    for line in log.read_text("utf-8", "replace").splitlines():
        if (match := _LINE.match(line)) and match[1] not in _IN_MEMORY:
            seen[match[1]] += 1
            calls.append(Call(match[1], seen[match[1]], match[2]))
    return calls


def killed_at(call: Call, work: Callable[[], str], log: Path) -> Ended:
    """Run the work; SIGKILL ends it as it enters the call."""
    return _traced(work, log, f"--trace={call.name}", f"--inject={call.name}:signal=KILL:when={call.nth}")


def failed_at(call: Call, error: str, work: Callable[[], str], log: Path, *, onwards: bool = False) -> Ended:
    """Run the work; the call, and with `onwards` every later one of its name, returns `error` undone."""
    when = f"{call.nth}{'+' if onwards else ''}"
    return _traced(work, log, f"--trace={call.name}", f"--inject={call.name}:error={error}:when={when}")


def _traced(work: Callable[[], str], log: Path, *options: str) -> Ended:
    strace = require_tool("strace")
    # Shared memory and not a pipe: telling the outcome must not be a system call that is counted or failed.
    with mmap.mmap(-1, _REPORT_BYTES) as report:
        pid = os.fork()
        if pid == 0:
            _run_and_report(work, report)
        with _reaped(pid):
            _, stopped = os.waitpid(pid, os.WUNTRACED)
            assert os.WIFSTOPPED(stopped), stopped
            command = [strace, "-f", "-s", "256", "-p", str(pid), "-o", str(log), *options]
            with subprocess.Popen(command, stderr=subprocess.PIPE) as tracer:
                try:
                    _wait_until_attached(tracer)
                    os.kill(pid, signal.SIGCONT)
                    status = _wait(pid)
                    tracer.wait(_SECONDS)
                finally:
                    tracer.kill()
        text = bytes(report).rstrip(b"\0").decode()
    said = json.loads(text) if text else {}
    return Ended(status, injected=log.read_text("utf-8", "replace").count("(INJECTED)"), **said)


def _run_and_report(work: Callable[[], str], report: mmap.mmap) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)
    said: dict[str, str | bool]
    try:
        said = {"said": work()}
    except BaseException as error:
        said = {
            "said": str(error),
            "failure": type(error).__name__,
            "expected": isinstance(error, MuseError),
        }
    text = json.dumps(said).encode()[:_REPORT_BYTES]
    report[: len(text)] = text
    os._exit(0)


def _wait_until_attached(tracer: subprocess.Popen[bytes]) -> None:
    assert tracer.stderr is not None
    ready, _, _ = select.select([tracer.stderr], [], [], _SECONDS)
    line = tracer.stderr.readline() if ready else b"nothing"
    assert b"attached" in line, f"strace did not attach: {line!r}"


@contextmanager
def _reaped(pid: int) -> Iterator[None]:
    """Whatever happens to the test, the child does not outlive it."""
    try:
        yield
    finally:
        try:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


def _wait(pid: int) -> int:
    deadline = time.monotonic() + _SECONDS
    while time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.001)
    raise TimeoutError(f"the traced child {pid} did not end within {_SECONDS} s")
