"""The rows a gate measures on: a choice that depends on ids alone, kept vectors that are never stale."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import faiss
import numpy as np
import pytest

from muse_assets.embeddings.digests import BUCKET_ROWS, Digests, digest_rows
from muse_assets.ivfpq.encoding import fill
from muse_assets.ivfpq.files import discard_lists
from muse_assets.ivfpq.probing import choose_nprobe, measure_probes
from muse_assets.ivfpq.training import train
from muse_assets.snapshots import building, sampled_rows
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.sampled_rows import (
    Gathered,
    RowSample,
    choose_rows,
    keep_rows,
    kept_file,
    kept_rows,
)
from muse_assets_tests.embedding_rows import SPEC, delete_rows, npy, payloads_of, put_rows, unit_vectors
from muse_assets_tests.lanes import Lane, build, full_bytes, lane_at, temps

IDS = np.arange(0, 9000, 3, dtype=np.int64)
SOURCE = "a table"


def test_the_choice_is_of_ids_alone_and_stable() -> None:
    chosen = choose_rows(IDS, 500)
    assert len(np.unique(chosen)) == 500
    shuffled = np.random.default_rng(1).permutation(IDS)
    np.testing.assert_array_equal(choose_rows(shuffled, 500), chosen)
    fewer = choose_rows(np.setdiff1d(IDS, chosen[7:8]), 500)
    assert len(np.setdiff1d(fewer, chosen)) == 1, "a row that goes is replaced by one"
    np.testing.assert_array_equal(choose_rows(IDS, 10**6)[:500], chosen)
    # Random over the table: thirds of it are met alike.
    assert np.histogram(chosen, 3)[0].min() > 130


def test_what_is_gathered_covers_the_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampled_rows, "SAMPLED_ROWS", 500)
    gathered = Gathered(len(IDS), 4)
    for part in np.array_split(IDS, 7):
        gathered.take(part, np.repeat(part, 4).reshape(-1, 4).astype(np.float32))
    rows = gathered.hand_over()
    assert 500 < len(rows.ids) < 620
    chosen = choose_rows(IDS, 500)
    np.testing.assert_array_equal(rows.by_hash().first(500).ids, chosen)
    np.testing.assert_array_equal(rows.by_hash().vectors[:500, 0], chosen)
    assert not len(gathered.hand_over().ids)
    assert not len(Gathered(0, 4).hand_over().ids)


def table(rows: int, changed: tuple[int, ...] = ()) -> Digests:
    idx = np.arange(1, rows + 1)
    return digest_rows(idx, [b"new" if i in changed else bytes([i % 251]) for i in idx])


@pytest.fixture
def kept(tmp_path: Path) -> RowSample:
    ids = np.array([0, 40, 41, 200], np.int64)
    rows = RowSample(ids, np.arange(4 * SPEC.dimension, dtype=np.float32).reshape(4, -1))
    keep_rows(tmp_path, SPEC, SOURCE, table(300), rows)
    return rows


def test_kept_rows_come_back_while_their_bucket_stands(tmp_path: Path, kept: RowSample) -> None:
    again = kept_rows(tmp_path, SPEC, SOURCE, table(300))
    np.testing.assert_array_equal(again.ids, kept.ids)
    np.testing.assert_array_equal(again.vectors, kept.vectors)
    bucket_of_two = 41 // BUCKET_ROWS
    moved = kept_rows(tmp_path, SPEC, SOURCE, table(300, changed=(bucket_of_two * BUCKET_ROWS,)))
    assert moved.ids.tolist() == [0, 200]
    assert kept_rows(tmp_path, SPEC, SOURCE, table(64)).ids.tolist() == [0, 40, 41], "gone buckets"
    assert not len(kept_rows(tmp_path, SPEC, "another column", table(300)).ids)
    assert not len(kept_rows(tmp_path, replace(SPEC, dimension=64), SOURCE, table(300)).ids)


def test_damaged_or_missing_kept_rows_are_none(tmp_path: Path, kept: RowSample) -> None:
    path = kept_file(tmp_path, SPEC.name)
    content = path.read_bytes()
    for at in range(0, len(content), 7):
        flipped = bytearray(content)
        flipped[at] ^= 0x10
        path.write_bytes(flipped)
        found = kept_rows(tmp_path, SPEC, SOURCE, table(300))
        known = dict(zip(kept.ids.tolist(), kept.vectors, strict=True))
        for number, vector in zip(found.ids.tolist(), found.vectors, strict=True):
            np.testing.assert_array_equal(vector, known[number], f"a flipped bit at {at}")
    path.write_bytes(content[:50])
    assert not len(kept_rows(tmp_path, SPEC, SOURCE, table(300)).ids)
    path.unlink()
    assert not len(kept_rows(tmp_path, SPEC, SOURCE, table(300)).ids)


def test_a_full_disk_keeps_nothing_and_says_nothing(tmp_path: Path, kept: RowSample) -> None:
    path = kept_file(tmp_path, SPEC.name)
    path.unlink()
    path.parent.rmdir()
    path.parent.touch()
    keep_rows(tmp_path, SPEC, SOURCE, table(300), kept)
    assert not len(kept_rows(tmp_path, SPEC, SOURCE, table(300)).ids)


@pytest.fixture
def lane(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Lane:
    """A table of 900 rows of which 200 are measured on."""
    monkeypatch.setattr(sampled_rows, "SAMPLED_ROWS", 200)
    monkeypatch.setattr(sampled_rows.choose_rows, "__defaults__", (200,))
    made = lane_at(f"sqlite:///{tmp_path / 'e.sqlite'}", tmp_path / "work")
    put_rows(made.engine, made.spec, payloads_of(unit_vectors(900)))
    train_cluster(made.engine, made.spec, made.cluster)
    return made


@pytest.mark.parametrize("read_unproved", [1000, 5])
def test_an_incremental_build_measures_what_a_full_one_does(
    lane: Lane, monkeypatch: pytest.MonkeyPatch, read_unproved: int
) -> None:
    monkeypatch.setattr(building, "_READ_UNPROVED", read_unproved)
    read: list[int] = []
    by_table = building._read_rows

    def counted(build: object, ids: object, digests: object = None) -> object:
        read.append(len(ids))  # type: ignore[arg-type]
        return by_table(build, ids, digests)  # type: ignore[arg-type]

    monkeypatch.setattr(building, "_read_rows", counted)
    build(lane)
    assert len(read) == 1, "re-encoding alone: all that is measured on was pulled"
    kept = kept_file(lane.work, lane.spec.name)
    for day in (2, 3):
        put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(9, seed=day), 900 + 10 * day))
        put_rows(lane.engine, lane.spec, {100 * day: npy(unit_vectors(1, seed=day)[0])})
        delete_rows(lane.engine, lane.spec, [day, 500 + day])
        read.clear()
        built = build(lane, day)
        assert len(read) == 1, "the rest was kept"
        assert built.path.read_bytes() == full_bytes(lane, day)
    for content in (None, b"junk"):
        kept.unlink() if content is None else kept.write_bytes(content)
        put_rows(lane.engine, lane.spec, {77: npy(unit_vectors(1, seed=len(read))[0])})
        read.clear()
        built = build(lane, 4)
        assert sum(read) > 1100, "read again"
        assert built.path.read_bytes() == full_bytes(lane, 4)
        proved = len(np.load(kept)["ids"])
        assert (proved >= 200) == (read_unproved == 5), "only what was digested as it was read is kept"
    assert not temps(lane)


def test_a_measurement_agrees_with_probing_every_list() -> None:
    vectors = unit_vectors(3000, seed=4, topics=60)
    index = train(vectors, nlist=100, m=8).index
    fill(index, [(np.arange(len(vectors)), vectors)])
    ids = np.random.default_rng(2).permutation(len(vectors))[:600]
    ours = measure_probes(index, ids, vectors[ids])
    assert max(ours.nprobe) == 64
    all_lists = index.search(vectors[ids[:200]], 11, params=faiss.SearchParametersIVF(nprobe=100))[1]
    for nprobe, kept in zip(ours.nprobe, ours.kept, strict=True):
        some = index.search(vectors[ids[:200]], 11, params=faiss.SearchParametersIVF(nprobe=nprobe))[1]
        found = np.mean(
            [
                np.isin(a[a != own][:10], b[b != own]).mean()
                for a, b, own in zip(all_lists, some, ids[:200], strict=True)
            ]
        )
        assert kept == pytest.approx(found, abs=0.005)
    assert choose_nprobe(ours, 0.0, 0.98) <= 64


def test_discarded_lists_are_gone() -> None:
    vectors = unit_vectors(500)
    index = train(vectors, nlist=10, m=8).index
    fill(index, [(np.arange(500), vectors)])
    discard_lists(index)
    assert index.ntotal == index.invlists.compute_ntotal() == 0
    assert (index.search(vectors[:2], 3)[1] == -1).all()
