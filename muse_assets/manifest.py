"""The facts of one index file, kept beside it under the file's own content hash.

Here: the manifest's fields and where it lies. `<directory>/.manifests/<index>/<sha256>.json` is written
and fsynced before the file is renamed into place, so a file and its facts cannot tear: a file whose hash
has no manifest was damaged, edited or never ours. Not here: what the facts are for.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from datetime import date
from pathlib import Path
from typing import Any

from muse_assets import durable_files
from muse_assets.failures import PassingFailure
from muse_assets.sealed_json import read_sealed, write_sealed


@dataclass(frozen=True)
class Manifest:
    """One validated index file.

    rows: vectors in the inverted lists. ntotal_field: what the file's own `ntotal` says, largest id + 1.
    partition: newest day (Seoul, ISO) this content stands for. cluster: fingerprint of the coarse
    centroids and the codebook. gate: the limits that were kept. rejected: reason -> rows. queries: how many
    recall is of. probes: by nprobe, recall@k and codes scanned. list_sizes: codes per inverted list. checks:
    the gate's outcomes, name -> facts. trained_recall: recall@10 of the first file with this cluster, at its
    widest search. drift: ratios to the facts of training (`snapshots.drift`). verified_from: the day (ISO) by
    which, or later, every bucket of the table was digested; empty in facts of before there was a rotation.
    """

    index: str
    partition: str
    sha256: str
    size: int
    built_at: str
    rows: int
    ntotal_field: int
    index_class: str
    dimension: int
    metric: str
    nlist: int
    m: int
    nbits: int
    nprobe: int
    id_offset: int
    cluster: str
    encoder: str
    source: str
    newest_idx: int
    mode: str
    parent: str | None
    added: int
    removed: int
    reembedded: int
    gate: str = ""
    verified_from: str = ""
    rejected: dict[str, int] = field(default_factory=dict)
    queries: int = 0
    recall_at_1: float = 0.0
    recall_at_10: float = 0.0
    recall_at_100: float | None = None
    codes_scanned: float = 0.0
    probes: list[dict[str, float]] = field(default_factory=list)
    # Of the newest snapshot that there was before, and what it finds of this file's queries.
    previous: str | None = None
    previous_recall_at_10: float | None = None
    trained_recall: float = 0.0
    drift: dict[str, float] = field(default_factory=dict)
    imbalance: float = 1.0
    list_sizes: list[int] = field(default_factory=list)
    checks: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def day(self) -> date:
        """`partition` as a date."""
        return date.fromisoformat(self.partition)


def manifest_path(directory: Path, index: str, sha256: str) -> Path:
    """Where the facts of the file with that content hash lie."""
    return directory / ".manifests" / index / f"{sha256}.json"


def write_manifest(directory: Path, manifest: Manifest) -> Path:
    """Write the manifest durably; call it before the file itself is renamed into place."""
    path = manifest_path(directory, manifest.index, manifest.sha256)
    write_sealed(path, asdict(manifest))
    return path


def read_manifest(directory: Path, index: str, sha256: str) -> Manifest | None:
    """The facts of the file with that content hash; None if there are none or they were damaged.

    Raises PassingFailure where the disk fails: a file must not be called damaged for that.
    """
    path = manifest_path(directory, index, sha256)
    try:
        content = read_sealed(path)
    except OSError as error:
        raise PassingFailure(
            f"Index {index}: the manifest {path} cannot be read: {error.strerror or error}; nothing was"
            " replaced.",
            next_step="check that disk and the file's permissions, then launch the run again.",
        ) from error
    if content is None:
        return None
    known = {f.name for f in fields(Manifest)}
    try:
        manifest = Manifest(**{key: value for key, value in content.items() if key in known})
    except TypeError:  # an older version's, without a field that is needed now
        return None
    return manifest if (manifest.index, manifest.sha256) == (index, sha256) else None


def identify(directory: Path, index: str, path: Path) -> Manifest | None:
    """The facts of the file at `path` by hashing its bytes; None if it is missing or not validated."""
    try:
        sha256 = durable_files.file_sha256(path)
    except OSError:
        return None
    return read_manifest(directory, index, sha256)
