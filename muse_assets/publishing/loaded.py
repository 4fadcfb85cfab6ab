"""The record of what the search server loaded last.

Here: reading and writing `.loaded.json`. Not here: making the server load anything (`reloading.py`).
"""

from __future__ import annotations

import json
from pathlib import Path

from muse_assets.durable_files import write_text
from muse_assets.failures import PermanentFailure
from muse_assets.publishing.layout import loaded_file


def loaded_contents(server: Path) -> dict[str, str]:
    """Index -> sha256 that the server last loaded well. PermanentFailure if the record is unreadable."""
    path = loaded_file(server)
    try:
        content = json.loads(path.read_text("utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError:
        content = None
    if not isinstance(content, dict) or not all(isinstance(value, str) for value in content.values()):
        raise PermanentFailure(
            f"{path} is not a JSON object of hashes.",
            next_step="remove it; the next reload covers every live file and writes it anew.",
        )
    return content


def record_loaded(server: Path, contents: dict[str, str]) -> None:
    """Replace the record atomically and durably."""
    write_text(loaded_file(server), json.dumps(contents, indent=1, sort_keys=True) + "\n")
