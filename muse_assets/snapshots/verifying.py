"""Finds damage in the work directory: dated snapshots, their row facts, the trained cluster.

Here: reading and naming. Not here: the server directory (`publishing.verifying`), or repairing
(`cli.repairing`).
"""

from __future__ import annotations

from pathlib import Path

from muse_assets.catalog import IndexSpec
from muse_assets.failures import PermanentFailure
from muse_assets.publishing.verifying import Finding, verify
from muse_assets.snapshots.cluster import load_cluster
from muse_assets.snapshots.store import read_state, snapshots, state_path


def verify_work(work: Path, spec: IndexSpec) -> list[Finding]:
    """Check all that one index has in the work directory; row facts are named only when they are bad."""
    found = verify(work, spec)
    for position, snapshot in enumerate(snapshots(work, spec)):
        sha256 = snapshot.manifest.sha256
        path = state_path(work, spec.name, sha256)
        # Without them an older snapshot can still be deployed; builds start from the newest.
        if (path.exists() or position == 0) and read_state(work, spec.name, sha256) is None:
            what = f"the row facts of {snapshot.path.name}; no build can start from it"
            found.append(Finding(path, "damaged" if path.exists() else "missing", what))
    cluster = work / spec.cluster_file
    if cluster.exists():
        try:
            what = f"cluster {load_cluster(cluster, spec).fingerprint[:12]}"
            found.append(Finding(cluster, "ok", what))
        except PermanentFailure as error:
            found.append(Finding(cluster, "damaged", error.what))
    elif found:  # so this index was trained once
        found.append(Finding(cluster, "missing", "no index can be built without it"))
    return found
