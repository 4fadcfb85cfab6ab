"""A power cut at each system call of a publish, on a real journaling file system.

Here: ext4 on a loop device whose image is copied at the moment of the cut; what a new mount finds in the
copy. Not here: kills, after which the kernel still writes what it was given (`test_publish_system_calls.py`).

The image file holds what reached the disk: what was not fsynced is still in the page cache of the mounted
file system, and lost. Nothing else syncs it: commits of the journal are ten minutes apart, and ext4's own
repair of renames without fsync (auto_da_alloc) is off.
"""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from muse_assets.publishing.verifying import verify
from muse_assets_tests.faults.conftest import Times
from muse_assets_tests.faults.ledger import Injecting
from muse_assets_tests.faults.mounts import ext4_image, loop
from muse_assets_tests.faults.publish_bench import (
    Bench,
    Publish,
    bench_of,
    empty,
    legacy,
    spread,
    with_backup,
)
from muse_assets_tests.faults.system_calls import killed_at
from muse_assets_tests.server_directories import SPEC, assert_sound, ended, in_child, live, put

PUBLISHES = [Publish(empty, 3), Publish(legacy, 3), Publish(with_backup, 3), Publish(with_backup, None)]
_HARSH = "commit=600,noauto_da_alloc"


@pytest.fixture(params=PUBLISHES, ids=lambda publish: publish.name.replace(" ", "_"))
def bench(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Bench]:
    image = ext4_image(tmp_path / "disk.image", 16)
    with loop(image, tmp_path / "disk", _HARSH) as disk:
        yield bench_of(request.param, tmp_path, disk)


def durable(bench: Bench, label: str) -> Path:
    """A server directory that would survive a cut as it is."""
    server = bench.fresh(label)
    subprocess.run(["sync", "--file-system", server], check=True)
    return server


def disk_after_the_cut(bench: Bench) -> Path:
    copy = bench.work / "cut.image"
    subprocess.run(["cp", "--sparse=always", bench.work / "disk.image", copy], check=True)
    return copy


def assert_survived(bench: Bench, server: Path) -> None:
    """The live file is old or new and complete, with its facts; whatever has a name is complete."""
    content = bench.content(server)
    assert content in (bench.old, bench.new)
    if content is not None and content != bench.old:
        (found,) = [finding for finding in verify(server, SPEC) if finding.path.name == SPEC.live_file]
        assert found.state == "ok", found
    # The fallback, the backups and the facts, each as it was written or not there.
    assert [finding for finding in verify(server, SPEC) if finding.state == "damaged"] == []


def test_a_power_cut_at_each_system_call(injecting: Injecting, times: Times, bench: Bench) -> None:
    with injecting("6", "power cut at each system call of a publish (ext4 image)") as ledger:
        chosen = spread(calls := bench.calls(), times(8, len(calls)))
        outcomes = set()
        for number, call in enumerate(chosen):
            with ledger.injection(f"{bench.publish.name}, {call}"):
                server = durable(bench, f"cut_{number}")
                killed = killed_at(call, lambda server=server: bench.run(server), bench.log)  # type: ignore[misc]
                # A killed process flushes nothing, so this is the disk of that moment.
                copy = disk_after_the_cut(bench)
                assert killed.status == -9, killed
                shutil.rmtree(server)
                with loop(copy, bench.work / "after") as after:
                    survivor = after / server.name
                    assert_survived(bench, survivor)
                    outcomes.add(bench.content(survivor))
                    with ledger.recovery():
                        put(survivor, bench.taken)
                    assert live(survivor) == bench.new
                    assert_sound(survivor)
        assert outcomes == {bench.old, bench.new}


def test_a_power_cut_after_deployed_was_said(injecting: Injecting, times: Times, bench: Bench) -> None:
    with injecting("6", "power cut right after a publish returned (ext4 image)") as ledger:
        for number in range(times(2, 40)):
            with ledger.injection(f"{bench.publish.name} {number}"):
                server = durable(bench, f"cut_{number}")
                assert ended(in_child(lambda server=server: bench.run(server))) == 0  # type: ignore[misc]
                copy = disk_after_the_cut(bench)
                with loop(copy, bench.work / "after") as after:
                    survivor = after / server.name
                    assert live(survivor) == bench.new
                    assert_survived(bench, survivor)
                    with ledger.recovery():
                        assert put(survivor, bench.taken).already_live
                    assert_sound(survivor)
                shutil.rmtree(server)
