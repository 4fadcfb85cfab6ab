"""Files that were live before: listed, kept for a time, pruned.

Here: `.backups/<index>/`. Not here: putting one back (`deploying.rollback`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from muse_assets.catalog import IndexSpec
from muse_assets.durable_files import file_sha256, fsync_directory, link
from muse_assets.manifest import Manifest, read_manifest
from muse_assets.publishing.layout import backup_folder, manifest_folder
from muse_assets.publishing.loaded import loaded_contents

_TIME = "%Y%m%dT%H%M%S.%fZ"
_NAME = re.compile(r"^(?P<time>\d{8}T\d{6}\.\d{6}Z)_(?P<damaged>damaged_)?(?P<sha12>[0-9a-f]{12})(\.index)?$")


@dataclass(frozen=True)
class Retention:
    """Keep at least the newest `backups` contents that are not live, and all replaced within `days`."""

    backups: int = 2
    days: float = 7.0


DEFAULT_RETENTION = Retention()


@dataclass(frozen=True)
class Backup:
    """A file that was live until `replaced_at` (UTC). sha12: first 12 hex digits of its content's hash.

    manifest: None if the facts are lost; such a backup cannot be rolled back to.
    """

    path: Path
    replaced_at: datetime
    sha12: str
    size: int
    manifest: Manifest | None


def backups(spec: IndexSpec, server: Path) -> list[Backup]:
    """The index's backups, newest first, by name only: nothing is hashed."""
    found = []
    for path, replaced_at, sha12, damaged in _entries(spec, server):
        if damaged:
            continue
        try:
            size = path.stat().st_size
        except FileNotFoundError:  # pruned by a deploy since it was listed
            continue
        found.append(Backup(path, replaced_at, sha12, size, _manifest(server, spec.name, sha12)))
    return found


def keep(spec: IndexSpec, server: Path, path: Path, sha256: str, *, damaged: bool) -> Path:
    """Link the file into the backups, durably; damaged bytes under a name that no rollback takes."""
    now = datetime.now(UTC)
    # A clock that was set back must not make the newest backup look old.
    if (entries := _entries(spec, server)) and entries[0][1] >= now:
        now = entries[0][1] + timedelta(microseconds=1)
    name = f"{now:{_TIME}}_damaged_{sha256[:12]}" if damaged else f"{now:{_TIME}}_{sha256[:12]}.index"
    target = backup_folder(server, spec.name) / name
    try:
        link(path, target)
    except BaseException:
        target.unlink(missing_ok=True)  # linked but not durable: a further name of a file that stays live
        raise
    return target


def release(spec: IndexSpec, server: Path, path: Path) -> None:
    """Remove the names among the backups that are links to `path`; its bytes stay."""
    links = [kept for kept, *_ in _entries(spec, server) if kept.exists() and kept.samefile(path)]
    for kept in links:
        kept.unlink()
    if links:
        fsync_directory(backup_folder(server, spec.name))


def is_intact(backup: Backup) -> bool:
    """Whether the backup's bytes are those of its manifest."""
    return backup.manifest is not None and file_sha256(backup.path) == backup.manifest.sha256


def set_aside_damaged(spec: IndexSpec, server: Path) -> list[Path]:
    """Give backups whose bytes are not those of their manifest a name that no rollback takes; return those.

    Call it under the index's lock. They are pruned with age, as every damaged file that is kept aside.
    """
    aside = []
    for backup in backups(spec, server):
        if backup.manifest is None or not is_intact(backup):
            path = backup.path.with_name(f"{backup.replaced_at:{_TIME}}_damaged_{backup.sha12}")
            backup.path.rename(path)
            aside.append(path)
    if aside:
        fsync_directory(backup_folder(server, spec.name))
    return aside


def prune(spec: IndexSpec, server: Path, live_sha256: str, retention: Retention) -> None:
    """Remove backups beyond `retention`, repeated contents, and manifests that no file here needs.

    What the server loaded last stays whatever its age: a failed reload goes back to it. Raises
    PermanentFailure if the record of that is unreadable, and OSError.
    """
    loaded = loaded_contents(server).get(spec.name, "")
    oldest = datetime.now(UTC) - timedelta(days=retention.days)
    kept: set[str] = set()
    spare = retention.backups
    for path, replaced_at, sha12, damaged in _entries(spec, server):
        if damaged:
            stays = replaced_at >= oldest
        elif sha12 in kept:
            stays = False
        else:
            is_spare = spare > 0 and not live_sha256.startswith(sha12)
            stays = is_spare or replaced_at >= oldest or loaded.startswith(sha12)
            spare -= is_spare
        if not stays:
            path.unlink(missing_ok=True)
        elif not damaged:
            kept.add(sha12)
    # A manifest may go only after its file has: a backup without one could not be rolled back to.
    fsync_directory(backup_folder(server, spec.name))
    needed = kept | {live_sha256[:12]} | _fallback_content(spec, server)
    for facts in manifest_folder(server, spec.name).glob("*.json"):
        if facts.stem[:12] not in needed:
            facts.unlink(missing_ok=True)


def _fallback_content(spec: IndexSpec, server: Path) -> set[str]:
    fallback = server / spec.fallback_file
    try:
        # Nearly always a link to a backup, which spares reading gigabytes.
        if any(path.samefile(fallback) for path, *_, damaged in _entries(spec, server) if not damaged):
            return set()
        return {file_sha256(fallback)[:12]}
    except FileNotFoundError:
        return set()


def _entries(spec: IndexSpec, server: Path) -> list[tuple[Path, datetime, str, bool]]:
    """Path, UTC time, sha12 and whether damaged, of everything that was set aside; newest first."""
    found = []
    for path in backup_folder(server, spec.name).glob("[0-9]*"):
        if match := _NAME.match(path.name):
            replaced_at = datetime.strptime(match["time"], _TIME).replace(tzinfo=UTC)
            found.append((path, replaced_at, match["sha12"], match["damaged"] is not None))
    return sorted(found, key=lambda entry: entry[1], reverse=True)


def _manifest(server: Path, index: str, sha12: str) -> Manifest | None:
    for path in manifest_folder(server, index).glob(f"{sha12}*.json"):
        return read_manifest(server, index, path.stem)
    return None
