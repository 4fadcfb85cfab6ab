"""Failures of the pipeline as red runs whose first lines tell the operator what to do.

Here: the one translation from MuseError to Dagster's Failure. Not here: the words themselves, which
each failure brings along, or runs whose process died (`run_processes.py`).
"""

import contextlib
from collections.abc import Callable, Iterator

import dagster as dg
from dagster import DagsterExecutionInterruptedError, DagsterRunStatus

from muse_assets.assets.run_processes import this_process
from muse_assets.failures import MuseError, PassingFailure

# In a failure's metadata: whether launching the run again may help. The deploy sensor reads it.
PASSING = "passing"

# The only retries of a step: a database or Redis that was away, a busy lock; never bad data. Below them a
# build takes a page again for about 3 s (`snapshots.sync`), and redis-py reconnects three times.
RETRY_PASSING = dg.RetryPolicy(max_retries=2, delay=15, backoff=dg.Backoff.EXPONENTIAL)


@contextlib.contextmanager
def red_run(subject: str, still_live: Callable[[], str]) -> Iterator[None]:
    """Turn a MuseError into a Failure: what happened to `subject`, what is live now, what to do.

    `still_live` is asked after the failure: what was true before a publication may not be so any more.
    Retries are left to `RETRY_PASSING`, and only where trying again can help. The last try is not one of
    them: Dagster would show "Exceeded max_retries" in place of these words.
    """
    context = dg.AssetExecutionContext.get()
    context.instance.add_run_tags(context.run.run_id, this_process())
    try:
        yield
    except DagsterExecutionInterruptedError:
        # Dagster would answer "Terminate" by running a step that has a retry policy again.
        raise dg.Failure(
            description=f"{subject}: terminated before it was done.\nLive: {still_live()}\n"
            "Next: launch it again; it starts from what is there.",
            # A host that shuts down terminates its runs too; only a person's "Terminate" is meant to last.
            metadata={PASSING: not _asked_to_end(context)},
            allow_retries=False,
        ) from None
    except MuseError as error:
        live = still_live()
        tries, passing = context.op_execution_context.retry_number, isinstance(error, PassingFailure)
        raise dg.Failure(
            description=f"{subject}: {error.what}\nLive: {live}\nNext: {error.next_step}",
            metadata={"next_step": error.next_step, "still_live": live, PASSING: passing},
            allow_retries=passing and tries < RETRY_PASSING.max_retries,
        ) from None
    except Exception as error:
        # A defect of ours, not a fault that passes: Dagster's policy alone would run the step again.
        raise dg.Failure(
            description=f"{subject}: unexpected {type(error).__name__}: {error}\nLive: {still_live()}\n"
            "Next: report this with the run's stack trace; the next run starts from what is there.",
            metadata={PASSING: False},
            allow_retries=False,
        ) from error


def _asked_to_end(context: dg.AssetExecutionContext) -> bool:
    run = context.instance.get_run_by_id(context.run.run_id)
    return run is not None and run.status == DagsterRunStatus.CANCELING
