"""The search server's contract: its own FAISS version answers from our files and keys as we say it does.

The server's environment is `.venv-server` at the repository root (`make .venv-server`), or the interpreter
that MUSE_SERVER_PYTHON names. Without one these tests are skipped with a loud line; with CI=true they fail.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import pytest
import redis
from numpy.typing import NDArray
from sqlalchemy import Engine, delete, func, insert, select, update

from muse_assets.catalog import CATALOG, IndexSpec
from muse_assets.connections.databases import engine_for
from muse_assets.connections.embedded_valkey import embedded_valkey
from muse_assets.connections.redis_server import connect
from muse_assets.manifest import Manifest
from muse_assets.playlists.refreshing import refresh_program
from muse_assets.publishing.deploying import deploy
from muse_assets.publishing.live import live_file
from muse_assets.sample import write_days, write_sample
from muse_assets.sample.tables import embedding_table, program_tables
from muse_assets.server_search import Answer, search
from muse_assets.snapshots.building import build_snapshot
from muse_assets.snapshots.cluster import train_cluster

ROOT = Path(__file__).parents[1]
SERVER = Path(__file__).with_name("legacy_server.py")
PROGRAM = CATALOG.programs[0]
K = 10
GONE, REEMBEDDED = 5, 7
REQUESTED_AT = 1_790_000_000.25

INDEXES = pytest.mark.parametrize("spec", CATALOG.indexes, ids=lambda spec: spec.name)


@dataclass(frozen=True)
class Installation:
    """Two generations of every index, the second one live; Redis filled.

    newest: index -> largest idx of the table. queries: index -> (n, d) vectors, the first one that of the
    newest row, the second that of the re-embedded one.
    """

    embeddings: Engine
    server: Path
    client: redis.Redis
    newest: dict[str, int]
    queries: dict[str, NDArray[np.float32]]

    def playlist(self, spec: IndexSpec) -> NDArray[np.int64]:
        value = self.client.get(PROGRAM.ids_key(spec.name))
        assert isinstance(value, bytes)
        return np.array(json.loads(value), dtype=np.int64)

    def manifest(self, spec: IndexSpec) -> Manifest:
        live = live_file(self.server, spec)
        assert live is not None
        assert live.manifest is not None
        return live.manifest

    def search(self, spec: IndexSpec, query: NDArray[np.float32], *, program: bool) -> Answer:
        ids = self.playlist(spec) if program else None
        return search(self.embeddings, spec, self.server / spec.live_file, query[None], k=K, playlist_ids=ids)


Asked = Callable[[Path, list[IndexSpec]], dict[str, Any]]


@pytest.fixture(scope="module")
def installation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    """A small sample with gaps, deletions and a row re-embedded far away, built and deployed twice."""
    home = tmp_path_factory.mktemp("installation")
    embeddings, playlists = (engine_for(f"sqlite:///{home / name}.sqlite") for name in ("e", "p"))
    server = home / "server"
    server.mkdir()
    threads = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)  # spinning threads on a busy machine cost seconds
    with embedded_valkey(home / "valkey") as url, connect(url) as client:
        write_sample(embeddings, playlists, CATALOG, songs=120)
        for spec in CATALOG.indexes:
            train_cluster(embeddings, spec, home / "work" / spec.cluster_file)
            build_and_deploy(embeddings, spec, home, date(2026, 1, 1))
        write_days(embeddings, playlists, CATALOG, days=3, inserts=4, today=date(2026, 1, 4))
        newest = {spec.name: change_rows(embeddings, playlists, spec) for spec in CATALOG.indexes}
        for spec in CATALOG.indexes:
            build_and_deploy(embeddings, spec, home, date(2026, 1, 4))
        refresh_program(embeddings, playlists, client, CATALOG, PROGRAM, "song_tables", now=REQUESTED_AT)
        queries = {spec.name: queries_of(embeddings, spec, newest[spec.name]) for spec in CATALOG.indexes}
        yield Installation(embeddings, server, client, newest, queries)
    faiss.omp_set_num_threads(threads)


@pytest.fixture(scope="module")
def asked(installation: Installation, server_python: Path, tmp_path_factory: pytest.TempPathFactory) -> Asked:
    """Ask the server, in its own interpreter, all queries of some indexes."""
    folder = tmp_path_factory.mktemp("requests")

    def ask(server: Path, specs: list[IndexSpec]) -> dict[str, Any]:
        requests = []
        for spec in specs:
            np.save(folder / f"{spec.name}.npy", installation.queries[spec.name])
            playlist = installation.playlist(spec).tolist()
            requests.append(
                {
                    "index": spec.name,
                    "queries": str(folder / f"{spec.name}.npy"),
                    "k": K,
                    "playlist": playlist,
                }
            )
        (folder / "requests.json").write_text(json.dumps(requests), "utf-8")
        done = subprocess.run(
            [server_python, SERVER, server, folder / "requests.json"],
            capture_output=True,
            text=True,
            check=False,
            timeout=60,
        )
        assert done.returncode == 0, done.stderr
        content: dict[str, Any] = json.loads(done.stdout)
        assert content["faiss"] == "1.11.0" != faiss.__version__
        answers: dict[str, Any] = content["answers"]
        return answers

    return ask


@pytest.fixture(scope="module")
def answers(installation: Installation, asked: Asked) -> dict[str, Any]:
    """The server's answers from the live files."""
    return asked(installation.server, list(CATALOG.indexes))


def build_and_deploy(embeddings: Engine, spec: IndexSpec, home: Path, day: date) -> None:
    built = build_snapshot(embeddings, spec, home / "work", day)
    deploy(spec, built.path, built.manifest, home / "server")


def change_rows(embeddings: Engine, playlists: Engine, spec: IndexSpec) -> int:
    """Delete one row, move one far away, put the newest one's song into the program; the newest idx."""
    table = embedding_table(spec).table
    away = np.random.default_rng(1).standard_normal(spec.dimension).astype(np.float32)
    payload = npy(away / np.linalg.norm(away))
    with embeddings.begin() as connection:
        connection.execute(delete(table).where(table.c.idx == GONE))
        connection.execute(
            update(table).where(table.c.idx == REEMBEDDED).values({spec.embedding_column: payload})
        )
        newest: int = connection.execute(select(func.max(table.c.idx))).scalar_one()
        key = [table.c[name] for name in spec.song_key]
        disc, *track = connection.execute(select(*key).where(table.c.idx == newest)).one()
    songs = program_tables([PROGRAM]).songs[PROGRAM.id]
    with playlists.begin() as connection:
        song = {"disc_id": disc, "track_no": track[0] if track else "01"}
        connection.execute(
            insert(songs).values({**song, "song_name": "가장 새로운 노래", "artist_name": "새"})
        )
    return newest


def npy(vector: NDArray[np.float32]) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, vector)
    return buffer.getvalue()


def stored_vectors(embeddings: Engine, spec: IndexSpec) -> dict[int, NDArray[np.float32]]:
    """idx -> vector (d,) of every row, parsed by NumPy itself."""
    table = embedding_table(spec).table
    with embeddings.connect() as connection:
        rows = connection.execute(select(table.c.idx, table.c[spec.embedding_column])).all()
    return {
        idx: np.load(io.BytesIO(payload), allow_pickle=False).reshape(-1).astype(np.float32)
        for idx, payload in rows
    }


def queries_of(embeddings: Engine, spec: IndexSpec, newest: int) -> NDArray[np.float32]:
    vectors = stored_vectors(embeddings, spec)
    others = sorted(vectors)[:: max(1, len(vectors) // 40)]
    return np.array([vectors[idx] for idx in (newest, REEMBEDDED, *others)])


@INDEXES
def test_the_server_reads_what_the_contract_says(
    installation: Installation, answers: dict[str, Any], spec: IndexSpec
) -> None:
    facts, answer = installation.manifest(spec), answers[spec.name]
    assert answer["file"] == spec.live_file
    assert (answer["class"], answer["d"], answer["metric"]) == ("IndexIVFPQ", spec.dimension, faiss.METRIC_L2)
    assert answer["nprobe"] == facts.nprobe > 0
    assert answer["ntotal"] == installation.newest[spec.name] > facts.rows
    with installation.embeddings.connect() as connection:
        table = embedding_table(spec).table
        assert facts.rows == connection.execute(select(func.count()).select_from(table)).scalar_one()


@INDEXES
def test_the_server_answers_as_this_version_and_as_our_search(
    installation: Installation, answers: dict[str, Any], spec: IndexSpec
) -> None:
    queries, answer = installation.queries[spec.name], answers[spec.name]
    ours = faiss.read_index(str(installation.server / spec.live_file))
    selector = faiss.IDSelectorBatch(installation.playlist(spec))
    within = faiss.SearchParametersIVF(nprobe=max(ours.nprobe, 100), sel=selector)
    for kind, parameters in (("plain", None), ("playlist", within)):
        distances, ids = ours.search(queries, K, params=parameters)
        found_ids, found_distances = (np.array(answer[kind][name]) for name in ("ids", "distances"))
        np.testing.assert_array_equal(found_ids, ids)
        np.testing.assert_allclose(found_distances, distances, rtol=1e-5, atol=1e-6)
        for row, query in enumerate(queries[:8]):
            told = installation.search(spec, query, program=kind == "playlist")
            cut = spec.distance_cut or np.inf
            kept = (found_ids[row] >= 0) & (found_distances[row] <= cut)
            assert [hit.idx - 1 for hit in told.hits] == found_ids[row][kept].tolist()
            assert [hit.distance for hit in told.hits] == pytest.approx(
                found_distances[row][kept].tolist(), rel=1e-5, abs=1e-6
            )


@INDEXES
def test_a_playlist_keeps_its_newest_song_and_nothing_else(
    installation: Installation, answers: dict[str, Any], spec: IndexSpec
) -> None:
    playlist, answer = installation.playlist(spec), answers[spec.name]
    newest = installation.newest[spec.name] - 1
    assert answer["allowed"] == len(playlist)
    assert newest == playlist[-1]
    assert newest in answer["playlist"]["ids"][0]
    assert {i for row in answer["playlist"]["ids"] for i in row} - {-1} <= set(playlist.tolist())


@INDEXES
def test_hits_are_looked_up_as_the_right_rows(
    installation: Installation, answers: dict[str, Any], spec: IndexSpec
) -> None:
    table = embedding_table(spec).table
    key = [table.c[name] for name in spec.song_key]
    told = installation.search(spec, installation.queries[spec.name][0], program=True)
    with installation.embeddings.connect() as connection:
        for hit in told.hits:
            assert tuple(connection.execute(select(*key).where(table.c.idx == hit.idx)).one()) == hit.song_key
    assert told.hits
    found = {i for row in answers[spec.name]["plain"]["ids"] for i in row} - {-1}
    assert {i + 1 for i in found} <= set(stored_vectors(installation.embeddings, spec))


@INDEXES
def test_a_reembedded_row_finds_itself_first_and_a_deleted_one_never(
    answers: dict[str, Any], spec: IndexSpec
) -> None:
    plain = answers[spec.name]["plain"]["ids"]
    assert plain[1][0] == REEMBEDDED - 1
    assert GONE - 1 not in {i for row in plain for i in row}


@INDEXES
def test_the_stored_nprobe_meets_the_gate_on_the_server(
    installation: Installation, answers: dict[str, Any], spec: IndexSpec
) -> None:
    """Recall@10 of the server's plain answers against exact search over the table."""
    vectors = stored_vectors(installation.embeddings, spec)
    ids = np.array(sorted(vectors)) - 1
    table = np.array([vectors[i + 1] for i in ids])
    shares = []
    for query, found in zip(installation.queries[spec.name], answers[spec.name]["plain"]["ids"], strict=True):
        distances = ((table - query) ** 2).sum(1)
        # An equally near row is as good: one artist's rows are all alike.
        tenth = np.sort(distances)[min(K, len(distances)) - 1] + 1e-5
        near = set(ids[distances <= tenth].tolist())
        shares.append(len(near.intersection(found)) / min(K, len(ids)))
    assert np.mean(shares) >= spec.recall_gate
    assert installation.manifest(spec).recall_at_10 >= spec.recall_gate


@pytest.mark.parametrize("damage", ["removed", "truncated"])
def test_the_fallback_answers_when_the_live_file_does_not_load(
    installation: Installation, asked: Asked, tmp_path: Path, damage: str
) -> None:
    """The file beside it is the generation before, whole."""
    server = tmp_path / "server"
    shutil.copytree(installation.server, server)
    specs = [spec for spec in CATALOG.indexes if spec.name in ("vibe", "album_name")]
    for spec in specs:
        live = server / spec.live_file
        if damage == "removed":
            live.unlink()
        else:
            os.truncate(live, live.stat().st_size // 2)
    answers = asked(server, specs)
    for spec in specs:
        answer = answers[spec.name]
        assert answer["file"] == spec.fallback_file
        assert answer["ntotal"] < installation.newest[spec.name]
        query = installation.queries[spec.name][2]
        told = search(installation.embeddings, spec, server / spec.live_file, query[None], k=K)
        assert told.file == server / spec.fallback_file
        assert [hit.idx - 1 for hit in told.hits] == answer["plain"]["ids"][2]


def test_redis_holds_ascending_ids_and_a_time(installation: Installation) -> None:
    for spec in CATALOG.indexes:
        value = installation.client.get(f"playlist_idx:{PROGRAM.id}_{spec.name}")
        assert isinstance(value, bytes)
        ids = json.loads(value)
        assert ids
        assert all(type(i) is int and 0 <= i < installation.newest[spec.name] for i in ids)
        assert ids == sorted(set(ids))
        assert installation.client.ttl(f"playlist_idx:{PROGRAM.id}_{spec.name}") == -1
    updated = installation.client.get(f"playlist_update:{PROGRAM.id}")
    assert isinstance(updated, bytes)
    assert "." in updated.decode()
    assert float(updated) == REQUESTED_AT
