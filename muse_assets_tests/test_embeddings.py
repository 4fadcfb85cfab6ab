"""Embeddings: bytes into vectors, digests that miss nothing, samples of the whole table."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import warnings
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.lib import format as npy_format
from sqlalchemy import Engine, event, text

from muse_assets.connections.databases import connected, engine_for
from muse_assets.embeddings.decoding import Decoded, Reason, decode
from muse_assets.embeddings.digests import (
    BUCKET_ROWS,
    Digests,
    changed_buckets,
    digest_rows,
    empty_digests,
    join_digests,
    read_digests,
    steps,
)
from muse_assets.embeddings.payloads import Joined, join
from muse_assets.embeddings.reading import (
    Bounds,
    join_pages,
    pages,
    quoted,
    read_ranges,
    rows_by_idx,
    table_columns,
    table_extent,
)
from muse_assets.embeddings.sampling import Sample, sample_vectors
from muse_assets.failures import PassingFailure, PermanentFailure
from muse_assets_tests.embedding_rows import NOON, SPEC, Payload, clear, npy, put_rows

D = 8
SMALL = replace(SPEC, dimension=D, m=1)
EVERY = Bounds(-(2**62), 2**62)
VECTOR = np.linspace(-1, 1, D).astype(np.float32)


@pytest.fixture(params=["sqlite", "mariadb"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    sqlite = request.param == "sqlite"
    made = engine_for(
        f"sqlite:///{tmp_path / 'e.sqlite'}" if sqlite else request.getfixturevalue("mariadb_schema")
    )
    yield made
    made.dispose()


@pytest.fixture
def sqlite(tmp_path: Path) -> Iterator[Engine]:
    made = engine_for(f"sqlite:///{tmp_path / 's.sqlite'}")
    yield made
    made.dispose()


# Decoding


def npy_version(array: Any, version: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # numpy warns that only numpy 1.9.2 and later read these
        npy_format.write_array(file, array, version=version)
    return file.getvalue()


def npy_header(text: str, data: bytes = VECTOR.tobytes(), version: bytes = b"\x01\x00") -> bytes:
    """A payload with a header that numpy.save would not write."""
    raw = text.encode("latin1") + b"\n"
    length = len(raw).to_bytes(2 if version[:1] == b"\x01" else 4, "little")
    return b"\x93NUMPY" + version + length + raw + data


def decode_one(payload: Payload, encoding: Any = "npy", dimension: int = D) -> tuple[Any, Reason]:
    decoded = decode([payload], dimension, encoding)
    assert decoded.vectors.shape == (1, dimension)
    assert decoded.vectors.dtype == np.float32
    return decoded.vectors[0], Reason(decoded.reasons[0])


@pytest.mark.parametrize("dtype", ["<f2", ">f2", "<f4", ">f4", "<f8", ">f8"])
@pytest.mark.parametrize("shape", [(D,), (1, D)])
@pytest.mark.parametrize("version", [(1, 0), (2, 0), (3, 0)])
def test_every_npy_of_one_vector_decodes(
    dtype: str, shape: tuple[int, ...], version: tuple[int, int]
) -> None:
    stored = VECTOR.astype(dtype).reshape(shape)
    for array in (stored, np.asfortranarray(stored)):
        vector, reason = decode_one(npy_version(array, version))
        assert reason == Reason.OK
        np.testing.assert_array_equal(vector, stored.astype(np.float32).ravel())


def test_a_pickle_is_never_loaded(tmp_path: Path) -> None:
    trace = tmp_path / "unpickled"

    class Harmful:
        def __reduce__(self) -> tuple[Any, ...]:
            return Path.touch, (trace,)

    file = io.BytesIO()
    np.save(file, np.array([Harmful()] * D, dtype=object), allow_pickle=True)
    payload = file.getvalue()
    np.load(io.BytesIO(payload), allow_pickle=True)
    assert trace.exists(), "the payload has to be harmful where pickles are allowed"
    trace.unlink()
    raw = pickle.dumps(Harmful())
    for harmful in (payload, raw, raw[: 4 * D].ljust(4 * D, b"\0")):
        for encoding in ("npy", "json"):
            assert decode_one(harmful, encoding)[1] == Reason.UNREADABLE
        decode_one(harmful, "float32")
    assert not trace.exists()


GOOD = npy(VECTOR)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (None, Reason.NULL),
        (b"", Reason.UNREADABLE),
        ("", Reason.UNREADABLE),
        ("드라이브", Reason.UNREADABLE),
        (GOOD.decode("latin1"), Reason.UNREADABLE),
        (b"not an array at all", Reason.UNREADABLE),
        (GOOD[:6], Reason.WRONG_LENGTH),
        (GOOD[:7], Reason.WRONG_LENGTH),
        (GOOD[:9], Reason.WRONG_LENGTH),
        (GOOD[:40], Reason.WRONG_LENGTH),
        (GOOD[:-3], Reason.WRONG_LENGTH),
        (GOOD[:-4], Reason.WRONG_LENGTH),
        (GOOD + GOOD, Reason.WRONG_LENGTH),
        (GOOD + b"\0", Reason.WRONG_LENGTH),
        (npy(np.zeros(2 * D, np.float32)), Reason.WRONG_LENGTH),
        (npy(np.ones((2, D // 2), np.float32)), Reason.WRONG_LENGTH),
        (npy(np.float32(1)), Reason.WRONG_LENGTH),
        (npy(np.ones(D, np.int32)), Reason.UNREADABLE),
        (npy(np.ones(D, np.complex64)), Reason.UNREADABLE),
        (npy(np.array(["a"] * D)), Reason.UNREADABLE),
        (npy(np.zeros(D, [("a", "<f4")])), Reason.UNREADABLE),
        (GOOD[:6] + b"\x09\x00" + GOOD[8:], Reason.WRONG_LENGTH),  # read as a header of gigabytes
        (
            npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (8,)}", version=b"\x04\x00"),
            Reason.UNREADABLE,
        ),
        (
            npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (8,)}", version=b"\x02\x01"),
            Reason.UNREADABLE,
        ),
        (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (-1, -8)}"), Reason.WRONG_LENGTH),
        (npy_header("{'descr': '<f4', 'fortran_order': False, 'shape': (8,"), Reason.UNREADABLE),
        (npy_header("((((("), Reason.UNREADABLE),
        (npy_header("'''"), Reason.UNREADABLE),
        (npy_header("{'descr': '<f4'}"), Reason.UNREADABLE),
        (npy_header("(" * 4000), Reason.UNREADABLE),
        (npy_header("__import__('os').abort()"), Reason.UNREADABLE),
        (npy(np.full(D, np.nan, np.float32)), Reason.NOT_FINITE),
        (npy(np.array([1, np.nan, *[0] * (D - 2)], np.float16)), Reason.NOT_FINITE),
        (npy(np.array([1, -np.inf, *[0] * (D - 2)], np.float64)), Reason.NOT_FINITE),
        (npy(np.full(D, 1e300)), Reason.NOT_FINITE),  # infinite as float32
        (npy(np.full(D, 1e25, np.float32)), Reason.NOT_FINITE),  # finite, but its distances are not
        (npy(np.zeros(D, np.float32)), Reason.ZERO),
        (npy(-np.zeros(D, np.float32)), Reason.ZERO),
        (npy(np.full(D, 1e-300)), Reason.ZERO),  # zero as float32
        (npy(np.full(D, 1e-10, np.float32)), Reason.OK),
        (npy(np.full(D, 1e15, np.float32)), Reason.OK),
    ],
)
def test_npy_payloads_are_accepted_or_rejected_by_reason(payload: Payload, reason: Reason) -> None:
    vector, found = decode_one(payload)
    assert found == reason
    assert bool(vector.any()) == (reason == Reason.OK), "a rejected row is zeros"


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (VECTOR.tobytes(), Reason.OK),
        (None, Reason.NULL),
        (b"", Reason.WRONG_LENGTH),
        (VECTOR.tobytes()[:-4], Reason.WRONG_LENGTH),
        (VECTOR.tobytes() * 2, Reason.WRONG_LENGTH),
        ("text", Reason.UNREADABLE),
        (np.full(D, np.inf, "<f4").tobytes(), Reason.NOT_FINITE),
        (bytes(4 * D), Reason.ZERO),
    ],
)
def test_raw_float32(payload: Payload, reason: Reason) -> None:
    vector, found = decode_one(payload, "float32")
    assert found == reason
    if reason == Reason.OK:
        np.testing.assert_array_equal(vector, VECTOR)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (json.dumps(VECTOR.tolist()), Reason.OK),
        (json.dumps([VECTOR.tolist()]), Reason.OK),
        (json.dumps(VECTOR.tolist()).encode(), Reason.OK),
        (None, Reason.NULL),
        ("", Reason.UNREADABLE),
        ("매일밤 음악여행", Reason.UNREADABLE),
        ('{"a": 1}', Reason.UNREADABLE),
        (b"\xff\xfe\xfd", Reason.UNREADABLE),
        ("[" * 100_000, Reason.UNREADABLE),
        (json.dumps([["x"] * D]), Reason.UNREADABLE),
        (json.dumps([[1.0], [1.0, 2.0]]), Reason.UNREADABLE),
        (json.dumps([10**400] * D), Reason.UNREADABLE),
        ("null", Reason.WRONG_LENGTH),
        ("[]", Reason.WRONG_LENGTH),
        (json.dumps(VECTOR.tolist()[1:]), Reason.WRONG_LENGTH),
        (json.dumps(np.ones((2, D // 2)).tolist()), Reason.WRONG_LENGTH),
        (json.dumps([float("nan")] * D), Reason.NOT_FINITE),
        (json.dumps([None, *[1.0] * (D - 1)]), Reason.NOT_FINITE),
        (json.dumps([1e300] * D), Reason.NOT_FINITE),
        (json.dumps([0] * D), Reason.ZERO),
    ],
)
def test_json(payload: Payload, reason: Reason) -> None:
    vector, found = decode_one(payload, "json")
    assert found == reason
    if reason == Reason.OK:
        np.testing.assert_array_equal(vector, VECTOR)


def slow_vector(payload: Payload) -> Any:
    """The vector by numpy's own reader, one row at a time; None where the row cannot be indexed."""
    if not isinstance(payload, bytes):
        return None
    stream = io.BytesIO(payload)
    try:
        array = np.load(stream, allow_pickle=False)
    except Exception:
        return None
    if not isinstance(array, np.ndarray) or array.dtype.char not in "efd" or stream.read():
        return None
    with np.errstate(over="ignore", invalid="ignore"):
        vector = array.astype(np.float32)
    square = float(np.square(vector, dtype=np.float64).sum())
    return vector.ravel() if array.shape in ((D,), (1, D)) and 1e-24 <= square <= 1e37 else None


@st.composite
def npy_payloads(draw: st.DrawFn) -> Payload:
    values = draw(st.lists(st.floats(width=64), min_size=D - 1, max_size=D + 1) | st.just(VECTOR.tolist()))
    with np.errstate(over="ignore"):
        array = np.array(values).astype(draw(st.sampled_from(["<f4", "<f2", ">f4", "<f8", ">f8", "<i4"])))
    if draw(st.booleans()):
        array = array[None, :]
    payload = npy_version(array, draw(st.sampled_from([(1, 0), (2, 0), (3, 0)])))
    for _ in range(draw(st.sampled_from([0, 0, 0, 1, 2]))):
        at = draw(st.integers(0, len(payload) - 1))
        payload = payload[:at] + bytes([draw(st.integers(0, 255))]) + payload[at + 1 :]
    return payload[: draw(st.sampled_from([None, None, None, -4, -3, 7, 60, 128]))]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(st.lists(npy_payloads() | st.none() | st.binary(max_size=80) | st.text(max_size=20), max_size=12))
@pytest.mark.filterwarnings("ignore")  # numpy on headers that it takes for Python 2's
def test_decoding_a_page_equals_decoding_row_by_row(payloads: list[Payload]) -> None:
    with np.errstate(invalid="ignore"):
        decoded = decode(payloads, D, "npy")
    expected = [slow_vector(payload) for payload in payloads]
    assert [reason == Reason.OK for reason in decoded.reasons] == [vector is not None for vector in expected]
    for vector, wanted in zip(decoded.vectors, expected, strict=True):
        np.testing.assert_array_equal(vector, np.zeros(D, np.float32) if wanted is None else wanted)


@pytest.mark.parametrize("usual_share", [0.0, 0.5, 0.99, 1.0])
def test_a_page_of_many_blocks_equals_row_by_row(usual_share: float) -> None:
    random = np.random.default_rng(7)
    odd: list[Payload] = [
        None,
        "text",
        b"",
        GOOD[:-4],
        GOOD + b"\0",
        npy(VECTOR.astype(">f8")),
        npy(VECTOR.astype("<f2")[None, :]),
        npy_version(2 * VECTOR, (2, 0)),
        npy(VECTOR.astype(np.int32)),
        npy(np.full(D, np.nan, np.float32)),
        npy(np.zeros(D, np.float32)),
        b"\x93NUMPY" + GOOD[6:].replace(b"<f4", b"<i4"),
    ]
    payloads = [
        npy(random.standard_normal(D).astype(np.float32))
        if random.random() < usual_share
        else odd[random.integers(len(odd))]
        for _ in range(1500)
    ]
    together = decode(payloads, D, "npy")
    for row, payload in enumerate(payloads):
        vector, reason = decode_one(payload)
        assert reason == together.reasons[row]
        np.testing.assert_array_equal(vector, together.vectors[row])
        wanted = slow_vector(payload)
        assert (wanted is None) == (reason != Reason.OK)
        np.testing.assert_array_equal(vector, 0 if wanted is None else wanted)


@pytest.mark.parametrize("dimension", [2, 512, 1024])
@pytest.mark.parametrize(("square", "reason"), [(1e-24, Reason.ZERO), (1e37, Reason.NOT_FINITE)])
def test_the_limits_of_a_norm_are_exact(dimension: int, square: float, reason: Reason) -> None:
    """Whether a row passes is decided in float64, however its squares are summed at first."""
    at_limit = np.full(dimension, np.sqrt(square / dimension), np.float32)
    steps = (1 + np.arange(-40, 41) * 2.0**-23).astype(np.float32)
    vectors = [at_limit * step for step in (*steps, np.float32(0.5), np.float32(0.99), np.float32(1.5))]
    exact = [np.square(vector, dtype=np.float64).sum() for vector in vectors]
    rejected = [(e < square) if reason == Reason.ZERO else (e > square) for e in exact]
    assert 5 < sum(rejected) < len(rejected) - 5
    found = decode([npy(vector) for vector in vectors], dimension, "npy").reasons
    assert [Reason(r) for r in found] == [reason if no else Reason.OK for no in rejected]


def test_normalizing_leaves_rejected_rows_alone() -> None:
    decoded: Decoded = decode([npy(3 * VECTOR), None, npy(np.zeros(D))], D, "npy", normalize=True)
    np.testing.assert_allclose(np.linalg.norm(decoded.vectors, axis=1), [1, 0, 0], rtol=1e-6)


# Digests

SQL_ROWS = st.dictionaries(
    st.integers(1, 6 * BUCKET_ROWS), st.none() | st.binary(max_size=9) | st.just(GOOD), max_size=25
)


def sql_digests(engine: Engine, high: int = EVERY.high, spec: Any = SMALL) -> Digests:
    with connected(engine, "testing") as connection:
        return read_digests(connection, spec, [Bounds(EVERY.low, high)])


def row_digests(rows: dict[int, Payload], high: int = EVERY.high) -> Digests:
    covered = sorted(idx for idx in rows if idx <= high)
    return digest_rows(np.array(covered, np.int64), [rows[idx] for idx in covered])


def assert_equal(one: Digests, other: Digests) -> None:
    np.testing.assert_array_equal(one.columns(), other.columns())


@settings(
    max_examples=25,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=SQL_ROWS, high=st.integers(0, 7 * BUCKET_ROWS))
def test_the_database_digests_as_python_does(engine: Engine, rows: dict[int, Payload], high: int) -> None:
    clear(engine, SMALL)
    put_rows(engine, SMALL, rows)
    assert_equal(sql_digests(engine, high), row_digests(rows, high))
    kept = {idx: payload for idx, payload in rows.items() if not 40 < idx < 100}
    with connected(engine, "testing") as connection:
        in_parts = read_digests(connection, SMALL, [Bounds(1, 40), Bounds(100, 10**6)])
    # Bounds may cut a bucket in two: its parts are digested apart.
    assert in_parts.total_rows == len(kept)


@pytest.mark.parametrize("idx", [2**31 - 2, 2**31 + 5, 2**40 + 1])
def test_large_idx_digest_alike(engine: Engine, idx: int) -> None:
    rows: dict[int, Payload] = {idx + step: bytes([step]) * 50 for step in range(3)}
    put_rows(engine, SMALL, rows)
    assert_equal(sql_digests(engine), row_digests(rows))


def test_text_beyond_ascii_digests_alike(engine: Engine) -> None:
    """Junk in a JSON column is a rejected row, and must not look like a row that never stands still."""
    spec = replace(SMALL, encoding="json")
    rows: dict[int, Payload] = {1: json.dumps(VECTOR.tolist()), 2: "드라이브 뮤직", 3: "é", 4: None, 5: ""}
    put_rows(engine, spec, rows)
    assert_equal(sql_digests(engine, spec=spec), row_digests(rows))


def test_a_database_without_crc32_is_digested_from_its_rows(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows: dict[int, Payload] = {idx: bytes([idx % 251]) * idx for idx in [*range(1, 70), *range(500, 520)]}
    rows[33] = None
    put_rows(engine, SMALL, rows)
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    for high in (EVERY.high, 510, 50, 0):
        by_query = sql_digests(engine, high)
        with monkeypatch.context() as patched:
            patched.setattr(engine.dialect, "name", "postgresql")
            statements.clear()
            assert_equal(sql_digests(engine, high), by_query)
            assert not any("CRC32" in statement for statement in statements)


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    st.dictionaries(st.integers(1, 300), st.binary(min_size=1, max_size=12), min_size=3, max_size=40),
    st.data(),
)
def test_every_kind_of_change_is_seen_in_its_bucket(rows: dict[int, bytes], data: st.DataObject) -> None:
    after: dict[int, Payload] = dict(rows)
    change = data.draw(st.sampled_from(["swap", "byte", "replace", "delete", "insert", "empty", "null"]))
    first, second = data.draw(st.lists(st.sampled_from(sorted(rows)), min_size=2, max_size=2, unique=True))
    if change == "swap":
        after[first], after[second] = rows[second], rows[first]
    elif change == "byte":
        at = data.draw(st.integers(0, len(rows[first]) - 1))
        flipped = bytearray(rows[first])
        flipped[at] ^= data.draw(st.integers(1, 255))
        after[first] = bytes(flipped)
    elif change == "insert":
        after[data.draw(st.integers(301, 400))] = b"new"
    elif change == "replace":
        # As many rows as before: a count would not notice.
        after[data.draw(st.integers(301, 400))] = after.pop(first)
    elif change == "delete":
        del after[first]
    elif change == "empty":
        after[first] = b""
    else:
        after[first] = None
    moved = {idx for idx in {*rows, *after} if rows.get(idx) != after.get(idx)}
    found = changed_buckets(row_digests(dict(rows)), row_digests(after))
    assert found.tolist() == sorted({idx // BUCKET_ROWS for idx in moved})


def test_a_swap_is_seen_by_the_database(engine: Engine) -> None:
    first, second = npy(VECTOR), npy(VECTOR[::-1].copy())
    put_rows(engine, SMALL, {1: first, 2: second, 40: first})
    before = sql_digests(engine)
    put_rows(engine, SMALL, {1: second, 2: first})
    assert changed_buckets(before, sql_digests(engine)).tolist() == [0]
    put_rows(engine, SMALL, {1: first, 2: second})
    assert not len(changed_buckets(before, sql_digests(engine)))


def test_replacing_and_selecting_buckets() -> None:
    rows: dict[int, Payload] = {idx: bytes([idx]) for idx in range(1, 4 * BUCKET_ROWS)}
    whole = row_digests(rows)
    moved = row_digests(dict.fromkeys(range(BUCKET_ROWS, 2 * BUCKET_ROWS), b"new"))
    updated = whole.replaced(np.array([1]), moved)
    assert changed_buckets(whole, updated).tolist() == [1]
    assert_equal(updated.select(np.array([1])), moved)
    assert whole.replaced(np.array([1]), empty_digests()).bucket.tolist() == [0, 2, 3]
    assert whole.total_rows == 4 * BUCKET_ROWS - 1


def test_digests_of_steps_join_to_that_of_the_whole(engine: Engine) -> None:
    step = 8192 * BUCKET_ROWS
    rows: dict[int, Payload] = {
        idx: b"%d" % idx for at in (5, step - 2, 2 * step) for idx in range(at, at + 40)
    }
    put_rows(engine, SMALL, rows)
    bound = Bounds(5, 2 * step + 30)
    parts = list(steps(bound))
    assert [part.low for part in parts] == [5, step, 2 * step]
    with connected(engine, "testing") as connection:
        whole = read_digests(connection, SMALL, [bound])
        apart = join_digests(read_digests(connection, SMALL, [part]) for part in reversed(parts))
    assert_equal(whole, row_digests(rows, bound.high))
    assert_equal(apart, whole)


# Reading


@pytest.mark.parametrize("rows_a_page", [1, 32, 100])
def test_pages_hold_every_row_once_and_split_no_bucket(engine: Engine, rows_a_page: int) -> None:
    idx = [*range(1, 130), 1000, 1001, 1023, 1024, *range(5000, 5040)]
    put_rows(engine, SMALL, {i: f"{i}".encode() for i in idx})
    statements: list[str] = []
    event.listen(engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
    bounds = [Bounds(1, 1001), Bounds(1024, 5020)]
    with connected(engine, "testing") as connection:
        found = list(pages(connection, SMALL, bounds, BUCKET_ROWS, rows_a_page))
    assert len(statements) < 40, "a gap costs no query"
    joined = join_pages(found)
    expected = [i for i in idx if i <= 1001 or 1024 <= i <= 5020]
    assert joined.idx.tolist() == expected
    assert list(joined.payloads) == [f"{i}".encode() for i in expected]
    buckets = [set(page.idx // BUCKET_ROWS) for page in found]
    assert all(not one & other for one, other in itertools.pairwise(buckets))
    assert max(len(page.idx) for page in found) <= max(rows_a_page, BUCKET_ROWS)


def test_rows_by_range_and_by_idx(engine: Engine) -> None:
    put_rows(engine, SMALL, {i: f"{i}".encode() for i in range(1, 2500)})
    with connected(engine, "testing") as connection:
        page = read_ranges(connection, SMALL, [Bounds(5, 7), Bounds(2498, 9999)])
        assert page.idx.tolist() == [5, 6, 7, 2498, 2499]
        assert page.payloads[0] == b"5"
        wanted = np.array([2400, 7, 9000, *range(100, 2000)])
        found = join_pages(rows_by_idx(connection, SMALL, wanted))
        assert found.idx.tolist() == [7, *range(100, 2000), 2400]
        assert not len(join_pages(rows_by_idx(connection, SMALL, np.empty(0, np.int64))).idx)


ODD: list[Payload] = [GOOD, None, b"", b"\x00,'%\\", GOOD[:-3], GOOD + b"x", b"\xff" * 5000, GOOD, None]


@pytest.mark.parametrize("first", [1, 90, 9_999_999_990])
def test_payloads_arrive_as_stored_however_they_are_sent(engine: Engine, first: int) -> None:
    rows = dict(zip(range(first, first + 99, 11), ODD, strict=True))
    put_rows(engine, SMALL, rows)
    with connected(engine, "testing") as connection:
        by_range = read_ranges(
            connection, SMALL, [Bounds(first, first + 30), Bounds(first + 31, first + 200)]
        )
        by_idx = join_pages(rows_by_idx(connection, SMALL, np.array([*reversed(rows), 7])))
    for page in (by_range, by_idx):
        assert page.idx.tolist() == list(rows)
        assert list(page.payloads) == ODD
        assert [page.payloads[row] for row in range(len(ODD))] == ODD
        assert_equal(digest_rows(page.idx, page.payloads), row_digests(rows, first + 200))
        decoded, expected = decode(page.payloads, D, "npy"), decode(ODD, D, "npy")
        np.testing.assert_array_equal(decoded.vectors, expected.vectors)
        np.testing.assert_array_equal(decoded.reasons, expected.reasons)


def test_rows_come_one_by_one_where_joined_they_are_cut_off(engine: Engine) -> None:
    rows: dict[int, Payload] = {idx: b"%d" % idx * 50 for idx in range(1, 400)}
    put_rows(engine, SMALL, rows)
    with connected(engine, "testing") as connection:
        read_ranges(connection, SMALL, [Bounds(1, 1)])
        if engine.dialect.name != "sqlite":
            # As a server does whose packets are too small: from 1 to all of the three lists are cut off.
            for largest in (4, 1500, 5000, 50_000):
                connection.exec_driver_sql(f"SET SESSION group_concat_max_len = {largest}")
                page = read_ranges(connection, SMALL, [Bounds(1, 1000)])
                assert dict(zip(page.idx.tolist(), page.payloads, strict=True)) == rows
        page = read_ranges(connection, SMALL, [Bounds(1, 1000)])
    assert dict(zip(page.idx.tolist(), page.payloads, strict=True)) == rows


def test_digests_come_one_by_one_where_joined_they_are_cut_off(engine: Engine) -> None:
    rows: dict[int, Payload] = {idx: b"%d" % idx * 50 for idx in range(1, 400)}
    put_rows(engine, SMALL, rows)
    with connected(engine, "testing") as connection:
        whole = read_digests(connection, SMALL, [Bounds(1, 1000)])
        assert whole.total_rows == len(rows)
        if engine.dialect.name != "sqlite":
            for largest in (4, 100, *range(1100, 1130)):
                connection.exec_driver_sql(f"SET SESSION group_concat_max_len = {largest}")
                assert_equal(read_digests(connection, SMALL, [Bounds(1, 1000)]), whole)
            assert_equal(digest_rows(np.array([*rows], np.int64), [*rows.values()]), whole)


def test_a_page_of_huge_payloads_arrives(engine: Engine) -> None:
    """24 MB: joined, more than a server sends at once."""
    rows: dict[int, Payload] = {idx: b"%05d" % idx * 12_000 for idx in range(1, 400)}
    put_rows(engine, SMALL, rows)
    with connected(engine, "testing") as connection:
        page = read_ranges(connection, SMALL, [Bounds(1, 1000)])
    assert dict(zip(page.idx.tolist(), page.payloads, strict=True)) == rows


@given(
    payloads=st.lists(st.sampled_from([None, GOOD, npy(VECTOR.astype("<f8")), b"", GOOD[:-1]]), max_size=9),
    order=st.randoms(use_true_random=False),
)
def test_joined_payloads_are_the_same_payloads(payloads: list[bytes | None], order: Any) -> None:
    sizes = [len(payload or b"") for payload in payloads]
    starts = np.cumsum([0, *sizes], dtype=np.int64)[:-1]
    lengths = np.array([-1 if payload is None else len(payload) for payload in payloads], np.int64)
    places = list(range(len(payloads)))
    order.shuffle(places)
    joined = Joined(b"".join(payload or b"" for payload in payloads), starts[places], lengths[places])
    expected = [payloads[place] for place in places]
    assert list(joined) == expected
    assert list(join([joined, joined[:2]])) == expected + expected[:2]
    assert list(join([joined, expected])) == 2 * expected
    for some in (slice(None), slice(1, 3)):
        decoded, apart = decode(joined[some], D, "npy"), decode(expected[some], D, "npy")
        np.testing.assert_array_equal(decoded.vectors, apart.vectors)
        np.testing.assert_array_equal(decoded.reasons, apart.reasons)


def test_the_extent_ends_at_the_newest_row_of_the_day(engine: Engine) -> None:
    midnight = datetime(2026, 11, 2)
    put_rows(engine, SMALL, {1: b"a", 5: b"a"}, NOON)
    put_rows(engine, SMALL, {3: b"late", 9: b"b"}, midnight)
    with connected(engine, "testing") as connection:
        assert table_extent(connection, SMALL, midnight).newest_idx == 5
        assert table_extent(connection, SMALL, None).newest_idx == 9
        assert table_extent(connection, SMALL, datetime(2020, 1, 1)).newest_idx == 0


def test_a_table_without_created_at_is_taken_as_it_is(engine: Engine) -> None:
    put_rows(engine, SMALL, {1: b"a", 9: b"b"}, dated=False)
    with connected(engine, "testing") as connection:
        extent = table_extent(connection, SMALL, datetime(2020, 1, 1))
    assert extent.newest_idx == 9
    assert "created_at" not in extent.columns


def test_missing_tables_and_columns_are_named(engine: Engine) -> None:
    put_rows(engine, SMALL, {1: b"a"})
    with connected(engine, "testing") as connection:
        with pytest.raises(PermanentFailure, match="tb_absent does not exist"):
            table_columns(connection, replace(SMALL, table="tb_absent"))
        with pytest.raises(PermanentFailure, match="no column nowhere"):
            table_columns(connection, replace(SMALL, embedding_column="nowhere"))


@pytest.mark.parametrize("name", ["a b", "a`b", 'a"b', "a;DROP TABLE b", "", "1a", "a" * 65, "표"])
def test_identifiers_that_could_be_sql_are_refused(sqlite: Engine, name: str) -> None:
    with connected(sqlite, "testing") as connection, pytest.raises(PermanentFailure, match="not a table"):
        quoted(connection, name)


# Sampling


def numbered(idx: Any) -> dict[int, Payload]:
    """Rows whose vector says which row it is: the second float is 1, so no row is zero."""
    return {int(i): np.array([i, 1], "<f4").tobytes() for i in idx}


NUMBERED = replace(SPEC, dimension=2, m=1, encoding="float32")


def sample(engine: Engine, wanted: int, seed: int = 1) -> Sample:
    return sample_vectors(engine, NUMBERED, lambda rows: wanted, doing="testing", seed=seed)


@pytest.mark.parametrize("keys_a_row", [1, 10])
def test_a_sample_is_uniform_over_the_whole_table(sqlite: Engine, keys_a_row: int) -> None:
    random = np.random.default_rng(5)
    idx = np.sort(1 + random.choice(20_000 * keys_a_row, 20_000, replace=False))
    put_rows(sqlite, NUMBERED, numbered(idx))
    keys: list[Any] = []

    def count(_c: Any, _cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        _head, looks_up, named = statement.partition(" IN (")
        assert looks_up or "COUNT(*)" in statement or "PRAGMA" in statement, "only counts and looks keys up"
        keys.extend(map(int, named.partition(")")[0].split(",") if looks_up else ()))

    event.listen(sqlite, "before_cursor_execute", count)
    drawn = sample(sqlite, 1000)
    event.remove(sqlite, "before_cursor_execute", count)
    found = drawn.vectors[:, 0].astype(int)
    assert len(found) == len(set(found)) == 1000
    assert drawn.idx.tolist() == found.tolist()
    deciles = np.bincount(np.searchsorted(idx, found) // 2000, minlength=10)
    assert deciles.min() > 60, deciles  # 100 each; a standard deviation is 9.5
    # Training takes prefixes.
    assert np.bincount(np.searchsorted(idx, found[:500]) // 2000, minlength=10).min() > 20
    assert len(keys) == len(set(keys)) < 1.7 * 1000 * keys_a_row
    assert drawn.table_rows == 20_000
    np.testing.assert_array_equal(drawn.vectors, sample(sqlite, 1000).vectors)
    assert set(found) != set(sample(sqlite, 1000, seed=2).vectors[:, 0].astype(int))


def test_a_sample_of_more_than_the_table_is_the_table(engine: Engine) -> None:
    put_rows(engine, NUMBERED, numbered(range(3, 300, 2)))
    found = sample(engine, 10_000).vectors[:, 0].astype(int)
    assert sorted(found) == list(range(3, 300, 2))
    assert list(found) != sorted(found)


def test_one_stray_row_far_away_costs_nothing(engine: Engine) -> None:
    put_rows(engine, NUMBERED, numbered([*range(1, 500), 2**40]))
    drawn = sample(engine, 100)
    assert len(set(drawn.vectors[:, 0])) == 100
    assert drawn.vectors[:, 0].min() < 100
    assert drawn.vectors[:, 0].max() > 400


def test_a_sample_of_a_sparse_table_does_not_follow_the_key_it_was_listed_by(engine: Engine) -> None:
    """A server lists keys by the smallest index it has, and an operator may add one."""
    put_rows(engine, NUMBERED, numbered(range(1, 20_000, 40)), NOON + timedelta(days=1))
    put_rows(engine, NUMBERED, numbered(range(20_001, 40_000, 40)), NOON)
    before = sample(engine, 100)
    with engine.begin() as connection:
        connection.execute(text(f"CREATE INDEX by_day ON {NUMBERED.table} (created_at)"))
    np.testing.assert_array_equal(sample(engine, 100).idx, before.idx)


def test_rejected_rows_are_counted_and_made_up_for(engine: Engine) -> None:
    rows = numbered(range(1, 301))
    rows |= {idx: np.array([np.nan, 1], "<f4").tobytes() for idx in range(1, 61)}
    rows |= dict.fromkeys(range(100, 110))
    put_rows(engine, NUMBERED, rows)
    every = sample(engine, 300)
    assert every.rejected == {"not_finite": 60, "null": 10}
    assert len(every.vectors) == 230
    assert every.idx.tolist() == every.vectors[:, 0].tolist()
    some = sample(engine, 200)
    assert len(some.vectors) == 200
    assert sum(some.rejected.values()) > 30


def test_a_table_of_mostly_unusable_rows_is_not_drawn_in_ever_smaller_rounds(sqlite: Engine) -> None:
    rows = dict.fromkeys(range(1, 10_001)) | numbered(range(1, 10_001, 20))
    put_rows(sqlite, NUMBERED, rows)
    statements: list[str] = []
    event.listen(sqlite, "before_cursor_execute", lambda *args: statements.append(args[2]))
    drawn = sample(sqlite, 400)
    assert len(set(drawn.idx.tolist())) == 400
    assert drawn.idx.tolist() == drawn.vectors[:, 0].tolist()
    assert sum(" IN (" in statement for statement in statements) <= 12


def test_an_empty_table_has_an_empty_sample(engine: Engine) -> None:
    clear(engine, NUMBERED)
    drawn = sample(engine, 100)
    assert drawn.vectors.shape == (0, 2)
    assert drawn.table_rows == 0


def test_a_database_that_is_gone_passes(tmp_path: Path) -> None:
    gone = engine_for("mysql+pymysql://root:secret-word@127.0.0.1:9/muse")
    with pytest.raises(PassingFailure, match="while testing") as caught, connected(gone, "testing"):
        pass
    assert "secret-word" not in str(caught.value)
