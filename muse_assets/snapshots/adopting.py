"""Takes an index file that this system did not write as the one to build on, without a rebuild.

Here: the proof, bucket by bucket, that an id in the file is `idx` + the catalog's offset, and what is
written then: the file as a snapshot, its row facts, its cluster. Not here: putting anything live, or
mending what was not proved: the next build pulls those buckets (`sync`), measures and gates the result.

The proof: every row of the table is encoded with the file's own quantizers, and its list and code have to
be what the file holds under the row's id. Files of faiss-cpu 1.11 with flat and with HNSW coarse quantizers
agreed in all of 4 x 20,000 rows, near-ties of identical vectors included; what differs all the same (a tie,
a row embedded again since) only makes its bucket be pulled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, tzinfo
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sqlalchemy import Connection, Engine

from muse_assets import durable_files
from muse_assets.catalog import IndexSpec
from muse_assets.connections.databases import read
from muse_assets.embeddings.decoding import Reason, decode
from muse_assets.embeddings.digests import BUCKET_ROWS, Digests, digest_rows, empty_digests
from muse_assets.embeddings.reading import (
    Bounds,
    Page,
    count_rows,
    join_pages,
    pages,
    table_columns,
)
from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.contents import Contents, list_sizes, read_contents, trained_fingerprint
from muse_assets.ivfpq.encoding import (
    coarse_quantizer,
    encode_all,
    encoder_name,
    split_codes,
    why_not_continued,
)
from muse_assets.ivfpq.exact_neighbors import NearestRows, Neighbors, Queries, no_neighbors
from muse_assets.ivfpq.files import describe, read_index
from muse_assets.ivfpq.probing import K, ProbeCurve, measure_probes
from muse_assets.ivfpq.quality import imbalance
from muse_assets.manifest import Manifest, write_manifest
from muse_assets.snapshots.building import recall_facts, source_of
from muse_assets.snapshots.cluster import SEED, ClusterManifest, load_cluster, take_cluster
from muse_assets.snapshots.progress import Progress, silent
from muse_assets.snapshots.queries import draw_queries
from muse_assets.snapshots.store import (
    RowState,
    Snapshot,
    lock_file,
    read_state,
    snapshots,
    sweep,
    write_state,
)

MODE = "adopted"
# Of the rows whose id the file has; below, nearly every bucket would be encoded anew anyway.
MIN_AGREEMENT = 0.9
# Rows that stand at other ids: two pairs whose vectors were swapped since. A gap shifts every later row.
_MAX_MOVED = 4
# Rows that differ are looked for at other ids; so many tell a shift from re-embedded rows.
_KEPT_DIFFERENCES = 50_000
_STEP_ROWS = 65_536
_MAX_STEPS = 1000
_PAGE_TRIES = 5
# A lower gate than measured: samples differ, and rows come and go.
_GATE_MARGIN = 0.95


@dataclass(frozen=True)
class Adoption:
    """What was taken over. compared: rows whose id the file has; equal: those with the same list and code.

    absent: usable rows that the file lacks; stale: ids of the file without a usable row. pulled: rows in
    buckets that were not proved, which the next build encodes. manifest: of the file, as a snapshot; cluster:
    of what it was trained to.
    """

    manifest: Manifest
    cluster: ClusterManifest
    coarse_quantizer: str
    compared: int
    equal: int
    absent: int
    stale: int
    pulled: int


@dataclass(frozen=True)
class _Moved:
    """Rows whose list and code the file holds under another id than theirs."""

    rows: int
    idx: int
    at: int


@dataclass(frozen=True)
class _Facts:
    """Of the proved buckets of a step: digests, and the rows that cannot be indexed."""

    digests: Digests
    rejected_idx: NDArray[np.int64]
    rejected_reason: NDArray[np.uint8]


@dataclass(frozen=True)
class _Proof:
    state: RowState
    newest_idx: int
    table_rows: int
    compared: int
    equal: int
    absent: int
    moved: _Moved | None


def adopt(
    engine: Engine, spec: IndexSpec, live: Path, work: Path, zone: tzinfo, *, on_progress: Progress = silent
) -> Adoption | None:
    """Take the file `live` over as a snapshot of the day it was written, in the work directory.

    zone: whose days those are. Returns None when the work directory builds on this file's cluster already.
    Raises PermanentFailure when the ids are not idx + offset, when the file's kind cannot be kept, when the
    catalog says another shape (with the lines to put there), or when the work directory has a cluster or
    snapshots of its own. `live` is only read.
    """
    if not live.is_file():
        raise PermanentFailure(
            f"Index {spec.name}: there is no file {live} to adopt.",
            next_step=f"correct MUSE_SERVER_DIR, or build the index: {_rebuild(spec)}.",
        )
    with (
        durable_files.explained(f"Index {spec.name}", work, "nothing was adopted"),
        durable_files.locked(lock_file(work, spec)),
    ):
        sweep(work, spec)
        written = min(datetime.fromtimestamp(live.stat().st_mtime, zone), datetime.now(zone))
        # A copy first: what is proved is what is kept, whatever the legacy batch does to the file meanwhile.
        target = work / spec.snapshot_file(written.date())
        staged = durable_files.stage(target, durable_files.copy_into(live), expected_size=live.stat().st_size)
        try:
            index = _read(spec, staged.path, live)
            fingerprint = trained_fingerprint(index)
            if _builds_on(spec, work, fingerprint):
                durable_files.discard(staged)
                return None
            held = read_contents(index)
            proof = _prove(engine, spec, index, held, on_progress)
            _require_ids_by_idx(spec, live, proof)
            on_progress("measuring recall", 0, 0)
            curve = measure_probes(index, proof.state.queries, proof.state.neighbors, fixed=index.nprobe)
            _require_shape(spec, live, index, curve)
            manifest = Manifest(
                index=spec.name,
                partition=written.date().isoformat(),
                sha256=staged.sha256,
                size=staged.size,
                built_at=written.astimezone(UTC).isoformat(timespec="seconds"),
                rows=len(held.ids),
                ntotal_field=describe(staged.path).ntotal,
                index_class=type(index).__name__,
                dimension=index.d,
                metric=spec.metric,
                nlist=index.nlist,
                m=index.pq.M,
                nbits=index.pq.nbits,
                nprobe=index.nprobe,
                id_offset=spec.id_offset,
                cluster=fingerprint,
                encoder=encoder_name(),
                source=source_of(spec),
                newest_idx=proof.newest_idx,
                mode=MODE,
                parent=None,
                added=0,
                removed=0,
                reembedded=0,
                gate="",  # nothing was gated: even an unchanged table is measured by the next build
                rejected=proof.state.rejected_counts(),
                **recall_facts(curve, index.nprobe),
                imbalance=round(imbalance(index), 4),
                list_sizes=[int(size) for size in list_sizes(index)],
            )
            write_state(work, spec.name, staged.sha256, proof.state)
            write_manifest(work, manifest)
            cluster = take_cluster(
                index,
                spec,
                work / spec.cluster_file,
                proof.state.queries,
                table_rows=proof.table_rows,
                newest_idx=proof.newest_idx,
            )
        except BaseException:
            durable_files.discard(staged)
            raise
        durable_files.commit(staged)
    return Adoption(
        manifest=manifest,
        cluster=cluster,
        coarse_quantizer=coarse_quantizer(index),
        compared=proof.compared,
        equal=proof.equal,
        absent=proof.absent,
        stale=len(held.ids) - proof.compared,
        pulled=proof.table_rows - proof.state.digests.total_rows,
    )


def _rebuild(spec: IndexSpec) -> str:
    return f"`muse run --rebuild --index {spec.name}` trains and builds it anew"


def _read(spec: IndexSpec, path: Path, live: Path) -> Any:
    """The index in the copy `path` of `live`; PermanentFailure unless we could go on building it."""
    try:
        index = read_index(path)
    except PermanentFailure as error:
        raise PermanentFailure(
            error.what.replace(str(path), str(live)), next_step=f"{_rebuild(spec)}."
        ) from None
    problems = why_not_continued(index)
    if index.d != spec.dimension:
        problems.append(f"its dimension is {index.d}, the catalog says {spec.dimension}")
    if not index.ntotal:
        problems.append("it holds no vectors")
    if problems:
        raise PermanentFailure(
            f"Index {spec.name}: {live} cannot be adopted: {'; '.join(problems)}.",
            next_step=f"check `dimension` in the catalog; else {_rebuild(spec)}.",
        )
    return index


def _builds_on(spec: IndexSpec, work: Path, fingerprint: str) -> bool:
    """Whether a snapshot there has this cluster; PermanentFailure where others would be mixed with it."""
    found: list[Snapshot] = list(snapshots(work, spec))
    if any(
        one.manifest.cluster == fingerprint and read_state(work, spec.name, one.manifest.sha256)
        for one in found
    ):
        return True
    foreign = [one.path for one in found if one.manifest.cluster != fingerprint]
    cluster = work / spec.cluster_file
    if cluster.exists() and not _same_cluster(spec, cluster, fingerprint):
        foreign.append(cluster)
    if foreign:
        names = ", ".join(sorted(path.name for path in foreign))
        raise PermanentFailure(
            f"Index {spec.name}: {work} has files of another cluster already: {names}.",
            next_step="go on with those, or move them out of that directory and adopt again.",
        )
    return False


def _same_cluster(spec: IndexSpec, path: Path, fingerprint: str) -> bool:
    try:
        return load_cluster(path, spec).fingerprint == fingerprint
    except PermanentFailure:
        return False


def _prove(engine: Engine, spec: IndexSpec, index: Any, held: Contents, on_progress: Progress) -> _Proof:
    def extent(connection: Connection) -> tuple[int, int, int]:
        table_columns(connection, spec)
        return count_rows(connection, spec)

    table_rows, oldest, newest = read(engine, f"counting {spec.table} for {spec.name}", extent)
    duplicate = held.ids[1:] == held.ids[:-1]
    once = np.ones(len(held.ids), bool)
    once[1:] &= ~duplicate
    once[:-1] &= ~duplicate
    agrees = np.zeros(len(held.ids), bool)
    queries = draw_queries(engine, spec, seed=SEED)
    nearest = NearestRows(queries, no_neighbors(queries))
    facts = [_Facts(empty_digests(), np.empty(0, np.int64), np.empty(0, np.uint8))]
    differing = [(held.ids[:0], held.lists[:0], held.codes[:0])]
    compared = absent = kept = done = 0
    for step in _steps(oldest, newest):
        page = read(
            engine,
            f"reading {spec.table} for {spec.name}",
            partial(_page, spec, step),
            tries=_PAGE_TRIES,
        )
        decoded = decode(page.payloads, spec.dimension, spec.encoding, spec.normalize)
        good = decoded.reasons == Reason.OK
        ids, vectors = page.idx[good] + spec.id_offset, decoded.vectors[good]
        nearest.take(ids, vectors)
        lists, codes = split_codes(index, encode_all(index, vectors))
        at = np.minimum(np.searchsorted(held.ids, ids), len(held.ids) - 1)
        present = held.ids[at] == ids
        equal = present & once[at] & (held.lists[at] == lists) & (held.codes[at] == codes).all(axis=1)
        agrees[at[equal]] = True
        compared += int(present.sum())
        absent += int((~present).sum())
        wrong = np.flatnonzero(present & ~equal)[: _KEPT_DIFFERENCES - kept]
        kept += len(wrong)
        differing.append((ids[wrong], lists[wrong], codes[wrong]))

        proved = _proved_buckets(spec, step, held, ids, ids[equal])
        digests = digest_rows(page.idx, page.payloads)
        rejected = ~good & np.isin(page.idx // BUCKET_ROWS, proved)
        facts.append(
            _Facts(digests.select(proved), page.idx[rejected], decoded.reasons[rejected].astype(np.uint8))
        )
        done += len(page.idx)
        on_progress("comparing with the table", done, table_rows)
    ids, lists, codes = (np.concatenate(parts) for parts in zip(*differing, strict=True))
    return _Proof(
        state=_joined(facts, queries, nearest.hand_over()),
        newest_idx=newest,
        table_rows=table_rows,
        compared=compared,
        equal=int(agrees.sum()),
        absent=absent,
        moved=_moved(spec, Contents(ids, lists, codes), held, agrees),
    )


def _page(spec: IndexSpec, step: Bounds, connection: Connection) -> Page:
    return join_pages(pages(connection, spec, [step], BUCKET_ROWS))


def _steps(oldest: int, newest: int) -> Iterator[Bounds]:
    """Ranges of whole buckets, of _STEP_ROWS idx each, but at most about _MAX_STEPS of them."""
    low = oldest // BUCKET_ROWS
    width = max(_STEP_ROWS // BUCKET_ROWS, -(-(newest // BUCKET_ROWS - low + 1) // _MAX_STEPS))
    while newest and low * BUCKET_ROWS <= newest:
        yield Bounds(low * BUCKET_ROWS, (low + width) * BUCKET_ROWS - 1)
        low += width


def _proved_buckets(
    spec: IndexSpec, step: Bounds, held: Contents, valid: NDArray[np.int64], equal: NDArray[np.int64]
) -> NDArray[np.int64]:
    """Buckets of the step in which the file holds every valid row as encoded now, and nothing else."""
    first = step.low // BUCKET_ROWS
    buckets = (step.high + 1) // BUCKET_ROWS - first
    low, high = np.searchsorted(held.ids, [step.low + spec.id_offset, step.high + 1 + spec.id_offset])

    def by_bucket(ids: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.bincount((ids - spec.id_offset) // BUCKET_ROWS - first, minlength=buckets)

    in_file, in_table = by_bucket(held.ids[low:high]), by_bucket(valid)
    proved: NDArray[np.int64] = np.flatnonzero((by_bucket(equal) == in_table) & (in_file == in_table)) + first
    return proved


def _joined(facts: list[_Facts], queries: Queries, neighbors: Neighbors) -> RowState:
    columns = np.concatenate([one.digests.columns() for one in facts])
    digests = empty_digests().replaced(
        np.empty(0, np.int64), Digests(*(columns[:, column] for column in range(columns.shape[1])))
    )
    return RowState(
        digests,
        np.concatenate([one.rejected_idx for one in facts]),
        np.concatenate([one.rejected_reason for one in facts]),
        queries,
        neighbors,
    )


def _moved(spec: IndexSpec, rows: Contents, held: Contents, agrees: NDArray[np.bool_]) -> _Moved | None:
    """Which of `rows`, that differ under their own id, stand under ids that are not their own row's either.

    Codes that also stand under an id that agrees with its own row are left out: a song that is in the table
    twice is no shift. So in a table of shared vectors (artists) a shift may show in the agreement alone.
    """
    free = np.flatnonzero(~agrees)
    wanted = _keys(rows.lists, rows.codes)
    found = _keys(held.lists[free], held.codes[free])
    order = np.argsort(found, kind="stable")
    at = np.searchsorted(found[order], wanted)
    inside = at < len(found)
    hit = np.zeros(len(wanted), bool)
    hit[inside] = found[order][at[inside]] == wanted[inside]
    hit &= ~np.isin(wanted, _keys(held.lists[agrees], held.codes[agrees]))
    if not hit.any():
        return None
    first = int(np.flatnonzero(hit)[0])
    idx = int(rows.ids[first]) - spec.id_offset
    return _Moved(int(hit.sum()), idx, int(held.ids[free[order[at[first]]]]))


def _keys(lists: NDArray[np.int64], codes: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """A 64-bit hash of each (list, code), (n,): collisions need billions of rows."""
    weights = np.random.default_rng(SEED).integers(1, 1 << 63, codes.shape[1] + 1, np.uint64)
    keys: NDArray[np.uint64] = lists.astype(np.uint64) * weights[0]
    for column in range(codes.shape[1]):
        keys += codes[:, column].astype(np.uint64) * weights[column + 1]
    return keys


def _require_ids_by_idx(spec: IndexSpec, live: Path, proof: _Proof) -> None:
    if proof.moved and proof.moved.rows > _MAX_MOVED:
        moved = proof.moved
        raise PermanentFailure(
            f"Index {spec.name}: {live}: idx {moved.idx} is at id {moved.at}, not at "
            f"{moved.idx + spec.id_offset}, and {moved.rows - 1:,} rows more are not at their ids: this file "
            "was filled by position, and the server names wrong songs for those.",
            next_step=f"{_rebuild(spec)}; nothing was adopted.",
        )
    if proof.equal < MIN_AGREEMENT * max(proof.compared, 1):
        raise PermanentFailure(
            f"Index {spec.name}: {live}: of {proof.compared:,} rows of {spec.table} whose id it has, "
            f"{proof.equal:,} encode to what it holds; {MIN_AGREEMENT:.0%} is asked for.",
            next_step="check that `table`, `embedding_column` and `normalize` in the catalog are what the "
            f"file was made from; else {_rebuild(spec)}.",
        )


def _require_shape(spec: IndexSpec, live: Path, index: Any, curve: ProbeCurve) -> None:
    """Raise PermanentFailure, with the lines for the catalog, unless it says what the file is."""
    shape: dict[str, int | float] = {
        "nlist": index.nlist,
        "m": index.pq.M,
        "nbits": index.pq.nbits,
        "nprobe": index.nprobe,
    }
    differs = any(getattr(spec, name) != value for name, value in shape.items())
    recall = curve.at(index.nprobe).recall[K]
    if spec.recall_gate > recall:
        shape["recall_gate"] = math.floor(recall * _GATE_MARGIN * 100) / 100
        differs = True
    if spec.max_imbalance < imbalance(index):
        shape["max_imbalance"] = math.ceil(imbalance(index) / _GATE_MARGIN * 10) / 10
        differs = True
    if differs:
        lines = "\n".join(f"{name} = {value}" for name, value in shape.items())
        raise PermanentFailure(
            f"Index {spec.name}: every id of {live} is idx {spec.id_offset:+d}, but the catalog does not say "
            f"its shape (recall@10 {recall:.3f} at nprobe {index.nprobe}).",
            next_step="put these lines into the file that MUSE_CATALOG names, then adopt again:\n\n"
            f"[index.{spec.name}]\n{lines}",
        )
