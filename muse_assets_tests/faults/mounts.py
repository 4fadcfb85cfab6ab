"""Small disks of a test's own: tmpfs, a read-only bind mount, ext4 in an image file.

Here: mounting and taking away again. Not here: filling or failing them. Tests that need these are not
proven without root (`tools.require_root`).
"""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

from muse_assets_tests.faults.tools import not_proven, require_root, require_tool


@contextlib.contextmanager
def mounted(folder: Path, *options: str) -> Iterator[Path]:
    """Something mounted on `folder` for the time of the block."""
    require_root()
    folder.mkdir(exist_ok=True)
    made = subprocess.run(["mount", *options, str(folder)], check=False, capture_output=True, text=True)
    if made.returncode:
        not_proven(f"mount {' '.join(options)}: {made.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def tmpfs(folder: Path, size: str) -> contextlib.AbstractContextManager[Path]:
    return mounted(folder, "-t", "tmpfs", "-o", f"size={size}", "tmpfs")


@contextlib.contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """The folder bound over itself, read-only, as a mount that was made so by mistake."""
    with mounted(folder, "--bind", str(folder)):
        subprocess.run(["mount", "-o", "remount,bind,ro", str(folder)], check=True)
        yield


def ext4_image(path: Path, megabytes: int) -> Path:
    """A file that holds an empty ext4."""
    make = require_tool("mkfs.ext4")
    with path.open("wb") as file:
        file.truncate(megabytes << 20)
    subprocess.run([make, "-q", path], check=True)
    return path


def loop(image: Path, folder: Path, options: str = "rw") -> contextlib.AbstractContextManager[Path]:
    """The image's file system, through a loop device."""
    return mounted(folder, "-o", f"loop,{options}", str(image))
