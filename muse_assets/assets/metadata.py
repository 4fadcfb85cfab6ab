"""What the UI shows of a build: numbers that become plots, a sparkline, tables.

Here: domain facts into Dagster metadata. Not here: measuring them.
"""

import base64
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from muse_assets.catalog import IndexSpec
from muse_assets.manifest import Manifest
from muse_assets.publishing.deploying import Deployment
from muse_assets.snapshots.building import Built
from muse_assets.snapshots.cluster import ClusterManifest
from muse_assets.snapshots.gate import Check

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
        "coarse_error": manifest.coarse_error,
        "seconds": manifest.seconds,
        "m": manifest.m,
        "nbits": manifest.nbits,
        "fingerprint": manifest.fingerprint,
        "sha256": manifest.sha256,
        "objective_by_iteration": dg.MetadataValue.md(sparkline(manifest.objective, "k-means objective")),
    }


def index_metadata(built: Built) -> dict[str, Any]:
    """Of one day's snapshot; the numbers become plots by partition."""
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
        "nprobe": facts.nprobe,
        "nlist": facts.nlist,
        "imbalance": facts.imbalance,
        "seconds": round(built.seconds, 2),
        "size_mb": round(facts.size / 1e6, 3),
        "newest_idx": facts.newest_idx,
        "ntotal_field": facts.ntotal_field,
        "sha256": facts.sha256,
        "cluster": facts.cluster,
        "path": dg.MetadataValue.path(str(built.path)),
        "list_sizes": dg.MetadataValue.md(sparkline(sorted(facts.list_sizes, reverse=True), "list sizes")),
        "recall_by_nprobe": dg.MetadataValue.table(
            [dg.TableRecord({"nprobe": int(n), "recall@10": r}) for n, r in _ascending(facts.recall_curve)],
            schema=dg.TableSchema([dg.TableColumn("nprobe", "int"), dg.TableColumn("recall@10", "float")]),
        ),
    }
    if rejected:
        metadata["rejected_rows"] = dg.MetadataValue.table(rejected)
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
    deployment: Deployment, manifest: Manifest, backups: int, live: str
) -> dict[str, Any]:
    """Of what is live now."""
    return {
        "dagster/row_count": manifest.rows,
        "partition": deployment.partition,
        "sha256": deployment.sha256,
        "already_live": deployment.already_live,
        "replaced_sha256": deployment.replaced_sha256 or "none",
        "size_mb": round(deployment.size / 1e6, 3),
        "nprobe": manifest.nprobe,
        "recall_at_10": manifest.recall_at_10,
        "ntotal_field": manifest.ntotal_field,
        "built_at": manifest.built_at,
        "backups": backups,
        "seconds": round(deployment.seconds, 3),
        "live_file": dg.MetadataValue.path(live),
        **({"warning": deployment.warning} if deployment.warning else {}),
    }


def sparkline(values: Sequence[float], label: str) -> str:
    """A bar picture of `values` as a Markdown image, small enough to show inline."""
    bars = _means(values, _SPARKLINE_BARS)
    top = max(bars, default=0) or 1
    path = "".join(f"M{4 * x + 2} 24V{24 - round(22 * bar / top)}" for x, bar in enumerate(bars))
    svg = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{4 * len(bars) + 4}" height="24">'
        f'<path d="{path}" stroke="#4f7df9" stroke-width="3"/></svg>'
    )
    return f"![{label}](data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()})"


def _means(values: Sequence[float], bars: int) -> list[float]:
    if len(values) <= bars:
        return list(values)
    edges = [round(i * len(values) / bars) for i in range(bars + 1)]
    return [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _ascending(curve: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(curve.items(), key=lambda item: int(item[0]))
