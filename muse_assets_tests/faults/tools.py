"""What a fault test needs from the machine: programs, and root.

Here: saying loudly that a fault was not proven for want of them. Not here: the servers' binaries
(`conftest.py` above), or injecting anything.
"""

from __future__ import annotations

import os
from typing import NoReturn

import pytest

from muse_assets_tests.servers import find_binary


def require_tool(name: str) -> str:
    """The program's path; without it the test is not proven here."""
    if (found := find_binary(name)) is None:
        not_proven(f"{name} is not installed")
    return found


def require_root() -> None:
    """Mounts and loop devices are root's."""
    if os.geteuid() != 0:
        not_proven("this needs root")


def not_proven(reason: str) -> NoReturn:
    """Skip the test loudly; in CI fail it, for CI has everything."""
    if os.environ.get("CI") == "true":
        pytest.fail(f"NOT PROVEN HERE: {reason}")
    pytest.skip(f"NOT PROVEN HERE: {reason}")
