"""Index files as the search server reads them, and back.

Here: writing an index through a callback, reading one whose bytes are known, the facts in its header,
the trained part of one as bytes. Not here: which directory, which name, hashes (`durable_files`, `manifest`).

The server drops playlist ids that are not below `ntotal`, so the file's `ntotal` field is written as
largest id + 1 (IVF search never looks at it) and set back to the true count on load.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.contents import list_ids, list_sizes


@dataclass(frozen=True)
class IndexFacts:
    """What an index file says of itself; m and nbits are None for a class without a product quantizer."""

    index_class: str
    dimension: int
    metric: str
    nlist: int
    m: int | None
    nbits: int | None
    nprobe: int
    ntotal: int
    is_trained: bool


def ntotal_field(index: Any) -> int:
    """What the file's `ntotal` has to say: largest id + 1."""
    ids = list_ids(index)
    return int(ids.max()) + 1 if len(ids) else 0


def write_index(index: Any, write: Callable[[bytes], None]) -> None:
    """Serialize `index` block by block into `write`, its `ntotal` field set to `ntotal_field`.

    A callback and not `faiss.write_index` to a path: that returns normally with a truncated file when
    only the last buffer meets a full disk.
    """
    failed: list[BaseException] = []

    def guarded(block: bytes) -> int:
        try:
            write(block)
        except BaseException as error:
            failed.append(error)
            raise
        return len(block)

    rows = index.ntotal
    index.ntotal = ntotal_field(index)
    writer = faiss.PyCallbackIOWriter(guarded, 1 << 20)
    try:
        faiss.write_index(index, faiss.BufferedIOWriter(writer, 1 << 20))
    except Exception:
        if failed:
            raise failed[0] from None
        raise
    finally:
        index.ntotal = rows
    if failed:
        raise failed[0]


def read_index(path: Path, *, precompute: bool = False) -> Any:
    """Load an IVF-PQ index into memory with its true `ntotal`.

    Not memory-mapped: adding to or removing from a mapped index kills the process. Check the file's
    hash before: FAISS notices almost no damage (of 400 flipped bits, 399 loaded). `precompute` builds the
    table that speeds up searching and is useless for adding. Raises PermanentFailure naming the file.
    """
    index = _read(path, faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    if not isinstance(index, faiss.IndexIVFPQ):
        raise PermanentFailure(
            f"{path} is a {type(index).__name__}, not an IndexIVFPQ.",
            next_step="train and build this index anew (job `rebuild`).",
        )
    index.ntotal = int(list_sizes(index).sum())
    if precompute:
        index.use_precomputed_table = 0
        index.precompute_table()
    return index


def trained_bytes(index: Any) -> bytes:
    """The trained cluster of an index alone, empty, for another process; `from_trained_bytes` reads it."""
    lists, owned, rows = index.invlists, index.own_invlists, index.ntotal
    empty = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    index.own_invlists = False
    index.replace_invlists(empty, False)
    index.ntotal = 0
    try:
        serialized: NDArray[np.uint8] = faiss.serialize_index(index)
        return serialized.tobytes()
    finally:
        index.replace_invlists(lists, owned)
        index.ntotal = rows


def from_trained_bytes(serialized: bytes) -> Any:
    """The empty index that `trained_bytes` was given."""
    return faiss.deserialize_index(np.frombuffer(serialized, np.uint8))


def discard_lists(index: Any) -> None:
    """Free the inverted lists of an index that is not used any more, whoever still refers to it.

    `reset` keeps their memory.
    """
    empty = faiss.ArrayInvertedLists(index.nlist, index.code_size)
    index.replace_invlists(empty, True)
    empty.this.disown()
    index.ntotal = 0


def describe(path: Path) -> IndexFacts:
    """The facts of an index file of any class, without loading its lists into memory.

    Raises PermanentFailure when FAISS cannot read it.
    """
    index = _read(path, faiss.IO_FLAG_MMAP | faiss.IO_FLAG_SKIP_PRECOMPUTE_TABLE)
    pq = index.pq if isinstance(index, faiss.IndexIVFPQ) else None
    return IndexFacts(
        index_class=type(index).__name__,
        dimension=index.d,
        metric="l2" if index.metric_type == faiss.METRIC_L2 else f"metric {index.metric_type}",
        nlist=getattr(index, "nlist", 0),
        m=pq.M if pq else None,
        nbits=pq.nbits if pq else None,
        nprobe=getattr(index, "nprobe", 0),
        ntotal=index.ntotal,
        is_trained=bool(index.is_trained),
    )


def _read(path: Path, flags: int) -> Any:
    limit = faiss.get_deserialization_vector_byte_limit()
    try:
        # A damaged header may claim gigabytes; no vector in the file is longer than the file.
        faiss.set_deserialization_vector_byte_limit(max(path.stat().st_size, 1 << 20) + 1)
        return faiss.read_index(str(path), flags)
    except OSError as error:
        raise PermanentFailure(
            f"{path} cannot be opened: {error.strerror}.",
            next_step="check that the file is where it should be.",
        ) from error
    except RuntimeError as error:
        # FAISS begins with the C++ function and the path of its source file.
        reason = re.sub(r"^Error in .*? at \S+:\d+: ", "", str(error).strip()).splitlines()[0][:200]
        raise PermanentFailure(
            f"{path} is not a readable FAISS index: {reason}",
            next_step="`muse verify` names damaged files; rebuild the index or roll back.",
        ) from None
    finally:
        # It is the whole process's: a larger file, read by other means, would be refused.
        faiss.set_deserialization_vector_byte_limit(limit)
