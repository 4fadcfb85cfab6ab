"""What the server loads now: the live file of an index, and whether its bytes are known.

Here: reading only. Not here: replacing it (`deploying.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, date, datetime
from pathlib import Path

from muse_assets.catalog import IndexSpec
from muse_assets.durable_files import Stamp, stamped_sha256
from muse_assets.failures import PermanentFailure
from muse_assets.manifest import Manifest, read_manifest
from muse_assets.publishing.layout import explained, manifest_folder

ADOPTED = "adopted"


@dataclass(frozen=True)
class LiveFile:
    """The live file of one index. sha256 in hex, size in bytes.

    manifest: None when the bytes are damaged or were edited: this directory has manifests of the index,
    but none for these bytes. In a directory without any, the file is the legacy's and is adopted: its
    manifest (mode "adopted") holds what FAISS reads in it, and the earliest date there is, for nobody
    knows the file's day. stamp: when it was hashed; None if nobody did.
    """

    path: Path
    sha256: str
    size: int
    manifest: Manifest | None
    stamp: Stamp | None = None

    @property
    def damaged(self) -> bool:
        """Whether these bytes were never published here, or can no longer be read."""
        return self.manifest is None


def live_file(server: Path, spec: IndexSpec) -> LiveFile | None:
    """The index's live file, hashed; None if there is none. PassingFailure if the disk fails."""
    path = server / spec.live_file
    with explained(f"Index {spec.name}", server):
        try:
            sha256, stamp = stamped_sha256(path)
        except FileNotFoundError:
            return None
        manifest = read_manifest(server, spec.name, sha256)
        if manifest is None and not any(manifest_folder(server, spec.name).glob("*.json")):
            manifest = _adopted(spec, path, sha256, stamp.size)
    # Of the bytes that were hashed: someone's cp may have truncated the file just after it was opened.
    return LiveFile(path, sha256, manifest.size if manifest else stamp.size, manifest, stamp)


def _adopted(spec: IndexSpec, path: Path, sha256: str, size: int) -> Manifest | None:
    # FAISS takes longer to import than a deploy takes on small files, and only the first one needs it.
    from muse_assets.ivfpq.files import describe  # noqa: PLC0415

    try:
        facts = describe(path)
    except PermanentFailure:
        return None
    return Manifest(
        index=spec.name,
        partition=date.min.isoformat(),
        sha256=sha256,
        size=size,
        built_at=datetime.fromtimestamp(path.stat().st_mtime, UTC).isoformat(timespec="seconds"),
        rows=facts.ntotal,
        ntotal_field=facts.ntotal,
        index_class=facts.index_class,
        dimension=facts.dimension,
        metric=facts.metric,
        nlist=facts.nlist,
        m=facts.m or 0,
        nbits=facts.nbits or 0,
        nprobe=facts.nprobe,
        id_offset=spec.id_offset,
        cluster="",
        encoder="",
        source=ADOPTED,
        newest_idx=facts.ntotal - 1 - spec.id_offset,
        mode=ADOPTED,
        parent=None,
        added=0,
        removed=0,
        reembedded=0,
    )
