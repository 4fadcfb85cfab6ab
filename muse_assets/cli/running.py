"""Commands that run the asset graph: the whole daily job, deploys, the sample, the UI."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    import dagster as dg
    from rich.console import Console

    from muse_assets.catalog import Catalog, IndexSpec
    from muse_assets.cli.launching import Outcome
    from muse_assets.settings import Settings
    from muse_assets.snapshots.progress import Progress

_WHICH = click.option(
    "--index", "names", multiple=True, metavar="NAME", help="Only this index (repeat for several)."
)


@click.command(short_help="The whole daily job now: build, deploy, cache playlists.")
@_WHICH
@click.option("--rebuild", is_flag=True, help="Train and build in full, even where a cluster exists.")
@click.option("--verify-all", is_flag=True, help="Digest whole tables, whatever verify_days says.")
def run(names: tuple[str, ...], rebuild: bool, verify_all: bool) -> None:
    """The whole daily job now: build today's indexes, deploy, reload, cache the playlists.

    An index without a trained cluster is trained first. With no settings at all, the sample catalog is
    written first.
    """
    from muse_assets.cli import summary
    from muse_assets.cli.configuring import check_connections, read_settings
    from muse_assets.cli.launching import open_instance

    settings, console = read_settings(), summary.terminal()
    catalog = settings.load_catalog()
    specs = [catalog.index(name) for name in names] or list(catalog.indexes)
    check_connections(settings)
    from muse_assets.definitions import build_defs  # reads the settings too, but explains nothing

    with progress() as report, _embedded_redis(settings):
        if settings.embedding_db_url is None:
            _write_sample_once(settings, catalog, console, report)
        with open_instance(settings) as instance:
            defs = build_defs(settings, progress=_reporting(report))
            outcomes = {
                spec.name: _build_and_deploy(
                    settings, defs, instance, spec, rebuild=rebuild, verify_all=verify_all
                )
                for spec in specs
            }
            after = _after_deploys(settings, defs, instance, catalog, report)
    summary.show_indexes(console, settings, specs, outcomes)
    summary.show_playlists(console, catalog, after)
    failures = {**outcomes, **after}
    summary.show_failures(console, failures)
    home = f"MUSE_HOME={settings.root} " if settings.home != Path(".muse") else ""
    click.echo(f"Open the UI on this instance: {home}{_this_command()} ui")
    if not all(outcome.success for outcome in failures.values()):
        sys.exit(1)


@click.command(short_help="Write the sample catalog, or further days of it.")
@click.option("--songs", type=click.IntRange(min=1), default=2000, show_default=True)
@click.option("--days", type=click.IntRange(min=0), default=0, help="Write this many further days.")
@click.option("--url", help="SQLAlchemy URL to write all tables to; default: the two databases set.")
@click.option("--seed", type=int, default=2026, show_default=True)
def sample(songs: int, days: int, url: str | None, seed: int) -> None:
    """Write the sample catalog, or further days of inserts, deletes, late rows and re-embeddings."""
    from muse_assets.cli import summary
    from muse_assets.cli.configuring import read_settings
    from muse_assets.connections.databases import engine_for
    from muse_assets.sample.day_one import write_sample
    from muse_assets.sample.embedded import write_embedded_sample
    from muse_assets.sample.further_days import write_days

    settings, console = read_settings(), summary.terminal()
    catalog = settings.load_catalog()
    embeddings = engine_for(url or settings.embedding_url())
    playlists = engine_for(url or settings.playlist_url())
    with progress() as report:
        if days:
            written = write_days(embeddings, playlists, catalog, days=days, on_progress=report)
        else:
            write = write_embedded_sample if settings.embedded_databases and not url else write_sample
            done = write(embeddings, playlists, catalog, songs=songs, seed=seed, on_progress=report)
    # After the bar has gone: it would stay in front of the first line.
    if days:
        summary.show_sample_days(console, written)
    else:
        summary.show_sample(console, done)


@click.command()
@click.argument("index")
@click.option("--partition", default="", help="Day (YYYY-MM-DD) of the snapshot; default: the newest.")
@click.option("--confirm-size", is_flag=True, help="Accept a file over 1.5 times the live one's size.")
@click.option("--confirm-shrink", is_flag=True, help="Accept that a large share of the live rows vanished.")
@click.option("--confirm-recall", is_flag=True, help="Accept that it finds less than the live one.")
@click.option("--replace-damaged", is_flag=True, help="Replace a live file that is not what was published.")
@click.option("--release", is_flag=True, help="Release a pinned index first.")
def deploy(index: str, **options: Any) -> None:
    """Put an index's newest validated snapshot live."""
    _deploy(index, **options)


@click.command(short_help="Put an index's newest backup live again, and pin it.")
@click.argument("index")
@click.option("--to", default="", metavar="SHA256", help="Start of the backup's sha256; default: the newest.")
@click.option("--why", default="", help="The reason, shown wherever the pin is.")
def rollback(index: str, to: str, why: str) -> None:
    """Put an index's newest backup live again, and pin it: no build replaces it until `muse release`."""
    _deploy(index, rollback=True, rollback_to=to, why=why)


@click.command(short_help="Let new builds of a pinned index go live again.")
@click.argument("index")
def release(index: str) -> None:
    """Let new builds of a pinned index go live again."""
    from muse_assets.cli.configuring import read_settings
    from muse_assets.publishing.pinning import release_pin

    settings = read_settings()
    spec = settings.load_catalog().index(index)
    if (pin := release_pin(spec, settings.server_directory())) is None:
        click.echo(f"{spec.name} is not pinned.")
        return
    click.echo(f"{spec.name} is released; it was {pin.what}.")
    click.echo(
        "The deploy sensor now puts the newest build live. Where it does not run, "
        f"`muse deploy {spec.name}` does, or the next `muse run`."
    )


@click.command(short_help="Open the Dagster UI and its daemon.")
@click.option("--port", type=int, default=3000, show_default=True)
def ui(port: int) -> None:
    """Open the Dagster UI and its daemon on this instance, at 127.0.0.1."""
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.launching import dagster_home

    dagster_home(read_settings())
    workspace = Path("workspace.yaml")
    target = ["-w", str(workspace)] if workspace.exists() else ["-m", "muse_assets.definitions"]
    program = str(Path(sys.executable).with_name("dagster"))
    os.execv(program, [program, "dev", "-h", "127.0.0.1", "-p", str(port), *target])  # noqa: S606


def _deploy(name: str, **options: Any) -> None:
    from muse_assets.assets.index_lane import deployed_key
    from muse_assets.automation import DEPLOY, asset_config
    from muse_assets.cli import summary
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.launching import launch, open_instance

    settings, console = read_settings(), summary.terminal()
    spec = settings.load_catalog().index(name)
    from muse_assets.definitions import build_defs  # reads the settings too, but explains nothing

    with open_instance(settings) as instance:
        outcome = launch(
            build_defs(settings),
            instance,
            DEPLOY,
            [deployed_key(spec)],
            run_config=asset_config(deployed_key(spec), **options),
        )
    if not outcome.success:
        summary.show_failures(console, {name: outcome})
        sys.exit(1)
    facts = outcome.metadata[deployed_key(spec).to_user_string()]
    done = "was live already" if facts["already_live"] else "is live"
    restart = "" if facts["already_live"] else " Restart the server to load it."
    click.echo(
        f"{facts['live_file']} {done}: {facts['partition']}, {facts['dagster/row_count']:,} rows, "
        f"sha256 {facts['sha256'][:12]}, backups: {facts['backups']}.{restart}"
    )
    if facts["pinned"]:
        click.echo(f"{facts['pin']}: `muse release {name}` lets new builds go live.")


def _build_and_deploy(
    settings: Settings,
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    spec: IndexSpec,
    *,
    rebuild: bool,
    verify_all: bool,
) -> Outcome:
    from muse_assets.assets.index_lane import cluster_key, deployed_key, index_key
    from muse_assets.automation import DAILY, DEPLOY, REBUILD, asset_config
    from muse_assets.cli.launching import Outcome, launch
    from muse_assets.publishing.pinning import read_pin
    from muse_assets.seoul_time import seoul_today

    today = seoul_today().isoformat()
    # As the deploy sensor does: what an operator pinned is built, and stays as it is.
    pinned = read_pin(settings.server_directory(), spec.name) is not None
    if rebuild or not (settings.work_directory() / spec.cluster_file).exists():
        keys = [cluster_key(spec), index_key(spec), *([] if pinned else [deployed_key(spec)])]
        return launch(defs, instance, REBUILD, keys, partition=today)
    built = launch(
        defs,
        instance,
        DAILY,
        [index_key(spec)],
        partition=today,
        run_config=asset_config(index_key(spec), verify_all=verify_all),
    )
    if pinned or not built.success:
        return built
    live = launch(defs, instance, DEPLOY, [deployed_key(spec)])
    return Outcome(live.success, live.failure, live.run_id, {**built.metadata, **live.metadata})


def _after_deploys(
    settings: Settings,
    defs: dg.Definitions,
    instance: dg.DagsterInstance,
    catalog: Catalog,
    report: Progress,
) -> dict[str, Outcome]:
    from muse_assets.assets.playlist_cache import PLAYLIST_CACHE
    from muse_assets.assets.server_reload import SERVER_RELOAD
    from muse_assets.automation import PLAYLISTS, RELOAD
    from muse_assets.cli.launching import launch

    done = {}
    if settings.reload:
        report("reloading the server", 0, 0)
        done["server reload"] = launch(defs, instance, RELOAD, [SERVER_RELOAD])
    for position, program in enumerate(catalog.programs):
        report("playlists", position, len(catalog.programs))
        done[program.id] = launch(defs, instance, PLAYLISTS, [PLAYLIST_CACHE], partition=program.id)
    return done


def _write_sample_once(settings: Settings, catalog: Catalog, console: Console, report: Progress) -> None:
    from muse_assets.cli import summary
    from muse_assets.connections.databases import engine_for
    from muse_assets.sample.day_one import sample_written, write_sample
    from muse_assets.sample.embedded import write_embedded_sample

    embeddings = engine_for(settings.embedding_url())
    if not sample_written(embeddings, catalog):
        playlists = engine_for(settings.playlist_url())
        write = write_embedded_sample if settings.embedded_databases else write_sample
        summary.show_sample(console, write(embeddings, playlists, catalog, on_progress=report))


@contextlib.contextmanager
def _embedded_redis(settings: Settings) -> Iterator[None]:
    """Keep the embedded Valkey up for the whole command instead of starting it for each program."""
    from muse_assets.connections.embedded_valkey import embedded_valkey

    with contextlib.ExitStack() as stack:
        if settings.redis_url is None:
            stack.enter_context(embedded_valkey(settings.valkey_directory()))
        yield


@contextlib.contextmanager
def progress() -> Iterator[Progress]:
    """A progress callable that draws one bar a task in a terminal, and one line a task elsewhere."""
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.progress import Progress as Bars

    console = Console()
    if not console.is_terminal:
        shown: set[str] = set()

        def line(doing: str, _done: int, total: int) -> None:
            if doing not in shown:
                shown.add(doing)
                click.echo(f"  {doing}{f' ({total:,})' if total else ''}")

        yield line
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Bars(*columns, console=console, transient=True) as bars:
        task = bars.add_task("starting", total=None, count="")
        doing_now = ""

        def bar(doing: str, done: int, total: int) -> None:
            nonlocal doing_now
            if doing != doing_now:
                doing_now = doing
                bars.reset(task)
            speed = bars.tasks[0].speed
            rate = f", {speed:,.0f}/s" if speed else ""
            count = f"{done:,} of {total:,}{rate}" if total else ""
            bars.update(task, description=doing, completed=done, total=total or None, count=count)

        yield bar


def _reporting(report: Progress) -> Any:
    """A progress resource that writes to the terminal instead of the run's log."""
    from muse_assets.resources import ProgressLog

    class Terminal(ProgressLog):
        def reporter(self, context: Any) -> Progress:
            index = context.asset_key.path[0]
            return lambda doing, done, total: report(f"{index}: {doing}", done, total)

    return Terminal()


def _this_command() -> str:
    """How the user called this program, for copying."""
    command = Path(sys.argv[0])
    try:
        return str(command.relative_to(Path.cwd())) if command.is_absolute() else str(command)
    except ValueError:
        return str(command)
