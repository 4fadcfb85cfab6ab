"""What `muse info` answers at which hour. Here: the words. Not here: the command (`test_cli.py`)."""

from __future__ import annotations

from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from muse_assets.cli.index_status import IndexStatus, answer
from muse_assets.manifest import Manifest
from muse_assets.publishing.live import ADOPTED, LiveFile
from muse_assets.publishing.pinning import Pin
from muse_assets.seoul_time import SEOUL
from muse_assets_tests.server_directories import snapshot

TODAY, YESTERDAY = "2026-03-03", "2026-03-02"


def at(clock: str, day: str = TODAY) -> datetime:
    return datetime.fromisoformat(f"{day} {clock}").replace(tzinfo=SEOUL)


@pytest.fixture(scope="module")
def facts(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """400 rows of a table of 403, three of them rejected."""
    made = snapshot(tmp_path_factory.mktemp("work"), 1, TODAY)[1]
    parity = {"passed": True, "summary": "", "table_rows": 403, "indexed": 400}
    return replace(made, checks={"id_parity": parity}, rejected={"not_finite": 3})


def status(facts: Manifest, index: str = "vibe", pin: Pin | None = None) -> IndexStatus:
    return IndexStatus(index, LiveFile(Path("x"), facts.sha256, facts.size, facts), facts, pin)


@pytest.mark.parametrize(
    ("live_day", "now", "said"),
    [
        (TODAY, "17:05", "fresh"),
        (YESTERDAY, "00:00", "fresh"),
        (YESTERDAY, "16:57", "fresh"),
        (YESTERDAY, "16:58", "due by 17:30"),
        (YESTERDAY, "17:29", "due by 17:30"),
        (YESTERDAY, "17:30", "late since 17:30"),
        (YESTERDAY, "23:59", "late since 17:30"),
        ("2026-03-01", "17:05", "late since 2026-03-02 17:30"),
        ("2026-02-27", "17:30", "late since 2026-02-28 17:30"),
    ],
)
def test_an_index_is_late_once_its_hour_has_passed(
    facts: Manifest, live_day: str, now: str, said: str
) -> None:
    found = status(replace(facts, partition=live_day))
    assert found.freshness(at(now)) == said
    in_utc = at(now).astimezone(tz=None)
    assert found.freshness(in_utc) == said
    assert (found.troubles(at(now)) == []) == (said == "fresh")


def test_all_is_well_is_said_in_one_sentence(facts: Manifest) -> None:
    both = [status(facts), status(facts, "title")]
    assert answer(both, at("17:05")) == f"All 2 are fresh, exact and live, of {TODAY}."
    assert answer(both[:1], at("17:05")) == f"vibe is fresh, exact and live, of {TODAY}."


def test_what_is_not_is_named_with_its_reason(facts: Manifest) -> None:
    pin = Pin("lyrics", facts.sha256, TODAY, f"{TODAY}T17:02:00+09:00", "틀린 제목")
    newer = replace(facts, sha256="b" * 64)
    found = [
        status(facts),
        IndexStatus("artist", None, None, None),
        IndexStatus("title", LiveFile(Path("x"), "c" * 64, 7, None), None, None),
        status(facts, "lyrics", pin),
        replace(status(facts, "lyrics_3"), built=newer),
        status(replace(facts, rejected={}), "album_name"),
        status(replace(facts, partition=YESTERDAY), "lyrics_summary"),
    ]
    assert answer(found, at("18:00")) == (
        "1 of 7 is fresh, exact and live. artist: nothing is live."
        " title: the live file is not what was published."
        f" lyrics: pinned to {facts.sha256[:12]} of {TODAY} since {TODAY} 17:02 Seoul (틀린 제목)."
        f" lyrics_3: its newest build of {TODAY} is not live. album_name: exact: NO."
        f" lyrics_summary: of {YESTERDAY}, late since 17:30."
    )
    assert answer(found[1:2], at("18:00")) == "It is not fresh, exact and live. artist: nothing is live."


def test_of_an_adopted_file_nobody_knows_the_day(facts: Manifest) -> None:
    legacy = replace(facts, partition="0001-01-01", mode=ADOPTED, checks={})
    found = replace(status(legacy), built=None)
    assert (found.live_day, found.freshness(at("18:00")), found.exact) == ("unknown",) * 3
    assert found.troubles(at("18:00")) == ["of unknown, unknown", "exact: unknown"]
