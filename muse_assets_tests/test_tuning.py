"""Choosing an index's shape: figures that a build would have, laws of the choice, lines to paste."""

from __future__ import annotations

import json
import re
import subprocess
import tomllib
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import dagster as dg
import faiss
import numpy as np
import pytest
from click.testing import CliRunner, Result
from hypothesis import given
from hypothesis import strategies as st

from muse_assets.catalog import CATALOG, load_catalog
from muse_assets.cli import cli
from muse_assets.connections.databases import engine_for
from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.encoding import fill
from muse_assets.ivfpq.files import read_index
from muse_assets.ivfpq.training import choose_nlist, train
from muse_assets.ivfpq.tuning import (
    SAME_RECALL,
    Operating,
    Sample,
    Shape,
    Tuner,
    candidate_shapes,
    choose,
    pareto,
    split_sample,
)
from muse_assets_tests.benchmarks.vectors import clustered
from muse_assets_tests.installations import DAY_ONE, Installation, install

DIMENSION, ROWS, QUERIES = 32, 4000, 200


@lru_cache
def drawn() -> Any:
    return clustered(ROWS + QUERIES, DIMENSION, topics=40, latent=8)


def sample(share: float = 1.0) -> Sample:
    vectors = drawn()[: QUERIES + int(share * ROWS)]
    return Sample(vectors[QUERIES:], vectors[:QUERIES], ROWS)


# --- figures --------------------------------------------------------------------------------------


def test_the_figures_are_those_of_an_index_that_is_built_so() -> None:
    """Recall by nprobe, codes scanned and bytes, each computed another way."""
    tried = sample()
    shape = Shape("PQ", 24, 8, 8)
    found = Tuner(tried).measure(shape)
    index = train(tried.rows, nlist=24, m=8, nbits=8).index
    fill(index, [(np.arange(ROWS), tried.rows)])
    _, exact = faiss.knn(tried.queries, tried.rows, 10)
    for one in found:
        index.nprobe = one.nprobe
        _, ids = index.search(tried.queries, 10)
        overlap = np.mean([len(np.intersect1d(a, b)) / 10 for a, b in zip(ids, exact, strict=True)])
        assert one.recall == pytest.approx(overlap, abs=1e-3)
        _, lists = index.quantizer.search(tried.queries, one.nprobe)
        sizes = np.array([index.invlists.list_size(number) for number in range(24)])
        assert one.codes_scanned == pytest.approx(sizes[lists].sum(axis=1).mean())
        assert one.bytes_a_vector == 8 + 8
        # Codes and ids, centroids, and the table of 4-byte floats that a loaded index precomputes.
        assert one.server_bytes == 32 * (ROWS * 16 + 4 * 24 * DIMENSION + 4 * 24 * 8 * 256)
        assert one.milliseconds > 0
    assert [one.nprobe for one in found] == [1, 2, 4, 8, 16, 24][: len(found)]
    assert found[-1].recall > found[0].recall + 0.05


def test_a_sample_stands_for_its_table() -> None:
    whole, tenth = (
        {one.nprobe: one for one in Tuner(sample(share)).measure(Shape("PQ", 16, 8, 8))}
        for share in (1.0, 0.1)
    )
    for nprobe in whole.keys() & tenth.keys():
        assert tenth[nprobe].codes_scanned == pytest.approx(whole[nprobe].codes_scanned, rel=0.25)
        assert tenth[nprobe].server_bytes == whole[nprobe].server_bytes
        assert tenth[nprobe].recall == pytest.approx(whole[nprobe].recall, abs=0.2)
    assert len(whole.keys() & tenth.keys()) > 2


def test_searches_are_timed_on_lists_as_long_as_the_tables() -> None:
    rows = sample().rows
    short, long = (
        Tuner(Sample(rows, sample().queries, table)).measure(Shape("PQ", 4, 8, 8))[-1]
        for table in (ROWS, 50 * ROWS)
    )
    assert long.codes_scanned == pytest.approx(50 * short.codes_scanned)
    assert long.milliseconds > 4 * short.milliseconds


def test_a_graph_over_the_centroids_finds_nearly_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("muse_assets.ivfpq.tuning._HNSW_FROM", 16)
    found = Tuner(sample()).measure(Shape("PQ", 32, 8, 8))
    by = {coarse: {o.nprobe: o for o in found if o.coarse == coarse} for coarse in ("flat", "HNSW")}
    assert by["flat"].keys() & by["HNSW"].keys() >= {1, 2, 4}
    for nprobe in by["flat"].keys() & by["HNSW"].keys():
        assert by["HNSW"][nprobe].recall == pytest.approx(by["flat"][nprobe].recall, abs=0.02)
    assert all(one.shape.present_server and one.buildable == (one.coarse == "flat") for one in found)


@pytest.mark.parametrize(
    "shape",
    [Shape("OPQ", 8, 8, 8), Shape("RaBitQ", 8, 0, 1), Shape("rotated RaBitQ", 8, 0, 2)],
    ids=lambda shape: shape.codes,
)
def test_what_another_server_could_search(shape: Shape) -> None:
    found = Tuner(sample(0.5)).measure(shape)
    assert found[0].bytes_a_vector == shape.code_bytes(DIMENSION) + 8
    assert found[-1].recall > 0.3
    assert not any(one.buildable for one in found)


def test_whose_faiss_can_search_what(server_python: Path, tmp_path: Path) -> None:
    """`present_server` is what the server's own FAISS says, asked as the server asks."""
    vectors = sample().rows[:1000]
    made = {
        Shape("PQ", 8, 8, 8): "IVF8,PQ8np",
        Shape("OPQ", 8, 8, 8): "OPQ8,IVF8,PQ8np",
        Shape("RaBitQ", 8, 0, 1): "IVF8,RaBitQ",
        Shape("RaBitQ", 8, 0, 2): "IVF8,RaBitQ2",
        Shape("rotated RaBitQ", 8, 0, 1): "RR32,IVF8,RaBitQ",
    }
    for number, factory in enumerate(made.values()):
        index = faiss.index_factory(DIMENSION, factory)
        index.train(vectors)
        index.add(vectors)
        faiss.write_index(index, str(tmp_path / f"{number}.index"))
    np.save(tmp_path / "query.npy", vectors[:1])
    script = (
        "import json, sys, faiss, numpy as np\n"
        "def found(path):\n"
        "    index = faiss.read_index(path)\n"
        "    selector, nprobe = faiss.IDSelectorBatch([0, 5]), max(index.nprobe, 100)\n"
        "    parameters = faiss.SearchParametersIVF(nprobe=nprobe, sel=selector)\n"
        "    return set(index.search(query, 2, params=parameters)[1][0].tolist()) == {0, 5}\n"
        "query, answers = np.load(sys.argv[1]), []\n"
        "for path in sys.argv[2:]:\n"
        "    try:\n"
        "        answers.append(found(path))\n"
        "    except (RuntimeError, AttributeError):\n"
        "        answers.append(False)\n"
        "print(json.dumps(answers))\n"
    )
    files = [str(tmp_path / f"{number}.index") for number in range(len(made))]
    done = subprocess.run(
        [server_python, "-c", script, tmp_path / "query.npy", *files],
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == [shape.present_server for shape in made]


# --- candidates and the choice --------------------------------------------------------------------


@given(
    dimension=st.sampled_from([8, 60, 384, 512, 1024]),
    budget=st.integers(9, 400),
    rows=st.integers(100, 2000),
    table=st.integers(2000, 50_000_000),
    any_server=st.booleans(),
)
def test_every_candidate_fits(dimension: int, budget: int, rows: int, table: int, any_server: bool) -> None:
    thin = Sample(np.empty((rows, dimension), np.float32), np.empty((1, dimension), np.float32), table)
    try:
        shapes = candidate_shapes(dimension, thin, budget, any_server=any_server)
    except PermanentFailure:
        # Even the widest sub-vectors, in 4 bits each, would be too much.
        widest = max(width for width in (4, 8, 16, 32, 64) if dimension % width == 0)
        assert budget < 8 + dimension // widest / 2
        return
    assert len(set(shapes)) == len(shapes)
    assert shapes[0].kind == "PQ"
    assert all(shape.code_bytes(dimension) + 8 <= budget for shape in shapes)
    assert all(dimension % shape.m == 0 for shape in shapes if shape.m)
    assert all(1 <= shape.nlist <= rows for shape in shapes)
    assert any_server or all(shape.kind == "PQ" for shape in shapes)


def operating(recall: float, ms: float, size: int, kind: Any, coarse: Any) -> Operating:
    shape = Shape(kind, 8, 0 if "RaBitQ" in kind else 4, 8)
    return Operating(shape, coarse, 1, recall, 1.0, ms, size, 1.0, 1.0, 1.0)


operatings = st.lists(
    st.builds(
        operating,
        st.sampled_from([0.1, 0.5, 0.504, 0.9]),
        st.sampled_from([1.0, 2.0, 3.0]),
        st.sampled_from([16, 24]),
        st.sampled_from(["PQ", "OPQ"]),
        st.sampled_from(["flat", "HNSW"]),
    ),
    min_size=1,
    max_size=12,
)


def at_least_as_good(a: Operating, b: Operating, *, room: float = 0.0) -> bool:
    return (
        a.recall >= b.recall - room
        and a.milliseconds <= b.milliseconds
        and a.bytes_a_vector <= b.bytes_a_vector
        and (a.shape.present_server or not b.shape.present_server)
    )


@given(operatings)
def test_the_table_shows_what_nothing_beats(found: list[Operating]) -> None:
    front = pareto(found)
    assert all(any(at_least_as_good(shown, one, room=SAME_RECALL) for shown in front) for one in found)
    assert not any(at_least_as_good(a, b) for a in front for b in front if a is not b)


@given(operatings, st.sampled_from([0.05, 0.5, 0.6, 0.95]))
def test_the_choice_is_the_quickest_that_is_enough_and_can_be_built(
    found: list[Operating], recall: float
) -> None:
    found.append(operating(0.1, 3.0, 24, "PQ", "flat"))
    chosen = choose(found, recall)
    buildable = [one for one in found if one.shape.kind == "PQ" and one.coarse == "flat"]
    best = max(one.recall for one in buildable)
    assert chosen in buildable
    assert chosen.recall >= min(recall, 0.95 * best)
    assert all(
        one.milliseconds >= chosen.milliseconds
        for one in buildable
        if one.recall >= max(recall, chosen.recall)
    )


def test_too_few_rows_are_refused() -> None:
    with pytest.raises(PermanentFailure, match="90 usable rows are too few"):
        split_sample(np.zeros((90, 4), np.float32), 90, 10)
    split = split_sample(np.zeros((200, 4), np.float32), 1000, 500)
    assert (len(split.rows), len(split.queries), split.table_rows) == (180, 20, 1000)


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture
def installed(tmp_path: Path, valkey_url: str) -> Iterator[Installation]:
    """Tables of day one, nothing built."""
    with dg.DagsterInstance.ephemeral() as instance:
        yield install(
            tmp_path,
            instance,
            embedding_db_url=f"sqlite:///{tmp_path / 'e.sqlite'}",
            playlist_db_url=f"sqlite:///{tmp_path / 'p.sqlite'}",
            redis_url=valkey_url,
            songs=200,
            only=["title"],
        )


def tune(installed: Installation, *options: str) -> Result:
    settings = installed.settings
    environment = {
        "MUSE_HOME": str(settings.root),
        "MUSE_SERVER_DIR": str(installed.server),
        "MUSE_EMBEDDING_DB_URL": settings.embedding_url(),
        "MUSE_CATALOG": str(settings.catalog) if settings.catalog else None,
    }
    return CliRunner().invoke(cli, ["tune", "title", *options], env=environment)


def test_the_lines_it_prints_build_the_index_it_measured(installed: Installation) -> None:
    before = sorted(path for path in installed.settings.root.rglob("*.index"))
    svg = installed.settings.root / "tuned.svg"
    done = tune(installed, "--recall", "0.5", "--rows", "200", "--queries", "20", "--svg", str(svg))
    assert done.exit_code == 0, done.output
    assert sorted(path for path in installed.settings.root.rglob("*.index")) == before
    (chosen,) = (line for line in done.output.splitlines() if line.rstrip().endswith("<--"))
    cells = chosen.split()
    assert float(cells[5]) >= 0.5
    assert re.search(rf"⠤{cells[0]}⠤ {cells[1]}, {cells[2]} lists, {cells[3]}", done.output)
    assert "recall@10" in svg.read_text("utf-8")

    lines = done.output[done.output.index("# muse tune") :]
    (block,) = tomllib.loads(lines)["index"].values()
    path = installed.settings.root / "catalog.toml"
    path.write_text(lines, "utf-8")
    spec = load_catalog(path).index("title")
    assert f"PQ{spec.m}x{spec.nbits}" == cells[1]
    assert spec.nprobe == int(cells[4])
    assert ("nlist" in block) == (int(cells[2]) != choose_nlist(200))

    pasted = installed.with_settings(catalog=path)
    pasted.rebuild("title", DAY_ONE)
    index = read_index(pasted.server / "muse_title.index")
    assert (index.nlist, index.pq.M, index.pq.nbits, index.nprobe) == (
        int(cells[2]),
        spec.m,
        spec.nbits,
        spec.nprobe,
    )
    assert f"takes nprobe {spec.nprobe} from the file" in done.output


def test_a_wish_out_of_reach_is_said_so_and_passes_its_own_gate(installed: Installation) -> None:
    strict = installed.settings.root / "strict.toml"
    strict.write_text("[index.title]\nrecall_gate = 0.9\n", "utf-8")
    wishing = installed.with_settings(catalog=strict)
    done = tune(wishing, "--recall", "1", "--bytes-per-vector", "16", "--any-server")
    assert done.exit_code == 0, done.output
    assert "No shape of 16 bytes a vector or less reaches recall@10 1" in done.output
    lines = done.output[done.output.index("# muse tune") :]
    block = tomllib.loads(lines)["index"]["title"]
    assert block["m"] * block["nbits"] <= 64
    measured = float(re.findall(r"recall@10 (0\.\d+),", lines)[0])
    assert measured < 0.9
    assert block["recall_gate"] == pytest.approx(measured - 1 / 20**0.5, abs=0.011)

    done = tune(installed, "--bytes-per-vector", "9")
    assert done.exit_code == 1
    assert "No shape of 1024 dimensions has codes of 1 bytes or less." in done.output


def test_a_missing_table_is_named(installed: Installation) -> None:
    with engine_for(installed.settings.embedding_url()).begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE {CATALOG.index('title').table}")
    done = tune(installed)
    assert done.exit_code == 1
    assert CATALOG.index("title").table in done.output
