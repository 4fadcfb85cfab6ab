"""The asset graph in real runs on real stores: what is materialized, checked, recorded, live and cached."""

from __future__ import annotations

import json
import re
import shlex
import socket
import sys
from collections.abc import Iterator
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from sqlalchemy import text

from muse_assets.assets.index_lane import deployed_key, index_key, table_key
from muse_assets.assets.metadata import sparkline
from muse_assets.catalog import CATALOG, IndexSpec
from muse_assets.ivfpq.contents import list_ids
from muse_assets.ivfpq.files import read_index
from muse_assets.resources import ProgressLog
from muse_assets.sample import write_days
from muse_assets.snapshots.gate import DESCRIPTIONS
from muse_assets_tests.conftest import Stores
from muse_assets_tests.installations import (
    DAY_ONE,
    DAY_THREE,
    DAY_TWO,
    Installation,
    install,
)

INDEX = "artist"  # the table with the fewest rows and one row a song
PROGRAMS = [program.id for program in CATALOG.programs]


@pytest.fixture
def instance() -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.ephemeral() as instance:
        yield instance


@pytest.fixture
def full(stores: Stores, instance: dg.DagsterInstance, tmp_path: Path) -> Installation:
    """All seven tables."""
    return install(tmp_path, instance, **_urls(stores), songs=200)


@pytest.fixture
def lane(stores: Stores, instance: dg.DagsterInstance, tmp_path: Path) -> Installation:
    """One table, on either kind of store."""
    return install(tmp_path, instance, **_urls(stores), only=[INDEX])


@pytest.fixture
def small(instance: dg.DagsterInstance, valkey_url: str, tmp_path: Path) -> Installation:
    """One table in SQLite: for what the kind of store has no part in."""
    return install(tmp_path, instance, **_sqlite(tmp_path, valkey_url), only=[INDEX])


def _urls(stores: Stores) -> dict[str, Any]:
    return {
        "embedding_db_url": stores.embedding_url,
        "playlist_db_url": stores.playlist_url,
        "redis_url": stores.redis_url,
    }


def _sqlite(folder: Path, redis_url: str) -> dict[str, Any]:
    databases = {
        name: f"sqlite:///{folder / name}.sqlite" for name in ("embedding_db_url", "playlist_db_url")
    }
    return {**databases, "redis_url": redis_url}


def live_ids(installation: Installation, index: str) -> set[int]:
    found = list_ids(read_index(installation.server / installation.catalog.index(index).live_file))
    assert len(set(found.tolist())) == len(found)
    return set(found.tolist())


def records(table: Any) -> list[dict[str, Any]]:
    """The rows of a table in metadata."""
    return [record.data for record in table.records]


def assert_sensible(spec: IndexSpec, songs: list[dict[str, Any]]) -> None:
    """Whether every previewed song has neighbors that are other songs, nearest first, with known titles."""
    assert len({row["idx"] for row in songs}) == 5
    for row in songs:
        cells = [row[f"neighbor {place}"] for place in (1, 2, 3)]
        found = [re.fullmatch(r"(.+) \((\d+\.\d\d)\)", cell) for cell in cells if cell != "none"]
        names = [match[1] for match in found if match]
        assert len(names) == len(found) > 0
        assert row["song"] not in names
        assert len(set(names)) == len(names)
        distances = [float(match[2]) for match in found if match]
        assert distances == sorted(distances)
        assert spec.distance_cut is None or distances[-1] <= spec.distance_cut
        known = r".+ · .+" if len(spec.song_key) == 2 else r"\d{7}, disc of .+"
        assert re.fullmatch(known, row["song"])


def test_a_rebuild_and_the_playlists_make_a_whole_installation(full: Installation) -> None:
    ran = full.run("rebuild", partition=DAY_ONE)

    assert ran.success, ran.failure
    assert sorted(ran.materialized) == sorted(
        f"{spec.name}/{step}" for spec in full.catalog.indexes for step in ("cluster", "index", "deployed")
    )
    for spec in full.catalog.indexes:
        assert live_ids(full, spec.name) == full.table_ids(spec.name)
    for program in PROGRAMS:
        cached = full.cache(program)
        assert cached.success, cached.failure
        assert cached.metadata("playlist_cache")["changed"] is True
    values = full.redis_values()
    kinds = ("update", "meta")
    assert set(values) == {f"playlist_{kind}:{program}" for kind in kinds for program in PROGRAMS} | {
        f"playlist_idx:{program}_{spec.name}" for program in PROGRAMS for spec in full.catalog.indexes
    }
    assert len(values) == 42 + 2 * 6
    for spec in full.catalog.indexes:
        for program in PROGRAMS:
            ids = json.loads(values[f"playlist_idx:{program}_{spec.name}"] or b"")
            assert ids == sorted(set(ids))
            assert set(ids) <= live_ids(full, spec.name)
        assert_sensible(spec, records(ran.metadata(f"{spec.name}/index")["nearest_neighbors"]))
    again = full.cache("drp").metadata("playlist_cache")
    assert again["program"] == "드라이브 뮤직"
    assert again["changed"] is False
    assert again["ids"] == sum(again[f"ids_{spec.name}"] for spec in full.catalog.indexes) > 0


def test_what_a_run_records_of_a_lane(lane: Installation) -> None:
    ran = lane.rebuild(INDEX)
    spec = lane.catalog.index(INDEX)
    live = lane.server / spec.live_file
    built, deployed = ran.metadata(f"{INDEX}/index"), ran.metadata(f"{INDEX}/deployed")

    assert ran.checks == dict.fromkeys(DESCRIPTIONS, True)
    assert ran.metadata(f"{INDEX}/cluster")["table_rows"] == 200
    assert (built["dagster/row_count"], built["mode"], built["added"]) == (200, "full", 200)
    assert (built["newest_idx"], built["ntotal_field"], built["rejected"]) == (200, 200, 0)
    assert built["recall_at_10"] >= spec.recall_gate
    assert deployed["live_file"] == str(live)
    assert (deployed["partition"], deployed["already_live"]) == (DAY_ONE, False)
    assert deployed["sha256"] == built["sha256"] == lane.server_files()[spec.live_file]
    assert built["list_sizes"].startswith("![list sizes](data:image/svg+xml;base64,")
    assert (deployed["age_hours"], deployed["replaced_sha256"], deployed["backups"]) == (0, "none", 0)
    assert "replaced_age_hours" not in deployed
    assert {row["before"] for row in records(built["before_and_after"])} == {"none"}
    assert "nearest_neighbors_note" not in built
    # Every song of an artist has the same vector here: a neighbor by another artist were nonsense.
    for row in records(built["nearest_neighbors"]):
        artist = re.escape(row["song"].split(" · ")[1])
        for place in (1, 2, 3):
            named = rf"(.+ · {artist}|\d{{7}}/\d\d|\d{{7}}/\d\d, disc of {artist}) \(0\.00\)"
            assert re.fullmatch(named, row[f"neighbor {place}"])
    for key, sha256 in ((index_key(spec), built["sha256"]), (deployed_key(spec), built["sha256"])):
        event = lane.instance.get_latest_materialization_event(key)
        assert event
        assert event.asset_materialization
        assert event.asset_materialization.tags
        assert event.asset_materialization.tags["dagster/data_version"] == sha256
    observed = lane.instance.fetch_observations(table_key(spec), limit=1).records[0].asset_observation
    assert observed
    assert observed.metadata["dagster/row_count"].value == 200
    assert spec.embedding_column in str(observed.metadata["columns"].value)


def test_a_sparkline_stays_inline_however_many_values() -> None:
    for values in ([], [0.0], [1.0] * 5_000):
        assert len(sparkline(values, "list sizes")) < 1_000


def test_the_preview_shows_other_songs_every_day_and_the_same_again(small: Installation) -> None:
    first = small.rebuild(INDEX).metadata(f"{INDEX}/index")["nearest_neighbors"]
    again, next_day = (
        small.build(INDEX, day).metadata(f"{INDEX}/index")["nearest_neighbors"] for day in (DAY_ONE, DAY_TWO)
    )
    assert records(again) == records(first)
    assert {row["idx"] for row in records(next_day)} != {row["idx"] for row in records(first)}


@pytest.mark.parametrize("silent", [True, False])
def test_a_build_does_without_the_playlist_database(
    small: Installation, monkeypatch: pytest.MonkeyPatch, silent: bool
) -> None:
    monkeypatch.setattr("muse_assets.snapshots.neighbor_preview._SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1] if silent else 1
        url = f"mysql+pymysql://muse:canary@127.0.0.1:{port}/x?read_timeout=3"
        ran = small.with_settings(playlist_db_url=url).rebuild(INDEX)

    facts = ran.metadata(f"{INDEX}/index")
    songs = records(facts["nearest_neighbors"])
    assert len(songs) == 5
    assert all(re.fullmatch(r"\d{7}/\d\d", row["song"]) for row in songs)
    reason = (
        "did not answer within 0.3 s" if silent else f"mysql 127.0.0.1:{port}/x, while reading song titles"
    )
    assert facts["nearest_neighbors_note"].startswith("titles are missing: ")
    assert reason in facts["nearest_neighbors_note"]
    assert "canary" not in facts["nearest_neighbors_note"]


def test_a_build_without_known_titles_says_so(small: Installation) -> None:
    with small.playlists.begin() as connection:
        for program in small.catalog.programs:
            connection.execute(text(f"UPDATE {program.song_table} SET disc_id = 'x'"))
    facts = small.rebuild(INDEX).metadata(f"{INDEX}/index")
    assert facts["nearest_neighbors_note"] == ("none of 200 sampled songs has a title in the playlist tables")
    assert len(records(facts["nearest_neighbors"])) == 5


def test_a_broken_preview_is_a_note_and_no_red_run(
    small: Installation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("muse_assets.snapshots.neighbor_preview._draw", lambda *_: 1 / 0)
    facts = small.rebuild(INDEX).metadata(f"{INDEX}/index")
    assert facts["nearest_neighbors_note"] == "no preview: ZeroDivisionError"
    assert records(facts["nearest_neighbors"]) == []


def test_a_retrained_index_is_shown_beside_its_previous_snapshot(small: Installation) -> None:
    first = small.rebuild(INDEX).metadata(f"{INDEX}/index")
    _grow(small)
    cluster = small.run("rebuild", f"{INDEX}/cluster").metadata(f"{INDEX}/cluster")

    ran = small.build(INDEX, DAY_TWO)

    assert ran.materialized == [f"{INDEX}/index"]
    second = ran.metadata(f"{INDEX}/index")
    assert second["mode"] == "full"
    assert second["cluster"] == cluster["fingerprint"] != first["cluster"]
    rows = {row["fact"]: (row["before"], row["after"]) for row in records(second["before_and_after"])}
    assert rows["file"] == (f"muse_{INDEX}_20260101.index", f"muse_{INDEX}_20260102.index")
    for fact, shown in (
        ("rows", [f"{facts['dagster/row_count']:,}" for facts in (first, second)]),
        ("imbalance", [f"{facts['imbalance']:.2f}" for facts in (first, second)]),
        ("lists probed", [f"{facts['nprobe']} of {facts['nlist']}" for facts in (first, second)]),
        ("cluster", [facts["cluster"][:12] for facts in (first, second)]),
        ("mode", ["full", "full"]),
    ):
        assert rows[fact] == tuple(shown)
    # The previous file's is of this build's queries.
    before, after = rows["recall@10"]
    assert after == f"{second['recall_at_10']:.3f}"
    assert 0.9 < float(before) <= 1
    assert all(0 < int(scanned) <= 210 for scanned in rows["codes scanned a query"])

    replaced = small.deploy(INDEX).metadata(f"{INDEX}/deployed")
    assert (replaced["replaced_sha256"], replaced["backups"]) == (first["sha256"], 1)
    assert replaced["replaced_age_hours"] >= replaced["age_hours"] >= 0


def test_progress_is_a_line_a_stage_and_one_every_ten_seconds(instance: dg.DagsterInstance) -> None:
    now = 0.0

    @dg.asset
    def work() -> None:
        nonlocal now
        report = ProgressLog(clock=lambda: now).reporter(dg.AssetExecutionContext.get())
        report("digesting the table", 0, 0)
        for done in range(1_000, 60_001, 1_000):
            now += 0.5
            report("encoding", done, 60_000)
        report("training: coarse k-means: 4 lists, error 0.5", 1, 0)
        report("training: coarse k-means: 4 lists, error 0.4", 2, 0)

    ran = dg.materialize([work], instance=instance)

    messages = [entry.user_message for entry in instance.all_logs(ran.run_id) if not entry.is_dagster_event]
    assert messages == [
        "digesting the table (0.0 s)",
        "encoding: 1,000 of 60,000 (0.5 s)",
        "encoding: 21,000 of 60,000, 2,000/s, 0:00:20 left (10.5 s)",
        "encoding: 41,000 of 60,000, 2,000/s, 0:00:10 left (20.5 s)",
        "encoding: 60,000 of 60,000, 2,000/s (30.0 s)",
        "training: coarse k-means: 4 lists, error 0.5 (30.0 s)",
        "training: coarse k-means: 4 lists, error 0.4 (30.0 s)",
    ]


def test_days_follow_the_table(lane: Installation) -> None:
    lane.rebuild(INDEX)
    before = lane.server_files()

    unchanged = lane.build(INDEX, DAY_TWO)

    assert unchanged.success, unchanged.failure
    facts = unchanged.metadata(f"{INDEX}/index")
    assert (facts["mode"], facts["added"], facts["removed"], facts["dagster/row_count"]) == (
        "unchanged",
        0,
        0,
        200,
    )
    assert unchanged.checks == dict.fromkeys(DESCRIPTIONS, True)
    assert lane.deploy(INDEX).metadata(f"{INDEX}/deployed")["already_live"] is True
    assert lane.server_files() == before

    one_table = replace(lane.catalog, indexes=(lane.catalog.index(INDEX),))
    write_days(lane.embeddings, lane.playlists, one_table, days=1, inserts=10, deletes=4, reembeds=3)
    again = lane.build(INDEX, DAY_TWO)
    facts = again.metadata(f"{INDEX}/index")
    ids = lane.table_ids(INDEX)
    assert facts["mode"] == "incremental"
    assert (facts["dagster/row_count"], facts["removed"], facts["reembedded"]) == (len(ids), 4, 3)
    assert facts["added"] == len(ids) - 200 + 4
    assert lane.deploy(INDEX).success
    assert live_ids(lane, INDEX) == ids
    assert lane.server_files()[f"muse_{INDEX}_backup.index"] == before[f"muse_{INDEX}.index"]

    # The partition of an earlier day holds that day's rows only, less those deleted since.
    earlier = lane.build(INDEX, DAY_ONE)
    assert earlier.metadata(f"{INDEX}/index")["newest_idx"] == 200


def test_an_index_without_its_cluster_says_which_file_it_looked_for(small: Installation) -> None:
    ran = small.build(INDEX, DAY_ONE)

    cluster = small.work / f"muse_{INDEX}_cluster.index"
    assert ran.failure == (
        f"{INDEX} · index {DAY_ONE}: {INDEX} has no trained cluster: {cluster} does not exist.\n"
        f"Live: nothing yet: {small.server} has no muse_{INDEX}.index\n"
        f"Next: materialize {INDEX}/cluster (or launch the job `rebuild` for {INDEX})."
    )
    assert ran.retries == 0
    assert ran.materialized == []


def test_a_deploy_without_a_snapshot_says_where_it_looked(small: Installation) -> None:
    ran = small.deploy(INDEX)

    assert f"no validated snapshot in {small.work}" in ran.failure
    assert f"Next: materialize {INDEX}/index first." in ran.failure
    assert ran.retries == 0


def test_roll_back_and_forward_again(small: Installation) -> None:
    small.rebuild(INDEX)
    first = small.server_files()[f"muse_{INDEX}.index"]
    _grow(small)
    assert small.build(INDEX, DAY_TWO).success
    assert small.deploy(INDEX).success
    second = small.server_files()[f"muse_{INDEX}.index"]

    back = small.deploy(INDEX, rollback=True).metadata(f"{INDEX}/deployed")
    assert (back["sha256"], back["partition"], back["rollback"]) == (first, DAY_ONE, True)
    assert small.server_files()[f"muse_{INDEX}.index"] == first != second

    to = small.deploy(INDEX, rollback=True, rollback_to=second[:12]).metadata(f"{INDEX}/deployed")
    assert (to["sha256"], to["partition"]) == (second, DAY_TWO)

    small.deploy(INDEX, rollback=True)
    forward = small.deploy(INDEX, release=True).metadata(f"{INDEX}/deployed")
    assert (forward["sha256"], forward["partition"], forward["rollback"]) == (second, DAY_TWO, False)

    unknown = small.deploy(INDEX, rollback=True, rollback_to="beef")
    assert "no backup beef" in unknown.failure
    assert f"Live: muse_{INDEX}.index of {DAY_TWO} (" in unknown.failure
    assert small.server_files()[f"muse_{INDEX}.index"] == second


def test_deploying_a_day_by_configuration_but_never_an_older_one(small: Installation) -> None:
    small.rebuild(INDEX)
    _grow(small)
    assert small.build(INDEX, DAY_TWO).success

    chosen = small.deploy(INDEX, partition=DAY_ONE).metadata(f"{INDEX}/deployed")
    assert (chosen["partition"], chosen["already_live"]) == (DAY_ONE, True)
    assert small.deploy(INDEX, partition=DAY_TWO).metadata(f"{INDEX}/deployed")["partition"] == DAY_TWO
    live = small.server_files()
    older = small.deploy(INDEX, partition=DAY_ONE)
    assert f"the snapshot of {DAY_ONE} is older than the live file's {DAY_TWO}" in older.failure
    missing = small.deploy(INDEX, partition="2026-02-02")
    assert "no validated snapshot of 2026-02-02" in missing.failure
    assert f"Next: materialize {INDEX}/index for 2026-02-02 first." in missing.failure
    assert small.server_files() == live


def test_old_snapshots_go_with_a_deploy(small: Installation) -> None:
    # These days are long past: of more than two, only the newest two stay.
    small.rebuild(INDEX)
    for day in (DAY_TWO, DAY_THREE):
        _grow(small)
        assert small.build(INDEX, day).success
    assert len(_snapshot_files(small)) == 3
    assert small.deploy(INDEX).success
    assert _snapshot_files(small) == [f"muse_{INDEX}_20260102.index", f"muse_{INDEX}_20260103.index"]
    assert small.temp_files() == []


def test_an_index_that_fails_its_gate_is_recorded_and_discarded(small: Installation) -> None:
    small.rebuild(INDEX)
    before = small.server_files()
    _grow(small)
    strict = small.with_settings(catalog=_overrides(small, max_imbalance=1.0))

    ran = strict.build(INDEX, DAY_TWO)

    assert ran.checks == {**dict.fromkeys(DESCRIPTIONS, True), "list_balance": False}
    assert ran.materialized == []
    assert ran.retries == 0
    assert "failed its gate and was discarded: list_balance: imbalance 1." in ran.failure
    assert "limit 1.0" in ran.failure
    assert "Next: see the checks" in ran.failure
    assert small.server_files() == before
    assert _snapshot_files(small) == [f"muse_{INDEX}_20260101.index"]
    assert small.temp_files() == []
    # Neither the sensor nor a deploy by hand takes it.
    assert small.deploy(INDEX).metadata(f"{INDEX}/deployed")["partition"] == DAY_ONE


def test_a_much_larger_file_needs_confirmation(small: Installation) -> None:
    small.rebuild(INDEX)
    before = small.server_files()
    wide = small.with_settings(catalog=_overrides(small, nlist=180, max_imbalance=1_000.0))
    assert wide.run("rebuild", f"{INDEX}/cluster").success
    grown = wide.build(INDEX, DAY_TWO)
    assert grown.success, grown.failure
    size = (wide.work / f"muse_{INDEX}_20260102.index").stat().st_size
    assert size > 1.5 * (wide.server / f"muse_{INDEX}.index").stat().st_size

    refused = wide.deploy(INDEX)

    assert "more than 1.5 times the live file's" in refused.failure
    assert wide.server_files() == before
    assert wide.deploy(INDEX, confirm_size=True).success


def test_a_damaged_live_file_is_named_and_kept_aside(small: Installation) -> None:
    small.rebuild(INDEX)
    live = small.server / f"muse_{INDEX}.index"
    live.unlink()
    live.write_bytes(b"damaged")
    _grow(small)
    built = small.build(INDEX, DAY_TWO)

    refused = small.deploy(INDEX)
    assert f"the live file {live} is damaged or was edited" in refused.failure
    assert f"Live: muse_{INDEX}.index is not what was published (sha256 " in refused.failure
    assert live.read_bytes() == b"damaged"
    replaced = small.deploy(INDEX, replace_damaged=True).metadata(f"{INDEX}/deployed")
    assert replaced["sha256"] == built.metadata(f"{INDEX}/index")["sha256"]
    kept = [path for path in (small.server / ".backups" / INDEX).iterdir() if "damaged" in path.name]
    assert [path.read_bytes() for path in kept] == [b"damaged"]


def test_the_reload_hook_covers_the_deployed_files_once(small: Installation, tmp_path: Path) -> None:
    calls = tmp_path / "calls"
    hook = _command(f"open({str(calls)!r}, 'a').write('restarted ')")
    reloading = small.with_settings(reload=hook)
    reloading.rebuild(INDEX)

    first, second = (reloading.run("reload").metadata("server_reload") for _ in range(2))

    assert (first["reloaded"], first["indexes"]) == (True, INDEX)
    assert (second["reloaded"], second["indexes"]) == (False, "none")
    assert calls.read_text() == "restarted "


def test_a_failing_reload_is_red_and_puts_the_files_back(small: Installation, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    # Fails with its words from the moment that `broken` exists; a hook's own arguments are masked.
    hook = _command(
        f"import pathlib, sys; p = pathlib.Path({str(broken)!r}); sys.exit(p.exists() and p.read_text())"
    )
    reloading = small.with_settings(reload=hook)
    reloading.rebuild(INDEX)
    assert reloading.run("reload").success
    good = reloading.server_files()[f"muse_{INDEX}.index"]
    _grow(small)
    assert reloading.build(INDEX, DAY_TWO).success
    assert reloading.deploy(INDEX).success
    broken.write_text("no license")

    ran = reloading.run("reload")

    assert ran.materialized == []
    latest = reloading.instance.get_latest_materialization_event(dg.AssetKey([INDEX, "deployed"]))
    assert latest is not None
    assert latest.run_id == ran.result.run_id
    assert latest.asset_materialization is not None
    facts = {name: value.value for name, value in latest.asset_materialization.metadata.items()}
    assert (facts["sha256"], facts["rollback"]) == (good, True)  # what went back is live now
    assert ran.retries == 0
    assert "no license" in ran.failure
    assert f"{INDEX} went back to {good[:12]} of {DAY_ONE}" in ran.failure
    assert "Next: look into the server's log" in ran.failure
    assert reloading.server_files()[f"muse_{INDEX}.index"] == good


def test_without_a_hook_the_reload_says_what_to_do_by_hand(small: Installation) -> None:
    small.rebuild(INDEX)
    facts = small.run("reload").metadata("server_reload")
    assert facts["reloaded"] is False
    assert "restart the search server by hand" in facts["message"]


def test_the_song_pool_layout_and_its_unknown_programs(full: Installation) -> None:
    by_table = full.cache("drp")
    assert by_table.checks["programs_known"]
    expected = full.redis_values()
    pool = full.with_settings(playlist_layout="song_pool")
    ran = pool.cache("drp")
    assert ran.success, ran.failure
    assert ran.checks["programs_known"]
    # Both layouts of the sample hold the same songs; only the update time differs.
    assert {k: v for k, v in pool.redis_values().items() if "idx" in k} == {
        k: v for k, v in expected.items() if "idx" in k
    }

    with pool.playlists.begin() as connection:
        connection.execute(text("INSERT INTO tb_program_m (id, name) VALUES ('zzz', '새 프로그램')"))
    warned = pool.cache("drp")
    assert warned.success
    assert not warned.checks["programs_known"]
    (check,) = (c for c in warned.result.get_asset_check_evaluations() if c.check_name == "programs_known")
    assert check.severity == dg.AssetCheckSeverity.WARN
    assert check.description == "not in the catalog: zzz"

    with pool.playlists.begin() as connection:
        connection.execute(text("DROP TABLE tb_program_m"))
    before = pool.redis_values()
    broken = pool.cache("drp")
    assert "tb_program_m" in broken.failure
    assert "Next: create" in broken.failure
    assert pool.redis_values() == before


def test_a_playlist_that_lost_its_songs_needs_confirmation(full: Installation) -> None:
    assert full.cache("drp").success
    before = full.redis_values()
    table = full.catalog.program("drp").song_table
    with full.playlists.begin() as connection:
        keep = connection.execute(text(f"SELECT MIN(idx) FROM {table}")).scalar()
        connection.execute(text(f"DELETE FROM {table} WHERE idx > {keep}"))

    refused = full.cache("drp")

    assert "Program drp (드라이브 뮤직)" in refused.failure
    assert "Next: " in refused.failure
    assert refused.retries == 0
    assert full.redis_values() == before
    assert full.cache("drp", confirm_shrink=True).success
    assert full.redis_values() != before


@pytest.mark.parametrize("encoding", ["float32", "json"])
def test_an_installation_names_its_own_table_columns_and_encoding(
    stores: Stores, instance: dg.DagsterInstance, tmp_path: Path, encoding: str
) -> None:
    overrides = tmp_path / "catalog.toml"
    overrides.write_text(
        f'[index.{INDEX}]\ntable = "tb_vectors_v2"\nembedding_column = "vec"\nencoding = "{encoding}"\n'
        'song_key = ["disc", "track"]\ncreated_at_column = "made_at"\n',
        "utf-8",
    )
    own = install(tmp_path, instance, **_urls(stores), only=[INDEX], catalog=overrides)

    own.rebuild(INDEX)

    assert live_ids(own, INDEX) == own.table_ids(INDEX)
    assert len(own.table_ids(INDEX)) == 200
    observed = own.instance.fetch_observations(table_key(own.catalog.index(INDEX)), limit=1).records[0]
    assert observed.asset_observation
    assert "made_at" in str(observed.asset_observation.metadata["columns"].value)


def _overrides(installation: Installation, **fields: Any) -> Path:
    path = installation.settings.root / "catalog.toml"
    lines = "\n".join(f"{name} = {json.dumps(value)}" for name, value in fields.items())
    path.write_text(f"[index.{INDEX}]\n{lines}\n", "utf-8")
    return path


def _grow(installation: Installation) -> None:
    """Write the table's next day."""
    one_table = replace(installation.catalog, indexes=(installation.catalog.index(INDEX),))
    write_days(installation.embeddings, installation.playlists, one_table, days=1, inserts=5)


def _snapshot_files(installation: Installation) -> list[str]:
    found = installation.work.glob(f"muse_{INDEX}_2*.index")
    return sorted(path.name for path in found if date.fromisoformat(path.stem[-8:]))


def _command(python: str) -> str:
    return shlex.join([sys.executable, "-c", python])
