"""What is odd about a table's vectors, as a build tells it: a warning, numbers, and rows to look at."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import dagster as dg
import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from muse_assets.assets.metadata import index_metadata
from muse_assets.catalog import CATALOG
from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.coarse_error import coarse_errors
from muse_assets.ivfpq.contents import read_contents
from muse_assets.ivfpq.duplicates import Duplicates, Group, find_duplicates
from muse_assets.playlists.songs import program_songs
from muse_assets.snapshots.building import Built
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.data_quality import confirm_duplicates, constant_dimensions, norm_outliers
from muse_assets.snapshots.gate import CONSTANT_DIMENSIONS, DUPLICATES, NORM_OUTLIERS, WARNING_ONLY
from muse_assets.snapshots.neighbor_preview import NeighborPreview
from muse_assets_tests.conftest import Stores
from muse_assets_tests.embedding_rows import payloads_of, put_rows, unit_vectors
from muse_assets_tests.installations import install
from muse_assets_tests.lanes import Lane, build, lane_at

Vectors = NDArray[np.float32]
ROWS = 400


def lane_of(vectors: Vectors, folder: Path, **spec: Any) -> Lane:
    made = lane_at(f"sqlite:///{folder / 'e.sqlite'}", folder / "work")
    made = replace(made, spec=replace(made.spec, **spec))
    put_rows(made.engine, made.spec, payloads_of(vectors))
    train_cluster(made.engine, made.spec, made.cluster)
    return made


def facts_of(built: Built, check: str) -> dict[str, Any]:
    return built.manifest.checks[check]


def filled(lists: list[int], codes: list[int], code_size: int) -> Any:
    """An index of 3 lists with these rows; every code is one byte, and then zeros up to the last."""
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(code_size), code_size, 3, code_size, 8)
    for id_, (number, code) in enumerate(zip(lists, codes, strict=True)):
        row = np.zeros(code_size, np.uint8)
        row[-1], row[0] = code, code // 2
        ids = np.array([id_ * 10], np.int64)
        index.invlists.add_entries(number, 1, faiss.swig_ptr(ids), faiss.swig_ptr(row))
    return index


@given(
    rows=st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=60),
    code_size=st.sampled_from([1, 2, 7, 8, 9, 16]),
)
@settings(max_examples=60, deadline=None)
def test_duplicates_are_what_a_slow_count_finds(rows: list[tuple[int, int]], code_size: int) -> None:
    index = filled([number for number, _ in rows], [code for _, code in rows], code_size)
    contents = read_contents(index)
    same: dict[tuple[int, bytes], list[int]] = {}
    for id_, number, code in zip(contents.ids, contents.lists, contents.codes, strict=True):
        same.setdefault((int(number), code.tobytes()), []).append(int(id_))
    found = find_duplicates(index)
    assert (found.rows, found.repeated) == (len(rows), len(rows) - len(same))
    expected = sorted((len(ids) for ids in same.values() if len(ids) > 1), reverse=True)[:5]
    assert [group.rows for group in found.groups] == expected
    for group in found.groups:
        assert list(group.ids) in [ids[:4] for ids in same.values()]
        assert len(set(group.ids)) == len(group.ids)


def test_codes_that_differ_in_their_last_bytes_alone_are_told_apart() -> None:
    """A hash that only sums its words takes 1 in 256 of these for equal."""
    random = np.random.default_rng(0)
    codes = np.zeros((5000, 64), np.uint8)
    codes[:, 7::8] = random.integers(0, 256, (5000, 8))
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(64), 64, 1, 64, 8)
    ids = np.arange(5000)
    index.invlists.add_entries(0, 5000, faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    different = Counter(map(bytes, codes))
    assert find_duplicates(index).repeated == 5000 - len(different)


def test_repeated_vectors_are_counted_named_and_compared(tmp_path: Path) -> None:
    vectors = unit_vectors(ROWS)
    vectors[10:110] = vectors[10]
    vectors[200:400] = vectors[200]
    lane = lane_of(vectors, tmp_path)
    built = build(lane)
    facts = facts_of(built, DUPLICATES)
    assert not facts["passed"]
    assert (facts["repeated_rows"], facts["largest_group"]) == (99 + 199, 200)
    assert facts["summary"] == "298 of 400 rows (74.5%) repeat another row's vector, limit 50%."
    groups = [
        record.data for record in index_metadata(built, NeighborPreview(()))["largest_duplicates"].records
    ]
    assert groups[:2] == [
        {"rows": 200, "idx": "201, 202, 203, 204", "equal to the bit": "4 of 4 read"},
        {"rows": 100, "idx": "11, 12, 13, 14", "equal to the bit": "4 of 4 read"},
    ]


def test_near_copies_and_rows_that_went_are_told_from_copies() -> None:
    """Near-copies share a code, too; what a reader sees is what the table has now."""
    found = Duplicates(9, 4, (Group(3, (1, 2, 3)), Group(2, (7, 8)), Group(2, (20, 21))))
    vectors = {1: [1.0], 2: [1.0], 3: [1.0001], 8: [2.0]}

    def read(ids: NDArray[np.int64]) -> tuple[NDArray[np.int64], Vectors]:
        there = [id_ for id_ in ids.tolist() if id_ in vectors]
        return np.array(there), np.array([vectors[id_] for id_ in there], np.float32)

    groups = confirm_duplicates(found, -1, read)
    assert [(group.rows, group.idx, group.read, group.equal) for group in groups] == [
        (3, (2, 3, 4), 3, 2),
        (2, (8, 9), 1, 1),
        (2, (21, 22), 0, 0),
    ]
    assert confirm_duplicates(Duplicates(9, 0, ()), -1, read) == ()


def test_names_may_repeat_and_songs_may_not() -> None:
    shares = {spec.name: spec.max_duplicate_share for spec in CATALOG.indexes}
    assert {name for name, share in shares.items() if share == 1} == {"artist", "title", "album_name"}


def test_vectors_of_an_odd_length_are_named(tmp_path: Path) -> None:
    vectors = unit_vectors(ROWS)
    vectors[[40, 300]] *= 3
    built = build(lane_of(vectors, tmp_path, max_imbalance=100.0))
    facts = facts_of(built, NORM_OUTLIERS)
    assert facts["passed"], "2 of 400 rows are within the limit"
    assert (facts["outliers"], facts["usual_norm"]) == (2, pytest.approx(1))
    vectors[[41, 301]] *= 0.2
    facts = facts_of(build(lane_of(vectors, tmp_path / "more", max_imbalance=100.0)), NORM_OUTLIERS)
    assert not facts["passed"]
    assert facts["summary"].endswith("far from the usual length 1.000 (ids 40, 41, 300, 301).")


def test_lengths_that_spread_are_no_outliers() -> None:
    random = np.random.default_rng(1)
    vectors = unit_vectors(1000) * random.normal(20, 3, (1000, 1)).astype(np.float32)
    assert not len(norm_outliers(np.arange(1000), vectors).ids)
    assert norm_outliers(np.empty(0, np.int64), vectors[:0]).sampled == 0


def test_dimensions_that_hardly_vary_are_named(tmp_path: Path) -> None:
    vectors = unit_vectors(ROWS)
    vectors[:, [3, 17]] = 0.125
    built = build(lane_of(vectors, tmp_path))
    facts = facts_of(built, CONSTANT_DIMENSIONS)
    assert not facts["passed"]
    assert facts["summary"] == "2 of 32 dimensions hardly vary (3, 17)."
    assert facts_of(build(lane_of(unit_vectors(ROWS), tmp_path / "sound")), CONSTANT_DIMENSIONS)["passed"]


@pytest.mark.parametrize("rows", [0, 1, 29, 30, 500])
def test_rows_that_are_one_vector_vary_nowhere(rows: int) -> None:
    found = constant_dimensions(np.repeat(unit_vectors(1), rows, axis=0))
    assert (found.sampled, len(found.dimensions)) == ((rows, 32) if rows >= 30 else (None, 0))


def test_no_row_is_at_no_distance() -> None:
    index = faiss.IndexIVFPQ(faiss.IndexFlatL2(8), 8, 1, 8, 8)
    assert coarse_errors(index, np.empty((0, 8), np.float32)).shape == (0,)


def test_quality_only_warns() -> None:
    assert {NORM_OUTLIERS, CONSTANT_DIMENSIONS, DUPLICATES} < WARNING_ONLY


@pytest.mark.parametrize("field", ["max_duplicate_share", "max_norm_outlier_share", "max_constant_share"])
def test_a_limit_that_is_no_share_is_refused(field: str) -> None:
    with pytest.raises(PermanentFailure, match=field):
        wrong: dict[str, Any] = {field: 1.5}
        replace(CATALOG.index("vibe"), **wrong)


def test_a_changed_limit_is_measured_on_an_unchanged_table(tmp_path: Path) -> None:
    lane = lane_of(np.repeat(unit_vectors(200), 2, axis=0), tmp_path)
    assert facts_of(build(lane), DUPLICATES)["passed"]
    strict = replace(lane, spec=replace(lane.spec, max_duplicate_share=0.1))
    assert not facts_of(build(strict, 2), DUPLICATES)["passed"]


# --- coverage ----------------------------------------------------------------------------------------


def both_databases(stores: Stores) -> dict[str, Any]:
    return {"embedding_db_url": stores.embedding_url, "playlist_db_url": stores.playlist_url}


def test_songs_without_a_row_are_counted_and_named(stores: Stores, tmp_path: Path) -> None:
    """On either kind of database, by disc and track, and by disc alone."""
    with dg.DagsterInstance.ephemeral() as instance:
        urls = both_databases(stores)
        installed = install(tmp_path, instance, **urls, redis_url=stores.redis_url, songs=200)
        songs = sorted(program_songs(installed.playlists, installed.catalog.program("drp"), "song_tables"))
        gone = songs[::3]
        for index in ("title", "album_name"):
            spec = installed.catalog.index(index)
            for song in gone:
                where = " AND ".join(
                    f"{column} = '{part}'" for column, part in zip(spec.song_key, song, strict=False)
                )
                installed.execute(f"DELETE FROM {spec.table} WHERE {where}")
        ran = installed.cache("drp")

    assert ran.success, ran.failure
    assert ran.checks["songs_covered"] is False
    table = {r.data["index"]: r.data for r in ran.metadata("playlist_cache")["coverage"].records}
    assert table["vibe"]["without a row"] == 0
    assert (table["vibe"]["covered"], table["vibe"]["songs"]) == (1, len(songs))
    assert table["title"]["without a row"] == len(gone)
    assert table["title"]["examples"] == ", ".join("/".join(song) for song in gone[:5])
    discs = {disc for disc, _ in songs}
    assert table["album_name"]["songs"] == len(discs)
    assert table["album_name"]["without a row"] == len({disc for disc, _ in gone})


def test_the_limit_of_coverage_is_the_catalogs(stores: Stores, tmp_path: Path) -> None:
    catalog = tmp_path / "catalog.toml"
    catalog.write_text("[index.title]\nmin_coverage = 0.0\n", "utf-8")
    with dg.DagsterInstance.ephemeral() as instance:
        urls = both_databases(stores)
        installed = install(tmp_path, instance, **urls, redis_url=stores.redis_url, catalog=catalog)
        installed.execute(f"DELETE FROM {installed.catalog.index('title').table} WHERE idx > 4")
        ran = installed.cache("drp")
    assert ran.success, ran.failure
    assert ran.checks["songs_covered"] is True
