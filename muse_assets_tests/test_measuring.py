"""How growth is told of what was measured: exponents and lines of costs whose law is known."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from muse_assets_tests.benchmarks.measuring import Cost, Series, exponent, less, line, print_series

SIZES = (100, 200, 400, 800, 1_600)


def grown(power: float, *, fixed: float = 0.0, at_most: float | None = None) -> Series:
    costs = tuple(Cost(fixed + 0.01 * size**power, 2.0, 0.0) for size in SIZES)
    return Series("work", "rows", SIZES, costs, f"{power}", at_most)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_exponent_of_a_power_is_the_power(power: float) -> None:
    assert exponent(SIZES, grown(power).values("wall")) == pytest.approx(power, abs=1e-9)


def test_a_constant_beside_it_lowers_the_exponent_and_stands_in_the_line() -> None:
    values = grown(1.0, fixed=3.0).values("wall")
    assert 0.3 < exponent(SIZES, values) < 0.9
    assert line(SIZES, values) == pytest.approx((3.0, 0.01))


def test_what_is_left_of_a_cost_may_be_nothing_and_still_has_an_exponent() -> None:
    left = less(Cost(1.0, 1.0, 5.0), Cost(1.5, 0.5, 0.0))
    assert (left.wall, left.cpu, left.peak) == (-0.5, 0.5, 5.0)
    assert exponent(SIZES, [left.wall] * len(SIZES)) == pytest.approx(0)


@pytest.mark.parametrize(("at_most", "mark"), [(1.1, "ok"), (0.9, "MISSED"), (None, "")])
def test_growth_beyond_what_is_expected_is_told(at_most: float | None, mark: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    reached = print_series([grown(1.0, at_most=at_most)], console)
    assert isinstance(console.file, io.StringIO)
    told = console.file.getvalue()
    assert reached is (mark != "MISSED")
    assert {word for word in ("ok", "MISSED") if word in told} == ({mark} if mark else set())
    assert "16.0 / 2.00" in told
    assert "wall s / cpu s by rows" in told
