"""A work directory with one day built and a table that has grown since, to be copied for each fault.

Here: making it, building its second day, looking at what is there. Not here: the faults.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

from muse_assets.connections.databases import engine_for
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.progress import Progress, silent
from muse_assets_tests import embedding_rows
from muse_assets_tests.embedding_rows import payloads_of, put_rows, unit_vectors
from muse_assets_tests.server_directories import sha

SPEC = replace(embedding_rows.SPEC, recall_gate=0.3)
_DAYS = (date(2026, 11, 1), date(2026, 11, 2))


@dataclass(frozen=True)
class Lane:
    """The template is in `folder`. wanted: content of the second day; size: its bytes."""

    folder: Path
    wanted: str = ""
    size: int = 0

    def fresh(self, label: str) -> Path:
        """A copy of the template."""
        copy = self.folder / label
        subprocess.run(["cp", "-a", self.template, copy], check=True)
        return copy

    def build_in(self, folder: Path, on_progress: Progress = silent) -> Callable[[], str]:
        """Builds the second day in the copy, and returns its content's hash."""
        engine = engine_for(f"sqlite:///{folder / 'e.sqlite'}")

        def build() -> str:
            try:
                built = build_snapshot(engine, SPEC, folder / "work", _DAYS[1], on_progress=on_progress)
                return built.manifest.sha256
            finally:
                engine.dispose()

        return build

    def files(self, folder: Path) -> dict[str, str]:
        """Name -> content of the index files in a copy."""
        return {path.name: sha(path) for path in (folder / "work").glob("*.index")}

    @property
    def template(self) -> Path:
        return self.folder / "template"

    @property
    def target(self) -> str:
        return SPEC.snapshot_file(_DAYS[1])

    @property
    def log(self) -> Path:
        return self.folder / "strace"


def built_lane(folder: Path) -> Lane:
    """A lane in the empty folder."""
    lane = Lane(folder)
    lane.template.mkdir()
    engine = engine_for(f"sqlite:///{lane.template / 'e.sqlite'}")
    put_rows(engine, SPEC, payloads_of(unit_vectors(300)))
    train_cluster(engine, SPEC, lane.template / "work" / SPEC.cluster_file)
    build_snapshot(engine, SPEC, lane.template / "work", _DAYS[0])
    put_rows(engine, SPEC, payloads_of(unit_vectors(20, seed=1), 301))
    engine.dispose()
    warm = lane.fresh("warm")
    wanted = lane.build_in(warm)()
    return replace(lane, wanted=wanted, size=(warm / "work" / lane.target).stat().st_size)
