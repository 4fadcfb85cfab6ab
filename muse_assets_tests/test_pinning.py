"""A rollback holds until it is released: on the files, in real runs, at the terminal, through kills.

Here: what a pin keeps from happening, and what ends it. Not here: the sensor's other decisions
(`test_automation.py`), or the publishing of a rollback itself (`test_publishing.py`).
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from click.testing import CliRunner, Result
from pydantic import SecretStr

from muse_assets.automation import DEPLOY, PLAYLISTS
from muse_assets.cli import cli
from muse_assets.definitions import build_defs
from muse_assets.failures import PermanentFailure
from muse_assets.publishing.backups import backups
from muse_assets.publishing.deploying import rollback
from muse_assets.publishing.layout import pin_file
from muse_assets.publishing.pinning import Pin, put_pin, read_pin, release_pin
from muse_assets.sample import write_sample
from muse_assets.settings import Settings
from muse_assets_tests.faults.system_calls import Call, calls_of, failed_at, killed_at
from muse_assets_tests.installations import DAY_ONE, DAY_THREE, DAY_TWO, Installation, Ran
from muse_assets_tests.server_directories import SPEC, contents, flip_a_byte, live, put, snapshot
from muse_assets_tests.test_automation import Automation, jobs

INDEX = "title"
WHY = "절반의 제목이 틀림"


@pytest.fixture
def server(tmp_path: Path) -> Path:
    """Two deploys: the second is live, the first its backup."""
    (tmp_path / "server").mkdir()
    for seed in (1, 2):
        put(tmp_path / "server", snapshot(tmp_path / "work", seed))
    return tmp_path / "server"


def test_nothing_replaces_what_was_rolled_back_to_until_it_is_released(server: Path, tmp_path: Path) -> None:
    newer = snapshot(tmp_path / "work", 3)
    back = rollback(SPEC, server, pin=WHY)
    before = contents(server)

    with pytest.raises(PermanentFailure) as refused:
        put(server, newer)

    assert f"is pinned to {back.sha256[:12]} of {back.partition} since 20" in refused.value.what
    assert WHY in refused.value.what
    assert "`muse release vibe`" in refused.value.next_step
    assert contents(server) == before
    # What is live already may be deployed again, which leaves the pin.
    assert put(server, snapshot(tmp_path / "work", 1)).already_live
    released = release_pin(SPEC, server)
    assert released is not None
    assert (released.sha256, released.partition, released.why) == (back.sha256, back.partition, WHY)
    assert release_pin(SPEC, server) is None
    assert put(server, newer).sha256 == live(server) != back.sha256


def test_a_deploy_may_release_in_the_same_step(server: Path, tmp_path: Path) -> None:
    back = rollback(SPEC, server, pin=WHY)
    newer = snapshot(tmp_path / "work", 3)
    assert put(server, newer, unpin=True).sha256 == live(server)
    assert read_pin(server, SPEC.name) is None
    # Also where there is nothing else to do.
    rollback(SPEC, server, to=live(server), pin=WHY)
    assert put(server, newer, unpin=True).already_live
    assert read_pin(server, SPEC.name) is None
    assert back.sha256 != live(server)


def test_a_rollback_that_is_no_operators_leaves_the_pin_as_it_is(server: Path) -> None:
    rollback(SPEC, server)
    assert read_pin(server, SPEC.name) is None
    rollback(SPEC, server, pin=WHY)
    pin = read_pin(server, SPEC.name)
    rollback(SPEC, server)
    assert read_pin(server, SPEC.name) == pin


def test_a_second_rollback_has_to_name_its_backup(server: Path, tmp_path: Path) -> None:
    """Else the newest backup, the file that was just put away as bad, would be live and pinned."""
    put(server, snapshot(tmp_path / "work", 3))
    third, back = live(server), rollback(SPEC, server, pin=WHY)
    with pytest.raises(PermanentFailure, match="was rolled back already") as refused:
        rollback(SPEC, server, pin=WHY)
    assert live(server) == back.sha256
    assert f"{third[:12]} of " in refused.value.what
    [first] = [b.sha12 for b in backups(SPEC, server) if b.sha12 not in (third[:12], back.sha256[:12])]
    assert rollback(SPEC, server, to=first, pin=WHY).sha256.startswith(first)


def test_a_damaged_pin_still_pins(server: Path, tmp_path: Path) -> None:
    rollback(SPEC, server, pin=WHY)
    flip_a_byte(pin_file(server, SPEC.name))
    with pytest.raises(PermanentFailure, match=r"is pinned, but .*vibe\.json is damaged"):
        put(server, snapshot(tmp_path / "work", 3))
    assert release_pin(SPEC, server) is not None
    assert put(server, snapshot(tmp_path / "work", 3)).sha256 == live(server)


def renames(server: Path, log: Path) -> list[Call]:
    """Of a rollback with a pin, which leave the directory otherwise at every one of them."""
    calls = calls_of(lambda: rollback(SPEC, server, pin=WHY).sha256, log)
    return [call for call in calls if call.name.startswith("rename")]


def test_a_kill_or_an_error_never_leaves_a_rollback_without_its_pin(server: Path, tmp_path: Path) -> None:
    log = tmp_path / "strace"
    names = renames(server, log)
    at_pin, at_live = (
        next(n for n, call in enumerate(names) if file.name in call.arguments)
        for file in (pin_file(server, SPEC.name), server / SPEC.live_file)
    )
    assert at_pin < at_live, "the pin comes first"
    for call in names[at_pin : at_live + 2]:
        for fault in ("EIO", "KILL"):
            release_pin(SPEC, server)
            put(server, snapshot(tmp_path / "work", 3))
            before = live(server)

            def back() -> str:
                return rollback(SPEC, server, pin=WHY).sha256

            ended = killed_at(call, back, log) if fault == "KILL" else failed_at(call, "EIO", back, log)

            assert (ended.status, ended.expected) in ((-9, False), (0, True), (0, False))
            pin = read_pin(server, SPEC.name)
            if live(server) != before:
                assert pin is not None, call
                assert pin.sha256 == live(server)
            elif fault == "EIO":
                assert pin is None, f"{call}: {ended}"
            if pin is not None and live(server) == before:
                # A pin without its rollback: nothing goes live, and the next rollback completes it.
                with pytest.raises(PermanentFailure, match="is pinned to"):
                    put(server, snapshot(tmp_path / "work", 4))
                assert rollback(SPEC, server, pin=WHY).sha256 == pin.sha256
    release_pin(SPEC, server)
    assert put(server, snapshot(tmp_path / "work", 4)).sha256 == live(server)
    assert not list(server.rglob("*.part"))


# --- in real runs, with the sensor ---


@dataclass(frozen=True)
class Template:
    """Where the files are, and the sensor's memory."""

    home: Path
    cursor: str
    run_keys: frozenset[str]


@contextmanager
def opened(home: Path, redis_url: str) -> Iterator[Installation]:
    urls: dict[str, Any] = {
        name: f"sqlite:///{home / name}.sqlite" for name in ("embedding_db_url", "playlist_db_url")
    }
    settings = Settings(home=home, server_dir=home / "server", redis_url=SecretStr(redis_url), **urls)
    with dg.DagsterInstance.local_temp(str(home / "dagster")) as instance:
        yield Installation(settings, instance)


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory, valkey_url: str) -> Template:
    """Two deployed days of one index, all of it followed up."""
    home = tmp_path_factory.mktemp("template")
    for folder in ("dagster", "server"):
        (home / folder).mkdir()
    with opened(home, valkey_url) as lane:
        one_table = replace(lane.catalog, indexes=(lane.catalog.index(INDEX),))
        write_sample(lane.embeddings, lane.playlists, one_table, songs=60)
        lane.rebuild(INDEX, DAY_ONE)
        automation = Automation(lane.defs, lane.instance)
        automation.tick()
        grow_and_build(lane, DAY_TWO)
        carry_out(lane, automation)
        assert automation.skipped == "nothing new: every validated build is live and was followed up"
        return Template(home, automation.cursor, frozenset(automation.run_keys))


@pytest.fixture
def installed(
    template: Template, tmp_path: Path, valkey_url: str, monkeypatch: pytest.MonkeyPatch
) -> Iterator[tuple[Installation, Automation]]:
    """A copy of the template's; `muse` in this process finds it."""
    home = tmp_path / "home"
    shutil.copytree(template.home, home)
    with opened(home, valkey_url) as lane:
        for name in lane.settings.model_fields_set:
            value = getattr(lane.settings, name)
            shown = value.get_secret_value() if isinstance(value, SecretStr) else value
            monkeypatch.setenv(f"MUSE_{name.upper()}", str(shown))
        monkeypatch.setenv("DAGSTER_HOME", str(home / "dagster"))
        automation = Automation(lane.defs, lane.instance)
        automation.cursor, automation.run_keys = template.cursor, set(template.run_keys)
        yield lane, automation


def grow_and_build(lane: Installation, day: str) -> str:
    """One row fewer and the day's snapshot; its sha256."""
    table = lane.catalog.index(INDEX).table
    lane.execute(f"DELETE FROM {table} WHERE idx = (SELECT MAX(idx) FROM {table})")
    built = lane.build(INDEX, day)
    assert built.success, built.failure
    return str(built.metadata(f"{INDEX}/index")["sha256"])


def carry_out(lane: Installation, automation: Automation) -> list[Ran]:
    """Tick until the sensor has nothing to do, and run the deploys it asks for."""
    ran = []
    while requests := automation.tick():
        for request in requests:
            if request.job_name == DEPLOY:
                result = lane.defs.resolve_job_def(DEPLOY).execute_in_process(
                    instance=lane.instance,
                    asset_selection=request.asset_selection,
                    run_config=request.run_config,
                    tags=request.tags,
                    raise_on_error=False,
                )
                ran.append(Ran(result))
    return ran


def live_sha(lane: Installation) -> str:
    return lane.server_files()[lane.catalog.index(INDEX).live_file]


def muse(*arguments: str) -> Result:
    return CliRunner().invoke(cli, arguments)


def test_the_sensor_leaves_a_pinned_index_alone_and_deploys_after_the_release(
    installed: tuple[Installation, Automation],
) -> None:
    lane, automation = installed
    second = live_sha(lane)

    facts = lane.deploy(INDEX, rollback=True, why=WHY).metadata(f"{INDEX}/deployed")

    first = live_sha(lane)
    assert (facts["sha256"], facts["rollback"], facts["pinned"]) == (first, True, True)
    assert f"{INDEX} is pinned to {first[:12]} of {DAY_ONE} since 20" in facts["pin"]
    assert jobs(automation.tick()) == [PLAYLISTS] * 6  # what is live now gets its playlists
    # The build it was taken back from, and the next days': all wait.
    for built in (second, grow_and_build(lane, DAY_THREE)):
        assert automation.tick() == []
        assert f"{INDEX} is pinned to {first[:12]}" in automation.skipped
        assert f"`muse release {INDEX}` lets new builds go live" in automation.skipped
        assert built != live_sha(lane) == first
    refused = lane.deploy(INDEX)
    assert f"Index {INDEX} is pinned to {first[:12]} of {DAY_ONE}" in refused.failure
    assert f"Next: `muse release {INDEX}`" in refused.failure
    assert refused.retries == 0

    third = grow_and_build(lane, DAY_THREE)
    assert release_pin(lane.catalog.index(INDEX), lane.server)
    [deployed] = carry_out(lane, automation)
    facts = deployed.metadata(f"{INDEX}/deployed")
    assert (facts["sha256"], facts["pinned"], facts["partition"]) == (third, False, DAY_THREE)
    assert live_sha(lane) == third


@pytest.mark.parametrize("cursor_is_lost", [False, True])
def test_a_release_brings_back_the_build_that_was_rolled_back(
    installed: tuple[Installation, Automation], cursor_is_lost: bool
) -> None:
    """Twice, since run keys and tags of the first time are there already."""
    lane, automation = installed
    second = live_sha(lane)
    for _ in range(2):
        assert lane.deploy(INDEX, rollback=True).success
        carry_out(lane, automation)
        assert live_sha(lane) != second
        assert release_pin(lane.catalog.index(INDEX), lane.server)
        automation.cursor = "" if cursor_is_lost else automation.cursor
        assert len(carry_out(lane, automation)) == 1
        assert live_sha(lane) == second
    assert automation.tick() == []


def test_what_is_built_under_a_pin_waits_even_if_the_rollback_was_killed(tmp_path: Path) -> None:
    """Of a killed rollback the event log knows nothing; other indexes go on meanwhile."""
    settings = Settings(home=tmp_path)
    with dg.DagsterInstance.ephemeral() as instance:
        automation = Automation(build_defs(settings), instance)
        automation.deployed(INDEX, DAY_ONE)
        automation.tick()
        put_pin(settings.server_directory(), INDEX, Pin(INDEX, "a" * 64, DAY_ONE, f"{DAY_TWO}T17:00:00", WHY))
        waiting = automation.built(INDEX, DAY_TWO)
        assert automation.tick() == []
        assert f"{INDEX} is pinned to {'a' * 12} of {DAY_ONE}" in automation.skipped
        automation.built("vibe", DAY_TWO)
        assert [request.tags["muse/index"] for request in automation.tick()] == ["vibe"]
        put_pin(settings.server_directory(), INDEX, None)
        assert [request.run_key for request in automation.tick()] == [f"deploy-{INDEX}-{waiting}"]


def test_a_launch_from_the_ui_releases_too_but_not_with_a_rollback(
    installed: tuple[Installation, Automation],
) -> None:
    lane, automation = installed
    second = live_sha(lane)
    both = lane.deploy(INDEX, rollback=True, release=True)
    assert "release: true contradicts it" in both.failure
    assert live_sha(lane) == second
    assert lane.deploy(INDEX, rollback=True).success
    facts = lane.deploy(INDEX, release=True).metadata(f"{INDEX}/deployed")
    assert (facts["sha256"], facts["pinned"], facts["rollback"]) == (second, False, False)
    assert carry_out(lane, automation) == []
    assert lane.deploy(INDEX, rollback=True, pin=False).metadata(f"{INDEX}/deployed")["pinned"] is False
    assert carry_out(lane, automation) == []  # what went back without a pin waits for the next build
    assert read_pin(lane.server, INDEX) is None


def test_at_the_terminal(installed: tuple[Installation, Automation]) -> None:
    lane, _ = installed
    second = live_sha(lane)
    back = muse("rollback", INDEX, "--why", WHY)
    first = live_sha(lane)
    assert f"{INDEX} is pinned to {first[:12]} of {DAY_ONE}" in back.output
    shown = muse("info", INDEX).output
    assert f"pinned to {first[:12]} of {DAY_ONE} since 20" in shown.splitlines()[-1]
    assert WHY in shown.splitlines()[-1]
    assert muse("deploy", INDEX).exit_code == 1
    # Its playlists fail, for want of the other indexes' tables; the pinned index does not.
    ran = muse("run", "--index", INDEX)
    assert f"muse_{INDEX}.index (pinned)" in ran.output
    assert f"{INDEX} · deploy" not in ran.output
    assert f"{INDEX} is pinned to {first[:12]}" in ran.output
    assert live_sha(lane) == first
    pin = pin_file(lane.server, INDEX)
    whole = pin.read_bytes()
    pin.write_bytes(whole[:-3])
    verified = muse("verify", INDEX)
    assert verified.exit_code == 1
    assert f"`muse release {INDEX}`" in next(
        line for line in verified.output.splitlines() if str(pin) in line
    )
    pin.write_bytes(whole)
    assert muse("verify", INDEX).exit_code == 0
    released = muse("release", INDEX)
    assert f"{INDEX} is released; it was pinned to {first[:12]}" in released.output
    assert f"`muse deploy {INDEX}`" in released.output
    assert muse("release", INDEX).output == f"{INDEX} is not pinned.\n"
    assert muse("deploy", INDEX).exit_code == 0
    assert live_sha(lane) == second
    # The legacy's own lines, for one index.
    nlist, trained, ntotal, d = muse("info", INDEX).output.splitlines()[3:7]
    spec = lane.catalog.index(INDEX)
    facts = muse("info_faiss", "--input", str(lane.server / spec.live_file)).output.splitlines()
    assert [nlist, trained, ntotal, d] == facts
    assert (trained, ntotal, d) == (
        "is_trained: True",
        f"ntotal: {max(lane.table_ids(INDEX)) + 1}",
        "d: 1024",
    )


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("damaged", ["live_file", "fallback_file"])
def test_a_repair_leaves_pins_as_they_are(
    installed: tuple[Installation, Automation], pinned: bool, damaged: str
) -> None:
    lane, _ = installed
    spec = lane.catalog.index(INDEX)
    if pinned:
        lane.deploy(INDEX, rollback=True)
    pin, wanted = read_pin(lane.server, INDEX), live_sha(lane)
    file = lane.server / getattr(spec, damaged)
    file.write_bytes(b"torn")

    repaired = muse("repair", INDEX)

    assert repaired.exit_code == 0, repaired.output
    assert live_sha(lane) == wanted
    assert (read_pin(lane.server, INDEX), pin is not None) == (pin, pinned)
