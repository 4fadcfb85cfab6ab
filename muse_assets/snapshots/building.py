"""One day's snapshot of one index: sync, measure, write, gate, and only then the file's real name.

Here: the order of the steps and the facts they leave. Not here: each step's work (`sync`, `gate`,
`store`), or Dagster (`assets.index_lane`).
"""

from __future__ import annotations

import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine

from muse_assets import durable_files
from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import read
from muse_assets.durable_files import Staged
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.digests import BUCKET_ROWS, changed_buckets, read_digests
from muse_assets.embeddings.reading import Bounds, Page, join_pages, rows_by_idx
from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.contents import list_ids, list_sizes, trained_fingerprint
from muse_assets.ivfpq.encoding import encoder_name
from muse_assets.ivfpq.files import ntotal_field, read_index, write_index
from muse_assets.ivfpq.quality import (
    ProbeCurve,
    choose_nprobe,
    imbalance,
    measure_probes,
    reencoded_wrongly,
)
from muse_assets.manifest import Manifest, read_manifest, write_manifest
from muse_assets.snapshots import gate
from muse_assets.snapshots.cluster import Cluster, load_cluster
from muse_assets.snapshots.gate import Check
from muse_assets.snapshots.progress import Progress, silent
from muse_assets.snapshots.store import (
    RowState,
    Snapshot,
    lock_file,
    read_state,
    snapshots,
    sweep,
    write_state,
)
from muse_assets.snapshots.sync import (
    Synced,
    TableState,
    read_table_state,
    require_forward,
    require_plausible,
    require_still_there,
    synchronize,
)

# Rows read again from the table for the gate: 20,000 bound its cost, and hold ten true neighbors of most
# queries near enough that recall reads at most a few points low.
_SAMPLED_ROWS = 20_000
_REENCODED_ROWS = 1_000
_QUERIES = 200
_SAMPLE_SEED = 7


@dataclass(frozen=True)
class Built:
    """A snapshot in place, what the gate said of it, and what was learned of the table.

    rejected_examples: reason -> up to five idx. table_rows: valid and rejected. seconds: of this build.
    previous: the newest snapshot up to that day as the build found it; None for the first.
    """

    path: Path
    manifest: Manifest
    checks: tuple[Check, ...]
    rejected_examples: dict[str, list[int]]
    table_rows: int
    table_columns: dict[str, str]
    seconds: float
    previous: Snapshot | None = None


@dataclass(frozen=True)
class _Build:
    """What one build is of; started: monotonic seconds."""

    engine: Engine
    spec: IndexSpec
    work: Path
    day: date
    on_progress: Progress
    started: float

    @property
    def target(self) -> Path:
        return self.work / self.spec.snapshot_file(self.day)


@dataclass(frozen=True)
class _Parent:
    snapshot: Snapshot
    state: RowState


@dataclass(frozen=True)
class _Filled:
    """An index that was synced, and what it was synced from and to."""

    index: Any
    cluster: Cluster
    parent: _Parent | None
    table: TableState
    synced: Synced


@dataclass(frozen=True)
class _Measured:
    curve: ProbeCurve
    imbalance: float
    list_sizes: NDArray[np.int64]


@dataclass(frozen=True)
class _RowSample:
    ids: NDArray[np.int64]
    vectors: NDArray[np.float32]


def build_snapshot(
    engine: Engine,
    spec: IndexSpec,
    work: Path,
    day: date,
    *,
    cluster_path: Path | None = None,
    confirm_shrink: bool = False,
    full: bool = False,
    on_progress: Progress = silent,
) -> Built:
    """Build and validate `muse_<index>_<YYYYMMDD>.index` for a Seoul day in the work directory.

    Builds on the newest verified snapshot of that day or an earlier one with the same trained cluster,
    encoder and source; else, or with `full`, from the empty cluster. `confirm_shrink` accepts a mass
    disappearance of rows. Raises GateFailed (with every check) when the result is not good, another
    MuseError when it could not be made; then the day's previous file, if any, is untouched.
    """
    build = _Build(engine, spec, work, day, on_progress, time.monotonic())
    unharmed = f"no snapshot of {day} was written"
    with (
        durable_files.explained(f"Index {spec.name}", work, unharmed),
        durable_files.locked(lock_file(work, spec)),
    ):
        cluster = load_cluster(cluster_path or work / spec.cluster_file, spec)
        sweep(work, spec)
        on_progress("digesting the table", 0, 0)
        midnight = datetime.combine(day + timedelta(days=1), datetime.min.time())
        table = read_table_state(engine, spec, midnight)
        found = snapshots(work, spec, until=day)
        previous = next(found, None)
        if previous and previous.manifest.source.split(".")[0] == spec.table:
            newest = previous.manifest.newest_idx
            require_forward(engine, spec, table, newest, confirm_shrink=confirm_shrink)
        earlier = chain([previous] if previous else [], found)
        parent = None if full else _find_parent(build, cluster, earlier)
        same_rows = parent and not len(changed_buckets(parent.state.digests, table.digests))
        if parent and same_rows and parent.snapshot.manifest.gate == gate_of(spec):
            built = _unchanged(build, parent, table)
        else:
            index = read_index(parent.snapshot.path) if parent else cluster.index
            synced = synchronize(engine, spec, index, parent.state if parent else None, table, on_progress)
            previous_rows = previous.manifest.rows if previous else 0
            require_plausible(spec, synced, previous_rows, confirm_shrink=confirm_shrink)
            built = _finish(build, _Filled(index, cluster, parent, table, synced))
        return replace(built, previous=previous)


def source_of(spec: IndexSpec) -> str:
    """What the vectors come from and how they are read: another source is never built upon."""
    return (
        f"{spec.table}.{spec.embedding_column} {spec.encoding} offset {spec.id_offset} "
        f"buckets {BUCKET_ROWS}{' normalized' if spec.normalize else ''}"
    )


def gate_of(spec: IndexSpec) -> str:
    """The limits a snapshot has to keep: after a change of them even an unchanged table is measured anew."""
    return (
        f"recall {spec.recall_gate} probes {spec.probe_share} imbalance {spec.max_imbalance} "
        f"rejected {spec.max_rejected_share}{f' nprobe {spec.nprobe}' if spec.nprobe else ''}"
    )


def _find_parent(build: _Build, cluster: Cluster, earlier: Iterable[Snapshot]) -> _Parent | None:
    wanted = (cluster.fingerprint, encoder_name(), source_of(build.spec))
    for snapshot in earlier:
        found = snapshot.manifest
        if (found.cluster, found.encoder, found.source) == wanted:
            state = read_state(build.work, build.spec.name, found.sha256)
            if state is not None:
                return _Parent(snapshot, state)
    return None


def _unchanged(build: _Build, parent: _Parent, table: TableState) -> Built:
    """The table equals the parent: the day gets a hard link and keeps the parent's measurements."""
    before = parent.snapshot.manifest
    manifest = replace(
        before,
        partition=max(before.partition, build.day.isoformat()),
        mode="unchanged",
        newest_idx=table.newest_idx,
        parent=before.sha256,
        added=0,
        removed=0,
        reembedded=0,
    )
    write_manifest(build.work, manifest)
    if parent.snapshot.path != build.target:
        durable_files.link(parent.snapshot.path, build.target)
    checks = tuple(
        gate.carried(
            Check(name, bool(facts["passed"]), str(facts["summary"]), _numbers(facts)), before.partition
        )
        for name, facts in before.checks.items()
    )
    return _built(build, manifest, checks, parent.state, table)


def _finish(build: _Build, filled: _Filled) -> Built:
    spec, index, synced = build.spec, filled.index, filled.synced
    build.on_progress("measuring recall", 0, 0)
    index.use_precomputed_table = 0
    index.precompute_table()
    sample = _sample_rows(build, synced)
    curve = measure_probes(index, sample.ids, sample.vectors, _QUERIES, fixed=spec.nprobe)
    index.nprobe = choose_nprobe(curve, spec.recall_gate, spec.probe_share, spec.nprobe)
    measured = _Measured(curve, imbalance(index), list_sizes(index))
    build.on_progress("writing", 0, 0)
    staged = durable_files.stage(build.target, partial(write_index, index))
    try:
        build.on_progress("checking", 0, 0)
        differences = _differences(staged, index, filled.cluster, sample)
        checks = (
            gate.check_id_parity(synced.expected_ids, list_ids(index), synced.state.digests.total_rows),
            gate.check_recall(spec, curve, index.nprobe, len(sample.ids)),
            _reencode(build, index, sample, synced),
            gate.check_balance(spec, measured.imbalance, measured.list_sizes),
            gate.check_norms(np.linalg.norm(sample.vectors, axis=1)),
            gate.check_integrity(differences, staged.sha256, staged.size),
        )
        gate.require_passed(spec, build.day.isoformat(), checks)
        manifest = _manifest(build, filled, measured, staged, checks)
        write_state(build.work, spec.name, staged.sha256, synced.state)
        write_manifest(build.work, manifest)
    except BaseException:
        durable_files.discard(staged)
        raise
    durable_files.commit(staged)
    return _built(build, manifest, checks, synced.state, filled.table)


def _built(
    build: _Build, manifest: Manifest, checks: tuple[Check, ...], state: RowState, table: TableState
) -> Built:
    return Built(
        path=build.target,
        manifest=manifest,
        checks=checks,
        rejected_examples=_rejected_examples(state),
        table_rows=state.digests.total_rows,
        table_columns=table.columns,
        seconds=time.monotonic() - build.started,
    )


def _sample_rows(build: _Build, synced: Synced) -> _RowSample:
    """Random valid rows, read again from the table; rows that have gone meanwhile are left out.

    The choice depends on the ids alone, so the same rows give the same nprobe and the same file.
    """
    spec, random = build.spec, np.random.default_rng(_SAMPLE_SEED)
    count = min(_SAMPLED_ROWS, len(synced.expected_ids))
    wanted = np.sort(random.choice(synced.expected_ids, count, replace=False)) - spec.id_offset

    def rows(connection: Connection) -> Page:
        return join_pages(rows_by_idx(connection, spec, wanted))

    page = read(build.engine, f"sampling {spec.table} to check {spec.name}", rows)
    # A gate that measures next to nothing passes everything: recall 1.0 after a TRUNCATE.
    require_still_there(spec, count, len(page.idx))
    decoded = decode(page.payloads, spec.dimension, spec.encoding, spec.normalize)
    good = decoded.reasons == Reason.OK
    ids, vectors = page.idx[good] + spec.id_offset, decoded.vectors[good]
    order = random.permutation(len(ids))
    return _RowSample(ids[order], vectors[order])


def _reencode(build: _Build, index: Any, sample: _RowSample, synced: Synced) -> Check:
    spec = build.spec
    ids = sample.ids[:_REENCODED_ROWS]
    wrong = reencoded_wrongly(index, ids, sample.vectors[:_REENCODED_ROWS])
    if len(wrong):
        # A writer may have changed a row after it was indexed: that is the next run's, not a fault.
        buckets = np.unique((wrong - spec.id_offset) // BUCKET_ROWS)
        bounds = [Bounds(int(b) * BUCKET_ROWS, int(b + 1) * BUCKET_ROWS - 1) for b in buckets]
        now = read(
            build.engine,
            f"digesting {spec.table} for {spec.name}",
            lambda connection: read_digests(connection, spec, bounds),
        )
        moved = changed_buckets(synced.state.digests.select(buckets), now)
        wrong = wrong[~np.isin((wrong - spec.id_offset) // BUCKET_ROWS, moved)]
    return gate.check_reencoding(wrong, len(ids))


def _differences(staged: Staged, index: Any, cluster: Cluster, sample: _RowSample) -> tuple[str, ...]:
    """What the written file, read back, has otherwise than the index in memory."""
    try:
        written = read_index(staged.path, precompute=True)
    except PermanentFailure as error:
        return (error.what,)
    problems = []
    if not np.array_equal(np.sort(list_ids(written)), np.sort(list_ids(index))):
        problems.append("the written file holds other ids")
    if trained_fingerprint(written) != cluster.fingerprint:
        problems.append("the written file has another cluster")
    queries = sample.vectors[:20]
    if len(queries) and not all(
        np.array_equal(a, b)
        for a, b in zip(written.search(queries, 10), index.search(queries, 10), strict=True)
    ):
        problems.append("the written file answers differently")
    return tuple(problems)


def _manifest(
    build: _Build, filled: _Filled, measured: _Measured, staged: Staged, checks: tuple[Check, ...]
) -> Manifest:
    spec, index, synced, curve = build.spec, filled.index, filled.synced, measured.curve
    # A table that went back to an earlier state gives the bytes, and so the facts, of a newer day too.
    known = read_manifest(build.work, spec.name, staged.sha256)
    day = build.day.isoformat()
    return Manifest(
        index=spec.name,
        partition=max(day, known.partition) if known else day,
        sha256=staged.sha256,
        size=staged.size,
        built_at=datetime.now(UTC).isoformat(timespec="seconds"),
        rows=len(synced.expected_ids),
        ntotal_field=ntotal_field(index),
        index_class=type(index).__name__,
        dimension=index.d,
        metric=spec.metric,
        nlist=index.nlist,
        m=index.pq.M,
        nbits=index.pq.nbits,
        nprobe=index.nprobe,
        id_offset=spec.id_offset,
        cluster=filled.cluster.fingerprint,
        encoder=encoder_name(),
        source=source_of(spec),
        gate=gate_of(spec),
        newest_idx=filled.table.newest_idx,
        mode="incremental" if filled.parent else "full",
        parent=filled.parent.snapshot.manifest.sha256 if filled.parent else None,
        added=synced.added,
        removed=synced.removed,
        reembedded=synced.reembedded,
        rejected=synced.state.rejected_counts(),
        recall_at_10=curve.at(index.nprobe),
        recall_curve={str(n): round(r, 4) for n, r in zip(curve.nprobe, curve.recall, strict=True)},
        imbalance=round(measured.imbalance, 4),
        list_sizes=[int(size) for size in measured.list_sizes],
        checks={
            check.name: {"passed": check.passed, "summary": check.summary, **check.facts} for check in checks
        },
    )


def _numbers(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("passed", "summary")}


def _rejected_examples(state: RowState) -> dict[str, list[int]]:
    """Reason -> up to five idx."""
    return {
        reason: [int(i) for i in state.rejected_idx[state.rejected_reason == Reason[reason.upper()]][:5]]
        for reason in state.rejected_counts()
    }
