"""IVF-PQ: codes that depend on the row alone, files that come back, training, and measures that tell."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.contents import (
    list_ids,
    list_sizes,
    read_contents,
    remove_ids,
    sort_lists,
    trained_fingerprint,
)
from muse_assets.ivfpq.encoding import BLOCK_ROWS, encode_all, encoder, fill, fused_dimensions, split_codes
from muse_assets.ivfpq.files import describe, discard_lists, ntotal_field, read_index, write_index
from muse_assets.ivfpq.kmeans import refine, start
from muse_assets.ivfpq.nearest_centroids import CodedCentroids
from muse_assets.ivfpq.quality import imbalance, reencoded_wrongly
from muse_assets.ivfpq.training import choose_nlist, train, training_rows
from muse_assets_tests.embedding_rows import unit_vectors


@lru_cache
def trained_bytes(dimension: int, m: int, nlist: int, rows: int) -> Any:
    vectors = unit_vectors(rows, dimension=dimension)
    return faiss.serialize_index(train(vectors, nlist=nlist, m=m).index)


def trained(dimension: int = 32, m: int = 8, nlist: int = 16, rows: int = 2000) -> Any:
    """A trained, empty index of the test's own."""
    return faiss.deserialize_index(trained_bytes(dimension, m, nlist, rows))


def filled(rows: int = 2000) -> tuple[Any, Any, Any]:
    """An index, its ids (with a gap) and its vectors."""
    index, vectors = trained(), unit_vectors(rows)
    ids = np.arange(rows, dtype=np.int64)
    ids[rows // 2 :] += 50
    fill(index, [(ids, vectors)])
    return index, ids, vectors


def saved(index: Any, path: Path) -> Path:
    path.write_bytes(written(index))
    return path


def written(index: Any) -> bytes:
    blocks: list[bytes] = []
    write_index(index, blocks.append)
    return b"".join(blocks)


# Encoding


def near_ties(dimension: int, m: int, nlist: int) -> Any:
    """A trained index whose centroids and codewords come in near-identical pairs."""
    index = trained(dimension, m, nlist, rows=1200)
    random = np.random.default_rng(3)
    codebook = faiss.vector_to_array(index.pq.centroids).reshape(m, 256, -1)
    codebook[:, 128:] = codebook[:, :128] * (1 + 1e-7 * random.standard_normal(codebook[:, :128].shape))
    faiss.copy_array_to_vector(codebook.astype(np.float32).ravel(), index.pq.centroids)
    quantizer = faiss.downcast_index(index.quantizer)
    centroids = quantizer.reconstruct_n(0, nlist)
    centroids[nlist // 2 :] = centroids[: nlist // 2] * (
        1 + 1e-7 * random.standard_normal(centroids[: nlist // 2].shape)
    )
    quantizer.reset()
    quantizer.add(centroids)
    return index


@pytest.mark.parametrize(
    ("dimension", "m"),
    [(512, 64), (1024, 64), (256, 8), (32, 8), (16, 8), (8, 8), (24, 8), (320, 8), (512, 8)],
)
def test_a_code_depends_on_the_row_alone(dimension: int, m: int) -> None:
    """In another order, company, batch or thread: an incremental index could not equal a full one else."""
    index = near_ties(dimension, m, nlist=8)
    random = np.random.default_rng(4)
    distinct = unit_vectors(200, seed=8, dimension=dimension)
    kinds = random.integers(0, 200, 1800)
    near = distinct[kinds] * (1 + 1e-7 * random.integers(0, 2, (1800, 1)))
    vectors = np.concatenate([distinct, near]).astype(np.float32)
    rows = [row.tobytes() for row in vectors]
    codes = encode_all(index, vectors)
    code_of: dict[bytes, bytes] = {}
    for row, code in zip(rows, codes, strict=True):
        assert code_of.setdefault(row, code.tobytes()) == code.tobytes(), "identical rows, different codes"
    assert len(code_of) < len(rows)

    order = random.permutation(len(vectors))
    np.testing.assert_array_equal(encode_all(index, vectors[order]), codes[order])
    with encoder(index) as encode:
        for start, size in ((0, 1), (17, 1), (1000, 3), (5, 700), (1, BLOCK_ROWS), (1999, 1)):
            np.testing.assert_array_equal(
                encode(np.ascontiguousarray(vectors[start : start + size])), codes[start : start + size]
            )
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    np.testing.assert_array_equal(encode_all(index, vectors), codes)
    faiss.omp_set_num_threads(threads)


@pytest.mark.parametrize("dimension", range(1, 33))
def test_the_fused_kernel_keeps_a_row_to_itself(dimension: int) -> None:
    """What `encoding` relies on: one distance to the bit, in every place of a block of any size."""
    if dimension > fused_dimensions():
        pytest.skip("no kernel for this dimension at this SIMD level")
    random = np.random.default_rng(dimension)
    words = random.standard_normal((256, dimension)).astype(np.float32)
    words[128:] = words[:128] * (1 + 1e-7 * random.standard_normal((128, dimension)))
    between = (words[random.integers(0, 256, 60)] + words[random.integers(0, 256, 60)]) / 2
    distinct = np.concatenate([words[::16], between, random.standard_normal((40, dimension))])
    distinct = distinct.astype(np.float32)
    nearest = faiss.IndexFlatL2(dimension)
    nearest.add(words)
    seen: dict[int, tuple[bytes, int]] = {}
    with encoder(trained()):
        for rows in (1, 7, 24, 1019, BLOCK_ROWS, BLOCK_ROWS):
            kinds = random.integers(0, len(distinct), rows)
            distances, found = nearest.search(distinct[kinds], 1)
            for kind, distance, word in zip(kinds.tolist(), distances[:, 0], found[:, 0], strict=True):
                answer = (distance.tobytes(), int(word))
                assert seen.setdefault(kind, answer) == answer
    assert len(seen) == len(distinct)


@pytest.mark.skipif(fused_dimensions() < 32, reason="this machine has no other kernels than these tests use")
def test_codes_depend_on_the_row_alone_without_avx512() -> None:
    these = "depends_on_the_row_alone or fused_kernel"
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", these, __file__]
    environment = {**os.environ, "FAISS_SIMD_LEVEL": "AVX2"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert run.returncode == 0, run.stdout
    assert "16 skipped" in run.stdout, "FAISS took no notice of the SIMD level asked for"


def quantizer_with(nbits: int = 8, nlist: int = 16, *, by_residual: bool = True, hnsw: bool = False) -> Any:
    quantizer = faiss.IndexHNSWFlat(32, 16) if hnsw else faiss.IndexFlatL2(32)
    index = faiss.IndexIVFPQ(quantizer, 32, nlist, 8, nbits)
    index.by_residual = by_residual
    index.own_fields = True
    quantizer.this.disown()
    index.cp.niter = index.pq.cp.niter = 2
    index.train(unit_vectors(12_000))
    return index


@pytest.mark.parametrize(
    "index",
    [
        partial(trained, 32, 8),
        partial(trained, 512, 64),
        partial(trained, 1024, 64),
        partial(trained, 320, 8),
        partial(quantizer_with, nbits=4),
        partial(quantizer_with, nbits=6),
        partial(quantizer_with, nlist=1),
        partial(quantizer_with, nlist=300),
        partial(quantizer_with, by_residual=False),
        partial(quantizer_with, hnsw=True),
    ],
)
def test_vectors_are_encoded_as_faiss_does(index: Any) -> None:
    made = index()
    vectors = unit_vectors(3000, seed=5, dimension=made.d)
    ours, by_faiss = encode_all(made, vectors), made.sa_encode(vectors)
    assert ours.dtype == np.uint8
    assert ours.shape == by_faiss.shape
    assert (ours == by_faiss).mean() > 0.9999
    errors = [np.square(vectors - made.sa_decode(codes)).sum(dtype=np.float64) for codes in (ours, by_faiss)]
    assert errors[0] == pytest.approx(errors[1], rel=1e-6)


def test_filling_equals_adding_one_by_one_and_by_faiss() -> None:
    vectors, ids = unit_vectors(600), np.arange(600, dtype=np.int64) * 3
    together, singly, by_faiss = trained(), trained(), trained()
    seen: list[int] = []
    batches = [(ids[:1], vectors[:1]), (ids[1:590], vectors[1:590]), (ids[590:], vectors[590:])]
    assert fill(together, batches, seen.append) == sum(seen) == 600
    for row in range(600):
        fill(singly, [(ids[row : row + 1], vectors[row : row + 1])])
    by_faiss.add_with_ids(vectors, ids)
    for other in (singly, by_faiss):
        sort_lists(other)
        assert faiss.serialize_index(other).tobytes() == faiss.serialize_index(together).tobytes()


def settings_of_faiss() -> tuple[int, int, int]:
    return (
        faiss.cvar.product_quantizer_compute_codes_bs,
        faiss.cvar.distance_compute_blas_threshold,
        faiss.InterruptCallback.get_period_hint(10**9),  # 2**30 where FAISS does not look for an interrupt
    )


def test_filling_leaves_the_process_as_it_was() -> None:
    before = settings_of_faiss()
    with encoder(trained()):
        under_way = settings_of_faiss()
        with pytest.raises(RuntimeError, match="the source broke"):
            fill(trained(), _broken_batches())
        assert settings_of_faiss() == under_way, "another encoder is at work"
    assert under_way[2] == 2**30
    assert settings_of_faiss() == before != under_way


def _broken_batches() -> Iterator[tuple[Any, Any]]:
    yield np.arange(5), unit_vectors(5)
    raise RuntimeError("the source broke")


def test_codes_come_apart_into_list_and_code() -> None:
    index, ids, vectors = filled()
    lists, codes = split_codes(index, encode_all(index, vectors))
    contents = read_contents(index)
    np.testing.assert_array_equal(contents.ids, ids)
    np.testing.assert_array_equal(contents.lists, lists)
    np.testing.assert_array_equal(contents.codes, codes)
    assert encode_all(index, vectors[:0]).shape == (0, index.sa_code_size())


# Contents


def test_contents_are_read_removed_and_put_in_order() -> None:
    index, ids, vectors = filled()
    some = ids[[3, 1500, 7]]
    assert read_contents(index, only=some).ids.tolist() == sorted(some.tolist())
    assert not len(read_contents(index, only=np.array([10**9])).ids)
    before = faiss.serialize_index(index).tobytes()
    fill(index, [(some, vectors[:3])])  # a second copy of each
    assert remove_ids(index, some) == 6
    assert not np.isin(list_ids(index), some).any()
    assert remove_ids(index, np.empty(0, np.int64)) == 0
    fill(index, [(some, vectors[[3, 1500, 7]])])
    sort_lists(index)
    assert faiss.serialize_index(index).tobytes() == before, "the history leaves no trace"
    assert int(list_sizes(index).sum()) == len(ids)


def test_the_fingerprint_tells_one_centroid_or_codeword_apart() -> None:
    index = trained()
    before = trained_fingerprint(index)
    assert trained_fingerprint(filled()[0]) == before, "rows are no part of it"
    codebook = faiss.vector_to_array(index.pq.centroids)
    for position in (0, 777, len(codebook) - 1):
        changed = codebook.copy()
        changed[position] = np.nextafter(changed[position], np.float32(np.inf))
        faiss.copy_array_to_vector(changed, index.pq.centroids)
        assert trained_fingerprint(index) != before
    faiss.copy_array_to_vector(codebook, index.pq.centroids)
    assert trained_fingerprint(index) == before
    quantizer = faiss.downcast_index(index.quantizer)
    centroids = quantizer.reconstruct_n(0, index.nlist)
    centroids[-1, -1] += 1e-3
    quantizer.reset()
    quantizer.add(centroids)
    assert trained_fingerprint(index) != before
    assert trained_fingerprint(trained(nlist=17)) != before


# Files


def test_a_file_says_largest_id_plus_one_and_is_read_back_with_its_rows(tmp_path: Path) -> None:
    index, ids, vectors = filled()
    index.nprobe = 5
    path = saved(index, tmp_path / "vibe.index")
    assert index.ntotal == 2000, "writing changes nothing in memory"
    assert ntotal_field(index) == faiss.read_index(str(path)).ntotal == ids[-1] + 1 == 2050
    for precompute in (False, True):
        back = read_index(path, precompute=precompute)
        assert back.ntotal == 2000
        for field in ("ids", "lists", "codes"):
            np.testing.assert_array_equal(
                getattr(read_contents(back), field), getattr(read_contents(index), field)
            )
        assert back.nprobe == 5
        found = back.search(vectors[:50], 10)
        np.testing.assert_allclose(found[0], index.search(vectors[:50], 10)[0], rtol=1e-3)
    again = saved(read_index(path), tmp_path / "again.index")
    assert again.read_bytes() == path.read_bytes()
    empty = saved(trained(), tmp_path / "empty.index")
    assert read_index(empty).ntotal == faiss.read_index(str(empty)).ntotal == 0


@pytest.mark.parametrize("after", [0, 1, 4096])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # FAISS's last flush
def test_a_write_that_fails_is_raised(after: int) -> None:
    """`after` bytes are taken: FAISS's own buffer hides the failure of its last write."""
    index, _, _ = filled(200)
    taken = 0

    def write(block: bytes) -> None:
        nonlocal taken
        taken += len(block)
        if taken > after:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        write_index(index, write)
    assert index.ntotal == 200


def test_damaged_files_are_named(tmp_path: Path) -> None:
    whole = saved(filled()[0], tmp_path / "whole.index").read_bytes()
    path = tmp_path / "muse_vibe.index"
    random = np.random.default_rng(1)
    cuts = [*random.integers(0, len(whole), 60).tolist(), 0, 3, 4, len(whole) - 1]
    junk = [random.bytes(size) for size in (1, 100, 100_000)]
    for content in [*(whole[:cut] for cut in cuts), *junk, *(b"IwPQ" + raw for raw in junk)]:
        path.write_bytes(content)
        for read in (read_index, describe):
            with pytest.raises(PermanentFailure, match=r"muse_vibe\.index is not a readable FAISS index"):
                read(path)
    for read in (read_index, describe):
        with pytest.raises(PermanentFailure, match="cannot be opened"):
            read(tmp_path / "absent.index")


def test_a_header_that_claims_gigabytes_allocates_none(tmp_path: Path) -> None:
    content = saved(filled()[0], tmp_path / "whole.index").read_bytes()
    # The coarse quantizer's vector of nlist * d floats, preceded by its length in floats (or bytes).
    lengths = [
        at for floats in (1, 4) if 0 < (at := content.find((16 * 32 * floats).to_bytes(8, "little"))) < 300
    ]
    assert lengths
    path = tmp_path / "muse_vibe.index"
    for at in lengths:
        path.write_bytes(content[:at] + (4 * 10**9).to_bytes(8, "little") + content[at + 8 :])
        before = _peak_kib()
        with pytest.raises(PermanentFailure, match="not a readable"):
            read_index(path)
        assert _peak_kib() - before < 100_000


def _peak_kib() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.findall(r"VmHWM:\s+(\d+)", status)[0])


def test_index_classes_are_described_and_only_ivfpq_is_loaded(tmp_path: Path) -> None:
    vectors = unit_vectors(1000)
    made = {
        "IVFFlat": faiss.index_factory(32, "IVF8,Flat"),
        "Flat": faiss.IndexFlatIP(32),
        "HNSW": faiss.IndexIVFPQ(faiss.IndexHNSWFlat(32, 8), 32, 8, 4, 8),
    }
    made["HNSW"].pq.cp.min_points_per_centroid = made["HNSW"].cp.min_points_per_centroid = 1
    facts = {}
    for name, index in made.items():
        index.train(vectors)
        index.add(vectors)
        path = tmp_path / f"{name}.index"
        faiss.write_index(index, str(path))
        facts[name] = describe(path)
        assert (facts[name].dimension, facts[name].ntotal, facts[name].is_trained) == (32, 1000, True)
    assert [fact.index_class for fact in facts.values()] == ["IndexIVFFlat", "IndexFlatIP", "IndexIVFPQ"]
    assert [(fact.nlist, fact.m, fact.nbits) for fact in facts.values()] == [
        (8, None, None),
        (0, None, None),
        (8, 4, 8),
    ]
    assert facts["Flat"].metric != facts["HNSW"].metric == "l2"
    assert read_index(tmp_path / "HNSW.index").ntotal == 1000
    for name in ("IVFFlat", "Flat"):
        with pytest.raises(PermanentFailure, match="not an IndexIVFPQ"):
            read_index(tmp_path / f"{name}.index")


# Training


@pytest.mark.parametrize("rows", [1, 40, 300, 5000])
def test_training_is_silent_and_deterministic(rows: int, capfd: pytest.CaptureFixture[str]) -> None:
    vectors = unit_vectors(rows)
    stages: list[str] = []
    runs = [
        train(vectors, nlist=choose_nlist(rows), m=8, seed=seed, on_stage=stages.append) for seed in (1, 1, 2)
    ]
    assert capfd.readouterr() == ("", ""), "FAISS prints its warnings"
    prints = [trained_fingerprint(run.index) for run in runs]
    assert prints[0] == prints[1]
    assert (prints[0] != prints[2]) == (rows >= 300), "fewer rows are their own centroids"
    assert runs[0].index.ntotal == 0
    assert runs[0].rows == rows
    assert "product quantizer" in stages[-1]
    assert 0 <= runs[0].objective[-1] <= 1
    assert runs[0].imbalance >= 1


def test_training_depends_on_the_sample_and_seed_alone() -> None:
    """Not on the number of threads, nor on whether the rows are a view."""
    vectors = unit_vectors(6000)
    prints = {trained_fingerprint(train(vectors, nlist=64, m=8).index)}
    threads = faiss.omp_get_max_threads()
    for wanted in (1, 3):
        faiss.omp_set_num_threads(wanted)
        prints.add(trained_fingerprint(train(vectors, nlist=64, m=8).index))
    faiss.omp_set_num_threads(threads)
    view = np.repeat(vectors, 2, axis=0)[::2]
    prints.add(trained_fingerprint(train(view, nlist=64, m=8).index))
    assert len(prints) == 1


def test_few_lists_of_many_rows_learn_from_all_of_them() -> None:
    vectors = unit_vectors(6000)
    trained = train(vectors, nlist=4, m=8)
    assert trained.rows == 6000
    distances = trained.index.quantizer.search(vectors, 1)[0]
    assert trained.objective[-1] == pytest.approx(distances.mean(), rel=0.01)


def test_training_ends_level_with_faiss() -> None:
    """Squared errors of unseen rows: the coarse one, and that of the whole code."""
    vectors = unit_vectors(30_000, dimension=64)
    sample, unseen = vectors[:20_000], vectors[20_000:]
    ours = train(sample, nlist=150, m=8).index
    by_faiss = faiss.index_factory(64, "IVF150,PQ8np")
    by_faiss.train(sample)
    errors = []
    for index in (ours, by_faiss):
        coarse = index.quantizer.search(unseen, 1)[0].mean()
        decoded = index.sa_decode(index.sa_encode(unseen))
        errors.append((coarse, np.square(decoded - unseen).sum(axis=1).mean()))
    assert errors[0][0] < 1.02 * errors[1][0]
    assert errors[0][1] < 1.02 * errors[1][1]


@pytest.mark.parametrize(("dimension", "count"), [(7, 17), (36, 100), (64, 500)])
def test_codes_of_centroids_tell_which_are_near(
    dimension: int, count: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """Of dimensions that no code length divides too; and FAISS, which warns of few points, says nothing."""
    rows = unit_vectors(4000, dimension=dimension)
    centroids = refine(rows, start(rows[:count], 8), steps=4, tolerance=0).centroids
    coded, rest = CodedCentroids(centroids), rows[count:]
    near = coded.near(rest, 16)
    assert near.shape == (len(rest), 16)
    assert (np.diff(np.sort(near, axis=1), axis=1) > 0).all(), "a centroid is told twice"
    assert (near >= 0).all() and (near < count).all()
    nearest = faiss.knn(rest, centroids, 1)[1]
    assert (near == nearest).any(axis=1).mean() > 0.97
    np.testing.assert_array_equal(coded.near(rest[5:6], 16)[0], near[5])
    assert capfd.readouterr() == ("", "")


def test_of_few_centroids_all_are_near() -> None:
    rows = unit_vectors(20, dimension=8)
    np.testing.assert_array_equal(CodedCentroids(rows[:10]).near(rows[10:12], 16), [range(10)] * 2)


def test_k_means_goes_on_where_most_rows_are_equal() -> None:
    """Most centroids begin on equal rows and are left without any: each splits a list that has some."""
    random = np.random.default_rng(1)
    rows = unit_vectors(400, dimension=16)
    rows = np.concatenate([np.repeat(rows[:1], 3600, axis=0), rows])[random.permutation(4000)]
    found = start(rows[:64], 8)
    for part in (1000, 2000, 4000):
        found = refine(rows[:part], found, steps=20, tolerance=0)
    assert found.centroids.shape == (64, 16)
    assert np.isfinite(found.centroids).all()
    distances = faiss.knn(rows, found.centroids, 1)[0][:, 0]
    assert found.errors[-1] == pytest.approx(distances.mean(), rel=0.01)
    assert found.errors[-1] < 0.8 * faiss.knn(rows, rows[:64].copy(), 1)[0].mean()


def test_k_means_ends_when_it_stops_paying() -> None:
    rows = unit_vectors(4000, dimension=16)
    patient, hasty = (
        refine(rows, start(rows[:32], 8), steps=30, tolerance=tolerance) for tolerance in (0, 0.05)
    )
    assert len(hasty.errors) < len(patient.errors)
    assert list(patient.errors[:-1]) == sorted(patient.errors[:-1], reverse=True)
    np.testing.assert_array_equal(hasty.nearest, faiss.knn(rows, hasty.centroids, 1)[1][:, 0])


def test_k_means_of_few_centroids_is_what_sums_anew_and_all_distances_give() -> None:
    """Its sums follow the rows that move, over many steps, to the same centroids."""
    rows = unit_vectors(3000, dimension=16)
    found = refine(rows, start(rows[:40], 8), steps=9, tolerance=0)
    assert len(found.errors) > 5
    wanted = rows[:40].astype(np.float64)
    for step in range(1, len(found.errors) + 1):
        nearest = faiss.knn(rows, wanted.astype(np.float32), 1)[1][:, 0]
        means = np.stack([rows[nearest == number].mean(axis=0) for number in range(40)])
        wanted += (1 if step == len(found.errors) else 1.5) * (means - wanted)
    np.testing.assert_allclose(found.centroids, wanted, atol=1e-5)


def test_the_number_of_lists_follows_the_table() -> None:
    assert choose_nlist(500_000) == 1000
    assert choose_nlist(40_000_000) == 8944
    assert choose_nlist(0) == choose_nlist(1) == choose_nlist(50) == 1
    assert choose_nlist(500_000, fixed=64) == 64
    assert all(choose_nlist(rows) * 39 <= max(rows, 39) for rows in range(0, 10_000, 7))
    assert training_rows(1000) == 192_000
    assert training_rows(1) == 65_536


def test_fewer_rows_than_lists_is_an_error_that_says_so() -> None:
    with pytest.raises(PermanentFailure, match="7 usable training rows are too few for nlist 8"):
        train(unit_vectors(7), nlist=8, m=8)
    with pytest.raises(PermanentFailure, match="0 usable"):
        train(unit_vectors(0), nlist=1, m=8)


# Quality


def test_discarded_lists_are_gone() -> None:
    index, _, vectors = filled()
    discard_lists(index)
    assert index.ntotal == index.invlists.compute_ntotal() == 0
    assert (index.search(vectors[:2], 3)[1] == -1).all()


def test_imbalance_is_one_when_lists_are_equal() -> None:
    index = trained()
    for number in range(16):
        index.invlists.add_entries(
            number, 5, faiss.swig_ptr(ids := np.arange(5)), faiss.swig_ptr(codes := np.zeros(40, np.uint8))
        )
    assert imbalance(index) == pytest.approx(1)
    assert len(ids) * 8 == len(codes)
    fill(index, [(np.arange(1000), np.repeat(unit_vectors(1), 1000, axis=0))])
    assert imbalance(index) > 8


def _longest(index: Any) -> int:
    return int(np.argmax(list_sizes(index)))


def _roll_ids(index: Any) -> None:
    number = _longest(index)
    size = index.invlists.list_size(number)
    ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
    ids[:] = np.roll(ids, 1)


def _zero_codes(index: Any) -> None:
    number = _longest(index)
    size = index.invlists.list_size(number) * index.code_size
    faiss.rev_swig_ptr(index.invlists.get_codes(number), size)[:] = 0


def _zero_codebook(index: Any) -> None:
    codebook = faiss.vector_to_array(index.pq.centroids)
    codebook[: len(codebook) // 10] = 0
    faiss.copy_array_to_vector(codebook, index.pq.centroids)


def _permute_centroids(index: Any) -> None:
    quantizer = faiss.downcast_index(index.quantizer)
    centroids = quantizer.reconstruct_n(0, index.nlist)
    quantizer.reset()
    quantizer.add(np.roll(centroids, 1, axis=0))


def _lose_a_row(index: Any) -> None:
    remove_ids(index, list_ids(index)[:1])


def _double_a_row(index: Any) -> None:
    fill(index, [(np.array([3]), unit_vectors(2000)[3:4])])


@pytest.mark.parametrize(
    ("plant", "at_least"),
    [
        (_roll_ids, 50),
        (_zero_codes, 50),
        (_zero_codebook, 1000),
        (_permute_centroids, 1800),
        (_lose_a_row, 1),
        (_double_a_row, 1),
    ],
)
def test_planted_faults_are_found_by_encoding_again(plant: Any, at_least: int) -> None:
    index, ids, vectors = filled()
    order = np.random.default_rng(6).permutation(len(ids))
    assert not len(reencoded_wrongly(index, ids[order], vectors[order]))
    plant(index)
    wrong = reencoded_wrongly(index, ids[order], vectors[order])
    assert len(wrong) >= at_least
    assert np.isin(wrong, ids).all()


def test_one_stale_vector_is_found() -> None:
    index, ids, vectors = filled()
    vectors[1234] = -vectors[1234]
    assert reencoded_wrongly(index, ids, vectors).tolist() == [ids[1234]]


# Histories

ROWS = st.sets(st.integers(0, 199), min_size=1, max_size=60)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.lists(ROWS, min_size=1, max_size=5), st.lists(ROWS, max_size=5))
def test_any_history_of_adding_and_removing_gives_the_same_bytes(
    additions: list[set[int]], removals: list[set[int]]
) -> None:
    vectors = unit_vectors(200)
    index = trained()
    held: set[int] = set()
    for step, added in enumerate(additions):
        new = np.array(sorted(added - held, reverse=True), np.int64)
        fill(index, [(new, vectors[new])])
        held |= added
        if step < len(removals):
            remove_ids(index, np.array(sorted(removals[step]), np.int64))
            held -= removals[step]
    sort_lists(index)
    at_once = trained()
    ids = np.array(sorted(held), np.int64)
    fill(at_once, [(ids, vectors[ids])])
    assert written(index) == written(at_once)
