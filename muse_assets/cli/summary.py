"""Tables for a terminal: what a run did, what is live, what was sampled.

Here: layout. Not here: finding out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from muse_assets.catalog import Catalog, IndexSpec
    from muse_assets.cli.launching import Outcome
    from muse_assets.sample.day_one import SampleSummary
    from muse_assets.sample.further_days import DaySummary
    from muse_assets.settings import Settings

_COUNTS = ("dagster/row_count", "added", "removed", "reembedded", "rejected")
_UNLIMITED = 1_000
_TEXT_COLUMNS = {
    *("index", "build", "live file", "live day", "newest built", "sha256", "day", "program", "name"),
    *("state", "file", "what", "song", "title", "artist", "fresh", "exact", "pinned"),
}


def terminal() -> Console:
    """Where commands print. Wide: a row broken by the terminal reads better than cells that Rich folds."""
    return Console(width=_UNLIMITED, highlight=False)


def show_indexes(
    console: Console, settings: Settings, specs: Sequence[IndexSpec], outcomes: Mapping[str, Outcome]
) -> None:
    """One line an index: what was built and what is live; a build without a deploy was held by a pin."""
    from muse_assets.publishing.pinning import read_pin

    table = _table(
        *("index", "build", "rows", "added", "removed", "re-embedded", "rejected"),
        *("recall@10", "seconds", "live file"),
    )
    modes = set()
    for spec in specs:
        facts = outcomes[spec.name].metadata.get(f"{spec.name}/index")
        live = outcomes[spec.name].metadata.get(f"{spec.name}/deployed")
        cluster = outcomes[spec.name].metadata.get(f"{spec.name}/cluster", {})
        if not outcomes[spec.name].success or facts is None:
            table.add_row(spec.name, "[red]failed", *[""] * 7, f"{spec.live_file} (unchanged)")
            continue
        modes.add(facts["mode"])
        seconds = facts["seconds"] + (live["seconds"] if live else 0) + cluster.get("seconds", 0)
        change = "pinned" if live is None else "same" if live["already_live"] else "new"
        table.add_row(
            spec.name,
            facts["mode"],
            *(f"{facts[key]:,}" for key in _COUNTS),
            f"{facts['recall_at_10']:.3f}",
            f"{seconds:.1f}",
            f"{spec.live_file} ({change})",
        )
    console.print(table)
    if modes == {"unchanged"}:
        console.print("Nothing new: every table is as it was indexed; no file was written or replaced.")
    for spec in specs:
        if pin := read_pin(settings.server_directory(), spec.name):
            console.print(
                f"{pin.describe()}: it was built and not deployed; `muse release {spec.name}` lets new builds"
                " go live.",
                markup=False,
            )
    console.print(f"Live files muse_<index>.index: {settings.server_directory()}", markup=False)


def show_playlists(console: Console, catalog: Catalog, outcomes: Mapping[str, Outcome]) -> None:
    """The programs' keys: one line a program, one column an index."""
    # Not "title": that is an index too.
    table = _table("program", "name")
    for spec in catalog.indexes:
        table.add_column(spec.name, justify="right")
    keys = 0
    for program in catalog.programs:
        facts = outcomes[program.id].metadata.get("playlist_cache")
        if not outcomes[program.id].success or facts is None:
            table.add_row(program.id, program.title, "[red]failed")
            continue
        counts = [facts[f"ids_{spec.name}"] for spec in catalog.indexes]
        keys += len(counts)
        table.add_row(program.id, program.title, *(f"{count:,}" for count in counts))
    console.print(table)
    example = catalog.programs[0].ids_key(catalog.indexes[0].name)
    console.print(
        f"{keys} playlist keys such as {example}, {keys // len(catalog.indexes)} playlist_update keys."
    )


def show_failures(console: Console, outcomes: Mapping[str, Outcome]) -> None:
    """What each failed run said, in full."""
    for outcome in outcomes.values():
        if not outcome.success:
            console.print(f"[red]FAILED[/red] (run {outcome.run_id[:8]})")
            console.print(outcome.failure, markup=False, soft_wrap=True)


def show_sample(console: Console, done: SampleSummary) -> None:
    """What the sample's first day wrote."""
    console.print(
        f"Sample catalog written: {done.songs:,} songs, "
        + ", ".join(f"{count:,} {name}" for name, count in done.rows.items())
        + " rows."
    )


def show_sample_days(console: Console, days: Iterable[DaySummary]) -> None:
    """What further days wrote."""
    table = _table("day", "index", "inserted", "late", "deleted", "re-embedded")
    for day in days:
        for name, counts in day.tables.items():
            values = (counts.inserted, counts.late, counts.deleted, counts.reembedded)
            table.add_row(day.day.isoformat(), name, *map(str, values))
    console.print(table)


def show_rows(console: Console, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A plain table."""
    table = _table(*columns)
    for row in rows:
        # As Text, since a title may well hold what Rich takes for markup.
        table.add_row(*(Text(f"{value:,}" if isinstance(value, int) else str(value)) for value in row))
    console.print(table)


def _table(*columns: str) -> Table:
    table = Table(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, padding=(0, 1))
    for name in columns:
        table.add_column(name, justify="left" if name in _TEXT_COLUMNS else "right", no_wrap=True)
    return table
