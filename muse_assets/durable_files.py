"""Files that are either wholly there or not there, through kills, full disks and power cuts.

Here: locks, staging a file beside its target, the rename that publishes it, content hashes. Not here:
what is in the files or which one goes where (`snapshots`, `publishing`). No library does all of this:
atomicwrites is unmaintained, boltons skips the directory fsync, shutil truncates in place.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

from muse_assets.failures import Conflict, PassingFailure, PermanentFailure

_BUFFER = 1 << 17
_BLOCK = 1 << 18  # above the buffer, so that a copied block is written as it is
# The disk begins with a piece while the next is made: 300 MB copied and fsynced in 0.11 s, not in 0.20 s.
_PIECE = 8 << 20
_TEMP_SUFFIX = ".part"
# A write moves the mtime within a tick of the clock (4 ms; 2 s on the coarsest file systems). One through a
# mapping does at its first change of a page after that was written back, which by the kernel's defaults is
# 35 s later at most (vm.dirty_expire_centisecs, vm.dirty_writeback_centisecs).
_SETTLED_SECONDS = 60.0

Write = Callable[[bytes | memoryview], None]


@dataclass(frozen=True)
class Stamp:
    """Which file it is, and when it was last written. size in bytes.

    settled: that was so long ago that any later write gives another stamp.
    """

    device: int
    inode: int
    size: int
    modified_ns: int
    settled: bool = field(compare=False)


@dataclass(frozen=True)
class Staged:
    """A complete, fsynced temp file beside `target`, re-read: its sha256 in hex, its stamp of that time."""

    path: Path
    target: Path
    sha256: str
    stamp: Stamp

    @property
    def size(self) -> int:
        """In bytes."""
        return self.stamp.size


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex. FAISS files carry no checksum of their own."""
    return stamped_sha256(path)[0]


def stamped_sha256(path: Path) -> tuple[str, Stamp]:
    """SHA-256 of a file's bytes, in hex, and its stamp from before the first was read. Raises OSError."""
    try:
        with path.open("rb") as file:
            stamp = _stamp(file.fileno())
            return hashlib.file_digest(file, "sha256").hexdigest(), stamp
    except OSError as error:
        if error.filename is None:  # a failed read, as opposed to a failed open, does not say of what
            error.filename = str(path)
        raise


def is_untouched(path: Path, stamp: Stamp) -> bool:
    """Whether `path` is the file of a settled `stamp`, not written since; if not, only its bytes can tell.

    It saves hashing one content twice in a run, never trusting one from an earlier run: a bad disk moves no
    mtime, and whoever sets one back would be believed. Raises OSError, but not for a missing file.
    """
    return stamp.settled and _is(path, stamp)


def _is(path: Path, stamp: Stamp) -> bool:
    try:
        # Opened, because a network file system answers a mere stat from its cache for up to a minute.
        with path.open("rb", buffering=0) as file:
            return _stamp(file.fileno()) == stamp
    except FileNotFoundError:
        return False


def _stamp(descriptor: int) -> Stamp:
    found = os.fstat(descriptor)
    # The ctime too: an mtime can be set back by whoever goes on writing.
    written_at = max(found.st_mtime, found.st_ctime)
    settled = time.time() - written_at >= _SETTLED_SECONDS
    return Stamp(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, settled)


@contextlib.contextmanager
def locked(lock_file: Path, *, wait_seconds: float = 0.0) -> Iterator[None]:
    """Hold an exclusive flock on `lock_file`, which is created once and never unlinked.

    flock and not lockf: a POSIX lock is lost as soon as any descriptor of the file closes.
    Raises Conflict when another process still holds it after `wait_seconds`.
    """
    with _explained(lock_file):
        make_directory(lock_file.parent)
        descriptor = os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    try:
        deadline = time.monotonic() + wait_seconds
        while True:
            try:
                with _explained(lock_file, passing_through=BlockingIOError):
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    raise Conflict(
                        f"Another process is at work here: it holds the lock {lock_file}.",
                        next_step="let it finish; this run changed nothing and can be launched again.",
                    ) from None
                time.sleep(0.05)
        yield
    finally:
        # The lock is gone whatever close says, and nothing was written: the work done under it holds.
        with contextlib.suppress(OSError):
            os.close(descriptor)


def make_directory(directory: Path) -> None:
    """Create the directory, and its parents, where missing: durably, and whatever the umask for readers.

    Raises OSError.
    """
    if directory.is_dir():
        return
    make_directory(directory.parent)
    try:
        directory.mkdir()
    except FileExistsError:
        if directory.is_dir():  # another process was faster
            return
        raise
    directory.chmod(directory.stat().st_mode | 0o055)
    fsync_directory(directory.parent)


def fsync_directory(directory: Path) -> None:
    """Make the names in `directory` durable; without it a power cut lost 120 of 120 renames."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(target: Path) -> list[Path]:
    """Remove the temp files that killed writers of `target` left; call it under the target's lock."""
    left = sorted(target.parent.glob(f".{target.name}.*{_TEMP_SUFFIX}"))
    for path in left:
        path.unlink(missing_ok=True)
    return left


def stage(target: Path, produce: Callable[[Write], None], *, expected_size: int | None = None) -> Staged:
    """Write what `produce` writes into a temp file beside `target`; hash, fsync and re-read it.

    The temp's name starts with a dot and does not end in `.index`, so no reader takes it for a file.
    A failed fsync is never retried: the kernel may have dropped the pages. Raises PassingFailure or
    PermanentFailure with the path, and leaves no temp file.
    """
    digest = hashlib.sha256()

    def produce_hashed(write: Write) -> None:
        def write_hashed(block: bytes | memoryview) -> None:
            write(block)
            digest.update(block)

        produce(write_hashed)

    staged = _stage(target, produce_hashed, expected_size)
    if staged.sha256 != digest.hexdigest():
        discard(staged)
        raise reads_back_differently(staged)
    return staged


def stage_copy(target: Path, source: Path, *, expected_size: int) -> Staged:
    """Copy `source` into a temp file beside `target`; fsync and re-read it. Raises as `stage` does.

    What it holds is hashed once, when it is re-read, so the caller has to know what it should be: a hash
    while copying would cost 0.2 s of 300 MB, and finds no more.
    """
    return _stage(target, copy_into(source), expected_size)


def _stage(target: Path, produce: Callable[[Write], None], expected_size: int | None) -> Staged:
    temp = _temp(target)
    with _explained(temp):
        descriptor = os.open(temp, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with (
            _explained(temp),
            os.fdopen(descriptor, "wb", buffering=_BUFFER) as file,
            ThreadPoolExecutor(1, "reading back") as thread,
        ):
            reading_back = _ReadingBack(temp, thread)
            if expected_size:
                # A disk that is too small says so before the first byte is written.
                os.posix_fallocate(descriptor, 0, expected_size)
            size = begun = 0

            def write(block: bytes | memoryview) -> None:
                nonlocal size, begun
                file.write(block)
                size += len(block)
                if size - begun >= _PIECE:
                    file.flush()
                    _begin_writeback(descriptor, begun, size)
                    reading_back.go_on(size)
                    begun = size

            produce(write)
            file.flush()
            file.truncate(size)
            # The server runs as another user, whatever this process's umask.
            os.fchmod(descriptor, 0o644)
            written = _stamp(descriptor)
            if begun:
                reading_back.go_on(size)
            os.fsync(descriptor)
            sha256 = reading_back.sha256()
            # A read that begins now would give the same, from the same pages, unless they were written to or
            # are out of date, on a network file system: either shows in the stamp.
            if not begun or not _is(temp, written):
                sha256, written = stamped_sha256(temp)
            return Staged(temp, target, sha256, written)
    except BaseException:
        _remove(temp)
        raise


class _ReadingBack:
    """Hashes what is read of a file, in a thread of its own, while it is written and fsynced.

    300 MB, beside the hash of the live file: known 0.1 s after the last byte, not 0.2 s after the fsync.
    """

    def __init__(self, path: Path, thread: Executor) -> None:
        self._path, self._thread = path, thread
        self._digest, self._at = hashlib.sha256(), 0
        self._under_way: list[Future[None]] = []

    def go_on(self, size: int) -> None:
        """Read what is written by now, up to `size` bytes."""
        self._under_way.append(self._thread.submit(self._read_up_to, size))

    def sha256(self) -> str:
        """Of all that was to be read, in hex. Raises OSError."""
        for read in self._under_way:
            read.result()
        return self._digest.hexdigest()

    def _read_up_to(self, size: int) -> None:
        block = memoryview(bytearray(_BLOCK))
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._at)
            while self._at < size and (count := file.readinto(block[: size - self._at])):
                self._digest.update(block[:count])
                self._at += count


def _begin_writeback(descriptor: int, start: int, end: int) -> None:
    # Advice: the pages are dirty, so they are handed to the disk and stay. A refusal only costs time.
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, start, end - start, os.POSIX_FADV_DONTNEED)


def reads_back_differently(staged: Staged) -> PassingFailure:
    """The failure of a disk that gives other bytes than it took."""
    return PassingFailure(
        f"{staged.path.name} reads back differently from what was written to {staged.target.parent}.",
        next_step="check that disk (dmesg, smartctl) and launch the run again.",
    )


def copy_into(source: Path) -> Callable[[Write], None]:
    """A producer for `stage` that copies `source` block by block."""

    def produce(write: Write) -> None:
        block = memoryview(bytearray(_BLOCK))
        with source.open("rb", buffering=0) as file:
            while count := file.readinto(block):
                write(block[:count])

    return produce


def commit(staged: Staged) -> None:
    """Rename the staged file over its target and make that durable, then see that it is there.

    Its bytes were read back when it was staged, and nobody else knows a temp's name: that the target is that
    file, not written since, tells as much as reading it again.
    Raises PassingFailure when the outcome cannot be confirmed: after the rename an error means
    *unknown*, so nothing is deleted and the next run reads back and decides.
    """
    try:
        with _explained(staged.target):
            staged.path.replace(staged.target)
    except BaseException:
        discard(staged)
        raise
    try:
        fsync_directory(staged.target.parent)
        confirmed = _is(staged.target, staged.stamp)
    except OSError:
        confirmed = False
    if not confirmed:
        raise PassingFailure(
            f"{staged.target} was renamed into place but could not be confirmed on disk.",
            next_step="check that disk and launch the run again; it reads the file back and decides.",
        )


def discard(staged: Staged) -> None:
    """Drop a staged file that is not to be published."""
    _remove(staged.path)


def write_text(target: Path, text: str) -> None:
    """Replace a small text file (UTF-8) atomically and durably."""
    with _explained(target):
        make_directory(target.parent)
    content = text.encode("utf-8")
    commit(stage(target, lambda write: write(content)))


def link(source: Path, target: Path) -> None:
    """Give `source`'s inode the further name `target`, replacing it atomically, and make it durable.

    For files that are replaced by rename only and never written in place. Raises Conflict when `source` is
    not there any more.
    """
    temp = _temp(target)
    with _explained(target):
        make_directory(target.parent)
        try:
            try:
                temp.hardlink_to(source)
            except FileNotFoundError as error:  # also while a rename replaces it: its inode has no name left
                raise Conflict(
                    f"{source} was replaced or removed by someone else during the run.",
                    next_step="find out who writes there, then launch the run again; nothing was replaced.",
                ) from error
            temp.replace(target)
        finally:
            temp.unlink(missing_ok=True)  # renaming onto the same inode leaves both names
        fsync_directory(target.parent)


def hold(path: Path) -> Path | None:
    """Keep the bytes at `path` under a temp name while `path` is replaced; None if nothing is there.

    Rename it back or unlink it; `sweep` removes what a killed process left.
    """
    held = _temp(path)
    with _explained(path):
        try:
            held.hardlink_to(path)
        except FileNotFoundError:
            return None
    return held


def _temp(target: Path) -> Path:
    return target.parent / f".{target.name}.{os.getpid()}-{time.monotonic_ns()}{_TEMP_SUFFIX}"


@contextlib.contextmanager
def explained(subject: str, directory: Path, unharmed: str) -> Iterator[None]:
    """Turn an OSError from before a rename into a failure that names the path.

    unharmed: a clause that says what the error did not change.
    """
    try:
        yield
    except OSError as error:
        raise PassingFailure(
            f"{subject}: {error.strerror or error} at {error.filename or directory}; {unharmed}.",
            next_step=f"check the disk of {directory} and its permissions, then launch the run again.",
        ) from error


def _remove(temp: Path) -> None:
    # On a failing disk this fails too, and must not hide the failure that led here; `sweep` comes later.
    with contextlib.suppress(OSError):
        temp.unlink(missing_ok=True)


@contextlib.contextmanager
def _explained(path: Path, passing_through: type[OSError] | tuple[()] = ()) -> Iterator[None]:
    """Turn an OSError into a failure that names the path and the remedy."""
    remedies = {
        errno.ENOSPC: ("the disk is full", "free space there"),
        errno.EDQUOT: ("the disk quota is used up", "free space there"),
        errno.EFBIG: ("the file would be larger than this process may write", "raise its file size limit"),
        errno.EROFS: ("the file system is read-only", "remount it writable"),
        errno.EACCES: ("permission denied", "give this user write access to the directory"),
        errno.EPERM: ("permission denied", "give this user write access to the directory"),
        errno.ENOENT: ("the directory does not exist", "create it or correct the setting"),
        errno.ENOTDIR: ("a part of the path is not a directory", "correct the setting"),
    }
    try:
        yield
    except passing_through:
        raise
    except OSError as error:
        reason, remedy = remedies.get(error.errno or 0, (str(error.strerror or error), "check that disk"))
        kind = PassingFailure if error.errno in (errno.EIO, errno.ENOSPC, errno.EDQUOT) else PermanentFailure
        raise kind(
            f"Cannot write {path}: {reason}. Nothing was replaced.",
            next_step=f"{remedy}, then launch the run again.",
        ) from error
