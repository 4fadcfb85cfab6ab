"""The command that makes damaged files good again: from an intact copy where there is one, else by a build.

Here: in which order, so that the live file comes first and each step finds what it builds on. Not here:
finding damage (`publishing.verifying`, `snapshots.verifying`), or the steps (jobs, `snapshots.cluster`).
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from collections.abc import Iterable

    import dagster as dg

    from muse_assets.catalog import IndexSpec
    from muse_assets.publishing.verifying import Finding
    from muse_assets.settings import Settings


@click.command(short_help="Make damaged files good again.")
@click.argument("names", nargs=-1, metavar="[INDEX]...")
def repair(names: tuple[str, ...]) -> None:
    """Restore what `muse verify` finds damaged: from an intact copy, or else by training or building.

    Damaged snapshots are removed and a damaged live file and backup kept aside. Intact files stay.
    """
    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.launching import open_instance

    settings = read_settings()
    catalog = settings.load_catalog()
    specs = [catalog.index(name) for name in names] or list(catalog.indexes)
    left: list[Finding] = []
    with open_instance(settings) as instance:
        for spec in specs:
            repairs = _Repairs(settings, instance, spec)
            if repairs.bad():
                repairs.run()
            left += repairs.bad()
    for finding in left:
        click.secho(f"{finding.state}: {finding.path}: {finding.what}", fg="red", err=True)
    if left:
        click.echo(
            "Next: mend what stopped the repair (above) and repair again; move files that this system did "
            "not write out of its directories.",
            err=True,
        )
        sys.exit(1)
    click.echo(f"Every file of {', '.join(spec.name for spec in specs)} is as published.")


@dataclass(frozen=True)
class _Repairs:
    """The repair of one index."""

    settings: Settings
    instance: dg.DagsterInstance
    spec: IndexSpec

    @property
    def server(self) -> Path:
        return self.settings.server_directory()

    @property
    def work(self) -> Path:
        return self.settings.work_directory()

    @cached_property
    def defs(self) -> dg.Definitions:
        from muse_assets.definitions import build_defs

        return build_defs(self.settings)

    def bad(self, *names: str) -> list[Finding]:
        """What is not as published; with `names`, of these files alone."""
        from muse_assets.cli.inspecting import findings

        found = (finding for finding in findings(self.settings, self.spec) if finding.state != "ok")
        return [finding for finding in found if not names or finding.path.name in names]

    def run(self) -> None:
        """Live file first; whatever was condemned for lost facts alone is acquitted before that."""
        self._restore_facts()
        if self.bad(self.spec.live_file):
            self._restore_live()
        rebuild = self._restore_cluster()
        if self._drop_snapshots() or rebuild or self.bad(self.spec.live_file):
            self._build(rebuild=rebuild)
        if self.bad(self.spec.live_file, self.spec.fallback_file):
            self._deploy_again()
        self._set_backups_aside()

    def _restore_facts(self) -> None:
        """Facts that one directory lost may lie beside the same content in the other."""
        from muse_assets.durable_files import file_sha256
        from muse_assets.manifest import read_manifest, write_manifest

        for directory, other in ((self.server, self.work), (self.work, self.server)):
            for path in [*directory.glob(f"muse_{self.spec.name}*.index"), *self._backups(directory)]:
                sha256 = file_sha256(path)
                if read_manifest(directory, self.spec.name, sha256) is None:
                    known = read_manifest(other, self.spec.name, sha256)
                    if known is not None:
                        self._say(f"the facts of {path} come from {other}")
                        write_manifest(directory, known)

    def _restore_live(self) -> None:
        """Put back what was deployed last if a copy of it is intact, else the newest that is."""
        from muse_assets.publishing.backups import backups, is_intact
        from muse_assets.snapshots.store import snapshots

        last = self._last_deployed()
        kept = [b.manifest.sha256 for b in backups(self.spec, self.server) if b.manifest and is_intact(b)]
        built = list(snapshots(self.work, self.spec))
        same = [one for one in built if one.manifest.sha256 == last]
        if last in kept:
            self._deploy(rollback=True, rollback_to=last, pin=False)
        elif same or built:
            self._deploy(partition=(same or built)[0].day.isoformat(), replace_damaged=True)
        elif kept:
            self._deploy(rollback=True, rollback_to=kept[0], pin=False)

    def _deploy_again(self) -> None:
        """The newest build; of a pinned index the content that it is pinned to."""
        from muse_assets.publishing.pinning import read_pin

        pin = read_pin(self.server, self.spec.name)
        if pin and pin.sha256:
            self._deploy(rollback=True, rollback_to=pin.sha256, pin=False)
        else:
            self._deploy(replace_damaged=True)

    def _restore_cluster(self) -> bool:
        """Return whether the cluster has to be trained anew: no intact index was filled from it."""
        from muse_assets.publishing.live import live_file
        from muse_assets.snapshots.cluster import restore_cluster
        from muse_assets.snapshots.store import snapshots

        if not self.bad(self.spec.cluster_file):
            return False
        path = self.work / self.spec.cluster_file
        live = live_file(self.server, self.spec)
        filled = [snapshot.path for snapshot in snapshots(self.work, self.spec)]
        if live is not None and not live.damaged:
            filled.append(live.path)
        for source in filled:
            if restore_cluster(source, path, self.spec):
                self._say(f"{path} was restored from {source}")
                return False
        return True

    def _drop_snapshots(self) -> bool:
        """Remove damaged snapshots and row facts; return whether the newest snapshot was one of them."""
        from muse_assets.durable_files import locked
        from muse_assets.snapshots.store import lock_file, snapshot_files

        with locked(lock_file(self.work, self.spec)):
            files = [path for _, path in snapshot_files(self.work, self.spec)]
            # Not the unknown ones, which this system did not write.
            bad = self.bad()
            damaged = {found.path for found in bad if found.state == "damaged"} & set(files)
            rows = {found.path for found in bad if found.path.suffix == ".npz"}
            for path in damaged | rows:
                path.unlink(missing_ok=True)
                self._say(f"{path} was removed")
        return bool(rows) or bool(damaged & set(files[:1]))

    def _set_backups_aside(self) -> None:
        from muse_assets.publishing.backups import set_aside_damaged
        from muse_assets.publishing.layout import working_on

        if any(finding.path in self._backups(self.server) for finding in self.bad()):
            with working_on(self.spec, self.server):
                for path in set_aside_damaged(self.spec, self.server):
                    self._say(f"a damaged backup is kept aside as {path}")

    def _build(self, *, rebuild: bool) -> None:
        from muse_assets.assets.index_lane import cluster_key, index_key
        from muse_assets.automation import DAILY, REBUILD
        from muse_assets.seoul_time import seoul_today

        keys = [cluster_key(self.spec)] * rebuild + [index_key(self.spec)]
        self._launch(REBUILD if rebuild else DAILY, keys, partition=seoul_today().isoformat())

    def _deploy(self, **options: Any) -> None:
        from muse_assets.assets.index_lane import deployed_key
        from muse_assets.automation import DEPLOY, asset_config

        self._launch(
            DEPLOY, [deployed_key(self.spec)], run_config=asset_config(deployed_key(self.spec), **options)
        )

    def _launch(self, job: str, keys: Iterable[dg.AssetKey], **options: Any) -> None:
        from muse_assets.cli.launching import launch

        keys = list(keys)
        outcome = launch(self.defs, self.instance, job, keys, **options)
        names = ", ".join(key.to_user_string() for key in keys)
        self._say(f"{names}: {'done' if outcome.success else 'failed'}")
        if not outcome.success:
            click.echo(outcome.failure, err=True)

    def _last_deployed(self) -> str | None:
        from muse_assets.assets.index_lane import deployed_key

        event = self.instance.get_latest_materialization_event(deployed_key(self.spec))
        found = event and event.asset_materialization
        return str(found.metadata["sha256"].value) if found and "sha256" in found.metadata else None

    def _backups(self, directory: Path) -> list[Path]:
        return sorted((directory / ".backups" / self.spec.name).glob("*.index"))

    def _say(self, what: str) -> None:
        click.echo(f"{self.spec.name}: {what}")
