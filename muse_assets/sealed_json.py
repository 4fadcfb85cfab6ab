"""Small JSON files that say themselves whether they are as they were written.

Here: the seal, a SHA-256 over the content, written and checked. Not here: what the facts mean
(`manifest`, `snapshots.cluster`). A flipped bit in a number is valid JSON, so parsing alone finds little.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from muse_assets import durable_files

_SEAL = "seal"


def write_sealed(path: Path, facts: dict[str, Any]) -> None:
    """Replace the file atomically and durably; the facts are JSON values, and none is named "seal"."""
    facts = json.loads(json.dumps(facts))  # as they will be read: keys are text, tuples are lists
    content = {**facts, _SEAL: _seal(facts)}
    durable_files.write_text(path, json.dumps(content, ensure_ascii=False, indent=1, sort_keys=True) + "\n")


def read_sealed(path: Path) -> dict[str, Any] | None:
    """The facts; None if the file is missing, cannot be parsed, or is not as it was written.

    Raises OSError where the disk fails: that says nothing of the facts.
    """
    try:
        content = json.loads(path.read_text("utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError, RecursionError):
        return None
    if not isinstance(content, dict) or content.pop(_SEAL, None) != _seal(content):
        return None
    return content


def _seal(facts: dict[str, Any]) -> str:
    canonical = json.dumps(facts, ensure_ascii=False, separators=(",", ":"), sort_keys=True)
    return hashlib.sha256(canonical.encode("utf-8")).hexdigest()
