"""Processes of runs, forked from one that has loaded everything and does nothing else.

Here: the way a process begins and with whom it ends. Not here: what the warm process loads (`warm.py`), or
who asks for a run (`serving.py`).
"""

from __future__ import annotations

import ctypes
import signal
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess, SpawnProcess
from typing import Any

_PR_SET_PDEATHSIG = 1


class RunProcess(ForkServerProcess):
    """The process of one run: a fork of the warm process, or a fresh interpreter where that fails.

    A warm process that died is started again by the next run (`multiprocessing.forkserver`).
    """

    @staticmethod
    def _Popen(process_obj: Any) -> Any:  # noqa: N802
        try:
            return ForkServerProcess._Popen(process_obj)
        except (EOFError, OSError):
            # It died while it was asked, or cannot load: a run that begins slowly is better than none.
            return SpawnProcess._Popen(process_obj)

    def run(self) -> None:
        """The run. Ends with the warm process, which alone learns how it ended: without it the server takes
        the run for dead and fails it, while it would go on.
        """
        if forkserver.get_inherited_fds() is not None:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        super().run()


class RunContext(ForkServerContext):
    """`multiprocessing`, with these processes."""

    Process = RunProcess


def warm_context(modules: list[str]) -> RunContext:
    """The context, its warm process already on the way: it imports `modules`, in this order.

    For the only user of `multiprocessing`'s fork server in this process.
    """
    context = RunContext()
    context.set_forkserver_preload(modules)
    forkserver.ensure_running()
    return context
