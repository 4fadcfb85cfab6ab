"""Taking over the legacy batch's files: what is proved, what the next build makes of it, what is refused.

The files are made as the legacy made them: IndexIVFPQ over IndexHNSWFlat, filled in batches of 5,000.
"""

from __future__ import annotations

import subprocess
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import dagster as dg
import faiss
import numpy as np
import pytest

from muse_assets.catalog import load_catalog
from muse_assets.connections.databases import engine_for
from muse_assets.durable_files import file_sha256
from muse_assets.embeddings.decoding import decode
from muse_assets.embeddings.reading import Bounds, read_ranges
from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.contents import trained_fingerprint
from muse_assets.ivfpq.files import read_index
from muse_assets.publishing.deploying import deploy
from muse_assets.seoul_time import SEOUL
from muse_assets.settings import Settings
from muse_assets.snapshots.adopting import Adoption, adopt
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster
from muse_assets.snapshots.store import snapshots
from muse_assets.snapshots.verifying import verify_work
from muse_assets_tests.embedding_rows import delete_rows, npy, payloads_of, put_rows, unit_vectors
from muse_assets_tests.lanes import Lane, full_bytes, ids_in, lane_at, temps
from muse_assets_tests.test_cli import muse, succeed

ROWS = 1600
TODAY = datetime.now(SEOUL).date()
VECTORS = unit_vectors(ROWS)


@dataclass(frozen=True)
class Legacy:
    """A lane whose server directory has a file of the legacy batch."""

    lane: Lane
    live: Path

    def adopt(self, **changed: Any) -> Adoption | None:
        spec = replace(self.lane.spec, **changed)
        return adopt(self.lane.engine, spec, self.live, self.lane.work, SEOUL)

    def refusal(self, **changed: Any) -> str:
        """What the refusal says; the file is as it was and the work directory has nothing."""
        before = file_sha256(self.live) if self.live.exists() else None
        with pytest.raises(PermanentFailure) as failed:
            self.adopt(**changed)
        assert before == (file_sha256(self.live) if self.live.exists() else None)
        assert list(self.lane.work.glob("*.index")) == []
        assert temps(self.lane) == []
        return str(failed.value)


def legacy_file(
    path: Path, vectors: Any, ids: Any = None, *, coarse: str = "hnsw", nlist: int = 8, m: int = 16
) -> Path:
    """What train_faiss and add_faiss leave; without ids each vector's is its position."""
    dimension = vectors.shape[1]
    quantizer = faiss.IndexHNSWFlat(dimension, 32) if coarse == "hnsw" else faiss.IndexFlatL2(dimension)
    index = faiss.IndexIVFPQ(quantizer, dimension, nlist, m, 8)
    index.pq.cp.niter = 3
    index.pq.cp.min_points_per_centroid = 1
    index.train(VECTORS if dimension == VECTORS.shape[1] else vectors)
    index.add(vectors) if ids is None else index.add_with_ids(vectors, ids)
    path.parent.mkdir(parents=True, exist_ok=True)
    faiss.write_index(index, str(path))
    return path


@pytest.fixture
def lane(tmp_path: Path) -> Lane:
    """A table of ROWS rows from idx 1 on; the catalog says the file's shape."""
    return filled_lane(f"sqlite:///{tmp_path / 'rows.sqlite'}", tmp_path / "work")


def filled_lane(url: str, work: Path) -> Lane:
    found = lane_at(url, work)
    found.work.mkdir()
    spec = replace(found.spec, nlist=8, m=16, nprobe=1, recall_gate=0.1)
    put_rows(found.engine, spec, payloads_of(VECTORS))
    return replace(found, spec=spec)


@pytest.fixture
def legacy(lane: Lane, tmp_path: Path) -> Legacy:
    return Legacy(lane, legacy_file(tmp_path / "server" / lane.spec.live_file, VECTORS))


def day_after(lane: Lane, days: int = 0, **options: Any) -> Any:
    return build_snapshot(lane.engine, lane.spec, lane.work, TODAY + timedelta(days=days), **options)


@pytest.mark.parametrize("coarse", ["hnsw", "flat"])
def test_the_file_is_taken_over_as_it_is_and_the_next_build_finds_nothing_to_encode(
    lane: Lane, tmp_path: Path, coarse: str
) -> None:
    live = legacy_file(tmp_path / lane.spec.live_file, VECTORS, coarse=coarse)
    done = Legacy(lane, live).adopt()

    assert done is not None
    assert (done.compared, done.equal, done.absent, done.stale, done.pulled) == (ROWS, ROWS, 0, 0, 0)
    assert done.coarse_quantizer == {"hnsw": "IndexHNSWFlat", "flat": "IndexFlatL2"}[coarse]
    (snapshot,) = snapshots(lane.work, lane.spec)
    assert snapshot.manifest.sha256 == file_sha256(live), "the very bytes"
    assert {found.state for found in verify_work(lane.work, lane.spec)} == {"ok"}

    built = day_after(lane)
    assert (built.manifest.mode, built.manifest.added, built.manifest.reembedded) == ("incremental", 0, 0)
    assert all(check.passed for check in built.checks)
    kept = read_index(built.path)
    assert (kept.nlist, kept.pq.M, kept.nprobe) == (8, 16, 1)
    assert trained_fingerprint(kept) == trained_fingerprint(read_index(live)), "graph and codebook too"


def test_what_the_file_lacks_or_holds_stale_is_the_next_builds(legacy: Legacy) -> None:
    lane = legacy.lane
    put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(40, seed=5), ROWS + 1))
    put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(3, seed=6), 100))  # embedded again
    put_rows(lane.engine, lane.spec, {700: npy(np.full(32, np.nan, np.float32))})
    gone = [*range(320, 352), *range(ROWS - 2, ROWS + 1), 9]  # a whole bucket, among others
    delete_rows(lane.engine, lane.spec, gone)

    done = legacy.adopt()
    assert done is not None
    assert (done.absent, done.stale) == (40, len(gone) + 1)
    assert done.compared - done.equal == 3
    assert done.pulled < 250, "only buckets with a difference"

    built = day_after(lane)
    left = set(range(1, ROWS + 41)) - set(gone) - {700}
    assert ids_in(built.path) == sorted(idx - 1 for idx in left)
    assert (built.manifest.mode, built.manifest.reembedded) == ("incremental", 3)
    assert built.manifest.rejected == {"not_finite": 1}
    assert all(check.passed for check in built.checks)
    assert built.path.read_bytes() == full_bytes(lane), "no trace of what the file held wrongly"


def test_mariadb_is_compared_alike(mariadb_schema: str, tmp_path: Path) -> None:
    lane = filled_lane(mariadb_schema, tmp_path / "work")
    live = legacy_file(tmp_path / lane.spec.live_file, VECTORS)
    delete_rows(lane.engine, lane.spec, range(320, 352))
    done = Legacy(lane, live).adopt()
    assert done is not None
    assert (done.equal, done.stale, done.pulled) == (ROWS - 32, 32, 0)
    assert len(ids_in(day_after(lane).path)) == ROWS - 32


def test_the_built_file_replaces_the_legacys_without_a_word_about_its_size(legacy: Legacy) -> None:
    lane = legacy.lane
    legacy.adopt()
    put_rows(lane.engine, lane.spec, payloads_of(unit_vectors(1, seed=5), ROWS + 1))
    built = day_after(lane)
    before = file_sha256(legacy.live)
    done = deploy(lane.spec, built.path, built.manifest, legacy.live.parent)

    assert (done.replaced_sha256, done.already_live) == (before, False)
    assert file_sha256(legacy.live.with_name(lane.spec.fallback_file)) == before


def test_a_file_of_the_servers_own_faiss_is_taken_over(
    lane: Lane, tmp_path: Path, server_python: Path
) -> None:
    np.save(tmp_path / "v.npy", VECTORS)
    live = tmp_path / "server" / lane.spec.live_file
    live.parent.mkdir()
    made = (
        "import faiss, numpy, sys; v = numpy.load(sys.argv[1]); q = faiss.IndexHNSWFlat(32, 32); "
        "i = faiss.IndexIVFPQ(q, 32, 8, 16, 8); i.pq.cp.niter = 3; i.train(v); i.add(v); "
        "faiss.write_index(i, sys.argv[2])"
    )
    subprocess.run([server_python, "-c", made, tmp_path / "v.npy", live], check=True, capture_output=True)
    done = Legacy(lane, live).adopt()
    assert done is not None
    assert done.equal == ROWS
    assert day_after(lane).manifest.mode == "incremental"


def test_another_graph_over_the_same_centroids_is_another_cluster(legacy: Legacy) -> None:
    """It decides the list too: a build must not go on with it."""
    index = read_index(legacy.live)
    before = trained_fingerprint(index)
    faiss.downcast_index(index.quantizer).hnsw.efSearch = 1
    assert trained_fingerprint(index) != before


# --- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("gap", [3, 800, ROWS - 20])
def test_a_file_filled_by_position_is_refused(lane: Lane, tmp_path: Path, gap: int) -> None:
    """One idx was never given: each later row's vector is one id too low."""
    delete_rows(lane.engine, lane.spec, [gap])
    live = legacy_file(tmp_path / lane.spec.live_file, np.delete(VECTORS, gap - 1, axis=0))
    said = Legacy(lane, live).refusal()
    assert f"idx {gap + 1} is at id {gap - 1}, not at {gap}" in said
    assert "filled by position" in said
    assert "muse run --rebuild --index vibe" in said


def test_ids_given_as_idx_minus_1_are_taken_over_whatever_the_gaps(lane: Lane, tmp_path: Path) -> None:
    kept = np.setdiff1d(np.arange(ROWS), [2, 800, *range(1000, 1100)])
    delete_rows(lane.engine, lane.spec, (np.setdiff1d(np.arange(ROWS), kept) + 1).tolist())
    live = legacy_file(tmp_path / lane.spec.live_file, VECTORS[kept], kept)
    done = Legacy(lane, live).adopt()
    assert done is not None
    assert (done.equal, done.pulled) == (len(kept), 0)


def test_songs_with_one_vector_are_no_shift(lane: Lane, tmp_path: Path) -> None:
    """Twins of deleted songs stand under ids that are nobody's now; songs embedded again became twins."""
    vectors = VECTORS.copy()
    vectors[100:200] = vectors[0]
    put_rows(lane.engine, lane.spec, payloads_of(vectors))
    live = legacy_file(tmp_path / lane.spec.live_file, vectors)
    delete_rows(lane.engine, lane.spec, range(101, 151))
    put_rows(lane.engine, lane.spec, payloads_of(vectors[100:150], ROWS + 1))  # the same songs, added again
    put_rows(lane.engine, lane.spec, payloads_of(np.repeat(vectors[:1], 20, axis=0), 301))
    done = Legacy(lane, live).adopt()
    assert done is not None
    assert (done.stale, done.absent, done.compared - done.equal) == (50, 50, 20)


def test_a_shift_among_shared_vectors_is_put_right_where_it_is_not_refused(
    lane: Lane, tmp_path: Path
) -> None:
    """Twenty songs an artist: after the gap only each artist's last one differs under its id."""
    vectors = np.repeat(VECTORS[: ROWS // 20], 20, axis=0)
    put_rows(lane.engine, lane.spec, payloads_of(vectors))
    delete_rows(lane.engine, lane.spec, [3])
    live = legacy_file(tmp_path / lane.spec.live_file, np.delete(vectors, 2, axis=0))
    done = Legacy(lane, live).adopt()
    assert done is not None
    assert done.equal < done.compared
    assert day_after(lane).path.read_bytes() == full_bytes(lane)


def test_a_file_of_other_vectors_is_refused(lane: Lane, tmp_path: Path) -> None:
    live = legacy_file(tmp_path / lane.spec.live_file, unit_vectors(ROWS, seed=77))
    said = Legacy(lane, live).refusal()
    assert "encode to what it holds; 90% is asked for" in said
    assert "embedding_column" in said


def test_the_catalog_has_to_say_the_files_shape(legacy: Legacy, tmp_path: Path) -> None:
    said = legacy.refusal(nlist=None, m=8, nprobe=None, recall_gate=0.99)
    lines = said.split("\n\n", 1)[1]
    shape = tomllib.loads(lines)["index"]["vibe"]
    assert {name: shape[name] for name in ("nlist", "m", "nbits", "nprobe")} == {
        "nlist": 8,
        "m": 16,
        "nbits": 8,
        "nprobe": 1,
    }
    (tmp_path / "catalog.toml").write_text(lines, "utf-8")
    assert load_catalog(tmp_path / "catalog.toml").index("vibe").nprobe == 1, "ready to be pasted"
    assert legacy.adopt(**shape) is not None
    assert day_after(replace(legacy.lane, spec=replace(legacy.lane.spec, **shape))).manifest.nprobe == 1


def _flat_ivf(path: Path) -> None:
    index = faiss.IndexIVFFlat(faiss.IndexFlatL2(32), 32, 8)
    index.train(VECTORS)
    index.add(VECTORS)
    faiss.write_index(index, str(path))


def _inner_product(path: Path) -> None:
    index = faiss.IndexIVFPQ(faiss.IndexFlatIP(32), 32, 8, 8, 8, faiss.METRIC_INNER_PRODUCT)
    index.pq.cp.min_points_per_centroid = 1
    index.train(VECTORS)
    index.add(VECTORS)
    faiss.write_index(index, str(path))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (_flat_ivf, "is a IndexIVFFlat, not an IndexIVFPQ"),
        (_inner_product, "its metric is not squared L2; its coarse quantizer is IndexFlatIP"),
        (lambda path: legacy_file(path, unit_vectors(400, dimension=64)), "its dimension is 64"),
        (lambda path: legacy_file(path, VECTORS[:0]), "it holds no vectors"),
        (lambda path: path.write_bytes(b"IwPQ" + bytes(500)), "is not a readable FAISS index"),
        (lambda path: path.unlink(), "there is no file"),
    ],
    ids=["class", "metric", "dimension", "empty", "damaged", "missing"],
)
def test_a_file_that_cannot_be_continued_is_refused(
    legacy: Legacy, make: Callable[[Path], Any], said: str
) -> None:
    make(legacy.live)
    refusal = legacy.refusal()
    assert said in refusal
    assert str(legacy.live) in refusal
    assert "muse run --rebuild --index vibe" in refusal


def test_what_is_built_on_already_is_left_alone(legacy: Legacy) -> None:
    lane = legacy.lane
    assert legacy.adopt() is not None
    built = day_after(lane)
    assert legacy.adopt() is None
    assert file_sha256(built.path) == built.manifest.sha256
    assert temps(lane) == []


def test_another_cluster_there_is_not_replaced(legacy: Legacy) -> None:
    lane = legacy.lane
    train_cluster(lane.engine, lane.spec, lane.cluster)
    before = file_sha256(lane.cluster)
    with pytest.raises(PermanentFailure, match=r"files of another cluster already: muse_vibe_cluster\.index"):
        legacy.adopt()
    assert file_sha256(lane.cluster) == before
    assert list(snapshots(lane.work, lane.spec)) == []


def test_a_killed_adoption_is_made_up_by_the_next(legacy: Legacy) -> None:
    lane = legacy.lane
    legacy.adopt()
    (snapshot,) = snapshots(lane.work, lane.spec)
    snapshot.path.unlink()  # the rename comes last
    assert legacy.adopt() is not None
    assert day_after(lane).manifest.mode == "incremental"


# --- the command, on the installed sample ------------------------------------------------------------


def test_the_command_takes_a_legacy_file_to_ours_live(tmp_path: Path) -> None:
    home, catalog = tmp_path / "home", tmp_path / "catalog.toml"
    succeed(home, "sample", "--songs", "150")
    settings = Settings(home=home)
    spec = settings.load_catalog().index("vibe")
    with engine_for(settings.embedding_url()).connect() as connection:
        page = read_ranges(connection, spec, [Bounds(0, 10_000)])
    vectors = decode(page.payloads, spec.dimension, spec.encoding).vectors
    live = legacy_file(settings.server_directory() / spec.live_file, vectors, page.idx - 1, nlist=4)
    legacys = file_sha256(live)

    said = muse(home, "adopt", "vibe")
    assert (said.returncode, said.stdout.count("adopted")) == (1, 0)
    assert "the catalog does not say its shape" in said.stderr
    catalog.write_text(said.stderr.split("\n\n", 1)[1], "utf-8")

    text = succeed(home, "adopt", "vibe", MUSE_CATALOG=str(catalog))
    assert f"{live} is adopted: {len(vectors):,} rows of {TODAY}, nlist 4, m 16, nprobe 1, IndexHNSW" in text
    assert f"{len(vectors):,} of {len(vectors):,} rows encode to what it holds" in text
    assert file_sha256(live) == legacys
    with dg.DagsterInstance.from_config(str(home / "dagster")) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey(["vibe", "cluster"]))
    adopted = event and event.asset_materialization
    assert adopted
    assert adopted.metadata["nlist"].value == 4
    assert "Adopted from" in str(adopted.description)
    text = succeed(home, "run", "--index", "vibe", MUSE_CATALOG=str(catalog))
    assert "incremental" in text
    assert file_sha256(live.with_name(spec.fallback_file)) in (legacys, file_sha256(live))
