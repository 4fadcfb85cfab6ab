"""Failures of the pipeline as red runs whose first lines tell the operator what to do.

Here: the one translation from MuseError to Dagster's Failure. Not here: the words themselves, which
each failure brings along.
"""

import contextlib
from collections.abc import Iterator

import dagster as dg

from muse_assets.failures import MuseError, PassingFailure

# The only level of retries: a lost connection or a busy lock, never bad data.
RETRY_PASSING = dg.RetryPolicy(max_retries=2, delay=15, backoff=dg.Backoff.EXPONENTIAL)


@contextlib.contextmanager
def red_run(subject: str, still_live: str) -> Iterator[None]:
    """Turn a MuseError into a Failure: what happened to `subject`, what is still live, what to do.

    Retries are left to `RETRY_PASSING`, and only where trying again can help.
    """
    try:
        yield
    except MuseError as error:
        raise dg.Failure(
            description=f"{subject}: {error.what}\nLive: {still_live}\nNext: {error.next_step}",
            metadata={"next_step": error.next_step, "still_live": still_live},
            allow_retries=isinstance(error, PassingFailure),
        ) from None
