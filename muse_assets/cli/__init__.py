"""The command `muse`: the daily job, the legacy verbs, and looking at what is there.

Here: words, options and tables for a terminal; each command imports what it needs when it runs, so that
`muse --help` stays quick. Not here: any work (the pipeline's packages) or a second way to do it.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Any

import click

from muse_assets.cli.adopting import adopt
from muse_assets.cli.inspecting import info, info_faiss, search, verify
from muse_assets.cli.legacy import add_daily_faiss, add_faiss, cache_playlist, train_faiss
from muse_assets.cli.repairing import repair
from muse_assets.cli.running import deploy, release, rollback, run, sample, ui
from muse_assets.cli.tuning import tune
from muse_assets.failures import MuseError

_INTERRUPTED = 130


class _ExplainedGroup(click.Group):
    """Failures end in one sentence and exit code 1, never in a traceback."""

    def list_commands(self, _ctx: click.Context) -> list[str]:
        """In the order in which people need them, the legacy verbs last."""
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except MuseError as error:
            click.secho(error.what, fg="red", err=True)
            click.echo(f"Next: {error.next_step}", err=True)
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Interrupted. Every live file is complete; run the command again to go on.", err=True)
            sys.stdout.flush()
            # Not sys.exit, which would wait for the thread of the run that was interrupted.
            os._exit(_INTERRUPTED)


@click.group(cls=_ExplainedGroup, context_settings={"help_option_names": ["-h", "--help"]})
def cli() -> None:
    """Keep the MUSE search indexes fresh, exact and safely deployed.

    Settings are environment variables (MUSE_...); with none set everything lives in .muse/.
    """


for command in (
    run,
    sample,
    ui,
    info,
    search,
    deploy,
    rollback,
    release,
    verify,
    repair,
    adopt,
    tune,
    train_faiss,
    add_faiss,
    add_daily_faiss,
    info_faiss,
    cache_playlist,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of the `muse` script."""
    # `kill`, systemd and cron's time-outs end a command as Ctrl-C does. SIGINT too: a script's `muse run &`
    # finds it ignored, Dagster gives SIGTERM the same, and the end of each step then waits 60 s for two
    # helper processes that SIGTERM does not end.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    sys.exit(cli())
