"""The command `muse` as people use it: the installed executable, in processes of its own, on a small sample.

One home is built once: sample, first run, second run, two further days, third run with one broken table,
that table's run once it is mended. Every other test works on a copy of it.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path

import dagster as dg
import pytest
from dagster import DagsterRunStatus
from rich.cells import cell_len

from muse_assets.catalog import CATALOG, IndexSpec
from muse_assets.connections.embedded_valkey import embedded_valkey
from muse_assets.connections.redis_server import connect
from muse_assets.durable_files import file_sha256, locked
from muse_assets.ivfpq.files import describe
from muse_assets.seoul_time import SEOUL, seoul_today

MUSE = Path(sys.executable).with_name("muse")
SPECS = list(CATALOG.indexes)
TITLE, ARTIST = CATALOG.index("title"), CATALOG.index("artist")
PASSWORD = "hunter2-canary"  # noqa: S105


def environment(home: Path, **settings: str) -> dict[str, str]:
    """This process's environment with these settings and no others of ours."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("MUSE_", "DAGSTER_"))}
    # Spinning threads on a busy machine cost seconds.
    return {**kept, "MUSE_HOME": str(home), "OMP_NUM_THREADS": "1", **settings}


def muse(home: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    """Run `muse` to its end; nothing it prints is ever a traceback."""
    done = subprocess.run(
        [MUSE, *arguments],
        env=environment(home, **settings),
        cwd=home.parent,
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
        timeout=120,
    )
    assert "Traceback" not in done.stdout + done.stderr, done.stdout + done.stderr
    return done


def succeed(home: Path, *arguments: str, **settings: str) -> str:
    done = muse(home, *arguments, **settings)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def refused(home: Path, *arguments: str, **settings: str) -> str:
    """What a command says that ends in one sentence, a next step and exit code 1."""
    done = muse(home, *arguments, **settings)
    said = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(said)) == (1, "", 2), done.stdout + done.stderr
    assert said[1].startswith("Next: ")
    return done.stderr


def row_of(output: str, name: str) -> list[str]:
    """The cells of the line of a printed table that begins with `name`."""
    [line] = [line for line in output.splitlines() if re.match(rf" *{re.escape(name)}  ", line)]
    return re.split(r"\s{2,}", line.strip())


def live_digests(home: Path) -> dict[str, str]:
    return {spec.name: file_sha256(home / "server" / spec.live_file) for spec in SPECS}


def live_stamps(home: Path) -> dict[str, tuple[int, int]]:
    facts = {spec.name: (home / "server" / spec.live_file).stat() for spec in SPECS}
    return {name: (fact.st_ino, fact.st_mtime_ns) for name, fact in facts.items()}


def table_idx(home: Path, spec: IndexSpec) -> set[int]:
    with contextlib.closing(sqlite3.connect(home / "embeddings.sqlite")) as connection:
        return {idx for (idx,) in connection.execute(f"SELECT idx FROM {spec.table}")}


@contextlib.contextmanager
def instance_of(home: Path) -> Iterator[dg.DagsterInstance]:
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        yield instance


@dataclass(frozen=True)
class Built:
    """The home, and what its commands printed."""

    home: Path
    sample: str
    first: str
    second: str
    days: str
    third: str
    third_status: int
    mended: str
    first_live: dict[str, str]
    third_live: dict[str, str]
    first_stamps: dict[str, tuple[int, int]]
    second_stamps: dict[str, tuple[int, int]]
    first_idx: dict[str, set[int]]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    home = tmp_path_factory.mktemp("built") / "home"
    sample = succeed(home, "sample", "--songs", "300")
    first_idx = {spec.name: table_idx(home, spec) for spec in SPECS}
    first = succeed(home, "run")
    live, first_stamps = live_digests(home), live_stamps(home)
    second = succeed(home, "run")
    second_stamps = live_stamps(home)
    days = succeed(home, "sample", "--days", "2")
    with broken(home, ARTIST):
        third = muse(home, "run")
        third_live = live_digests(home)
    return Built(
        home=home,
        sample=sample,
        first=first,
        second=second,
        days=days,
        third=third.stdout,
        third_status=third.returncode,
        mended=succeed(home, "run", "--index", "artist"),
        first_live=live,
        third_live=third_live,
        first_stamps=first_stamps,
        second_stamps=second_stamps,
        first_idx=first_idx,
    )


@contextlib.contextmanager
def broken(home: Path, spec: IndexSpec) -> Iterator[None]:
    """A third of the table's rows hold one byte, until the end of the block."""
    column = spec.embedding_column
    with contextlib.closing(sqlite3.connect(home / "embeddings.sqlite")) as connection:
        kept = connection.execute(f"SELECT {column}, idx FROM {spec.table} WHERE idx <= 100").fetchall()
        with connection:
            connection.execute(f"UPDATE {spec.table} SET {column} = x'00' WHERE idx <= 100")
        yield
        with connection:
            connection.executemany(f"UPDATE {spec.table} SET {column} = ? WHERE idx = ?", kept)


@pytest.fixture
def home(built: Built, tmp_path: Path) -> Path:
    """A home of the test's own, with all that the built one has."""
    shutil.copytree(built.home, tmp_path / "home")
    return tmp_path / "home"


# --- the daily job ---


def test_the_first_run_trains_builds_deploys_and_caches(built: Built) -> None:
    assert "300 songs" in built.sample
    for spec in SPECS:
        rows = len(built.first_idx[spec.name])
        assert f"{rows:,} {spec.name}" in built.sample
        cells = row_of(built.first, spec.name)
        assert cells[1:6] == ["full", f"{rows:,}", f"{rows:,}", "0", "0"]
        assert cells[-1] == f"{spec.live_file} (new)"
    for program in CATALOG.programs:
        [line] = [line for line in built.first.splitlines() if line.startswith(f"{program.id} ")]
        assert program.title in line
    assert "42 playlist keys such as playlist_idx:drp_vibe, 6 playlist_update keys." in built.first
    assert f"MUSE_HOME={built.home} " in built.first


def test_a_second_run_finds_nothing_new_and_touches_no_file(built: Built) -> None:
    assert "Nothing new" in built.second
    assert "Nothing new" not in built.first + built.third
    assert built.second_stamps == built.first_stamps
    for spec in SPECS:
        cells = row_of(built.second, spec.name)
        assert (cells[1], cells[3:6]) == ("unchanged", ["0", "0", "0"])
        assert cells[-1] == f"{spec.live_file} (same)"


def test_further_days_are_built_incrementally_with_the_tables_counts(built: Built) -> None:
    for spec in SPECS:
        before, now = built.first_idx[spec.name], table_idx(built.home, spec)
        cells = row_of(built.mended if spec is ARTIST else built.third, spec.name)
        assert cells[1:5] == [
            "incremental",
            *(str(n) for n in (len(now), len(now - before), len(before - now))),
        ]
        assert cells[-1] == f"{spec.live_file} (new)"
        assert describe(built.home / "server" / spec.live_file).ntotal == max(now)
    late = [line.split()[3] for line in built.days.splitlines() if line.startswith("2026-01-03")]
    assert len(late) == len(SPECS)
    assert "3" in late


def test_a_pipe_gets_one_line_a_task_and_no_colour(built: Built) -> None:
    assert built.third.count("  vibe: encoding (") == 1
    assert "\x1b" not in built.first + built.third


def test_runs_are_in_the_dagster_instance(built: Built) -> None:
    with instance_of(built.home) as instance:
        runs = instance.get_runs()
        assert {run.status for run in runs} == {DagsterRunStatus.SUCCESS, DagsterRunStatus.FAILURE}
        assert {run.job_name for run in runs} == {"rebuild", "daily", "deploy", "playlists"}
        for spec in SPECS:
            for key in ([spec.name, "cluster"], [spec.name, "index"], [spec.name, "deployed"]):
                assert instance.get_latest_materialization_event(dg.AssetKey(key)) is not None
            days = instance.get_materialized_partitions(dg.AssetKey([spec.name, "index"]))
            assert days == {seoul_today().isoformat()}
        programs = instance.get_materialized_partitions(dg.AssetKey("playlist_cache"))
        assert programs == {program.id for program in CATALOG.programs}


def test_a_broken_table_is_red_and_the_other_six_go_live(built: Built) -> None:
    assert built.third_status == 1
    assert {n for n in built.third_live if built.third_live[n] == built.first_live[n]} == {"artist"}
    assert row_of(built.third, "artist") == ["artist", "failed", "muse_artist.index (unchanged)"]
    failure = built.third[built.third.index("FAILED") :]
    assert failure.count("FAILED") == 1
    assert "artist · index" in failure
    assert "\nLive: muse_artist.index of " in failure
    assert "\nNext: " in failure
    with instance_of(built.home) as instance:
        [red] = instance.get_runs(dg.RunsFilter(statuses=[DagsterRunStatus.FAILURE]))
        assert red.asset_selection == {dg.AssetKey(["artist", "index"])}


# --- looking ---


def test_help_is_quick_and_names_every_command() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", MUSE, "--help"], capture_output=True, text=True, check=True
    )
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "click" in loaded
    assert not loaded & {"dagster", "faiss", "numpy", "sqlalchemy", "rich", "pydantic"}
    listed = re.findall(r"^  (\w+) +\S", done.stdout.partition("Commands:")[2], re.MULTILINE)
    legacy = ["train_faiss", "add_faiss", "add_daily_faiss", "info_faiss", "cache_playlist"]
    looking = ["info", "search"]
    changing = ["deploy", "rollback", "release", "verify", "repair", "adopt", "tune"]
    assert listed == ["run", "sample", "ui", *looking, *changing, *legacy]
    assert "..." not in done.stdout.partition("Commands:")[2]


def test_info_shows_what_is_live(built: Built) -> None:
    everything, one = succeed(built.home, "info"), succeed(built.home, "info", "vibe")
    live = live_digests(built.home)
    for spec in SPECS:
        now = table_idx(built.home, spec)
        cells = row_of(everything, spec.name)
        assert cells[2:4] == [str(len(now)), str(max(now))]
        assert live[spec.name][:12] in cells
    assert row_of(one, "vibe") == row_of(everything, "vibe")
    assert "title" not in one
    assert everything.splitlines()[-1].endswith(
        " Seoul: All 7 are fresh, exact and live, of " + f"{seoul_today()}."
    )
    facts = describe(built.home / "server" / CATALOG.index("vibe").live_file)
    assert f"nlist: {facts.nlist}\nis_trained: True\nntotal: {facts.ntotal}\nd: 512\n" in one
    assert str(built.home / "server") in one
    assert "There is no index 'nope'" in refused(built.home, "info", "nope")


def test_search_is_cut_like_the_server_and_takes_a_row_or_a_song(built: Built) -> None:
    found = succeed(built.home, "search", "title", "--idx", "37", "-k", "200")
    distances = [float(cell) for cell in re.findall(r"^ *(\d\.\d{4}) ", found, re.MULTILINE)]
    assert distances == sorted(distances)
    assert 1 < len(distances) < 200
    assert max(distances) <= 0.9
    assert f"{len(distances)} of 200 asked for, within distance 0.9." in found
    _, idx, song, *_ = row_of(found, f"{distances[0]:.4f}")
    assert idx == "37"
    assert succeed(built.home, "search", "title", "--song", song, "-k", "200") == found


def test_search_shows_korean_titles_in_line(built: Built) -> None:
    with contextlib.closing(sqlite3.connect(built.home / "playlists.sqlite")) as connection:
        songs = connection.execute("SELECT disc_id, track_no, song_name, artist_name FROM tb_song_drp_m")
        disc, track, title, artist = next(song for song in songs if re.search("[가-힣]", song[2]))
    found = succeed(built.home, "search", "title", "--song", f"{disc}/{track}", "-k", "3")
    heading, _, first, *_ = found.splitlines()[1:]
    assert re.split(r"\s{2,}", first.strip())[2:] == [f"{disc}/{track}", title, artist]
    # A Korean letter takes two columns of a terminal.
    assert cell_len(first[: first.index(artist)]) == heading.index("artist")


def test_search_within_a_program_finds_its_ids_only(built: Built) -> None:
    found = succeed(built.home, "search", "vibe", "--idx", "10", "--program", "k2k", "-k", "200")
    idx = [int(cell) for cell in re.findall(r"^ *\d\.\d{4} +(\d+) ", found, re.MULTILINE)]
    with embedded_valkey(built.home / "valkey") as url, connect(url) as client:
        value = client.get("playlist_idx:k2k_vibe")
    assert isinstance(value, bytes)
    assert {i - 1 for i in idx} == set(json.loads(value))
    assert f"nprobe 100 among {len(idx)} ids of k2k" in found


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nope", "--idx", "1"], "There is no index 'nope'"),
        (["title", "--idx", "99999"], "has no row with idx 99999"),
        (["title", "--song", "9999999/99"], "has no row of song 9999999/99"),
        (["title", "--idx", "3", "--program", "nope"], "There is no program 'nope'"),
    ],
)
def test_a_search_for_nothing_there_is_refused(built: Built, arguments: list[str], said: str) -> None:
    assert said in refused(built.home, "search", *arguments)


def test_search_wants_one_of_idx_and_song(built: Built) -> None:
    assert muse(built.home, "search", "title").returncode == 2


# --- deploys and damage ---


def test_roll_back_and_forward(built: Built, home: Path) -> None:
    third = live_digests(home)["vibe"]
    said = succeed(home, "rollback", "vibe")
    assert live_digests(home)["vibe"] == built.first_live["vibe"]
    assert f"is live: {seoul_today()}, " in said
    assert built.first_live["vibe"][:12] in said
    assert "Restart the server" in said
    for nowhere in (
        ["rollback", "vibe", "--to", "0123456789"],
        ["deploy", "vibe", "--partition", "2026-01-01"],
    ):
        done = muse(home, *nowhere)
        assert done.returncode == 1
        assert "vibe · deploy: " in done.stdout
        assert "\nNext: " in done.stdout
    assert live_digests(home)["vibe"] == built.first_live["vibe"]
    assert third[:12] in succeed(home, "deploy", "vibe", "--confirm-shrink", "--release")
    assert live_digests(home)["vibe"] == third


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()  # a new inode: the copy may share the old one with a backup
    path.write_bytes(content)


def test_what_verify_finds_repair_mends(home: Path) -> None:
    path, live = home / "server" / TITLE.live_file, live_digests(home)
    flip_a_byte(path)
    done = muse(home, "verify")
    assert done.returncode == 1
    assert row_of(done.stdout, "damaged")[1] == str(path)
    assert "1 of them not as published" in done.stdout
    [following] = [line for line in done.stdout.splitlines() if line.startswith("Next: ")]
    assert "`muse repair title`" in following
    succeed(home, "repair", "title")
    assert "0 of them not as published" in succeed(home, "verify")
    assert live_digests(home) == live


def test_a_damaged_live_file_is_not_replaced_unasked(home: Path) -> None:
    flip_a_byte(home / "server" / TITLE.live_file)
    damaged = live_digests(home)["title"]
    assert "DAMAGED" in row_of(succeed(home, "info"), "title")
    assert muse(home, "deploy", "title").returncode == 1
    assert live_digests(home)["title"] == damaged
    (home / "server" / TITLE.live_file).write_bytes(b"torn")
    done = muse(home, "search", "title", "--idx", "3")
    assert done.returncode == 0
    assert TITLE.fallback_file in done.stderr


# --- the legacy verbs ---


def legacy(spec: IndexSpec, *, dimension: int | None = None, legacy_type: str | None = None) -> list[str]:
    return [
        *("--model", spec.model, "--type", legacy_type or spec.legacy_type),
        *("--dimension", str(dimension or spec.dimension)),
    ]


def test_the_legacy_verbs_train_fill_bring_up_to_date_and_describe(home: Path, tmp_path: Path) -> None:
    cluster, full, daily = (
        tmp_path / "out" / f"muse_title_{part}.index" for part in ("cluster", "full", "daily")
    )
    succeed(home, "train_faiss", *legacy(TITLE), "--output", str(cluster))
    succeed(home, "add_faiss", *legacy(TITLE), "--input", str(cluster), "--output", str(full))
    before = table_idx(home, TITLE)
    assert describe(full).ntotal == max(before)
    succeed(home, "sample", "--days", "1")
    now = table_idx(home, TITLE)
    said = succeed(home, "add_daily_faiss", *legacy(TITLE), "--input", str(full), "--output", str(daily))
    assert (
        f"{daily}: {len(now)} rows (incremental: {len(now - before)} added, {len(before - now)} rem" in said
    )
    described = succeed(home, "info_faiss", "--input", str(daily), "--dimension", "1024")
    nlist = describe(cluster).nlist
    assert described.splitlines() == [f"nlist: {nlist}", "is_trained: True", f"ntotal: {max(now)}", "d: 1024"]
    wrong = refused(home, "info_faiss", "--input", str(daily), "--dimension", "512")
    assert "has dimension 1024, not 512" in wrong


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Every file but locks, with its inode and time of change."""
    files = (path for path in folder.rglob("*") if path.is_file() and ".locks" not in path.parts)
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in files}


def build(home: Path, verb: str, source: Path, output: Path) -> str:
    return succeed(home, verb, *legacy(TITLE), "--input", str(source), "--output", str(output))


def test_a_legacy_build_changes_its_output_and_no_other_file(home: Path) -> None:
    work = home / "work"
    today, mine = work / TITLE.snapshot_file(seoul_today()), work / "title by hand.index"
    before = tree(work)
    (work / ".muse_title.building").mkdir()  # of a killed call
    (work / ".muse_title.building" / "left").touch()

    said = build(home, "add_daily_faiss", today, mine)
    assert "(unchanged: 0 added" in said
    assert file_sha256(mine) == file_sha256(today)
    assert mine.stat().st_ino != today.stat().st_ino
    assert tree(work).items() >= before.items()
    assert tree(work).keys() - before.keys() == {mine.name}

    succeed(home, "sample", "--days", "1")
    said = build(home, "add_daily_faiss", mine, mine)
    assert "(incremental: " in said
    facts = f".manifests/title/{file_sha256(mine)}"
    assert tree(work).keys() - before.keys() == {mine.name, f"{facts}.json", f"{facts}.rows.npz"}
    assert {name: stamp for name, stamp in tree(work).items() if name in before} == before

    # What was built by hand is what the asset's own build makes of the same rows.
    build(home, "add_daily_faiss", today, today)
    assert file_sha256(today) == file_sha256(mine)
    assert "0 of them not as published" in succeed(home, "verify", "title")


@pytest.mark.parametrize("verb", ["train_faiss", "add_faiss", "add_daily_faiss"])
def test_legacy_verbs_refuse_files_that_are_not_theirs(home: Path, verb: str) -> None:
    work, server = home / "work", home / "server"
    before = tree(work), tree(server)
    source = [] if verb == "train_faiss" else ["--input", str(work / TITLE.cluster_file)]
    wrong_day = TITLE.snapshot_file(seoul_today() - timedelta(days=1))
    wrong_index = ARTIST.snapshot_file(seoul_today())
    for output, said in (
        (server / TITLE.live_file, "`muse deploy`"),
        (server / "new folder" / "any.index", "`muse deploy`"),
        (work / wrong_day, "named like a dated snapshot"),
        (work / wrong_index, "named like a dated snapshot"),
    ):
        text = refused(home, verb, *legacy(TITLE), *source, "--output", str(output))
        assert said in text
        assert str(output) in text
    assert (tree(work), tree(server)) == before


def log_lines(folder: Path, verb: str) -> list[str]:
    """The lines of the verb's log of today, without their times, which are checked."""
    lines = (folder / verb / f"{verb}_{seoul_today():%Y%m%d}.log").read_text("utf-8").splitlines()
    now = datetime.now(SEOUL).replace(tzinfo=None)
    for line in lines:
        assert timedelta(0) <= now - datetime.strptime(line[:19], "%Y-%m-%d %H:%M:%S") < timedelta(minutes=2)
    return [line[24:] for line in lines]


def test_legacy_verbs_log_each_event_on_a_line(home: Path, tmp_path: Path) -> None:
    cluster, output = home / "work" / TITLE.cluster_file, tmp_path / "full.index"
    build(home, "add_faiss", cluster, output)
    refused(home, "add_faiss", *legacy(TITLE), "--input", str(tmp_path / "none"), "--output", str(output))
    start, *progress, result, start_again, failure = log_lines(home.parent / "logs", "add_faiss")
    for line in (start, start_again):
        assert line.startswith("INFO start ")
        assert "--model bgem3" in line
        assert "--type song_name" in line
    assert f"--output {output}" in start
    rows = len(table_idx(home, TITLE))
    assert f"INFO encoding: {rows}" in progress
    assert result.startswith(f"INFO {output}: {rows} rows (full: ")
    assert failure.startswith("ERROR failed: title has no trained cluster: ")
    assert " Next: " in failure

    with contextlib.closing(sqlite3.connect(home / "playlists.sqlite")) as connection, connection:
        connection.execute("DROP TABLE tb_song_k2k_m")
    assert muse(home, "cache_playlist", MUSE_LOG_DIR=str(tmp_path / "else")).returncode == 1
    start, *programs = log_lines(tmp_path / "else", "cache_playlist")
    assert start == "INFO start"
    failed = [line for line in programs if line.startswith("ERROR k2k failed: ")]
    assert len(failed) == 1
    assert "tb_song_k2k_m" in failed[0]
    done = {line.split()[1] for line in programs if line.startswith("INFO ")}
    assert done == {program.id for program in CATALOG.programs} - {"k2k"}

    (tmp_path / "file").touch()
    assert "MUSE_LOG_DIR" in refused(home, "cache_playlist", MUSE_LOG_DIR=str(tmp_path / "file"))


def test_cache_playlist_refreshes_every_program(home: Path) -> None:
    with embedded_valkey(home / "valkey") as url, connect(url) as client:
        client.flushall()
        said = succeed(home, "cache_playlist")
        assert len(client.keys("playlist_idx:*")) == 42
        assert len(client.keys("playlist_update:*")) == 6
    assert [line.split()[0] for line in said.splitlines()] == [program.id for program in CATALOG.programs]
    assert all(program.title in said for program in CATALOG.programs)


def test_a_redis_that_is_set_gets_the_playlists_and_answers(home: Path, redis_url: str) -> None:
    with connect(redis_url) as client:
        client.flushdb()
        assert succeed(home, "cache_playlist", MUSE_REDIS_URL=redis_url)
        assert len(client.keys("playlist_idx:*")) == 42
        said = succeed(home, "search", "vibe", "--idx", "7", "--program", "drp", MUSE_REDIS_URL=redis_url)
        assert " ids of drp" in said
        client.flushdb()


@pytest.mark.parametrize("verb", ["train_faiss", "add_faiss", "add_daily_faiss"])
def test_legacy_verbs_refuse_a_wrong_dimension_or_type(built: Built, tmp_path: Path, verb: str) -> None:
    files = ["--output", str(tmp_path / "out.index")]
    if verb != "train_faiss":
        files += ["--input", str(built.home / "work" / TITLE.cluster_file)]
    dimension = refused(built.home, verb, *legacy(TITLE, dimension=512), *files)
    assert "title has dimension 1024, not 512" in dimension
    legacy_type = refused(built.home, verb, *legacy(TITLE, legacy_type="song"), *files)
    assert "No index has --model bgem3 --type song" in legacy_type
    assert "bgem3/song_name" in legacy_type
    assert muse(built.home, verb, *files).returncode == 2
    assert list(tmp_path.iterdir()) == []


# --- settings that cannot be used ---


@pytest.mark.parametrize(
    ("settings", "arguments", "said"),
    [
        ({"MUSE_EMBEDDING_DB_URL": f"nodb://u:{PASSWORD}@h/x"}, ["run"], "MUSE_EMBEDDING_DB_URL"),
        ({"MUSE_PLAYLIST_DB_URL": PASSWORD}, ["run"], "MUSE_PLAYLIST_DB_URL"),
        ({"MUSE_REDIS_URL": f"redes://:{PASSWORD}@h"}, ["run"], "MUSE_REDIS_URL"),
        ({"MUSE_REDIS_URL": f"redes://:{PASSWORD}@h"}, ["cache_playlist"], "MUSE_REDIS_URL"),
        ({"MUSE_PLAYLIST_LAYOUT": PASSWORD}, ["info"], "MUSE_PLAYLIST_LAYOUT"),
        ({"MUSE_AUTOMATION": PASSWORD}, ["run"], "MUSE_AUTOMATION"),
        ({"MUSE_AUTOMATION": PASSWORD}, ["deploy", "vibe"], "MUSE_AUTOMATION"),
        ({"MUSE_AUTOMATION": PASSWORD}, ["cache_playlist"], "MUSE_AUTOMATION"),
        ({"MUSE_CATALOG": "nowhere.toml"}, ["info"], "Catalog file nowhere.toml cannot be read"),
        ({"MUSE_CATALOG": "torn.toml"}, ["run"], "Catalog file torn.toml cannot be read"),
        ({"MUSE_CATALOG": "unknown.toml"}, ["run"], "There is no index 'vibes'"),
        ({}, ["run", "--index", "nope"], "There is no index 'nope'"),
        ({}, ["deploy", "nope"], "There is no index 'nope'"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_a_setting_that_cannot_be_used_ends_in_one_sentence(
    tmp_path: Path, settings: dict[str, str], arguments: list[str], said: str
) -> None:
    (tmp_path / "torn.toml").write_text("[index.vibe\n")
    (tmp_path / "unknown.toml").write_text("[index.vibes]\nnlist = 4\n")
    text = refused(tmp_path / "home", *arguments, **settings)
    assert said in text
    assert PASSWORD not in text
    assert not (tmp_path / "home" / "dagster").exists()


def test_a_database_out_of_reach_is_said_before_the_first_run(tmp_path: Path) -> None:
    url = f"mysql+pymysql://u:{PASSWORD}@127.0.0.1:{free_port()}/muse"
    started = time.monotonic()
    text = refused(tmp_path / "home", "run", MUSE_EMBEDDING_DB_URL=url)
    # Not after the retries of seven runs, 45 s each.
    assert time.monotonic() - started < 20
    assert "mysql 127.0.0.1" in text
    assert PASSWORD not in text


def test_sample_overwrites_nothing(built: Built) -> None:
    assert "overwrites nothing" in refused(built.home, "sample", "--songs", "300")
    assert "would pass" in refused_days(built.home)


def refused_days(home: Path) -> str:
    done = muse(home, "sample", "--days", "99999")
    assert done.returncode == 1
    return done.stderr


# --- interruptions ---


def start_rebuild(home: Path) -> subprocess.Popen[str]:
    """A rebuild of lyrics, in the middle."""
    process = subprocess.Popen(
        [MUSE, "run", "--rebuild", "--index", "lyrics"],
        env=environment(home, PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "lyrics: training" in line:
            return process
    pytest.fail("the rebuild ended before it could be interrupted")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_ends_at_once_and_live_files_are_whole(home: Path, number: signal.Signals) -> None:
    live = live_digests(home)
    process = start_rebuild(home)
    process.send_signal(number)
    said, _ = process.communicate(timeout=15)
    assert process.returncode == 130
    assert "Interrupted." in said
    assert "Traceback" not in said
    assert live_digests(home) == live
    with instance_of(home) as instance:
        [cancelled] = instance.get_runs(dg.RunsFilter(statuses=[DagsterRunStatus.CANCELED]))
        assert dg.AssetKey(["lyrics", "index"]) in (cancelled.asset_selection or ())
        assert all(run.is_finished for run in instance.get_runs())


def test_the_next_run_heals_a_killed_one_and_closes_its_record(home: Path) -> None:
    """A record that stays STARTED would make the deploy sensor wait for ever."""
    live = live_digests(home)
    process = start_rebuild(home)
    process.kill()
    process.communicate(timeout=15)
    assert live_digests(home) == live
    with instance_of(home) as instance:
        [killed] = [run for run in instance.get_runs() if not run.is_finished]
    succeed(home, "run", "--rebuild", "--index", "lyrics")
    with instance_of(home) as instance:
        closed = instance.get_run_by_id(killed.run_id)
        assert closed is not None
        assert closed.status == DagsterRunStatus.FAILURE
    assert "0 of them not as published" in succeed(home, "verify", "lyrics")
    assert not list(home.glob("*/.muse_lyrics*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_sample_that_was_cut_short_is_written_whole_by_the_next_run(
    tmp_path: Path, number: signal.Signals
) -> None:
    home = tmp_path / "home"
    process = subprocess.Popen(
        [MUSE, "run", "--index", "album_name"],
        env=environment(home, PYTHONUNBUFFERED="1"),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert process.stdout is not None
    for line in process.stdout:
        if "artist (" in line:
            break
    process.send_signal(number)
    process.communicate(timeout=15)
    assert (home / ".sample.part").exists() == (number == signal.SIGKILL)
    assert "2,000 songs" in succeed(home, "run", "--index", "album_name")
    assert not (home / ".sample.part").exists()
    assert all(table_idx(home, spec) for spec in SPECS)


def test_a_run_that_waits_to_try_again_says_so(home: Path) -> None:
    with locked(home / "work" / ".locks" / "title.lock"):
        process = subprocess.Popen(
            [MUSE, "run", "--index", "title"],
            env=environment(home),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        assert process.stderr is not None
        said = next((line for line in process.stderr if "Trying again" in line), "")
        process.terminate()
        process.communicate(timeout=15)
    assert said.startswith("title · index ")
    assert "holds the lock" in said
    assert said.endswith("Trying again in 15 s.\n")


# --- the page ---


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def test_ui_serves_the_page_and_its_graphql(built: Built, tmp_path: Path) -> None:
    port, log = free_port(), tmp_path / "ui.log"
    with log.open("wb") as output:
        # As a script's `muse ui &` starts it: with SIGINT ignored.
        process = subprocess.Popen(
            ["sh", "-c", 'trap "" INT; exec "$@"', "sh", MUSE, "ui", "--port", str(port)],
            env=environment(built.home),
            cwd=tmp_path,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        query = json.dumps({"query": "{version assetNodes{assetKey{path}}}"}).encode()
        answer = json.loads(fetched(f"http://127.0.0.1:{port}/graphql", process, log, query))
        page = fetched(f"http://127.0.0.1:{port}/", process, log)
        process.terminate()
        process.wait(timeout=60)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
    assert answer["data"]["version"] == dg.__version__
    paths = {"/".join(node["assetKey"]["path"]) for node in answer["data"]["assetNodes"]}
    assert {f"{spec.name}/deployed" for spec in SPECS} <= paths
    assert b"<html" in page


def fetched(url: str, process: subprocess.Popen[bytes], log: Path, body: bytes | None = None) -> bytes:
    """The reply once the server is up."""
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})  # noqa: S310
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(request, timeout=20) as reply:  # noqa: S310
            content: bytes = reply.read()
            return content
        time.sleep(0.2)
    pytest.fail(f"no answer from {url}: {log.read_text('utf-8', 'replace')[-2000:]}")
