"""Replaces the file that the search server loads, or puts an earlier one back: one mechanism for both.

Here: the order of steps by which the live file is complete at every instant. Not here: telling the
server (`reloading.py`).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from muse_assets.catalog import IndexSpec
from muse_assets.durable_files import (
    Staged,
    commit,
    copy_into,
    discard,
    file_sha256,
    fsync_directory,
    hold,
    is_untouched,
    link,
    reads_back_differently,
    stage,
    stage_copy,
)
from muse_assets.failures import Conflict, MuseError, PassingFailure, PermanentFailure
from muse_assets.manifest import Manifest, identify, manifest_path, read_manifest, write_manifest
from muse_assets.publishing.backups import (
    DEFAULT_RETENTION,
    Backup,
    backups,
    is_intact,
    keep,
    prune,
    release,
    set_aside_damaged,
)
from muse_assets.publishing.contract import violations
from muse_assets.publishing.layout import make_folders, working_on
from muse_assets.publishing.live import LiveFile, live_file
from muse_assets.publishing.pinning import Pin, pin_to, put_pin, read_pin

# Beside the staging of 300 MB, which takes 0.3 s, the hash of the live file costs 0.2 s; of this size, 20 ms.
_WORTH_A_THREAD = 32 << 20


@dataclass(frozen=True)
class Deployment:
    """What is live now, and what it replaced.

    partition: day (Seoul, ISO) the content stands for. replaced_sha256: None if there was no live file.
    backup: where the replaced file is kept; None if there was none or it was damaged. already_live: the
    wanted content was live before, so no file was replaced. size in bytes. warning: what failed after the
    publication, which holds all the same; None if nothing did.
    """

    index: str
    sha256: str
    partition: str
    replaced_sha256: str | None
    backup: Path | None
    already_live: bool
    seconds: float
    size: int
    warning: str | None = None


class Unconfirmed(PassingFailure):
    """The file was renamed into place, but its disk did not confirm it: whether it is live is unknown."""


def deploy(
    spec: IndexSpec,
    snapshot: Path,
    manifest: Manifest,
    server: Path,
    *,
    confirm_size: bool = False,
    confirm_shrink: bool = False,
    confirm_recall: bool = False,
    replace_damaged: bool = False,
    unpin: bool = False,
) -> Deployment:
    """Make `snapshot` the index's live file in the directory `server`, keeping the replaced one.

    confirm_size lets the file be more than 1.5 times the live one's size; confirm_shrink lets it have
    fewer rows than the catalog allows, confirm_recall find less; replace_damaged lets a live file of
    unknown content be replaced; unpin releases a pinned index, which otherwise takes the pinned content
    alone.
    Raises PermanentFailure for a refusal, Conflict when another process holds the lock or changed the live
    file or the snapshot meanwhile, PassingFailure for a failing disk. Unless it is Unconfirmed, the live
    file is the one it was.
    """
    started = time.monotonic()
    if snapshot.parent.resolve() == server.resolve():
        raise PermanentFailure(
            f"Index {spec.name}: the snapshot {snapshot} lies in the server directory itself.",
            next_step="set MUSE_WORK_DIR and MUSE_SERVER_DIR to different directories.",
        )
    with working_on(spec, server), _staging(spec, snapshot, manifest, server) as staging:
        live = live_file(server, spec)
        _separate(spec, server, live)
        pin = None if unpin else read_pin(server, spec.name)
        if live is not None and live.sha256 == manifest.sha256:
            return _stay(spec, manifest, server, live, pin, started)
        if pin is not None and pin.sha256 != manifest.sha256:
            raise PermanentFailure(
                f"Index {pin.describe()}; the snapshot of {manifest.partition} was not deployed.",
                next_step=f"`muse release {spec.name}` lets new builds go live again, a deploy with"
                " release: true this one.",
            )
        found = violations(
            spec,
            manifest,
            live,
            confirm_size=confirm_size,
            confirm_shrink=confirm_shrink,
            confirm_recall=confirm_recall,
        )
        _check_candidate(spec, snapshot, manifest, live, found)
        if live is not None and live.damaged and not replace_damaged:
            raise PermanentFailure(
                f"Index {spec.name}: the live file {live.path} is damaged or was edited: no manifest in"
                f" {server} has its content {live.sha256[:12]}.",
                next_step="roll back, or deploy again with replace_damaged; its bytes are kept aside.",
            )
        return _publish(spec, snapshot, manifest, server, live, pin, staging, started=started)


def rollback(
    spec: IndexSpec,
    server: Path,
    *,
    to: str | None = None,
    replacing: str | None = None,
    pin: str | None = None,
    lock_wait_seconds: float = 0.0,
) -> Deployment:
    """Make the newest backup that is not live the live file, or the one whose sha256 starts with `to`.

    The replaced file becomes a backup too, unless it is damaged, so rolling back again rolls forward; so
    once the file may have been replaced, every failure is permanent: a retry would undo it. replacing:
    the live sha256 to be replaced; Conflict if another is live. pin: why the index is to stay there until
    it is released; None leaves the pin as it is. Raises as `deploy` does otherwise, and PermanentFailure
    if there is no such backup, if its bytes are damaged, and for a second pinning rollback without `to`.
    """
    started = time.monotonic()
    with working_on(spec, server, wait_seconds=lock_wait_seconds):
        live = live_file(server, spec)
        _separate(spec, server, live)
        if replacing is not None and (live is None or live.sha256 != replacing):
            raise Conflict(
                f"Index {spec.name}: {server / spec.live_file} is no longer {replacing[:12]}, which was to be"
                " replaced.",
                next_step="nothing was changed; look at what is live, and roll back by hand if it is wrong.",
            )
        if to and live is not None and live.manifest is not None and live.sha256.startswith(to):
            return _stay(spec, live.manifest, server, live, _pin(server, live.manifest, pin), started)
        if pin is not None and not to:
            _require_first(spec, server, live)
        backup, manifest = _chosen(spec, server, live, to)
        held = _pin(server, manifest, pin)
        # The file being rolled back from may be one the server cannot load: it is no fallback.
        staging = partial(stage_copy, server / spec.live_file, backup.path, expected_size=manifest.size)
        try:
            return _publish(
                spec,
                backup.path,
                manifest,
                server,
                live,
                held,
                staging,
                fallback=backup.path,
                started=started,
            )
        except Unconfirmed as error:
            raise PermanentFailure(
                error.what,
                next_step="check that disk, and look at what is live before launching the rollback again.",
            ) from error


@contextlib.contextmanager
def _staging(
    spec: IndexSpec, snapshot: Path, manifest: Manifest, server: Path
) -> Iterator[Callable[[], Staged]]:
    """Yield what gives the staged copy. A large one is begun at once, in a thread: the live file is hashed
    meanwhile. What becomes of the deploy is decided without it, and unless it is published it is dropped.
    """
    copy = partial(stage_copy, server / spec.live_file, snapshot, expected_size=manifest.size)
    known = read_manifest(server, spec.name, manifest.sha256) is not None  # so it may well be live already
    if known or manifest.size < _WORTH_A_THREAD or not snapshot.is_file():
        yield copy
        return
    with ThreadPoolExecutor(1, "staging") as threads:
        begun = threads.submit(copy)
        try:
            yield begun.result
        finally:
            with contextlib.suppress(Exception):  # it was told to whoever asked for the copy
                discard(begun.result())


def _pin(server: Path, manifest: Manifest, why: str | None) -> Pin | None:
    return read_pin(server, manifest.index) if why is None else pin_to(manifest, why)


def _separate(spec: IndexSpec, server: Path, live: LiveFile | None) -> None:
    """Leave the live file's inode no further name here.

    A deploy killed between its backup and its rename leaves the backup, and perhaps the fallback, as links
    to the file that stays live: an operator's cp over that one would change all of them.
    """
    if live is None:
        return
    release(spec, server, live.path)
    fallback = server / spec.fallback_file
    if fallback.exists() and fallback.samefile(live.path):
        _ensure_fallback(spec, server, live.path)


def _check_candidate(
    spec: IndexSpec, snapshot: Path, manifest: Manifest, live: LiveFile | None, violated: list[str]
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
    if violated:
        raise PermanentFailure(
            f"Index {spec.name}: the search server should not get {snapshot}: {'; '.join(violated)}.",
            next_step="correct the catalog and build again; if the server itself was changed to take such"
            " a file, move the live file away first.",
        )


def _require_first(spec: IndexSpec, server: Path, live: LiveFile | None) -> None:
    """Refuse an operator's second rollback in a row that names no backup: the newest is what was bad."""
    held = read_pin(server, spec.name)
    if held is None or live is None or held.sha256 != live.sha256:
        return
    others = [b for b in backups(spec, server) if b.manifest and not live.sha256.startswith(b.sha12)]
    known = ", ".join(
        f"{b.sha12} of {b.manifest.partition} ({b.manifest.rows:,} rows)" for b in others if b.manifest
    )
    raise PermanentFailure(
        f"Index {held.describe()}: it was rolled back already; backups, newest first: {known or 'none'}.",
        next_step=f"to go further back, name one: `muse rollback {spec.name} --to ...` (rollback_to);"
        f" `muse release {spec.name}` lets new builds go live again.",
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


def _stay(
    spec: IndexSpec, manifest: Manifest, server: Path, live: LiveFile, pin: Pin | None, started: float
) -> Deployment:
    """The wanted bytes are live: bring their facts, pin and fallback up to date, leave the file alone."""
    make_folders(server, spec.name)
    if pin != read_pin(server, spec.name):
        put_pin(server, spec.name, pin)
    partition = _record(server, manifest).partition
    _ensure_fallback(spec, server, live.path)
    fsync_directory(server)  # what an Unconfirmed or killed deploy did not come to
    warning = _clean_up(spec, server, live.sha256, None)
    seconds = time.monotonic() - started
    return Deployment(spec.name, live.sha256, partition, live.sha256, None, True, seconds, live.size, warning)


def _publish(
    spec: IndexSpec,
    source: Path,
    manifest: Manifest,
    server: Path,
    live: LiveFile | None,
    pin: Pin | None,
    staging: Callable[[], Staged],
    *,
    fallback: Path | None = None,
    started: float,
) -> Deployment:
    """Stage, check, back up, compare, swap, prune; undo what was made when the swap does not happen.

    pin: the one to hold from now on. staging: gives the copy of `source`. fallback: the file to be linked as
    the server's second chance; None means the replaced one.
    """
    target, second_chance = server / spec.live_file, server / spec.fallback_file
    replaced = None if live is None else live.manifest
    make_folders(server, spec.name)
    kept = None
    with contextlib.ExitStack() as undo:
        staged = staging()
        undo.callback(discard, staged)
        _check_content(spec, source, staged, manifest)
        # The adopted file's facts come first: once there is any manifest, a live file without one is
        # damaged.
        for facts in (replaced, manifest):
            if facts is not None:
                if read_manifest(server, spec.name, facts.sha256) is None:
                    undo.callback(manifest_path(server, spec.name, facts.sha256).unlink, missing_ok=True)
                _record(server, facts)
        # Before the rename (`pinning`).
        if (pinned := read_pin(server, spec.name)) != pin:
            undo.callback(put_pin, server, spec.name, pinned)
            put_pin(server, spec.name, pin)
        if live is not None:
            kept = keep(spec, server, live.path, live.sha256, damaged=live.damaged)
            undo.callback(kept.unlink, missing_ok=True)
            fallback = fallback or (None if live.damaged else kept)
        # The lock does not stop an operator's own cp or mv. Compared last, for until the rename the
        # backup shares the live file's inode.
        if not _holds(target, live):
            raise Conflict(
                f"Index {spec.name}: {target} was changed by someone else during the deploy.",
                next_step="find out who writes there, then launch the run again; nothing was replaced.",
            )
        # Before the rename, so that the server finds a good file under both names at every instant.
        before = hold(second_chance)
        undo.callback(_put_back, before, second_chance)
        if fallback is not None:
            link(fallback, second_chance)
        else:
            _ensure_fallback(spec, server, staged.path)
        try:
            commit(staged)
            undo.pop_all()
        except BaseException as error:
            # An error of the rename, or one after it? Only the content tells; undo nothing in doubt.
            if not _may_be_live(target, staged.sha256):
                raise
            undo.pop_all()
            if not isinstance(error, MuseError):
                raise
            raise Unconfirmed(
                f"Index {spec.name}: {target} was renamed into place but could not be confirmed on disk.",
                next_step="check that disk and launch the run again; it reads the file back and decides.",
            ) from error
    warning = _clean_up(spec, server, staged.sha256, before)
    if kept is not None and live is not None and not live.damaged:
        warning = _check_kept(spec, server, kept, live) or warning
    return Deployment(
        index=spec.name,
        sha256=staged.sha256,
        partition=manifest.partition,
        replaced_sha256=live.sha256 if live else None,
        backup=kept if replaced else None,
        already_live=False,
        seconds=time.monotonic() - started,
        size=staged.size,
        warning=warning,
    )


def _record(server: Path, manifest: Manifest) -> Manifest:
    """Write the facts unless the directory has them for as new a day; return those that hold."""
    known = read_manifest(server, manifest.index, manifest.sha256)
    if known is not None and known.day >= manifest.day:
        return known
    write_manifest(server, manifest)
    return manifest


def _clean_up(spec: IndexSpec, server: Path, sha256: str, before: Path | None) -> str | None:
    """Drop what is no longer needed; what failed, in words, for the publication holds all the same."""
    try:
        if before is not None:
            before.unlink(missing_ok=True)
        prune(spec, server, sha256, DEFAULT_RETENTION)
    except (OSError, MuseError) as error:
        return (
            f"{server / spec.live_file} is published, but old backups could not be pruned (the next deploy"
            f" tries again): {error}"
        )
    return None


def _check_kept(spec: IndexSpec, server: Path, kept: Path, replaced: LiveFile) -> str | None:
    """Set a backup aside that is not what was replaced; what happened, in words, or None.

    A cp over the live file that began before the rename goes on in the inode that is the backup now, and
    perhaps the fallback: 64 of 300 such copies did.
    """
    published = f"{server / spec.live_file} is published, but"
    try:
        if _holds(kept, replaced):
            return None
        set_aside_damaged(spec, server)
        _ensure_fallback(spec, server, server / spec.live_file)
    except (OSError, MuseError) as error:
        return f"{published} its backup {kept} could not be checked: {error}"
    return (
        f"{published} someone else wrote into the replaced file meanwhile, so its backup is set aside as"
        " damaged. Find out who writes there."
    )


def _put_back(before: Path | None, fallback: Path) -> None:
    """Undo a new fallback, which may be a link to the very file that stays live."""
    if before is None:
        fallback.unlink(missing_ok=True)
    else:
        before.replace(fallback)
        before.unlink(missing_ok=True)  # renaming onto the same inode leaves both names


def _may_be_live(target: Path, sha256: str) -> bool:
    try:
        return _content(target) == sha256
    except OSError:
        return True


def _check_content(spec: IndexSpec, source: Path, staged: Staged, manifest: Manifest) -> None:
    if staged.sha256 == manifest.sha256:
        return
    if (found := identify(source.parent, spec.name, source)) is not None:
        if found.sha256 == manifest.sha256:
            raise reads_back_differently(staged)
        raise Conflict(
            f"Index {spec.name}: {source} was built anew while it was copied.",
            next_step="launch the run again; nothing was replaced.",
        )
    raise PermanentFailure(
        f"Index {spec.name}: {source} is damaged: its content is {staged.sha256[:12]}, its manifest says"
        f" {manifest.sha256[:12]}.",
        next_step=f"materialize {spec.name}/index for {manifest.partition} again, or roll back to another"
        " backup.",
    )


def _holds(path: Path, live: LiveFile | None) -> bool:
    """Whether `path` holds what was live at the start; with None, whether there is still nothing."""
    if live is not None and live.stamp is not None and is_untouched(path, live.stamp):
        return True
    return _content(path) == (live.sha256 if live else None)


def _content(path: Path) -> str | None:
    try:
        return file_sha256(path)
    except FileNotFoundError:
        return None


def _ensure_fallback(spec: IndexSpec, server: Path, content: Path) -> None:
    """Leave a known fallback as it is unless it is `content` itself; else the newest intact backup, else a
    copy of `content`.

    A copy and not a link: one overwritten inode would take the server's second chance with the first.
    """
    fallback = server / spec.fallback_file
    sha256 = _content(fallback)
    if sha256 is not None and not fallback.samefile(content):
        if read_manifest(server, spec.name, sha256) is not None:
            return
        keep(spec, server, fallback, sha256, damaged=True)
    for backup in backups(spec, server):
        if is_intact(backup) and not backup.path.samefile(content):
            link(backup.path, fallback)
            return
    commit(stage(fallback, copy_into(content), expected_size=content.stat().st_size))
