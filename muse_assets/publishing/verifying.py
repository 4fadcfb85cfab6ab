"""Finds damage: hashes every file of an index in a directory and looks for the facts it should match.

Here: reading and naming. Not here: repairing (`deploying.py`). FAISS notices almost no damage itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from muse_assets.catalog import IndexSpec
from muse_assets.durable_files import file_sha256
from muse_assets.failures import PassingFailure
from muse_assets.manifest import manifest_path, read_manifest
from muse_assets.publishing.layout import backup_folder, manifest_folder, pin_file
from muse_assets.publishing.pinning import read_pin


@dataclass(frozen=True)
class Finding:
    """One file: "ok", "damaged" (its bytes are not what was published), "unknown" (nothing says what they
    should be) or "missing" (other files of the index are here, this one is not). what: one clause.
    """

    path: Path
    state: Literal["ok", "damaged", "unknown", "missing"]
    what: str


def verify(directory: Path, spec: IndexSpec) -> list[Finding]:
    """Check the live file, the fallback, the backups, the pin and the dated snapshots of one index.

    Works on a server directory and on a work directory. Clusters are left out: they have no manifest.
    """
    live, fallback = directory / spec.live_file, directory / spec.fallback_file
    backups = sorted(backup_folder(directory, spec.name).glob("*.index"))
    snapshots = sorted(directory.glob(f"muse_{spec.name}_{'[0-9]' * 8}.index"))
    present = [path for path in (live, fallback) if path.exists()]
    found = [_check(directory, spec, path) for path in (*present, *backups, *snapshots)]
    if present or backups:  # so this is a server directory
        found += [
            Finding(path, "missing", "the search server looks for this file at start")
            for path in (live, fallback)
            if path not in present
        ]
    return [*found, *_check_pin(directory, spec)]


def _check_pin(directory: Path, spec: IndexSpec) -> list[Finding]:
    """A damaged pin holds the index all the same, but no longer says at what."""
    path = pin_file(directory, spec.name)
    try:
        pin = read_pin(directory, spec.name)
    except PassingFailure as error:
        return [Finding(path, "unknown", error.what)]
    if pin is None:
        return []
    if not pin.sha256:
        remedy = f"`muse release {spec.name}`, or roll back again"
        return [Finding(path, "damaged", f"the pin no longer says to what content; {remedy}")]
    return [Finding(path, "ok", pin.what)]


def _check(directory: Path, spec: IndexSpec, path: Path) -> Finding:
    try:
        sha256 = file_sha256(path)
    except OSError as error:
        return Finding(path, "damaged", f"it cannot be read: {error.strerror}")
    try:
        manifest = read_manifest(directory, spec.name, sha256)
    except PassingFailure:
        facts = manifest_path(directory, spec.name, sha256)
        return Finding(path, "unknown", f"its manifest {facts} cannot be read")
    if manifest is not None:
        return Finding(path, "ok", f"{manifest.partition}, {manifest.rows:,} rows, content {sha256[:12]}")
    return Finding(path, *_suspicion(directory, spec, path, sha256))


def _suspicion(
    directory: Path, spec: IndexSpec, path: Path, sha256: str
) -> tuple[Literal["damaged", "unknown"], str]:
    """Why there may be no manifest of a file with that content."""
    facts = manifest_path(directory, spec.name, sha256)
    if facts.exists():
        return "damaged", f"its manifest {facts} is damaged"
    if path.parent == backup_folder(directory, spec.name):
        promised = path.stem.rpartition("_")[2]
        if sha256.startswith(promised):
            return "unknown", f"its manifest {facts} is missing"
        return "damaged", f"its content is {sha256[:12]}, its name says {promised}"
    if any(manifest_folder(directory, spec.name).glob("*.json")):
        return "damaged", f"it was damaged or edited: no manifest has its content {sha256[:12]}"
    return "unknown", "it was put here by other means: this directory has no manifests of it"
