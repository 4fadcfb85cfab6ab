"""A deploy of a large file against `cp` and fsync of the same file, and what its readers feel of it.

Here: random bytes with a manifest, since a deploy reads no vector; real indexes where a reader searches
them. Not here: what a deploy survives (`muse_assets_tests/faults`).
"""

from __future__ import annotations

import contextlib
import hashlib
import mmap
import multiprocessing
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from multiprocessing.synchronize import Event
from pathlib import Path
from typing import Any

import faiss
import numpy as np

from muse_assets.durable_files import discard, file_sha256, fsync_directory, stage_copy
from muse_assets.publishing.deploying import deploy
from muse_assets_tests.benchmarks.measuring import Cost, Facts, Row, begin, in_turn, measure
from muse_assets_tests.server_directories import SPEC, Snapshot, snapshot

_BYTES = 300_000_000
_REPEATS = 5
# Of a live file that was written within the last minute, its bytes alone tell that it is still the same.
_A_MINUTE = 61.0
_DAYS = ("2026-11-21", "2026-11-22")
# A file three times as large, and what the process that publishes it may take for it, in MB.
_LARGE_BYTES = 1_000_000_000
_ALLOWED_MB = 16.0
_BLOCK = 1 << 16
# Few lists: FAISS makes a table for each at every open, 0.1 s for 1,024 of them, which is no stall.
_CODE_BYTES, _LISTS = 64, 64


def rows(scale: float) -> Iterator[Row]:
    """The day's deploy, and one of a file that is too large to be held in memory."""
    yield from _of_the_day(scale)
    yield _of_a_large_file(scale)


def _of_the_day(scale: float) -> Iterator[Row]:
    """Over a file that is older than a minute, as the day's is, and over one that is not."""
    size = int(_BYTES * scale)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        before, after = (random_snapshot(root / "work", seed, size, day) for seed, day in enumerate(_DAYS))
        # A server directory for each deploy, since what it leaves is a new file.
        servers = [root / f"server_{number}" for number in range(_REPEATS)]
        for server in servers:
            server.mkdir()
            deploy(SPEC, *before, server)
        os.sync()
        time.sleep(_A_MINUTE)
        costs = [
            in_turn(1, (deploy_after, (after, server)), (_copy, (after[0], server.with_suffix(".copy"))))
            for server in servers
        ]
        ours, copy = (_median(list(column)) for column in zip(*costs, strict=True))
        parts = measure(_parts, after[0], root / "parts.index").facts
        note = ", ".join(f"{name} {seconds:.2f} s" for name, seconds in parts.items())
        what = f"deploy of {size / 1e6:,.0f} MB"
        yield Row(what, "cp, fsync", ours, copy, reach=2, faster=False, note=f"its parts alone: {note}")
        if {file_sha256(server / SPEC.live_file) for server in servers} != {after[1].sha256}:
            raise RuntimeError("what is live is not what was deployed")
        again = (before[0], replace(before[1], partition="2026-11-23"))
        young = _median([measure(deploy_after, again, server) for server in servers])
        yield Row(f"{what}, over one of this minute", "cp, fsync", young, copy, reach=None, faster=False)


def _median(costs: list[Cost]) -> Cost:
    return sorted(costs, key=lambda cost: cost.wall)[len(costs) // 2]


def random_snapshot(work: Path, seed: int, size: int, day: str) -> Snapshot:
    """A file of `size` random bytes, and the manifest of them."""
    path, manifest = snapshot(work, seed, day)
    content = np.random.default_rng(seed).bytes(size)
    path.write_bytes(content)
    return path, replace(manifest, sha256=hashlib.sha256(content).hexdigest(), size=size)


def deploy_after(taken: Snapshot, server: Path) -> Facts:
    """The day's deploy."""
    _free_page_cache(taken[1].size, server)
    begin()
    done = deploy(SPEC, *taken, server)
    if done.already_live or done.warning:
        raise RuntimeError(f"it was no ordinary deploy: {done}")
    return {}


def _free_page_cache(size: int, folder: Path) -> None:
    """Leave free what the page cache of so many bytes was just using.

    Where a hypervisor hands memory out by the page, 300 MB that nobody used yet add 0.5 to 0.9 s to a copy of
    0.1; so whoever copies after another has removed a file is faster by that.
    """
    written = folder / "removed"
    block = bytes(1 << 20)
    with written.open("wb") as file:
        for _ in range(-(-size // len(block))):
            file.write(block)
    written.unlink()


def _copy(source: Path, target: Path) -> Facts:
    _free_page_cache(source.stat().st_size, target.parent)
    begin()
    subprocess.run(["cp", source, target], check=True)
    descriptor = os.open(target, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
    fsync_directory(target.parent)
    return {}


def _parts(source: Path, target: Path) -> dict[str, float]:
    started = time.perf_counter()
    file_sha256(source)
    hashed = time.perf_counter()
    discard(stage_copy(target, source, expected_size=source.stat().st_size))
    return {"hash of the live file": hashed - started, "copy, fsync, hash": time.perf_counter() - hashed}


# --- A large file, while it is read -----------------------------------------------------------------------


@dataclass(frozen=True)
class Readings:
    """What a reader met: the worst and the 99th percentile of its readings, in ms.

    cached: a block of the live file; direct: one past the cache, from the disk; opened: the file mapped by
    FAISS and searched. Each is of a new open of the live file's name.
    """

    count: int
    cached: tuple[float, float]
    direct: tuple[float, float]
    opened: tuple[float, float]

    def describe(self) -> str:
        """For a note."""
        kinds = ("block", self.cached), ("block past the cache", self.direct), ("search", self.opened)
        times = "; ".join(f"{kind} {worst:,.1f} (p99 {usual:,.1f})" for kind, (worst, usual) in kinds)
        return f"{self.count:,} readings, worst ms: {times}"


def _of_a_large_file(scale: float) -> Row:
    size = int(_LARGE_BYTES * scale)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        before, after = (_large_snapshot(root / "work", seed, size, day) for seed, day in enumerate(_DAYS))
        server = root / "server"
        server.mkdir()
        deploy(SPEC, *before, server)
        os.sync()
        time.sleep(_A_MINUTE)
        sources = (before[0], after[0])
        with _reading(server / SPEC.live_file, sources) as quiet:
            time.sleep(3)
        with _reading(server / SPEC.live_file, sources) as met:
            ours = measure(deploy_after, after, server)
        with _reading(server / SPEC.live_file, sources) as beside_copy:
            copy = measure(_copy, after[0], root / "copied.index")
        note = (
            f"{size / 1e6 / ours.wall:,.0f} MB/s, so 7 GB in {7e9 / size * ours.wall:,.0f} s. Readers"
            f" meanwhile: {met[0].describe()}; during cp: {beside_copy[0].describe()}; of a quiet disk:"
            f" {quiet[0].describe()}"
        )
    return Row(
        f"deploy of {size / 1e9:,.1f} GB, its memory",
        f"{_ALLOWED_MB:.0f} MB allowed; time of cp, fsync",
        ours,
        replace(copy, peak=_ALLOWED_MB),
        reach=1,
        faster=False,
        metric="peak",
        note=note,
    )


def _large_snapshot(work: Path, seed: int, size: int, day: str) -> Snapshot:
    """An index of about `size` bytes that FAISS can load, in a process of its own: it is made in memory."""
    path, manifest = snapshot(work, seed, day)
    measure(_write_large_index, path, seed, size)
    return path, replace(manifest, sha256=file_sha256(path), size=path.stat().st_size)


def _write_large_index(path: Path, seed: int, size: int) -> Facts:
    random = np.random.default_rng(seed)
    quantizer = faiss.IndexFlatL2(_CODE_BYTES)
    index = faiss.IndexIVFPQ(quantizer, _CODE_BYTES, _LISTS, _CODE_BYTES, 8)
    quantizer.add(random.random((_LISTS, _CODE_BYTES), dtype=np.float32))
    faiss.copy_array_to_vector(random.random(index.pq.centroids.size(), dtype=np.float32), index.pq.centroids)
    index.is_trained = True
    rows = size // (_CODE_BYTES + 8) // _LISTS
    for number in range(_LISTS):
        ids = np.arange(number * rows, (number + 1) * rows, dtype=np.int64)
        codes = random.integers(0, 256, (rows, _CODE_BYTES), dtype=np.uint8)
        index.invlists.add_entries(number, rows, faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    index.ntotal = _LISTS * rows
    faiss.write_index(index, str(path))
    return {}


@contextlib.contextmanager
def _reading(live: Path, sources: tuple[Path, Path]) -> Iterator[list[Readings]]:
    """Have another process read the live file for the time of the block; what it met is in the list then.

    RuntimeError when it met anything but one of the sources, whole.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    stop = context.Event()
    process = context.Process(target=_read, args=(live, sources, stop, sending))
    process.start()
    sending.close()
    met: list[Readings] = []
    try:
        if receiving.recv() != "ready":
            raise RuntimeError("the reader does not read")
        yield met
    finally:
        stop.set()
        with contextlib.suppress(EOFError):
            met.append(receiving.recv())
        process.join()
    if not met or not isinstance(met[0], Readings):
        raise RuntimeError(f"the reader failed: {met or 'it died'}")


def _read(live: Path, sources: tuple[Path, Path], stop: Event, sending: Any) -> None:
    """Read until told to stop; answer with the Readings, or with the error."""
    faiss.omp_set_num_threads(1)
    random = np.random.default_rng(7)
    query = random.random((1, _CODE_BYTES), dtype=np.float32)
    kept = [_Source(source, _search(source, query)) for source in sources]
    for source in kept:
        source.path.read_bytes()  # into memory: what is compared with costs the disk nothing
    times: dict[str, list[float]] = {"cached": [], "direct": [], "opened": []}
    sending.send("ready")
    try:
        while not stop.is_set():
            for kind, flags in (("cached", 0), ("direct", os.O_DIRECT)):
                times[kind].append(_read_block(live, kept, int(random.integers(1 << 40)), flags))
            started = time.perf_counter()
            found = _search(live, query)
            times["opened"].append(time.perf_counter() - started)
            if not any(np.array_equal(found, source.answer) for source in kept):
                raise RuntimeError("a search's answer is of neither file")
        of = {kind: (1e3 * max(all_), 1e3 * float(np.quantile(all_, 0.99))) for kind, all_ in times.items()}
        sending.send(Readings(sum(map(len, times.values())), **of))
    except BaseException as error:
        sending.send(f"{type(error).__name__}: {error}")
        raise


@dataclass(frozen=True)
class _Source:
    path: Path
    answer: Any


def _search(path: Path, query: Any) -> Any:
    """Distances and ids of the nearest, through a mapping of the file."""
    index = faiss.read_index(str(path), faiss.IO_FLAG_MMAP)
    index.nprobe = 1
    distances, ids = index.search(query, 10)
    return np.concatenate([distances.astype(np.float64), ids.astype(np.float64)])


def _read_block(live: Path, sources: list[_Source], place: int, flags: int) -> float:
    """Seconds of opening the file and reading a block of it; RuntimeError if no source has that block."""
    offset = place % (sources[0].path.stat().st_size - _BLOCK) // 4096 * 4096
    with mmap.mmap(-1, _BLOCK) as block:  # aligned, as O_DIRECT wants it
        started = time.perf_counter()
        descriptor = os.open(live, os.O_RDONLY | flags)
        count = os.preadv(descriptor, [block], offset)
        os.close(descriptor)
        seconds = time.perf_counter() - started
        if not any(block[:count] == _block(source.path, offset) for source in sources):
            raise RuntimeError(f"the {count} bytes at {offset} are of neither file")
    return seconds


def _block(path: Path, offset: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        return os.pread(file.fileno(), _BLOCK, offset)
