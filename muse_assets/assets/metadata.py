"""What the UI shows of a build: numbers that become plots, a sparkline, tables.

Here: domain facts into Dagster metadata. Not here: measuring them.
"""

import base64
import itertools
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from muse_assets.catalog import IndexSpec
from muse_assets.manifest import Manifest
from muse_assets.publishing.deploying import Deployment
from muse_assets.snapshots.building import Built
from muse_assets.snapshots.cluster import ClusterManifest
from muse_assets.snapshots.gate import DRIFT, Check
from muse_assets.snapshots.neighbor_preview import NEIGHBORS, NeighborPreview

# What the retrain sensor reads of a build.
RETRAIN_ADVISED = "retrain_advised"
# A Markdown picture renders inline only while the whole string stays under about 1,000 characters.
_SPARKLINE_BARS = 24


def table_schema(spec: IndexSpec) -> dg.TableSchema:
    """The columns that an index reads, as the catalog names them."""
    columns = [dg.TableColumn("idx", "bigint", "primary key, from 1; FAISS id = idx - 1")]
    columns += [
        dg.TableColumn(name, "varchar", "song key, compared after trimming") for name in spec.song_key
    ]
    columns += [
        dg.TableColumn(
            spec.embedding_column, "blob", f"{spec.dimension} floats as {spec.encoding} ({spec.model})"
        ),
        dg.TableColumn(spec.created_at_column, "datetime", "Seoul time; optional"),
    ]
    return dg.TableSchema(columns)


def cluster_metadata(manifest: ClusterManifest) -> dict[str, Any]:
    """Of a trained cluster."""
    return {
        "nlist": manifest.nlist,
        "training_rows": manifest.training_rows,
        "table_rows": manifest.table_rows,
        "coarse_error": round(manifest.coarse_error, 4),
        "seconds": manifest.seconds,
        "m": manifest.m,
        "nbits": manifest.nbits,
        "fingerprint": manifest.fingerprint,
        "sha256": manifest.sha256,
        "objective": dg.MetadataValue.md(sparkline(manifest.objective, "k-means objective")),
    }


def index_metadata(built: Built, preview: NeighborPreview) -> dict[str, Any]:
    """Of one day's snapshot, in the order of a person's questions; the numbers become plots by partition."""
    facts = built.manifest
    rejected = [
        dg.TableRecord({"reason": reason, "rows": count, "idx": ", ".join(map(str, examples))})
        for reason, count in facts.rejected.items()
        for examples in [built.rejected_examples.get(reason, [])]
    ]
    metadata: dict[str, Any] = {
        "dagster/row_count": facts.rows,
        "mode": facts.mode,
        "added": facts.added,
        "removed": facts.removed,
        "reembedded": facts.reembedded,
        "rejected": sum(facts.rejected.values()),
        "recall_at_10": facts.recall_at_10,
        "recall_at_1": facts.recall_at_1,
        **({} if facts.recall_at_100 is None else {"recall_at_100": facts.recall_at_100}),
        "codes_scanned": round(facts.codes_scanned, 1),
        "imbalance": facts.imbalance,
        "seconds": round(built.seconds, 2),
        **({"encoded_on": built.encoded_on} if built.encoded_on else {}),
        **({"dask_dashboard": dg.MetadataValue.url(built.dashboard)} if built.dashboard else {}),
        **{f"drift_{name}": value for name, value in facts.drift.items()},
        RETRAIN_ADVISED: not facts.checks.get(DRIFT, {}).get("passed", True),
        "size_mb": round(facts.size / 1e6, 3),
        "list_sizes": dg.MetadataValue.md(sparkline(sorted(facts.list_sizes, reverse=True), "list sizes")),
        "nearest_neighbors": _neighbors(preview),
        **({"nearest_neighbors_note": preview.note} if preview.note else {}),
        "before_and_after": _before_and_after(built),
        "recall_by_nprobe": _probes(facts),
        "nprobe": facts.nprobe,
        "nlist": facts.nlist,
        "newest_idx": facts.newest_idx,
        "verified_from": facts.verified_from or "unknown",
        "ntotal_field": facts.ntotal_field,
        "sha256": facts.sha256,
        "cluster": facts.cluster,
        "path": dg.MetadataValue.path(str(built.path)),
    }
    if rejected:
        metadata["rejected_rows"] = dg.MetadataValue.table(rejected)
    if built.duplicates:
        metadata["largest_duplicates"] = _duplicates(built)
    return metadata


def check_result(asset_key: dg.AssetKey, check: Check) -> dg.AssetCheckResult:
    """One gate check for the UI."""
    return dg.AssetCheckResult(
        passed=check.passed,
        asset_key=asset_key,
        check_name=check.name,
        severity=dg.AssetCheckSeverity.ERROR if check.blocking else dg.AssetCheckSeverity.WARN,
        description=check.summary,
        metadata=dict(check.facts),
    )


def deployment_metadata(
    deployment: Deployment, manifest: Manifest, replaced: Manifest | None, backups: int, live: str
) -> dict[str, Any]:
    """Of what is live now. replaced: facts of the file that was live before; None if none or unknown."""
    swapped = not deployment.already_live
    return {
        "dagster/row_count": manifest.rows,
        "partition": deployment.partition,
        "sha256": deployment.sha256,
        "already_live": deployment.already_live,
        "built_at": dg.MetadataValue.timestamp(datetime.fromisoformat(manifest.built_at)),
        "age_hours": _age_hours(manifest),
        "replaced_sha256": (swapped and deployment.replaced_sha256) or "none",
        **({"replaced_age_hours": _age_hours(replaced)} if swapped and replaced else {}),
        "backups": backups,
        "size_mb": round(deployment.size / 1e6, 3),
        "nprobe": manifest.nprobe,
        "recall_at_10": manifest.recall_at_10,
        "ntotal_field": manifest.ntotal_field,
        "seconds": round(deployment.seconds, 3),
        "live_file": dg.MetadataValue.path(live),
        **({"warning": deployment.warning} if deployment.warning else {}),
    }


def _age_hours(facts: Manifest) -> float:
    """Since the content was built; a day with nothing new keeps its content, and so its age."""
    return round((datetime.now(UTC) - datetime.fromisoformat(facts.built_at)).total_seconds() / 3600, 2)


def sparkline(values: Sequence[float], label: str) -> str:
    """A bar picture of `values` as a Markdown image, small enough to show inline."""
    bars = _means(values, _SPARKLINE_BARS)
    top = max(bars, default=0) or 1
    path = "".join(f"M{4 * x + 2} 24V{24 - round(22 * bar / top)}" for x, bar in enumerate(bars))
    width = 4 * len(bars) + 4
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{2 * width}" height="48" viewBox="0 0 {width} 24">'
        f'<path d="{path}" stroke="#4f7df9" stroke-width="3"/></svg>'
    )
    return f"![{label}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _duplicates(built: Built) -> dg.TableMetadataValue:
    """The largest groups of rows that share list and code, and whether the table's rows are equal."""
    records = [
        dg.TableRecord(
            {
                "rows": group.rows,
                "idx": ", ".join(map(str, group.idx)),
                "equal to the bit": f"{group.equal} of {group.read} read",
            }
        )
        for group in built.duplicates
    ]
    return dg.MetadataValue.table(records)


def _before_and_after(built: Built) -> dg.TableMetadataValue:
    """The previous snapshot's facts beside this one's: what a retrain or a day's rows changed.

    Recall of both is on the same queries: after a retrain the build asked the previous file anew.
    """
    facts, previous = built.manifest, built.previous
    before = _comparable(previous.path, previous.manifest) if previous else {}
    if previous and previous.manifest.cluster != facts.cluster:
        asked = facts.previous_recall_at_10 if facts.previous == previous.manifest.sha256 else None
        before["recall@10"] = "unknown" if asked is None else f"{asked:.3f}"
    records = [
        dg.TableRecord({"fact": name, "before": before.get(name, "none"), "after": after})
        for name, after in _comparable(built.path, built.manifest).items()
    ]
    return _table(records, "fact", "before", "after")


def _comparable(path: Path, facts: Manifest) -> dict[str, str]:
    return {
        "file": path.name,
        "mode": facts.mode,
        "rows": f"{facts.rows:,}",
        "recall@10": f"{facts.recall_at_10:.3f}",
        "lists probed": f"{facts.nprobe:,} of {facts.nlist:,}",
        "codes scanned a query": f"{facts.codes_scanned:,.0f}",
        "imbalance": f"{facts.imbalance:.2f}",
        "size": f"{facts.size / 1e6:,.3f} MB",
        "cluster": facts.cluster[:12],
    }


def _neighbors(preview: NeighborPreview) -> dg.TableMetadataValue:
    """One row a song; in brackets the squared L2 distance."""
    places = [f"neighbor {place}" for place in range(1, NEIGHBORS + 1)]
    records = []
    for song in preview.songs:
        cells = [f"{neighbor.song} ({neighbor.distance:.2f})" for neighbor in song.neighbors]
        cells += ["none"] * (NEIGHBORS - len(cells))
        named = dict(zip(places, cells, strict=True))
        records.append(dg.TableRecord({"idx": str(song.idx), "song": song.song, **named}))
    return _table(records, "idx", "song", *places)


def _table(records: Sequence[dg.TableRecord], *columns: str) -> dg.TableMetadataValue:
    """A table of texts; with a schema of its own it may be empty."""
    return dg.MetadataValue.table(records, schema=dg.TableSchema([dg.TableColumn(name) for name in columns]))


def _means(values: Sequence[float], bars: int) -> list[float]:
    if len(values) <= bars:
        return list(values)
    edges = [round(i * len(values) / bars) for i in range(bars + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _probes(facts: Manifest) -> dg.TableMetadataValue:
    """True recall and cost by nprobe, up to where more lists find hardly more."""
    columns = list(dict.fromkeys(name for probe in facts.probes for name in probe)) or ["nprobe"]
    records = [dg.TableRecord(probe) for probe in facts.probes]
    schema = dg.TableSchema(
        [dg.TableColumn(name, "int" if name == "nprobe" else "float") for name in columns]
    )
    return dg.MetadataValue.table(records, schema=schema)
