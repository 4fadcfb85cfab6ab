"""The sample: the real schema, the same bits every time, vectors worth searching, days as they happen."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from sqlalchemy import Engine, text

from muse_assets.catalog import CATALOG, Catalog, IndexSpec
from muse_assets.connections.databases import engine_for
from muse_assets.durable_files import locked
from muse_assets.failures import Conflict, PermanentFailure
from muse_assets.sample import (
    DaySummary,
    sample_written,
    write_days,
    write_embedded_sample,
    write_sample,
)
from muse_assets.sample.songs import artists_of, discs_and_tracks, genres_of, spelled, titles
from muse_assets.sample.vectors import content_of

SEED = 2026
Table = dict[int, tuple[Any, ...]]
NewDatabase = Callable[[str], Engine]


@pytest.fixture
def database(tmp_path: Path) -> NewDatabase:
    return lambda name: engine_for(f"sqlite:///{tmp_path / name}.sqlite")


def rows_of(engine: Engine, table: str) -> Table:
    """Every row by its first column."""
    with engine.connect() as connection:
        return {row[0]: tuple(row) for row in connection.execute(text(f"SELECT * FROM {table}"))}


def day_of(engine: Engine, spec: IndexSpec) -> dict[int, str]:
    with engine.connect() as connection:
        query = text(f"SELECT idx, {spec.created_at_column} FROM {spec.table}")
        return {idx: str(created_at)[:10] for idx, created_at in connection.execute(query)}


def payload(engine: Engine, spec: IndexSpec, idx: int) -> Any:
    with engine.connect() as connection:
        query = text(f"SELECT {spec.embedding_column} FROM {spec.table} WHERE idx = :idx")
        return connection.execute(query, {"idx": idx}).scalar_one()


def vectors_of(index: str, songs: int) -> np.ndarray[Any, Any]:
    spec = CATALOG.index(index)
    content = content_of(spec)
    return content.vectors(spec, SEED, np.arange(content.rows(songs)))


def tiny(*indexes: str, **changes: Any) -> Catalog:
    return replace(
        CATALOG,
        indexes=tuple(replace(CATALOG.index(name), dimension=64, **changes) for name in indexes),
        programs=CATALOG.programs[:2],
    )


def test_the_same_seed_gives_the_same_tables_whatever_their_size(database: NewDatabase) -> None:
    catalog = tiny(*(spec.name for spec in CATALOG.indexes))
    small, again, large = database("small"), database("again"), database("large")
    write_sample(small, small, catalog, songs=60)
    write_sample(again, again, catalog, songs=60)
    write_sample(large, large, catalog, songs=2100)  # more than one block
    for spec in catalog.indexes:
        rows = rows_of(small, spec.table)
        assert rows == rows_of(again, spec.table)
        longer = rows_of(large, spec.table)
        assert len(longer) > len(rows)
        assert all(longer[idx][:-1] == row[:-1] for idx, row in rows.items())  # created_at is spread anew
    other = database("other seed")
    write_sample(other, other, catalog, songs=60, seed=7)
    assert payload(other, catalog.index("vibe"), 1) != payload(small, catalog.index("vibe"), 1)


def test_a_song_is_the_same_alone_and_among_others() -> None:
    spec = CATALOG.index("lyrics")
    content = content_of(spec)
    among = content.vectors(spec, SEED, np.arange(700))
    assert np.array_equal(content.vectors(spec, SEED, np.array([650])), among[650:651])


def test_tables_are_as_the_real_ones(database: NewDatabase) -> None:
    engine = database("embeddings")
    assert not sample_written(engine, CATALOG)
    summary = write_sample(engine, database("playlists"), CATALOG, songs=70)
    assert sample_written(engine, CATALOG)
    for spec in CATALOG.indexes:
        rows = rows_of(engine, spec.table)
        assert len(rows) == summary.rows[spec.name]
        assert sorted(rows) == list(range(1, len(rows) + 1))
        with engine.connect() as connection:
            query = text(f"SELECT idx, idx_mod_100, {', '.join(spec.song_key)} FROM {spec.table}")
            for idx, modulo, disc, *track in connection.execute(query):
                assert modulo == idx % 100
                assert re.fullmatch(r"\d{7}", disc)
                assert all(re.fullmatch(r"\d\d", number) for number in track)
        vector = np.load(io.BytesIO(payload(engine, spec, len(rows))), allow_pickle=False)
        assert vector.dtype == np.float32
        assert vector.shape == ((1, 1024) if spec.model == "bgem3" else (512,))
        assert np.linalg.norm(vector) == pytest.approx(1, abs=1e-6)
    assert summary.rows["vibe"] == 3 * 70
    assert summary.rows["album_name"] == 11


@pytest.mark.parametrize("encoding", ["float32", "json"])
def test_the_other_encodings(database: NewDatabase, encoding: str) -> None:
    catalog = tiny("vibe", encoding=encoding)
    spec = catalog.index("vibe")
    engine = database("embeddings")
    write_sample(engine, engine, catalog, songs=80)
    written = payload(engine, spec, 5)
    vector = np.frombuffer(written, "<f4") if encoding == "float32" else np.array(json.loads(written), "<f4")
    assert np.array_equal(vector, content_of(spec).vectors(spec, SEED, np.array([4]))[0])
    [day] = write_days(engine, engine, catalog, days=1, today=date(2026, 1, 2))
    assert day.tables["vibe"].reembedded == 1


def test_programs_hold_the_same_songs_in_both_layouts(database: NewDatabase) -> None:
    playlists = database("playlists")
    catalog = replace(tiny("vibe"), programs=CATALOG.programs)
    summary = write_sample(database("embeddings"), playlists, catalog, songs=1500)
    with playlists.connect() as connection:
        names = connection.execute(text("SELECT id, name FROM tb_program_m")).all()
        assert ("drp", "드라이브 뮤직") in [tuple(row) for row in names]
        columns = "disc_id, track_no, song_name, artist_name"
        pool = [
            tuple(row)
            for row in connection.execute(
                text(f"SELECT program_id, is_banned, {columns} FROM tb_playlist_song_pool_m")
            )
        ]
        for program in catalog.programs:
            songs = {
                tuple(row) for row in connection.execute(text(f"SELECT {columns} FROM {program.song_table}"))
            }
            allowed = {row[2:] for row in pool if row[0] == program.id and not row[1]}
            assert songs == allowed
            assert len(songs) == summary.program_songs[program.id] > 10
    assert 1 <= sum(row[1] for row in pool) < 100
    assert any(re.search("[가-힣]", row[4]) for row in pool)
    assert any(re.search("[A-Za-z]", row[4]) for row in pool)


def test_neighbors_of_a_vibe_chunk_are_of_its_genre() -> None:
    vectors = vectors_of("vibe", 2000)
    genres = genres_of(SEED, artists_of(SEED, discs_and_tracks(np.arange(len(vectors)) // 3)[0]))
    assert len(set(genres)) == 12
    queries = np.arange(0, len(vectors), 20)
    _, found = faiss.knn(vectors[queries], vectors, 6)
    neighbors = np.array(
        [[i for i in row if i != query][:5] for query, row in zip(queries, found, strict=True)]
    )
    assert (genres[neighbors] == genres[queries][:, None]).mean() >= 0.9


def test_titles_of_the_same_words_are_near() -> None:
    names = titles(SEED, np.arange(2000))
    vectors = vectors_of("title", 2000)
    words = [(*row[used], form) for row, used, form in zip(names.words, names.used, names.forms, strict=True)]
    by_words: dict[tuple[int, ...], list[int]] = {}
    for song, key in enumerate(words):
        by_words.setdefault(key, []).append(song)
    twins = [songs[:2] for songs in by_words.values() if len(songs) > 1]
    translated = [(a, b) for a, b in twins if names.korean[a] != names.korean[b]]
    equal = [(a, b) for a, b in twins if names.korean[a] == names.korean[b]]
    assert len(translated) > 20
    assert len(equal) > 20
    text_of = spelled(names)
    for a, b in equal:
        assert text_of[a] == text_of[b]
        assert np.array_equal(vectors[a], vectors[b])
    apart = np.array([((vectors[a] - vectors[b]) ** 2).sum() for a, b in translated])
    others = ((vectors[:1000] - vectors[1000:]) ** 2).sum(axis=1)
    assert np.percentile(apart, 90) < np.percentile(others, 5)


def test_lyrics_windows_overlap() -> None:
    vectors = vectors_of("lyrics", 300).reshape(300, 3, 1024)
    next_window = ((vectors[:, 0] - vectors[:, 1]) ** 2).sum(axis=1).mean()
    window_after = ((vectors[:, 0] - vectors[:, 2]) ** 2).sum(axis=1).mean()
    other_song = ((vectors[:-1, 0] - vectors[1:, 0]) ** 2).sum(axis=1).mean()
    assert next_window < window_after < 0.5 * other_song


def test_an_artists_rows_are_identical() -> None:
    artists = artists_of(SEED, discs_and_tracks(np.arange(500))[0])
    vectors = vectors_of("artist", 500)
    for artist in set(artists.tolist()):
        assert len(np.unique(vectors[artists == artist], axis=0)) == 1
    assert len(np.unique(vectors, axis=0)) == len(set(artists.tolist()))


@pytest.mark.parametrize("index", ["vibe", "title"])
def test_ivfpq_finds_most_but_not_all_neighbors(index: str) -> None:
    vectors = vectors_of(index, 2000)
    count, dimension = vectors.shape
    built = faiss.IndexIVFPQ(faiss.IndexFlatL2(dimension), dimension, round((2 * count) ** 0.5), 64, 8)
    # Fewer points than FAISS advises, as the real one has at this size: keep it from printing so.
    built.cp.min_points_per_centroid = built.pq.cp.min_points_per_centroid = 1
    built.cp.niter = built.pq.cp.niter = 6
    built.train(vectors)
    built.add(vectors)
    built.nprobe = 16
    queries = np.arange(0, count, count // 200)
    exact, _ = faiss.knn(vectors[queries], vectors, 11)  # the query itself is the nearest
    _, found = built.search(vectors[queries], 11)
    hits = 0
    for query, farthest, row in zip(queries, exact[:, 10], found, strict=True):
        others = [i for i in row if i not in (query, -1)][:10]
        hits += int((((vectors[others] - vectors[query]) ** 2).sum(axis=1) <= farthest + 1e-5).sum())
    assert 0.65 <= hits / (10 * len(queries)) <= 0.92


def test_days_change_what_they_say(database: NewDatabase) -> None:
    catalog = tiny("vibe", "title", "album_name")
    embeddings, playlists = database("embeddings"), database("playlists")
    write_sample(embeddings, playlists, catalog, songs=600)

    for day in (date(2026, 1, 2), date(2026, 1, 3), date(2026, 1, 4)):
        before = {spec.name: rows_of(embeddings, spec.table) for spec in catalog.indexes}
        played = {program.id: len(rows_of(playlists, program.song_table)) for program in catalog.programs}
        [summary] = write_days(
            embeddings, playlists, catalog, days=1, inserts=40, deletes=5, reembeds=7, today=day
        )
        assert summary.day == day
        for spec in catalog.indexes:
            was, now = before[spec.name], rows_of(embeddings, spec.table)
            counts, days = summary.tables[spec.name], day_of(embeddings, spec)
            new = now.keys() - was.keys()
            late = {idx for idx in new if idx < max(was)}
            changed = {idx for idx in was.keys() & now.keys() if was[idx] != now[idx]}
            assert counts.inserted == len(new - late) > 0
            assert counts.late == len(late)
            assert {days[idx] for idx in new - late} == {day.isoformat()}
            assert {days[idx] for idx in late} <= {day.replace(day=day.day - 1).isoformat()}
            assert counts.late == (0 if day.day == 2 else 3)
            assert counts.deleted == len(was.keys() - now.keys()) == 5
            assert counts.reembedded == len(changed) == 7
            for idx in changed:
                assert [a == b for a, b in zip(was[idx], now[idx], strict=True)].count(False) == 1
        for program in catalog.programs:
            added = len(rows_of(playlists, program.song_table)) - played[program.id]
            assert added == summary.program_songs[program.id]
    assert len(rows_of(embeddings, catalog.index("title").table)) == 600 + 3 * 40 - 3 * 5 - 3
    assert max(rows_of(embeddings, catalog.index("vibe").table)) == 3 * (600 + 3 * 40)


def test_a_reembedded_vector_stays_near_its_old_one(database: NewDatabase) -> None:
    catalog = tiny("title")
    spec = catalog.index("title")
    engine = database("both")
    write_sample(engine, engine, catalog, songs=300)
    before = {idx: payload(engine, spec, idx) for idx in rows_of(engine, spec.table)}
    write_days(engine, engine, catalog, days=1, deletes=0, reembeds=20, today=date(2026, 1, 2))
    after = {idx: payload(engine, spec, idx) for idx in before}
    moved = [idx for idx in before if before[idx] != after[idx]]
    assert len(moved) == 20
    for idx in moved:
        old, new = (np.load(io.BytesIO(value), allow_pickle=False)[0] for value in (before[idx], after[idx]))
        assert 0.001 < ((old - new) ** 2).sum() < 0.1


def test_days_are_the_same_again_and_one_by_one(database: NewDatabase) -> None:
    catalog = tiny("vibe", "album_name")
    at_once, by_day = database("at once"), database("by day")
    today = date(2026, 1, 4)
    summaries: list[list[DaySummary]] = []
    for engine, steps in ((at_once, [3]), (by_day, [1, 2])):
        write_sample(engine, engine, catalog, songs=300)
        summaries.append(
            [day for days in steps for day in write_days(engine, engine, catalog, days=days, today=today)]
        )
    assert summaries[0] == summaries[1]
    for spec in catalog.indexes:
        assert rows_of(at_once, spec.table) == rows_of(by_day, spec.table)


def test_nothing_is_overwritten_and_nothing_foreign_is_changed(database: NewDatabase) -> None:
    catalog = tiny("title")
    engine, empty = database("embeddings"), database("empty")
    with pytest.raises(PermanentFailure, match=r"tb_embedding_bgem3_song_name_h.*no sample"):
        write_days(empty, empty, catalog, days=1, today=date(2026, 1, 2))
    write_sample(engine, engine, catalog, songs=20)
    before = rows_of(engine, catalog.index("title").table)
    with pytest.raises(PermanentFailure, match=r"tb_embedding_bgem3_song_name_h.*holds rows"):
        write_sample(engine, empty, catalog, songs=20)
    with pytest.raises(PermanentFailure, match="2026-01-01"):
        write_days(engine, engine, catalog, days=2, today=date(2026, 1, 2))
    with engine.begin() as connection:
        connection.execute(
            text(f"UPDATE {catalog.index('title').table} SET disccommseq = 'X' WHERE idx = 20")
        )
    with pytest.raises(PermanentFailure, match="did not write"):
        write_days(engine, engine, catalog, days=1, today=date(2026, 1, 2))
    after = rows_of(engine, catalog.index("title").table)
    assert {idx: row for idx, row in after.items() if idx != 20} == {
        idx: row for idx, row in before.items() if idx != 20
    }
    with empty.connect() as connection:
        assert connection.execute(text("SELECT COUNT(*) FROM sqlite_master")).scalar() == 0


class Cut(Exception):
    """Whatever ends a command in the middle."""


def test_an_embedded_sample_is_whole_or_absent(database: NewDatabase, tmp_path: Path) -> None:
    catalog = tiny("title", "album_name")
    embeddings, playlists, plain = database("embeddings"), database("playlists"), database("plain")
    with embeddings.connect():  # as a page that looks at the empty database does

        def cut(name: str, _done: int, _total: int) -> None:
            if name == "playlists":
                raise Cut

        with pytest.raises(Cut):
            write_embedded_sample(embeddings, playlists, catalog, songs=120, on_progress=cut)
        for engine in (embeddings, playlists):
            with engine.connect() as connection:
                assert connection.execute(text("SELECT COUNT(*) FROM sqlite_master")).scalar() == 0
        assert not (tmp_path / ".sample.part").exists()
        (tmp_path / ".sample.part").mkdir()  # as a kill leaves it
        (tmp_path / ".sample.part" / "embeddings.sqlite").write_bytes(b"torn")
        done = write_embedded_sample(embeddings, playlists, catalog, songs=120)
    assert done == write_sample(plain, plain, catalog, songs=120)
    assert sample_written(embeddings, catalog)
    for spec in catalog.indexes:
        assert rows_of(embeddings, spec.table) == rows_of(plain, spec.table)
    assert rows_of(playlists, "tb_song_drp_m") == rows_of(plain, "tb_song_drp_m")
    assert not (tmp_path / ".sample.part").exists()


def test_an_embedded_sample_goes_on_after_a_kill_between_its_two_files(database: NewDatabase) -> None:
    catalog = tiny("title")
    embeddings, playlists = database("embeddings"), database("playlists")
    write_sample(database("other"), playlists, catalog, songs=120)  # the playlists are in place first
    write_embedded_sample(embeddings, playlists, catalog, songs=120)
    assert sample_written(embeddings, catalog)


def test_an_embedded_sample_replaces_no_rows_and_waits_for_no_other(
    database: NewDatabase, tmp_path: Path
) -> None:
    catalog = tiny("title")
    embeddings, playlists = database("embeddings"), database("playlists")
    write_sample(database("other"), playlists, catalog, songs=120)
    before = rows_of(playlists, "tb_song_drp_m")
    with pytest.raises(PermanentFailure, match="overwrites nothing"):
        write_embedded_sample(embeddings, playlists, catalog, songs=90)
    assert not sample_written(embeddings, catalog)
    assert rows_of(playlists, "tb_song_drp_m") == before
    with locked(tmp_path / ".sample.lock"), pytest.raises(Conflict, match=r"\.sample\.lock"):
        write_embedded_sample(embeddings, playlists, catalog, songs=120)


def test_rows_are_exact_and_progress_reaches_the_end(database: NewDatabase) -> None:
    catalog = tiny("vibe", "title", "album_name")
    engine = database("both")
    seen: dict[str, tuple[int, int]] = {}
    summary = write_sample(
        engine,
        engine,
        catalog,
        songs=120,
        rows={"vibe": 2500, "album_name": 7},
        on_progress=lambda name, done, total: seen.update({name: (done, total)}),
    )
    assert summary.rows == {"vibe": 2500, "title": 120, "album_name": 7}
    for spec in catalog.indexes:
        assert len(rows_of(engine, spec.table)) == summary.rows[spec.name]
    assert seen == {"vibe": (2500, 2500), "title": (120, 120), "album_name": (7, 7), "playlists": (120, 120)}
    [day] = write_days(engine, engine, catalog, days=1, inserts=60, today=date(2026, 1, 2))
    assert day.tables["title"].inserted == 60 - 3
    with pytest.raises(PermanentFailure, match="no index 'vibes'"):
        write_sample(database("new"), engine, catalog, rows={"vibes": 3})
    with pytest.raises(PermanentFailure, match="title 0"):
        write_sample(database("new"), engine, catalog, rows={"title": 0})
