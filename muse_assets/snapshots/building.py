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
from sqlalchemy import Engine

from muse_assets import durable_files
from muse_assets.catalog import IndexSpec
from muse_assets.durable_files import Staged
from muse_assets.embeddings.decoding import Reason
from muse_assets.embeddings.digests import BUCKET_ROWS, changed_buckets
from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.contents import list_ids, list_sizes, trained_fingerprint
from muse_assets.ivfpq.duplicates import find_duplicates
from muse_assets.ivfpq.encoding import encoder_name
from muse_assets.ivfpq.exact_neighbors import Queries, lists_suffice
from muse_assets.ivfpq.files import discard_lists, ntotal_field, read_index, write_index
from muse_assets.ivfpq.probing import K, ProbeCurve, choose_nprobe, measure_probes, recall_at
from muse_assets.ivfpq.quality import imbalance
from muse_assets.manifest import Manifest, read_manifest, write_manifest
from muse_assets.snapshots import gate
from muse_assets.snapshots.cluster import SEED, Cluster, keep_queries, load_cluster
from muse_assets.snapshots.data_quality import (
    TELLING_ROWS,
    DuplicateGroup,
    confirm_duplicates,
    constant_dimensions,
    norm_outliers,
)
from muse_assets.snapshots.drift import Drift, measure_drift, widest_recall
from muse_assets.snapshots.encoding_workers import Recruit, in_process
from muse_assets.snapshots.gate import Check, GateFailed
from muse_assets.snapshots.progress import Progress, silent
from muse_assets.snapshots.queries import draw_queries
from muse_assets.snapshots.rereading import Reread, read_rows, reread
from muse_assets.snapshots.store import (
    RowState,
    Snapshot,
    lock_file,
    no_rows,
    read_state,
    snapshots,
    sweep,
    write_state,
)
from muse_assets.snapshots.sync import Synced, require_plausible, synchronize
from muse_assets.snapshots.table_state import (
    Since,
    TableState,
    read_table_state,
    require_forward,
    require_vouched_for,
)

_COMPARED_QUERIES = 20


@dataclass(frozen=True)
class Built:
    """A snapshot in place, what the gate said of it, and what was learned of the table.

    rejected_examples: reason -> up to five idx. table_rows: valid and rejected. seconds: of this build.
    duplicates: the largest groups of rows that share a code; of an unchanged table they are not read again.
    encoded_on: who encoded the rows, empty where none had to be; dashboard: their web page, if they have one.
    previous: the newest snapshot up to that day as the build found it; None for the first.
    """

    path: Path
    manifest: Manifest
    checks: tuple[Check, ...]
    rejected_examples: dict[str, list[int]]
    table_rows: int
    table_columns: dict[str, str]
    seconds: float
    duplicates: tuple[DuplicateGroup, ...] = ()
    encoded_on: str = ""
    dashboard: str | None = None
    previous: Snapshot | None = None


@dataclass(frozen=True)
class _Build:
    """What one build is of; started: monotonic seconds."""

    engine: Engine
    spec: IndexSpec
    work: Path
    day: date
    on_progress: Progress
    recruit: Recruit
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
    """An index that was synced, and what it was synced from and to.

    previous: the newest snapshot. replaced: rows of it in whose place stands another vector.
    """

    index: Any
    previous: Snapshot | None
    replaced: int
    cluster: Cluster
    parent: _Parent | None
    table: TableState
    synced: Synced


@dataclass(frozen=True)
class _Measured:
    """distances (c, K) float32: what the index gives for the first c queries."""

    curve: ProbeCurve
    distances: NDArray[np.float32]


def build_snapshot(
    engine: Engine,
    spec: IndexSpec,
    work: Path,
    day: date,
    *,
    cluster_path: Path | None = None,
    confirm_shrink: bool = False,
    full: bool = False,
    verify_all: bool = False,
    on_progress: Progress = silent,
    recruit: Recruit = in_process,
) -> Built:
    """Build and validate `muse_<index>_<YYYYMMDD>.index` for a Seoul day in the work directory.

    Builds on the newest verified snapshot of that day or an earlier one with the same trained cluster,
    encoder and source; else, or with `full`, from the empty cluster. `confirm_shrink` accepts a mass
    disappearance or exchange of rows. The whole table is digested by a build without a parent, with either
    of those and with `verify_all`; else what `spec.verify_days` makes due. `recruit` says who encodes. Raises
    GateFailed (with every check) when the result is not good, another MuseError when it could not be made;
    then the day's previous file, if any, is untouched.
    """
    build = _Build(engine, spec, work, day, on_progress, recruit, time.monotonic())
    unharmed = f"no snapshot of {day} was written"
    with (
        durable_files.explained(f"Index {spec.name}", work, unharmed),
        durable_files.locked(lock_file(work, spec)),
    ):
        cluster = load_cluster(cluster_path or work / spec.cluster_file, spec)
        sweep(work, spec)
        found = snapshots(work, spec, until=day)
        previous = next(found, None)
        earlier = chain([previous] if previous else [], found)
        parent = None if full else _find_parent(build, cluster, earlier)
        on_progress("digesting the table", 0, 0)
        midnight = datetime.combine(day + timedelta(days=1), datetime.min.time())
        since = None
        if parent and spec.verify_days > 1 and not (verify_all or confirm_shrink):
            since = Since(parent.state.digests, parent.state.verified, day)
        table = read_table_state(engine, spec, midnight, since)
        if previous and previous.manifest.source.split(".")[0] == spec.table:
            newest = previous.manifest.newest_idx
            require_forward(engine, spec, table, newest, confirm_shrink=confirm_shrink)
        require_vouched_for(engine, spec, table)
        same_rows = parent and not len(changed_buckets(parent.state.digests, table.digests))
        if parent and same_rows and parent.snapshot.manifest.gate == gate_of(spec):
            built = _unchanged(build, parent, table)
        else:
            filled = _fill(build, cluster, parent, table, previous)
            if parent and not lists_suffice(filled.synced.state.neighbors):
                # In a gap that was not asked for there may be rows: no full build without them.
                table = read_table_state(engine, spec, midnight) if since else table
                replaced = filled.replaced
                discard_lists(filled.index)
                anew = _fill(build, load_cluster(cluster.path, spec), None, table, previous)
                filled = replace(anew, replaced=replaced)
            if confirm_shrink:  # the table was emptied or restored on purpose
                filled = replace(filled, replaced=0)
            previous_rows = previous.manifest.rows if previous else 0
            require_plausible(spec, filled.synced, previous_rows, confirm_shrink=confirm_shrink)
            built = _finish(build, filled)
        return replace(built, previous=previous)


def _fill(
    build: _Build,
    cluster: Cluster,
    parent: _Parent | None,
    table: TableState,
    previous: Snapshot | None,
) -> _Filled:
    if parent:
        index, before = read_index(parent.snapshot.path), parent.state
    else:
        queries = cluster.queries
        if queries is None:
            queries = draw_queries(build.engine, build.spec, seed=SEED)
            keep_queries(cluster, build.spec, queries)
        index, before = cluster.index, no_rows(queries)
    synced = synchronize(build.engine, build.spec, index, before, table, build.on_progress, build.recruit)
    state = replace(synced.state, verified=table.verified(build.day))
    synced = replace(synced, state=state)
    return _Filled(index, previous, synced.replaced, cluster, parent, table, synced)


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
        f"rejected {spec.max_rejected_share} duplicates {spec.max_duplicate_share} "
        f"norms {spec.max_norm_outlier_share} constant {spec.max_constant_share}"
        f"{f' nprobe {spec.nprobe}' if spec.nprobe else ''}"
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
    state = replace(parent.state, verified=table.verified(build.day))
    if build.spec.verify_days > 1:  # else nobody reads the days, and an unchanged day costs no file
        write_state(build.work, build.spec.name, before.sha256, state)
    manifest = replace(
        before,
        partition=max(before.partition, build.day.isoformat()),
        mode="unchanged",
        newest_idx=table.newest_idx,
        parent=before.sha256,
        added=0,
        removed=0,
        reembedded=0,
        verified_from=_verified_from(state),
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
    return _built(build, manifest, checks, state, table)


def _finish(build: _Build, filled: _Filled) -> Built:
    spec, synced, day = build.spec, filled.synced, build.day.isoformat()
    build.on_progress("measuring recall", 0, 0)
    measured = _measure(spec, filled.index, synced.state)
    build.on_progress("writing", 0, 0)
    staged = durable_files.stage(build.target, partial(write_index, filled.index))
    try:
        build.on_progress("checking", 0, 0)
        # What is checked is what is served; and a build holds one index, not two.
        discard_lists(filled.index)
        try:
            index = read_index(staged.path)
        except PermanentFailure as error:
            unread = gate.check_integrity((error.what,), staged.sha256, staged.size)
            raise GateFailed(spec, day, (unread,)) from error
        sizes = list_sizes(index)
        again = reread(build.engine, spec, build.day, index, synced)
        drift = _measure_drift(build, filled, index, measured.curve, again)
        duplicates = find_duplicates(index)
        different = _differences(index, filled.cluster.fingerprint, synced.state.queries, measured)
        checks = (
            gate.check_id_parity(synced.expected_ids, list_ids(index), synced.state.digests.total_rows),
            gate.check_recall(spec, measured.curve, index.nprobe),
            gate.check_reencoding(again.wrong, len(again.ids)),
            gate.check_balance(spec, imbalance(index), sizes),
            _check_embedding_model(build, filled, again),
            gate.check_drift(drift),
            gate.check_norms(np.linalg.norm(again.vectors, axis=1)),
            gate.check_norm_outliers(spec, norm_outliers(again.ids, again.vectors)),
            gate.check_constant_dimensions(spec, constant_dimensions(again.vectors[again.random])),
            gate.check_duplicates(spec, duplicates),
            gate.check_integrity(different, staged.sha256, staged.size),
        )
        gate.require_passed(spec, day, checks)
        groups = confirm_duplicates(duplicates, spec.id_offset, partial(read_rows, build.engine, spec))
        manifest = _manifest(build, filled, index, measured.curve, drift, staged, checks)
        write_state(build.work, spec.name, staged.sha256, synced.state)
        write_manifest(build.work, manifest)
    except BaseException:
        durable_files.discard(staged)
        raise
    durable_files.commit(staged)
    return replace(
        _built(build, manifest, checks, synced.state, filled.table),
        duplicates=groups,
        encoded_on=synced.encoded_on,
        dashboard=synced.dashboard,
    )


def _built(
    build: _Build, manifest: Manifest, checks: tuple[Check, ...], state: RowState, table: TableState
) -> Built:
    return Built(
        path=build.target,
        manifest=manifest,
        checks=tuple(
            gate.with_verification(check, build.day.isoformat(), manifest.verified_from)
            if check.name == gate.ID_PARITY
            else check
            for check in checks
        ),
        rejected_examples=_rejected_examples(state),
        table_rows=state.digests.total_rows,
        table_columns=table.columns,
        seconds=time.monotonic() - build.started,
    )


def _measure(spec: IndexSpec, index: Any, state: RowState) -> _Measured:
    """Measure recall by nprobe, set the nprobe that follows, and note some distances.

    Without a precomputed table: of 1,414 lists it is 92 MB, and saves these few queries 0.03 s of 0.25.
    """
    curve = measure_probes(index, state.queries, state.neighbors, fixed=spec.nprobe)
    index.nprobe = choose_nprobe(curve, spec.recall_gate, spec.probe_share, spec.nprobe)
    return _Measured(curve, index.search(state.queries.vectors[:_COMPARED_QUERIES], K)[0])


def _check_embedding_model(build: _Build, filled: _Filled, again: Reread) -> Check:
    synced, queries = filled.synced, filled.synced.state.queries.vectors
    put_in = np.isin(again.ids, np.concatenate([synced.added_ids, synced.recoded_ids]))
    foreign = of_table = shift = None
    if len(queries) >= TELLING_ROWS:
        center = queries.mean(axis=0)
        foreign, of_table = (again.foreign_share(rows, center) for rows in (put_in, again.random))
        spread = float(queries.var(axis=0).sum())
        if spread and foreign is not None:
            shift = float(np.square(again.vectors[put_in].mean(axis=0) - center).sum()) / spread
    return gate.check_embedding_model(
        build.spec,
        rows=len(synced.expected_ids),
        put_in=synced.added + synced.reembedded,
        replaced=filled.replaced,
        foreign=foreign,
        foreign_of_table=of_table,
        mean_shift=shift,
    )


def _measure_drift(
    build: _Build, filled: _Filled, index: Any, curve: ProbeCurve, again: Reread
) -> Drift | None:
    """None where nobody knows what the cluster was trained on."""
    trained = filled.cluster.facts
    if trained is None:
        return None
    ids, newest = filled.synced.expected_ids, trained.newest_idx + build.spec.id_offset
    return measure_drift(
        trained,
        curve,
        rows=len(ids),
        new_rows=int((ids > newest).sum()),
        new_error=again.mean_error(again.random & (again.ids > newest)),
        imbalance=imbalance(index),
        trained_recall=_trained_recall(filled, curve),
    )


def _trained_recall(filled: _Filled, curve: ProbeCurve) -> float:
    """Of the first index with this cluster: the curve's, where there is no earlier one."""
    before = _of_this_cluster(filled)
    return before.trained_recall if before and before.trained_recall else widest_recall(curve)


def _of_this_cluster(filled: _Filled) -> Manifest | None:
    """Facts of the newest snapshot, where it was made with the same cluster and so has the same queries."""
    before = filled.previous.manifest if filled.previous else None
    return before if before and before.cluster == filled.cluster.fingerprint and before.queries else None


def _previous_recall(filled: _Filled) -> float | None:
    """What the newest snapshot finds of the queries, at its own nprobe; after a retrain it is asked anew.

    None where there is none, or where it cannot be asked: its vectors have another length.
    """
    queries = filled.synced.state.queries.vectors
    if filled.previous is None or filled.previous.manifest.dimension != queries.shape[1]:
        return None
    if same := _of_this_cluster(filled):
        return same.recall_at_10
    state, index = filled.synced.state, read_index(filled.previous.path)
    return recall_at(index, state.queries, state.neighbors)


def _differences(written: Any, fingerprint: str, queries: Queries, measured: _Measured) -> tuple[str, ...]:
    """What the written file, read back, has otherwise than the index that was measured."""
    problems = []
    if trained_fingerprint(written) != fingerprint:
        problems.append("the written file has another cluster")
    distances, _ = written.search(queries.vectors[:_COMPARED_QUERIES], K)
    # Not to the bit: how FAISS sums depends on settings of the whole process, which any encoder changes.
    if not np.allclose(distances, measured.distances, rtol=1e-3, atol=1e-5):
        problems.append("the written file answers differently")
    return tuple(problems)


def _manifest(
    build: _Build,
    filled: _Filled,
    index: Any,
    curve: ProbeCurve,
    drift: Drift | None,
    staged: Staged,
    checks: tuple[Check, ...],
) -> Manifest:
    spec, synced = build.spec, filled.synced
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
        verified_from=_verified_from(synced.state),
        newest_idx=filled.table.newest_idx,
        mode="incremental" if filled.parent else "full",
        parent=filled.parent.snapshot.manifest.sha256 if filled.parent else None,
        added=synced.added,
        removed=synced.removed,
        reembedded=synced.reembedded,
        rejected=synced.state.rejected_counts(),
        **recall_facts(curve, index.nprobe),
        previous=filled.previous.manifest.sha256 if filled.previous else None,
        previous_recall_at_10=_previous_recall(filled),
        trained_recall=_trained_recall(filled, curve),
        drift=drift.facts() if drift else {},
        imbalance=round(imbalance(index), 4),
        list_sizes=[int(size) for size in list_sizes(index)],
        checks={
            check.name: {"passed": check.passed, "summary": check.summary, **check.facts} for check in checks
        },
    )


def recall_facts(curve: ProbeCurve, nprobe: int) -> dict[str, Any]:
    """The manifest's fields of a measured curve, and of the nprobe that the file holds."""
    stored = curve.at(nprobe)
    return {
        "queries": curve.queries,
        "recall_at_1": stored.recall[1],
        "recall_at_10": stored.recall[K],
        "recall_at_100": stored.recall.get(100),
        "codes_scanned": stored.codes_scanned,
        "probes": [
            {
                "nprobe": probe.nprobe,
                **{f"recall@{k}": round(recall, 4) for k, recall in probe.recall.items()},
                "codes scanned": round(probe.codes_scanned, 1),
            }
            for probe in curve.probes
        ],
    }


def _verified_from(state: RowState) -> str:
    oldest = state.verified.oldest
    return oldest.isoformat() if oldest else ""


def _numbers(facts: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in facts.items() if key not in ("passed", "summary")}


def _rejected_examples(state: RowState) -> dict[str, list[int]]:
    """Reason -> up to five idx."""
    return {
        reason: [int(i) for i in state.rejected_idx[state.rejected_reason == Reason[reason.upper()]][:5]]
        for reason in state.rejected_counts()
    }
