"""Where things lie in the server directory, and how its failures read.

Here: paths and the check that the directory can be worked in. Not here: the contents of any file.

    muse_<index>.index                       live: what the server loads at start
    muse_<index>_backup.index                fallback: what it loads if that fails
    .manifests/<index>/<sha256>.json         facts of every file here, by content
    .backups/<index>/<UTC time>_<sha12>.index    files that were live before
    .locks/<index>.lock                      held by whoever changes the index's files
    .pins/<index>.json                       content that no build may replace, if there is one
    .loaded.json                             content the server last loaded well, by index
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from muse_assets import durable_files
from muse_assets.catalog import IndexSpec
from muse_assets.durable_files import locked, make_directory, sweep
from muse_assets.failures import PermanentFailure


def manifest_folder(server: Path, index: str) -> Path:
    """Folder of the manifests of one index."""
    return server / ".manifests" / index


def backup_folder(server: Path, index: str) -> Path:
    """Folder of the files of one index that were live before."""
    return server / ".backups" / index


def pin_file(server: Path, index: str) -> Path:
    """The pin of one index, if it is pinned."""
    return server / ".pins" / f"{index}.json"


def loaded_file(server: Path) -> Path:
    """JSON object: index -> sha256 that the server last loaded well."""
    return server / ".loaded.json"


def make_folders(server: Path, index: str) -> None:
    """Create the index's folders; their names survive a power cut."""
    for folder in (manifest_folder(server, index), backup_folder(server, index)):
        make_directory(folder)


@contextlib.contextmanager
def working_on(spec: IndexSpec, server: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold the index's lock in the server directory, swept of what killed processes left.

    Raises PermanentFailure for a directory that is missing or not writable (it is never created: its
    mount may be missing), Conflict when another process holds the lock after `wait_seconds`.
    """
    check_directory(server)
    lock = server / ".locks" / f"{spec.name}.lock"
    with explained(f"Index {spec.name}", server), locked(lock, wait_seconds=wait_seconds):
        sweep(server / spec.live_file)
        sweep(server / spec.fallback_file)
        sweep(pin_file(server, spec.name))
        for folder in (manifest_folder(server, spec.name), backup_folder(server, spec.name)):
            sweep(folder / "*")
        yield


def check_directory(server: Path) -> None:
    """Raise PermanentFailure unless `server` is a directory this process may write in."""
    with explained("The server directory", server):
        found = "is not a directory" if server.exists() else "does not exist"
        is_directory = server.is_dir()
    if not is_directory:
        raise PermanentFailure(
            f"The server directory {server} {found}.",
            next_step="mount or create it, or correct MUSE_SERVER_DIR; nothing was created or changed.",
        )
    if not os.access(server, os.R_OK | os.W_OK | os.X_OK):
        raise PermanentFailure(
            f"The server directory {server} is read-only for this process.",
            next_step="remount it writable or grant this user access; nothing was changed.",
        )


def explained(subject: str, server: Path) -> AbstractContextManager[None]:
    """Turn an OSError from before a rename into a failure that names the path."""
    return durable_files.explained(subject, server, "the live file was not replaced")
