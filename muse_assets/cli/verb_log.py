"""The log of a legacy verb: `logs/<verb>/<verb>_<YYYYMMDD>.log`, one line an event.

Here: what a line looks like. Not here: which file (`dated_logs`), or what it says (`legacy`).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator
from datetime import datetime

import click

from muse_assets.failures import MuseError, PermanentFailure
from muse_assets.settings import Settings


@contextlib.contextmanager
def verb_log(settings: Settings) -> Iterator[logging.Logger]:
    """The log of the command that click is running: its start with the options, and how it failed.

    The date is Seoul's when the command started, the times are Seoul's. Raises PermanentFailure when
    the file cannot be written.
    """
    from muse_assets.dated_logs import dated_log
    from muse_assets.seoul_time import SEOUL

    context = click.get_current_context()
    verb = context.info_name or ""
    logs = settings.log_dir.expanduser()
    try:
        path = dated_log(logs, verb, datetime.now(SEOUL))
        handler = logging.FileHandler(path, encoding="utf-8")
    except OSError as error:
        raise PermanentFailure(
            f"The log of {verb} in {logs} cannot be written: {error.strerror}.",
            next_step="give this user write access there, or set MUSE_LOG_DIR to a folder that has it.",
        ) from error
    line = logging.Formatter("%(asctime)s %(levelname)s %(message)s")
    line.converter = lambda seconds: datetime.fromtimestamp(seconds or 0, SEOUL).timetuple()
    handler.setFormatter(line)
    # Not from the registry: nothing else writes here, and nothing of it outlives the command.
    log = logging.Logger(verb, logging.INFO)
    log.addHandler(handler)
    log.info(" ".join(["start", *_options(context)]))
    try:
        yield log
    except MuseError as error:
        log.error("failed: %s", failure_line(error))
        raise
    except KeyboardInterrupt:
        log.error("interrupted")
        raise
    except Exception as error:
        # Its words may hold anything, a secret too.
        log.error("failed: unexpected %s", type(error).__name__)
        raise
    finally:
        handler.close()


def _options(context: click.Context) -> list[str]:
    return [f"{option.opts[0]} {context.params[option.name or '']}" for option in context.command.params]


def failure_line(error: MuseError) -> str:
    """What happened and what to do, on one line."""
    return " ".join(str(error).split())
