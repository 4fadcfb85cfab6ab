"""Replaces the file that the search server loads, or puts an earlier one back: one mechanism for both.

Here: the order of steps by which the live file is complete at every instant. Not here: telling the
server (`reloading.py`).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from muse_assets.catalog import IndexSpec
from muse_assets.durable_files import Staged, commit, copy_into, discard, file_sha256, link, stage
from muse_assets.failures import Conflict, PassingFailure, PermanentFailure
from muse_assets.manifest import Manifest, identify, manifest_path, read_manifest, write_manifest
from muse_assets.publishing.backups import (
    DEFAULT_RETENTION,
    Backup,
    Retention,
    backups,
    is_intact,
    keep,
    prune,
)
from muse_assets.publishing.contract import violations
from muse_assets.publishing.layout import make_folders, working_on
from muse_assets.publishing.live import LiveFile, live_file


@dataclass(frozen=True)
class Deployment:
    """What is live now, and what it replaced.

    partition: day (Seoul, ISO) the content stands for. replaced_sha256: None if there was no live file.
    backup: where the replaced file is kept; None if there was none or it was damaged. already_live: the
    wanted content was live before, so no file was replaced. size in bytes.
    """

    index: str
    sha256: str
    partition: str
    replaced_sha256: str | None
    backup: Path | None
    already_live: bool
    seconds: float
    size: int


def deploy(
    spec: IndexSpec,
    snapshot: Path,
    manifest: Manifest,
    server: Path,
    *,
    confirm_size: bool = False,
    replace_damaged: bool = False,
    retention: Retention = DEFAULT_RETENTION,
    lock_wait_seconds: float = 0.0,
) -> Deployment:
    """Make `snapshot` the index's live file in the directory `server`, keeping the replaced one.

    confirm_size lets the file be more than 1.5 times the live one's size; replace_damaged lets a live
    file of unknown content be replaced. Raises PermanentFailure for a refusal, Conflict when another
    process holds the lock or changed the live file meanwhile, PassingFailure for a failing disk. Unless
    the failure says that the file was renamed or published, the live file is the one it was.
    """
    started = time.monotonic()
    if snapshot.parent.resolve() == server.resolve():
        raise PermanentFailure(
            f"Index {spec.name}: the snapshot {snapshot} lies in the server directory itself.",
            next_step="set MUSE_WORK_DIR and MUSE_SERVER_DIR to different directories.",
        )
    with working_on(spec, server, wait_seconds=lock_wait_seconds):
        live = live_file(server, spec)
        if live is not None and live.sha256 == manifest.sha256:
            return _stay(spec, manifest, server, live, started)
        _check_candidate(spec, snapshot, manifest, live, confirm_size=confirm_size)
        if live is not None and live.damaged and not replace_damaged:
            raise PermanentFailure(
                f"Index {spec.name}: the live file {live.path} is damaged or was edited: no manifest in"
                f" {server} has its content {live.sha256[:12]}.",
                next_step="roll back, or deploy again with replace_damaged; its bytes are kept aside.",
            )
        return _publish(spec, snapshot, manifest, server, live, retention=retention, started=started)


def rollback(
    spec: IndexSpec,
    server: Path,
    *,
    to: str | None = None,
    retention: Retention = DEFAULT_RETENTION,
    lock_wait_seconds: float = 0.0,
) -> Deployment:
    """Make the newest backup that is not live the live file, or the one whose sha256 starts with `to`.

    The replaced file becomes a backup too, unless it is damaged, so rolling back again rolls forward.
    Raises as `deploy` does; PermanentFailure if there is no such backup or its bytes are damaged.
    """
    started = time.monotonic()
    with working_on(spec, server, wait_seconds=lock_wait_seconds):
        live = live_file(server, spec)
        if to and live is not None and live.manifest is not None and live.sha256.startswith(to):
            return _stay(spec, live.manifest, server, live, started)
        backup, manifest = _chosen(spec, server, live, to)
        # The file being rolled back from may be one the server cannot load: it is no fallback.
        return _publish(
            spec,
            backup.path,
            manifest,
            server,
            live,
            fallback=backup.path,
            retention=retention,
            started=started,
        )


def _check_candidate(
    spec: IndexSpec, snapshot: Path, manifest: Manifest, live: LiveFile | None, *, confirm_size: bool
) -> None:
    if not snapshot.is_file():
        raise PermanentFailure(
            f"Index {spec.name}: the snapshot {snapshot} does not exist.",
            next_step=f"materialize {spec.name}/index for {manifest.partition} again.",
        )
    if live is not None and live.manifest is not None and manifest.day < live.manifest.day:
        raise PermanentFailure(
            f"Index {spec.name}: the snapshot of {manifest.partition} is older than the live file's"
            f" {live.manifest.partition}.",
            next_step="to go back in time, roll back; otherwise deploy a newer partition.",
        )
    if found := violations(spec, manifest, live, confirm_size=confirm_size):
        raise PermanentFailure(
            f"Index {spec.name}: the search server could not serve {snapshot}: {'; '.join(found)}.",
            next_step="correct the catalog and build again; if the server itself was changed to take such"
            " a file, move the live file away first.",
        )


def _chosen(spec: IndexSpec, server: Path, live: LiveFile | None, to: str | None) -> tuple[Backup, Manifest]:
    kept = backups(spec, server)
    others = [b for b in kept if live is None or not live.sha256.startswith(b.sha12)]
    for backup in others:
        if backup.manifest is not None and backup.manifest.sha256.startswith(to or ""):
            return backup, backup.manifest
    known = ", ".join(b.sha12 for b in others if b.manifest is not None) or "none"
    wanted = f"backup {to}" if to else "backup that is not live"
    raise PermanentFailure(
        f"Index {spec.name}: {server} has no {wanted}; backups: {known}.",
        next_step="name one of these, or deploy a snapshot.",
    )


def _stay(spec: IndexSpec, manifest: Manifest, server: Path, live: LiveFile, started: float) -> Deployment:
    """The wanted bytes are live: bring their facts and the fallback up to date, leave the file alone."""
    make_folders(server, spec.name)
    partition = _record(server, manifest).partition
    _ensure_fallback(spec, server, live.path)
    seconds = time.monotonic() - started
    return Deployment(spec.name, live.sha256, partition, live.sha256, None, True, seconds, live.size)


def _publish(
    spec: IndexSpec,
    source: Path,
    manifest: Manifest,
    server: Path,
    live: LiveFile | None,
    *,
    fallback: Path | None = None,
    retention: Retention,
    started: float,
) -> Deployment:
    """Stage, check, back up, compare, swap, prune; undo what was made when the swap does not happen.

    fallback: the file to be linked as the server's second chance; None means the replaced one.
    """
    target = server / spec.live_file
    replaced = None if live is None else live.manifest
    # The adopted file's facts come first: once there is any manifest, a live file without one is damaged.
    facts = [replaced, manifest] if replaced else [manifest]
    make_folders(server, spec.name)
    made = [
        manifest_path(server, spec.name, m.sha256)
        for m in facts
        if read_manifest(server, spec.name, m.sha256) is None
    ]
    kept = None
    staged = stage(target, copy_into(source), expected_size=manifest.size)
    try:
        _check_content(spec, source, staged, manifest)
        for m in facts:
            _record(server, m)
        if live is not None:
            kept = keep(spec, server, live.path, live.sha256, damaged=live.damaged)
            made.append(kept)
            fallback = fallback or (None if live.damaged else kept)
        # The lock does not stop an operator's own cp or mv. Compared last, for until the rename the
        # backup shares the live file's inode.
        if _content(target) != (live.sha256 if live else None):
            raise Conflict(
                f"Index {spec.name}: {target} was changed by someone else during the deploy.",
                next_step="find out who writes there, then launch the run again; nothing was replaced.",
            )
        # Before the rename, so that the server finds a good file under both names at every instant.
        if fallback is not None:
            link(fallback, server / spec.fallback_file)
        else:
            _ensure_fallback(spec, server, staged.path)
        commit(staged)
    except BaseException:
        if staged.path.exists():  # not renamed
            discard(staged)
            for path in reversed(made):
                path.unlink(missing_ok=True)
        raise
    _prune_after(spec, server, staged.sha256, retention)
    return Deployment(
        index=spec.name,
        sha256=staged.sha256,
        partition=manifest.partition,
        replaced_sha256=live.sha256 if live else None,
        backup=kept if replaced else None,
        already_live=False,
        seconds=time.monotonic() - started,
        size=staged.size,
    )


def _record(server: Path, manifest: Manifest) -> Manifest:
    """Write the facts unless the directory has them for as new a day; return those that hold."""
    known = read_manifest(server, manifest.index, manifest.sha256)
    if known is not None and known.day >= manifest.day:
        return known
    write_manifest(server, manifest)
    return manifest


def _prune_after(spec: IndexSpec, server: Path, sha256: str, retention: Retention) -> None:
    try:
        prune(spec, server, sha256, retention)
    except OSError as error:
        raise PassingFailure(
            f"Index {spec.name}: {server / spec.live_file} is published, but old backups could not be"
            f" pruned: {error}.",
            next_step="check that disk; the next deploy prunes again.",
        ) from error


def _check_content(spec: IndexSpec, source: Path, staged: Staged, manifest: Manifest) -> None:
    if staged.sha256 != manifest.sha256:
        raise PermanentFailure(
            f"Index {spec.name}: {source} is damaged: its content is {staged.sha256[:12]}, its manifest says"
            f" {manifest.sha256[:12]}.",
            next_step=f"materialize {spec.name}/index for {manifest.partition} again, or roll back to another"
            " backup.",
        )


def _content(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        return None


def _ensure_fallback(spec: IndexSpec, server: Path, content: Path) -> None:
    """Leave a known fallback as it is; else the newest intact backup, else a copy of `content`.

    A copy and not a link: one overwritten inode would take the server's second chance with the first.
    """
    fallback = server / spec.fallback_file
    if identify(server, spec.name, fallback) is not None:
        return
    if (sha256 := _content(fallback)) is not None:
        keep(spec, server, fallback, sha256, damaged=True)
    for backup in backups(spec, server):
        if is_intact(backup):
            link(backup.path, fallback)
            return
    commit(stage(fallback, copy_into(content), expected_size=content.stat().st_size))
