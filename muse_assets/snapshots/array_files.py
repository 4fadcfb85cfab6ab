"""Arrays in one file that is written durably, and read only when it is whole.

Here: the file. Not here: what its arrays are, or what to do without them (`store`, `queries`).
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from muse_assets import durable_files


def write_arrays(path: Path, arrays: Mapping[str, NDArray[Any]]) -> None:
    """Replace the file atomically and durably."""
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    path.parent.mkdir(parents=True, exist_ok=True)
    durable_files.commit(durable_files.stage(path, lambda write: write(buffer.getbuffer())))


def read_arrays(path: Path, names: Iterable[str]) -> dict[str, NDArray[Any]] | None:
    """Those arrays, or None if the file is missing or unreadable, or lacks one."""
    try:
        with np.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as arrays:
            return {name: arrays[name] for name in names}
    except Exception:  # zip and npy parsers meet damage with a dozen types; making them anew answers all
        return None
