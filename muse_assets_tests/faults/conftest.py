"""Fixtures of the fault tests: ledgers, sizes, and a search for secrets after each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from muse_assets_tests.faults import ledger
from muse_assets_tests.faults.ledger import SECRETS, Injecting
from muse_assets_tests.servers import CANARY

Times = Callable[[int, int], int]


@pytest.fixture
def injecting(record_property: Callable[[str, object], None]) -> Injecting:
    """Opens ledgers: `with injecting("1", "SIGKILL at each system call") as ledger`."""
    return ledger.injecting(record_property)


@pytest.fixture
def times(pytestconfig: pytest.Config) -> Times:
    """How often to inject: `times(few, many)`; many with --heavy-faults, as `make test-faults` runs them."""
    heavy = bool(pytestconfig.getoption("--heavy-faults"))
    return lambda few, many: many if heavy else few


@pytest.fixture(autouse=True)
def no_secrets_left(
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
    record_property: Callable[[str, object], None],
) -> Iterator[None]:
    """The servers' password is in no file under `tmp_path`, no output and no log of the test (G9)."""
    yield
    output = capfd.readouterr()
    places = {"stdout": output.out, "stderr": output.err, "log": caplog.text}
    hits = [place for place, text in places.items() if CANARY in text]
    files = [path for path in tmp_path.rglob("*") if path.is_file() and not path.is_symlink()]
    hits += [str(path) for path in files if CANARY.encode() in path.read_bytes()]
    record_property(SECRETS, {"places": len(places) + len(files), "hits": hits})
    assert not hits, f"the password is in {hits}"
