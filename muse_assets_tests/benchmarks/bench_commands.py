"""How long `muse --help` and `muse info` take beside an empty Python.

Here: the installed command, on an embedded installation whose seven indexes are live. Not here: what they
print (`muse_assets_tests/test_cli.py`).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from muse_assets_tests.benchmarks.measuring import Facts, Row, begin, in_turn

_MUSE = str(Path(sys.executable).with_name("muse"))
_SONGS = 300
_REPEATS = 9


def rows(scale: float) -> Iterator[Row]:
    """Each command against Python's start and the time it may take more."""
    with tempfile.TemporaryDirectory() as home:
        _command([_MUSE, "sample", "--songs", str(max(100, int(_SONGS * scale)))], home)
        _command([_MUSE, "run"], home)
        for arguments, more in ((["--help"], 0.5), (["info"], 1.0)):
            ours, python = in_turn(
                _REPEATS,
                (_command, ([_MUSE, *arguments], home)),
                (_command, ([sys.executable, "-c", "pass"], home)),
            )
            yield Row(
                f"muse {' '.join(arguments)}",
                f"python + {more} s",
                ours,
                replace(python, wall=python.wall + more, cpu=python.cpu + more),
                reach=1,
                faster=False,
                note=f"{ours.wall - python.wall:.2f} s more than python -c pass",
            )


def _command(command: list[str], home: str) -> Facts:
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith(("MUSE_", "DAGSTER"))
    }
    begin()
    subprocess.run(
        command,
        env=environment | {"MUSE_HOME": home, "MUSE_LOG_DIR": f"{home}/logs"},
        cwd=home,
        check=True,
        stdout=subprocess.DEVNULL,
    )
    return {}
