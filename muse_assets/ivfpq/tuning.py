"""What an index's shape costs and finds: candidates trained, filled and searched on a sample of its table.

Here: a sample in; recall, work, time and bytes of each shape out. Not here: drawing the sample
(`embeddings.sampling`), or the nprobe that a build stores (`probing`).

A sample is a thinner table. Lists are as many as the whole table would get, so a probed list stands for the
same part of space; codes scanned, memory and fill time are scaled to the whole table, and searches are timed
on lists as long as its own. Of 300,000 rows (clusters, text, no clusters; nprobe 8 and more) a third told
codes and milliseconds within 3 and 10 %, and recall within 3.5 points: true neighbors lie farther away in a
sample, over more lists, but rows that are mistaken for them do too. A tenth told recall within 8 points.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import faiss
import numpy as np
from numpy.typing import NDArray

from muse_assets.failures import PermanentFailure
from muse_assets.ivfpq.contents import list_sizes
from muse_assets.ivfpq.encoding import fill
from muse_assets.ivfpq.exact_neighbors import as_near_as
from muse_assets.ivfpq.probing import probe_ladder
from muse_assets.ivfpq.training import HNSW_FROM_NLIST, choose_nlist, train, training_rows

K = 10
SERVER_PROCESSES = 32
_ID_BYTES = 8
_SEED = 1
_FEWEST_ROWS = 100
# Of the sample, at least: emptier lists would not stand for those of the table.
_ROWS_A_LIST = 8
# With 1,000 centroids of 512-d a graph took as long as comparing all, with 4,096 half.
_HNSW_FROM = 1024
_HNSW_LINKS, _HNSW_EF = 32, 32
# Floats of a sub-vector.
_WIDTHS = (4, 8, 16, 32, 64)
# Where the wish is out of reach: of text, 0.645 took 0.4 ms a query and the best, 0.673, took 6.6.
_NEARLY = 0.95
# Half a point: what the table does not tell apart.
SAME_RECALL = 0.005
# The ladder ends where twice the lists find less than this share more.
_SETTLED = 0.01
_TIMED_QUERIES, _TIMED_ROUNDS, _TIMED_SECONDS = 100, 3, 1.0
# Codes of the index that searches are timed on, at most: 150 MB of 64 bytes.
_TIMED_CODES = 2_000_000
# 500k x 512-d: 20 CPU-seconds and recall@10 0.84; with 4 iterations 11 and 0.82.
_OPQ_ROWS, _OPQ_ITERATIONS = 16_384, 10

Floats = NDArray[np.float32]
Kind = Literal["PQ", "OPQ", "RaBitQ", "rotated RaBitQ"]


@dataclass(frozen=True)
class Shape:
    """What is trained: m sub-quantizers of nbits each, or with m 0 RaBitQ of nbits a dimension."""

    kind: Kind
    nlist: int
    m: int
    nbits: int

    @property
    def codes(self) -> str:
        """How vectors are encoded, in FAISS's words."""
        rotation = {"OPQ": f"OPQ{self.m},", "rotated RaBitQ": "RR,"}.get(self.kind, "")
        return f"{rotation}PQ{self.m}x{self.nbits}" if self.m else f"{rotation}RaBitQ{self.nbits}"

    @property
    def present_server(self) -> bool:
        """Whether the search server of today can search it.

        It asks the index itself for its nprobe, which one behind a rotation does not have, and its FAISS 1.11
        reads RaBitQ of one bit only.
        """
        return self.kind == "PQ" or (self.kind == "RaBitQ" and self.nbits == 1)

    def code_bytes(self, dimension: int) -> int:
        """Of one vector, without its id."""
        if self.m:
            return -(-self.m * self.nbits // 8)
        return int(faiss.RaBitQuantizer(dimension, faiss.METRIC_L2, self.nbits).code_size)


@dataclass(frozen=True)
class Sample:
    """rows (n, d) and queries (q, d) float32, apart; table_rows: how many rows the whole table has."""

    rows: Floats
    queries: Floats
    table_rows: int

    @property
    def share(self) -> float:
        """Of the table."""
        return len(self.rows) / self.table_rows


@dataclass(frozen=True)
class Operating:
    """One shape searched at one nprobe; recall of the sample, all else of the whole table.

    coarse: how a query finds its lists. recall: recall@10. codes_scanned and milliseconds: a query, on one
    thread. bytes_a_vector: code and id, as in the file. server_bytes: of 32 server processes, with centroids
    and the precomputed table. fill_seconds: encoding, without reading.
    """

    shape: Shape
    coarse: Literal["flat", "HNSW"]
    nprobe: int
    recall: float
    codes_scanned: float
    milliseconds: float
    bytes_a_vector: int
    server_bytes: float
    train_seconds: float
    fill_seconds: float

    @property
    def buildable(self) -> bool:
        """Whether this system builds it: the catalog has no fields for the rest."""
        graph = self.shape.nlist >= HNSW_FROM_NLIST
        return self.shape.kind == "PQ" and (self.coarse == "HNSW") == graph


def split_sample(vectors: Floats, table_rows: int, queries: int) -> Sample:
    """Hold `queries` out of random vectors (n, d), a tenth at most.

    Raises PermanentFailure where that leaves too few rows.
    """
    held_out = min(queries, len(vectors) // 10)
    if len(vectors) - held_out < _FEWEST_ROWS:
        raise PermanentFailure(
            f"{len(vectors):,} usable rows are too few to try shapes on.",
            next_step="wait for more rows.",
        )
    return Sample(vectors[held_out:], vectors[:held_out], table_rows)


def candidate_shapes(
    dimension: int, sample: Sample, bytes_a_vector: int, *, any_server: bool = False
) -> tuple[Shape, ...]:
    """Shapes worth trying within that many bytes a vector (code and id).

    The finest code with half, once and twice the lists that a build would choose, and coarser or otherwise
    divided codes with those of a build: codes and lists hardly depend on each other. any_server adds OPQ and
    RaBitQ. Raises PermanentFailure when nothing fits.
    """
    usual = choose_nlist(sample.table_rows)
    most = max(1, len(sample.rows) // _ROWS_A_LIST)
    lists = sorted({min(most, max(1, size)) for size in (usual // 2, usual, 2 * usual)})
    nlist = min(usual, most)
    fitting = {
        nbits: [
            m
            for m in sorted({dimension // width for width in _WIDTHS if dimension % width == 0}, reverse=True)
            if -(-m * nbits // 8) + _ID_BYTES <= bytes_a_vector
        ]
        for nbits in (8, 6, 4)
    }
    shapes = [Shape("PQ", size, m, 8) for m in fitting[8][:1] for size in lists]
    shapes += [Shape("PQ", nlist, m, 8) for m in fitting[8][1:3]]
    shapes += [Shape("PQ", nlist, m, nbits) for nbits in (6, 4) for m in fitting[nbits][:1]]
    if any_server:
        shapes += [Shape("OPQ", nlist, m, 8) for m in fitting[8][:1]]
        kinds: tuple[Kind, ...] = ("RaBitQ", "rotated RaBitQ")
        rabitq = (Shape(kind, nlist, 0, nbits) for nbits in (1, 2, 4) for kind in kinds)
        shapes += [one for one in rabitq if one.code_bytes(dimension) + _ID_BYTES <= bytes_a_vector]
    if not shapes:
        raise PermanentFailure(
            f"No shape of {dimension} dimensions has codes of {bytes_a_vector - _ID_BYTES} bytes or less.",
            next_step="allow more bytes a vector; 8 of them are the id.",
        )
    return tuple(shapes)


class Tuner:
    """Measures shapes one after the other on one sample: memory is the sample's, twice, and one index's."""

    def __init__(self, sample: Sample) -> None:
        self.sample = sample

    @cached_property
    def _farthest(self) -> Floats:
        """Up to which squared distance a row counts as one of a query's nearest (q, 1); room for rounding."""
        distances, _ = faiss.knn(self.sample.queries, self.sample.rows, K)
        return as_near_as(distances[:, -1:])

    def measure(self, shape: Shape) -> tuple[Operating, ...]:
        """Train, fill and search one shape; by nprobe, until more lists find hardly more."""
        started = time.monotonic()
        rotation, rows = self._rotated(shape)
        ivf = _trained(shape, rows)
        trained = time.monotonic()
        ids = np.arange(len(rows))
        if shape.m:
            fill(ivf, [(ids, rows)])
        else:
            ivf.add(rows)
        filled = time.monotonic()
        del rows
        if isinstance(ivf, faiss.IndexIVFPQ):
            # As the server's `read_index` does.
            ivf.use_precomputed_table = 0
            ivf.precompute_table()
        found = [
            (coarse, curve)
            for coarse in self._coarse_quantizers(shape)
            for curve in (self._recalls(rotation, ivf, coarse),)
        ]
        factor = _lengthen(ivf, self.sample.share)
        return tuple(
            Operating(
                shape=shape,
                coarse=coarse,
                nprobe=nprobe,
                recall=recall,
                codes_scanned=scanned / self.sample.share,
                milliseconds=1000 * seconds / (factor * self.sample.share),
                bytes_a_vector=ivf.code_size + _ID_BYTES,
                server_bytes=self._server_bytes(ivf),
                train_seconds=trained - started,
                fill_seconds=(filled - trained) / self.sample.share,
            )
            for coarse, curve in found
            for (nprobe, recall, scanned), seconds in zip(
                curve, self._seconds(rotation, ivf, coarse, [probe[0] for probe in curve]), strict=True
            )
        )

    def _rotated(self, shape: Shape) -> tuple[Any, Floats]:
        """The shape's transform, None without one, and the rows that go into its lists."""
        rows, dimension = self.sample.rows, self.sample.rows.shape[1]
        if shape.kind in ("PQ", "RaBitQ"):
            return None, rows
        if shape.kind == "OPQ":
            rotation = faiss.OPQMatrix(dimension, shape.m)
            codebooks = faiss.ProductQuantizer(dimension, shape.m, 8)
            # Else FAISS writes a line to standard error for each of its trainings.
            codebooks.cp.min_points_per_centroid = 1
            rotation.pq, rotation.niter = codebooks, _OPQ_ITERATIONS
            rotation.train(rows[:_OPQ_ROWS])
            rotation.pq = None
        else:
            # RaBitQ (Gao and Long, 2024) supposes no preferred direction: recall@10 of text rose by 11
            # points, that of a set without clusters fell by 2.
            rotation = faiss.RandomRotationMatrix(dimension, dimension)
            rotation.init(_SEED)
        return rotation, rotation.apply(rows)

    def _coarse_quantizers(self, shape: Shape) -> tuple[Literal["flat", "HNSW"], ...]:
        if shape.nlist >= HNSW_FROM_NLIST:
            return ("HNSW",)
        return ("flat", "HNSW") if shape.nlist >= _HNSW_FROM and shape.kind == "PQ" else ("flat",)

    def _recalls(self, rotation: Any, ivf: Any, coarse: str) -> list[tuple[int, float, float]]:
        """(nprobe, recall@10, codes scanned in the sample), nprobe ascending."""
        rows, queries = self.sample.rows, self.sample.queries
        asked = queries if rotation is None else rotation.apply(queries)
        sizes = np.append(list_sizes(ivf), 0)  # list -1, where a graph reaches fewer lists, has no codes
        curve: list[tuple[int, float, float]] = []
        with _searched_by(ivf, coarse):
            for nprobe in probe_ladder(ivf.nlist):
                ivf.nprobe = nprobe
                _, lists = faiss.downcast_index(ivf.quantizer).search(asked, nprobe)
                _, ids = ivf.search(asked, K)
                distances = np.square(rows[ids] - queries[:, None, :]).sum(axis=2)
                recall = float(((ids >= 0) & (distances <= self._farthest)).mean())
                curve.append((nprobe, recall, float(sizes[lists].sum(axis=1).mean())))
                if len(curve) > 1 and recall - curve[-2][1] <= _SETTLED * recall:
                    break
        return curve

    def _seconds(self, rotation: Any, ivf: Any, coarse: str, nprobes: Iterable[int]) -> list[float]:
        """Median of single queries, one at a time as a server gets them, at each nprobe."""
        queries = self.sample.queries[:_TIMED_QUERIES]
        index = ivf if rotation is None else faiss.IndexPreTransform(rotation, ivf)
        found = []
        with _searched_by(ivf, coarse):
            for nprobe in nprobes:
                ivf.nprobe = nprobe
                rounds: list[list[float]] = []
                until = time.monotonic() + _TIMED_SECONDS
                while len(rounds) < _TIMED_ROUNDS and (not rounds or time.monotonic() < until):
                    rounds.append([_timed(index, queries[row : row + 1]) for row in range(len(queries))])
                # A query's best: the first time it meets a cold cache, any time another process.
                found.append(float(np.median(np.min(rounds, axis=0))))
        return found

    def _server_bytes(self, ivf: Any) -> float:
        centroids = 4 * ivf.nlist * ivf.d
        table = 4 * ivf.nlist * ivf.pq.M * ivf.pq.ksub if getattr(ivf, "use_precomputed_table", 0) == 1 else 0
        codes = self.sample.table_rows * (ivf.code_size + _ID_BYTES)
        return float(SERVER_PROCESSES * (codes + centroids + table))


def pareto(found: Iterable[Operating]) -> tuple[Operating, ...]:
    """Those that no other one equals or beats in time, bytes and, to half a point, recall; quickest first.

    What the present server cannot search beats nothing that it can.
    """
    every = sorted(
        found,
        key=lambda one: (one.milliseconds, one.bytes_a_vector, -one.recall, not one.shape.present_server),
    )
    front: list[Operating] = []
    for one in every:
        if not any(
            other.recall >= one.recall - SAME_RECALL
            and other.bytes_a_vector <= one.bytes_a_vector
            and other.shape.present_server >= one.shape.present_server
            for other in front
        ):
            front.append(one)
    return tuple(front)


def choose(found: Iterable[Operating], recall: float) -> Operating:
    """The quickest buildable one that reaches `recall`; where none does, 95 % of the best one's recall."""
    buildable = [one for one in found if one.buildable]
    best = max(one.recall for one in buildable)
    wanted = recall if best >= recall else _NEARLY * best
    enough = (one for one in buildable if one.recall >= wanted)
    return min(enough, key=lambda one: (one.milliseconds, one.bytes_a_vector))


def _trained(shape: Shape, rows: Floats) -> Any:
    """An empty IVF index trained on rows (n, d)."""
    rows = rows[: training_rows(shape.nlist)]
    if shape.m:
        return train(rows, nlist=shape.nlist, m=shape.m, nbits=shape.nbits, seed=_SEED).index
    quantizer = faiss.IndexFlatL2(rows.shape[1])
    index = faiss.IndexIVFRaBitQ(quantizer, rows.shape[1], shape.nlist, faiss.METRIC_L2, True, shape.nbits)
    index.own_fields = True
    quantizer.this.disown()
    index.train(rows)
    return index


@contextlib.contextmanager
def _searched_by(ivf: Any, coarse: str) -> Iterator[None]:
    """Let the index find its lists by that quantizer, over the same centroids."""
    own = ivf.quantizer
    if coarse == "flat" or isinstance(faiss.downcast_index(own), faiss.IndexHNSWFlat):
        yield
        return
    graph = faiss.IndexHNSWFlat(ivf.d, _HNSW_LINKS)
    graph.hnsw.efSearch = _HNSW_EF
    graph.add(faiss.downcast_index(own).reconstruct_n(0, ivf.nlist))
    ivf.quantizer = graph
    try:
        yield
    finally:
        ivf.quantizer = own


def _lengthen(ivf: Any, share: float) -> int:
    """Repeat the lists' codes until they are as long as the whole table's; return how many times.

    As far as memory allows; beyond it time grows with the codes.
    """
    rows = int(list_sizes(ivf).sum())
    factor = max(1, min(round(1 / share), _TIMED_CODES // rows))
    for number in range(ivf.nlist if factor > 1 else 0):
        size = ivf.invlists.list_size(number)
        if size:
            # Copies: the list's own memory moves when it grows.
            ids = np.tile(faiss.rev_swig_ptr(ivf.invlists.get_ids(number), size), factor - 1)
            codes = np.tile(
                faiss.rev_swig_ptr(ivf.invlists.get_codes(number), size * ivf.code_size), factor - 1
            )
            ivf.invlists.add_entries(number, len(ids), faiss.swig_ptr(ids), faiss.swig_ptr(codes))
    return factor


def _timed(index: Any, query: Floats) -> float:
    """Seconds of one search."""
    started = time.perf_counter()
    index.search(query, K)
    return time.perf_counter() - started
