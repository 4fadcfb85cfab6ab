"""The quality gate: what has to hold before a built index may become a snapshot.

Here: the checks, their limits and their words. Not here: the measurements (`ivfpq`) or what
Dagster shows of them (`assets.index_lane`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from muse_assets.catalog import IndexSpec
from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.duplicates import Duplicates
from muse_assets.ivfpq.probing import K, ProbeCurve
from muse_assets.snapshots.data_quality import ConstantDimensions, NormOutliers
from muse_assets.snapshots.drift import Drift

ID_PARITY = "id_parity"
RECALL = "recall_at_10"
REENCODING = "reencoding"
LIST_BALANCE = "list_balance"
EMBEDDING_MODEL = "embedding_model"
DRIFT = "drift"
VECTOR_NORMS = "vector_norms"
NORM_OUTLIERS = "norm_outliers"
CONSTANT_DIMENSIONS = "constant_dimensions"
DUPLICATES = "duplicates"
FILE_INTEGRITY = "file_integrity"

DESCRIPTIONS: Mapping[str, str] = {
    ID_PARITY: "The ids in the inverted lists are exactly the table's valid rows: none missing, none twice.",
    RECALL: "recall@10 of frozen queries against their exact neighbors, at the nprobe stored in the file.",
    REENCODING: "Sampled rows, read again from the table, encode to the list and code that the index holds.",
    LIST_BALANCE: "Inverted lists divide the rows: imbalance factor under the catalog's limit.",
    EMBEDDING_MODEL: "The rows come from the model that the cluster was trained on.",
    DRIFT: "The table is still what the cluster was trained on; else a retrain is worth it (warns).",
    VECTOR_NORMS: "Sampled vectors are unit length, as the server's distance cut assumes (warns).",
    NORM_OUTLIERS: "Few sampled vectors are far longer or shorter than the others (warns).",
    CONSTANT_DIMENSIONS: "Nearly every dimension varies over the sampled vectors (warns).",
    DUPLICATES: "No more rows share one vector than the catalog allows (warns).",
    FILE_INTEGRITY: "The written file reads back with its digest, its ids and the same answers.",
}
WARNING_ONLY = frozenset({DRIFT, VECTOR_NORMS, NORM_OUTLIERS, CONSTANT_DIMENSIONS, DUPLICATES})
_NORM_TOLERANCE = 0.02
# Of rows put in, and of the whole table. Nearer to the mean of all than to any centroid lay 87 to 100 % of
# another model's vectors (real text, sines, the seven sample tables, each rotated), at most 15 % of the same
# model's unseen topics and 3 % of its other rows. Distances to centroids do not tell: new artists lay 3.8
# times as far as the rows of training, an unrelated set 1.4 times. (docs/quality.md)
_FOREIGN, _FOREIGN_OF_TABLE = 0.5, 0.2
# A day with fewer rows put in is only judged by what the table is after it.
_TELLING_SHARE = 0.02


@dataclass(frozen=True)
class Check:
    """One check's outcome; `facts` are numbers and short texts for people."""

    name: str
    passed: bool
    summary: str
    facts: Mapping[str, int | float | str] = field(default_factory=dict)

    @property
    def blocking(self) -> bool:
        """Whether failing keeps the index from becoming a snapshot."""
        return self.name not in WARNING_ONLY


class GateFailed(PermanentFailure):
    """A built index failed its gate and was discarded; `checks` holds every outcome."""

    def __init__(self, spec: IndexSpec, partition: str, checks: tuple[Check, ...]) -> None:
        failed = [check for check in checks if check.blocking and not check.passed]
        super().__init__(
            f"{spec.name} {partition}: the built index failed its gate and was discarded: "
            + " ".join(f"{check.name}: {check.summary}" for check in failed),
            next_step=f"see the checks of {spec.name}/index; if the table is right, retrain "
            f"{spec.name}/cluster and materialize the index again.",
        )
        self.checks = checks


def require_passed(spec: IndexSpec, partition: str, checks: tuple[Check, ...]) -> None:
    """Raise GateFailed unless every blocking check passed."""
    if any(check.blocking and not check.passed for check in checks):
        raise GateFailed(spec, partition, checks)


def check_id_parity(expected: NDArray[np.int64], found: NDArray[np.int64], table_rows: int) -> Check:
    """expected: ids of the valid rows, ascending; found: ids read out of the inverted lists."""
    found = np.sort(found)
    equal = np.array_equal(found, expected)  # so nearly always: the sets of a million ids cost 0.1 s more
    duplicates = 0 if equal else int((found[1:] == found[:-1]).sum())
    missing, extra = ((), ()) if equal else (np.setdiff1d(expected, found), np.setdiff1d(found, expected))
    passed = not (duplicates or len(missing) or len(extra))
    examples = ", ".join(str(value) for value in [*missing[:5], *extra[:5]])
    return Check(
        ID_PARITY,
        passed,
        f"{len(found):,} ids equal the table's valid rows."
        if passed
        else f"{len(missing):,} missing, {len(extra):,} extra, {duplicates:,} twice (ids {examples}).",
        {
            "table_rows": table_rows,
            "indexed": len(found),
            "missing": len(missing),
            "extra": len(extra),
            "duplicates": duplicates,
        },
    )


def check_recall(spec: IndexSpec, curve: ProbeCurve, nprobe: int) -> Check:
    """Whether recall@10 at the stored nprobe meets the index's gate."""
    stored = curve.at(nprobe)
    recall = stored.recall[K]
    return Check(
        RECALL,
        recall >= spec.recall_gate,
        f"{recall:.3f} at nprobe {nprobe}, gate {spec.recall_gate:.2f}.",
        {
            "recall_at_10": recall,
            "nprobe": nprobe,
            "gate": spec.recall_gate,
            "codes_scanned": stored.codes_scanned,
            "queries": curve.queries,
        },
    )


def check_reencoding(wrong: NDArray[np.int64], sampled: int) -> Check:
    """wrong: sampled ids whose stored list or code is not what their row encodes to."""
    return Check(
        REENCODING,
        not len(wrong),
        f"{sampled:,} sampled rows encode to what is stored."
        if not len(wrong)
        else f"{len(wrong):,} of {sampled:,} sampled rows encode differently (ids {_few(wrong)}).",
        {"sampled_rows": sampled, "different": len(wrong)},
    )


def check_balance(spec: IndexSpec, imbalance: float, sizes: NDArray[np.int64]) -> Check:
    """sizes (nlist,): codes in each inverted list."""
    return Check(
        LIST_BALANCE,
        imbalance <= spec.max_imbalance,
        f"imbalance {imbalance:.2f}, limit {spec.max_imbalance:.1f}.",
        {
            "imbalance": imbalance,
            "limit": spec.max_imbalance,
            "empty_lists": int((sizes == 0).sum()),
            "longest_list": int(sizes.max(initial=0)),
            "mean_list": float(sizes.mean()) if len(sizes) else 0.0,
        },
    )


def check_embedding_model(
    spec: IndexSpec,
    *,
    rows: int,
    put_in: int,
    replaced: int,
    foreign: float | None,
    foreign_of_table: float | None,
    mean_shift: float | None,
) -> Check:
    """rows: of the index; put_in: those of them that are new or hold another vector; replaced: rows of the
    snapshot before in whose place stands another vector. foreign: share of the rows put in that lie nearer
    to the mean of the queries than to any centroid; foreign_of_table: of all rows. mean_shift: squared
    distance of the mean of the rows put in from the queries' mean, of the queries' variance; it is told, for
    one new topic shifts the mean more than another model. None where too few rows were looked at.
    """
    problems = []
    if rows and replaced > spec.max_replaced_share * rows:
        problems.append(
            f"{replaced:,} of {rows:,} rows hold other vectors than in the snapshot before (if the table was "
            "restored on purpose, launch the index with confirm_shrink: true)"
        )
    judged = spec.max_replaced_share < 1
    if judged and foreign is not None and put_in > _TELLING_SHARE * rows and foreign > _FOREIGN:
        problems.append(f"of the {put_in:,} rows put in, {foreign:.0%} lie by no centroid")
    elif judged and foreign_of_table is not None and foreign_of_table > _FOREIGN_OF_TABLE:
        problems.append(f"{foreign_of_table:.0%} of the table's rows lie by no centroid")
    told = {"foreign_share": foreign, "foreign_share_of_table": foreign_of_table, "mean_shift": mean_shift}
    share = replaced / rows if rows else 0.0
    return Check(
        EMBEDDING_MODEL,
        not problems,
        f"{'; '.join(problems)}: this looks like another embedding model."
        if problems
        else f"{share:.1%} of the rows hold other vectors than before.",
        {
            "replaced_share": round(share, 4),
            **{name: round(value, 4) for name, value in told.items() if value is not None},
        },
    )


def check_drift(drift: Drift | None) -> Check:
    """drift: None where nobody knows what the cluster was trained on."""
    reasons = drift.reasons() if drift else ()
    return Check(
        DRIFT,
        not reasons,
        f"{'; '.join(reasons)}: retrain."
        if reasons
        else "the table is what the cluster was trained on."
        if drift
        else "nobody knows what this cluster was trained on.",
        drift.facts() if drift else {},
    )


def check_norms(norms: NDArray[np.float32]) -> Check:
    """norms (n,): lengths of sampled vectors as they are indexed."""
    off = int((np.abs(norms - 1) > _NORM_TOLERANCE).sum())
    return Check(
        VECTOR_NORMS,
        off == 0,
        "sampled vectors are unit length."
        if not off
        else f"{off:,} of {len(norms):,} sampled vectors are not unit length "
        f"({norms.min():.3f} to {norms.max():.3f}): the server's distance cut of 0.9 assumes they are.",
        {
            "sampled_rows": len(norms),
            "not_unit": off,
            "smallest": float(norms.min(initial=np.inf)) if len(norms) else 0.0,
            "largest": float(norms.max(initial=0)),
        },
    )


def check_norm_outliers(spec: IndexSpec, outliers: NormOutliers) -> Check:
    """Whether no larger share than `max_norm_outlier_share` is far from the usual length."""
    share = len(outliers.ids) / max(outliers.sampled, 1)
    passed = share <= spec.max_norm_outlier_share
    found = f"{len(outliers.ids):,} of {outliers.sampled:,} sampled vectors"
    return Check(
        NORM_OUTLIERS,
        passed,
        f"{found} are far from the usual length {outliers.usual:.3f}"
        + ("." if not len(outliers.ids) else f" (ids {_few(outliers.ids)})."),
        {
            "sampled_rows": outliers.sampled,
            "outliers": len(outliers.ids),
            "usual_norm": outliers.usual,
            "limit_share": spec.max_norm_outlier_share,
        },
    )


def check_constant_dimensions(spec: IndexSpec, constant: ConstantDimensions) -> Check:
    """Whether no larger share than `max_constant_share` of the dimensions is nearly constant."""
    found = len(constant.dimensions)
    return Check(
        CONSTANT_DIMENSIONS,
        found <= spec.max_constant_share * spec.dimension,
        "sampled vectors are too few to tell."
        if constant.sampled is None
        else f"{found:,} of {spec.dimension:,} dimensions hardly vary"
        + ("." if not found else f" ({_few(constant.dimensions)})."),
        {"constant_dimensions": found, "limit_share": spec.max_constant_share},
    )


def check_duplicates(spec: IndexSpec, duplicates: Duplicates) -> Check:
    """Whether no larger share than `max_duplicate_share` of the rows repeats another's list and code."""
    share = duplicates.repeated / max(duplicates.rows, 1)
    return Check(
        DUPLICATES,
        share <= spec.max_duplicate_share,
        f"{duplicates.repeated:,} of {duplicates.rows:,} rows ({share:.1%}) repeat another row's vector"
        f", limit {spec.max_duplicate_share:.0%}.",
        {
            "repeated_rows": duplicates.repeated,
            "duplicate_share": round(share, 4),
            "largest_group": duplicates.groups[0].rows if duplicates.groups else 1,
            "limit_share": spec.max_duplicate_share,
        },
    )


def check_integrity(problems: tuple[str, ...], sha256: str, size: int) -> Check:
    """problems: what the written file, read back, has otherwise than the index that was measured."""
    return Check(
        FILE_INTEGRITY,
        not problems,
        f"{size:,} bytes read back intact." if not problems else "; ".join(problems),
        {"sha256": sha256, "bytes": size},
    )


def carried(check: Check, since: str) -> Check:
    """A check of an unchanged file, measured when that content was built."""
    return Check(check.name, check.passed, f"{check.summary} Unchanged since {since}.", check.facts)


def with_verification(check: Check, day: str, verified_from: str) -> Check:
    """The check of the ids, saying as of when the table's rows are known; both days ISO."""
    since = f"; the oldest part verified {verified_from}" if verified_from < day else ""
    return Check(
        check.name,
        check.passed,
        f"{check.summary} As of {day}{since}.",
        {**check.facts, "verified_from": verified_from},
    )


def _few(ids: NDArray[np.int64]) -> str:
    return ", ".join(str(value) for value in ids[:5])
