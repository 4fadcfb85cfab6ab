"""How far a table has moved from what its cluster was trained on, and when that is worth a retrain.

Here: ratios of facts, and the rule. Not here: measuring the facts (`building`), or asking for a retrain
(`automation`).

Centroids age mainly into scanned codes, codebooks hardly at all; DeDrift (Baranchuk et al., ICCV 2023) sees
the same. What a shift costs with and without a retrain: docs/quality.md.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass

from muse_assets.ivfpq.probing import K, ProbeCurve
from muse_assets.snapshots.cluster import ClusterManifest

MAX_ROWS = 2.0
MAX_IMBALANCE = 1.15
MAX_COARSE_ERROR = 1.15
# Less of new rows is not worth a retrain, however foreign they are.
MIN_NEW_SHARE = 0.10
MAX_RECALL_DROP = 0.01
# It is looked at every day: two deviations would be a false alarm every other month.
_DEVIATIONS = 3
# FAISS warns below 39 training rows a code word. What a smaller table was trained to fits its own rows and
# hardly any others: 334 rows lost 1.7 points of recall with the first 19 new ones, and of 6,486 the new ones
# lay 1.5 times as far from their centroids, while imbalance and codes scanned stood still.
_ENOUGH_ROWS = 39 * 256


@dataclass(frozen=True)
class Drift:
    """Ratios to the facts of training; 1 is none.

    rows: of the table; imbalance: of the lists; coarse_error: mean squared distance to their centroids of
    the rows that came since. new_share: those rows, of all; recall_drop: how much less recall@10 is than that
    of the cluster's first index, on the same queries, both at the widest search: the stored nprobe moves in
    powers of two, and recall with it by up to 2 points. recall_noise: the standard deviation that chance
    gives that. trained_rows: rows of the table at training.
    """

    trained_rows: int
    rows: float
    imbalance: float
    coarse_error: float
    new_share: float
    recall_drop: float
    recall_noise: float

    def reasons(self) -> tuple[str, ...]:
        """Why a retrain is worth it now; empty where it is not. Of a small table only its growth tells."""
        found = []
        if self.rows > MAX_ROWS:
            found.append(f"the table has {self.rows:.1f} times the rows it was trained on")
        if self.trained_rows < _ENOUGH_ROWS:
            return tuple(found)
        if self.imbalance > MAX_IMBALANCE:
            found.append(f"the lists are {self.imbalance:.2f} times as uneven as at training")
        if self.coarse_error > MAX_COARSE_ERROR and self.new_share > MIN_NEW_SHARE:
            found.append(
                f"rows that came since lie {self.coarse_error:.2f} times as far from their centroids as "
                f"those of training did, and are {self.new_share:.0%} of the table"
            )
        if self.recall_drop > max(MAX_RECALL_DROP, _DEVIATIONS * self.recall_noise):
            found.append(f"recall@10 is {100 * self.recall_drop:.1f} points lower than after training")
        return tuple(found)

    def facts(self) -> dict[str, float]:
        """For the manifest."""
        return {name: round(value, 4) for name, value in asdict(self).items()}


def measure_drift(
    trained: ClusterManifest,
    curve: ProbeCurve,
    *,
    rows: int,
    new_rows: int,
    new_error: float | None,
    imbalance: float,
    trained_recall: float,
) -> Drift:
    """The drift of an index whose cluster was `trained`.

    new_rows: those of its rows that came since; new_error: their mean squared distance to their centroids,
    None where they are too few to tell. trained_recall: `widest_recall` of the cluster's first index.
    """
    new_share = new_rows / max(rows, 1)
    # That share of the neighbors is other rows, each found or not.
    chances = 2 * trained_recall * (1 - trained_recall) * new_share
    return Drift(
        trained_rows=trained.table_rows,
        rows=rows / max(trained.table_rows, 1),
        imbalance=imbalance / trained.imbalance if trained.imbalance else 1.0,
        coarse_error=new_error / trained.coarse_error if new_error and trained.coarse_error else 1.0,
        new_share=new_share,
        recall_drop=trained_recall - widest_recall(curve),
        recall_noise=math.sqrt(chances / (K * max(curve.queries, 1))),
    )


def widest_recall(curve: ProbeCurve) -> float:
    """recall@10 where more lists find hardly more."""
    return max(probe.recall[K] for probe in curve.probes)
