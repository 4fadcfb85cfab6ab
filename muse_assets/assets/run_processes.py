"""Which process executes a run, and the end of runs whose process is gone.

Here: the tag and the test of life. Not here: why a process went, or what runs next. Dagster's run
monitoring does not see to it: its default launcher cannot ask after a run that has started, so a run that
was killed together with the daemon (a reboot) or at the command line stayed STARTED, held its index's pool
and kept the deploy sensor waiting, for ever.
"""

import os
import socket
from pathlib import Path

import dagster as dg
from dagster import DagsterRunStatus

PROCESS_TAG = "muse/process"
_UNFINISHED = [DagsterRunStatus.NOT_STARTED, DagsterRunStatus.STARTING, DagsterRunStatus.STARTED]


def this_process() -> dict[str, str]:
    """Run tags that name this process: host, pid, and the clock tick since boot at which it began.

    The last tells it from another process that got the same pid, as after a reboot or in a container.
    """
    pid = os.getpid()
    return {PROCESS_TAG: f"{socket.gethostname()}:{pid}:{_began(pid)}"}


def fail_dead_runs(instance: dg.DagsterInstance) -> list[dg.DagsterRun]:
    """Fail every unfinished run whose process was one of this host and is gone; return those runs."""
    dead = []
    for found in instance.get_runs(dg.RunsFilter(statuses=_UNFINISHED)):
        # Read again once its process is known to be gone: it may have finished the run before it went.
        if _is_gone(found.tags.get(PROCESS_TAG, "")):
            run = instance.get_run_by_id(found.run_id)
            if run is not None and not run.is_finished:
                instance.report_run_failed(
                    run, "The process that executed this run is gone: it was killed, or its host restarted."
                )
                dead.append(run)
    return dead


def _is_gone(tag: str) -> bool:
    host, _, rest = tag.partition(":")
    pid, _, began = rest.partition(":")
    return host == socket.gethostname() and pid.isdigit() and _began(int(pid)) != began


def _began(pid: int) -> str:
    """The tick at which a living process began; empty when there is none. Linux: /proc/<pid>/stat."""
    try:
        # The second field is the command in parentheses, which may hold anything.
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
    except OSError:
        return ""
    state, began = fields[0], fields[19]
    return "" if state in "ZX" else began
