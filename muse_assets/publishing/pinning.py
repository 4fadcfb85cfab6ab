"""Holds an index at the content an operator rolled it back to, until it is released.

Here: the pin, one sealed file an index. Not here: what respects it (`deploying.deploy`, the deploy
sensor), or going back (`deploying.rollback`).

A pin is written before the live file is replaced. A kill between the two leaves an index that no new
build replaces, and a pin that names another content than the live one; the other way round the next
build would undo a rollback that had happened.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from zoneinfo import ZoneInfo

from muse_assets.catalog import IndexSpec
from muse_assets.durable_files import fsync_directory
from muse_assets.failures import PassingFailure
from muse_assets.manifest import Manifest
from muse_assets.publishing.layout import pin_file, working_on
from muse_assets.sealed_json import read_sealed, write_sealed

# A deploy holds an index's lock while it copies and hashes the file.
_LOCK_WAIT_SECONDS = 10.0


@dataclass(frozen=True)
class Pin:
    """One index stays at one content. sha256: "" if the pin's file is damaged, which pins all the same.

    partition: the content's day (Seoul, ISO). since: when it was pinned (Seoul, ISO). why: in the words
    of whoever did it.
    """

    index: str
    sha256: str
    partition: str
    since: str
    why: str

    @property
    def what(self) -> str:
        """To what, since when and why, in an operator's words."""
        if not self.sha256:
            return f"pinned, but {self.why}"
        since = f"{datetime.fromisoformat(self.since):%Y-%m-%d %H:%M} Seoul"
        return f"pinned to {self.sha256[:12]} of {self.partition} since {since} ({self.why})"

    def describe(self) -> str:
        """The same as a clause."""
        return f"{self.index} is {self.what}"


def pin_to(manifest: Manifest, why: str) -> Pin:
    """A pin from now on to the content of these facts."""
    since = datetime.now(ZoneInfo("Asia/Seoul")).isoformat(timespec="seconds")
    return Pin(manifest.index, manifest.sha256, manifest.partition, since, " ".join(why.split()))


def read_pin(server: Path, index: str) -> Pin | None:
    """The index's pin, None if it has none. PassingFailure where the disk fails."""
    path = pin_file(server, index)
    try:
        content = read_sealed(path)
        if content is None:
            return _damaged(index, path) if path.exists() else None
        return Pin(**content)
    except OSError as error:
        raise PassingFailure(
            f"Index {index}: the pin {path} cannot be read: {error.strerror or error}; nothing was replaced.",
            next_step="check that disk and the file's permissions, then launch the run again.",
        ) from error
    except TypeError:  # another version's
        return _damaged(index, path)


def put_pin(server: Path, index: str, pin: Pin | None) -> None:
    """Make `pin` the index's, durably; None removes it. Call it under the index's lock."""
    path = pin_file(server, index)
    if pin is not None:
        write_sealed(path, asdict(pin))
    elif path.exists():
        path.unlink()
        fsync_directory(path.parent)


def release_pin(spec: IndexSpec, server: Path) -> Pin | None:
    """Remove the index's pin; the pin there was. Conflict when another process holds the lock."""
    with working_on(spec, server, wait_seconds=_LOCK_WAIT_SECONDS):
        pin = read_pin(server, spec.name)
        put_pin(server, spec.name, None)
        return pin


def _damaged(index: str, path: Path) -> Pin:
    return Pin(index, "", "", "", f"{path} is damaged and does not say to what")
