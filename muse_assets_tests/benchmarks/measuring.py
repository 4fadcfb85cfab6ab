"""Measuring one piece of work in a process of its own, the table of ratios and those of growth.

Here: costs, rows, series and printing. Not here: what is measured (`bench_*.py`), or on what (`vectors.py`,
`tables.py`).
"""

from __future__ import annotations

import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

Facts = Mapping[str, float | str]
Metric = Literal["wall", "cpu", "peak"]


@dataclass(frozen=True)
class Cost:
    """One piece of work. wall, cpu: seconds (cpu of all threads). peak: MB (2^20) resident at most, above
    the start, of this process alone.

    facts: what else it says of itself, such as recall@10; every figure of speed comes with its quality.
    """

    wall: float
    cpu: float
    peak: float
    facts: Facts = field(default_factory=dict)


@dataclass(frozen=True)
class Row:
    """One line of the table: `ours` against `baseline` by `metric`.

    reach: the ratio to be reached; `faster` says whether it is a speed-up (at least that often as fast)
    or a bound (at most that many times the baseline). lost: points of recall@10 lost to the baseline where
    that is worst, None where both give the same; may_lose: at most. note: quality and circumstances, in
    words.
    """

    what: str
    baseline_name: str
    ours: Cost
    baseline: Cost
    reach: float | None
    faster: bool = True
    metric: Metric = "wall"
    note: str = ""
    lost: float | None = None
    may_lose: float = 0.0

    @property
    def ratio(self) -> float:
        """Baseline over ours for a speed-up, ours over baseline for a bound."""
        ours, baseline = (float(getattr(cost, self.metric)) for cost in (self.ours, self.baseline))
        return baseline / ours if self.faster else ours / baseline

    @property
    def reached(self) -> bool:
        """Whether ratio and quality are what they have to be; a row that only states figures always is."""
        if self.lost is not None and self.lost > self.may_lose:
            return False
        if self.reach is None:
            return True
        return self.ratio >= self.reach if self.faster else self.ratio <= self.reach


@dataclass(frozen=True)
class Series:
    """One line of a table of growth: what a piece of work costs as something grows.

    grows: what the `sizes` count, ascending; costs: one for each. expected: how the cost should grow, in
    words. at_most: the largest exponent of the first of `metrics` that is as expected, None where it is only
    stated. per: for so many more the growth along a line is told.
    """

    what: str
    grows: str
    sizes: tuple[int, ...]
    costs: tuple[Cost, ...]
    expected: str
    at_most: float | None = None
    metrics: tuple[Metric, ...] = ("wall", "cpu")
    per: int = 1_000_000

    def values(self, metric: Metric) -> list[float]:
        """Of each size."""
        return [float(getattr(cost, metric)) for cost in self.costs]

    @property
    def reached(self) -> bool:
        """Whether the cost grows no faster than expected."""
        return self.at_most is None or exponent(self.sizes, self.values(self.metrics[0])) <= self.at_most


def exponent(sizes: Sequence[float], values: Sequence[float]) -> float:
    """b of values = a * sizes^b, by least squares of the logarithms; values not above 0 count as 0.1 ms."""
    return float(np.polyfit(np.log(sizes), np.log(np.maximum(values, 1e-4)), 1)[0])


def line(sizes: Sequence[float], values: Sequence[float]) -> tuple[float, float]:
    """a and b of values = a + b * sizes, by least squares."""
    slope, fixed = np.polyfit(np.asarray(sizes, float), values, 1)
    return float(fixed), float(slope)


def less(cost: Cost, part: Cost) -> Cost:
    """The rest of `cost` where `part` of its time is taken off."""
    return replace(cost, wall=cost.wall - part.wall, cpu=cost.cpu - part.cpu)


def measure(work: Callable[..., Facts | None], *arguments: Any) -> Cost:
    """Run `work(*arguments)` in a fresh process and say what it cost.

    `work` is a module's function, its arguments and the facts it returns can be pickled; what it prepares
    before it calls `begin()` is not counted. Raises RuntimeError when it fails.
    """
    context = multiprocessing.get_context("spawn")
    receiving, sending = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(sending, work, arguments))
    process.start()
    sending.close()
    try:
        outcome = receiving.recv()
    except EOFError:
        outcome = "it died"
    process.join()
    if not isinstance(outcome, Cost):
        raise RuntimeError(f"{work.__module__}.{work.__qualname__}: {outcome}")
    return outcome


def in_turn(repeats: int, *works: tuple[Callable[..., Facts | None], tuple[Any, ...]]) -> list[Cost]:
    """Measure each of `works` `repeats` times, taking turns, and return each one's median by wall."""
    found: list[list[Cost]] = [[] for _ in works]
    for _ in range(repeats):
        for place, (work, arguments) in enumerate(works):
            found[place].append(measure(work, *arguments))
    return [_median(costs) for costs in found]


def begin() -> None:
    """In a measured function: what came before was preparation."""
    # The high-water mark begins anew (Linux: proc(5), clear_refs); ru_maxrss would begin at the parent's.
    Path("/proc/self/clear_refs").write_text("5", "ascii")
    _started[:] = [_now()]


def print_table(rows: Iterable[Row], console: Console) -> bool:
    """Print the rows; whether all reached what they have to."""
    table = Table("what", "baseline", "wall s", "CPU s", "peak MB", "ratio", "reach", "")
    every = list(rows)
    for row in every:
        wall, cpu, peak = (
            f"{getattr(row.ours, name):,.{digits}f} / {getattr(row.baseline, name):,.{digits}f}"
            for name, digits in (("wall", 2), ("cpu", 2), ("peak", 0))
        )
        reach = "stated" if row.reach is None else f"{'>=' if row.faster else '<='} {row.reach:g}x"
        mark = "" if row.reach is None else "ok" if row.reached else "MISSED"
        ratio = f"{row.ratio:.2f}x {row.metric}"
        table.add_row(row.what, row.baseline_name, wall, cpu, peak, ratio, reach, mark)
        if row.note:
            table.add_row(f"  [dim]{row.note}[/dim]")
    if every:
        console.print("ours / baseline", table, sep="\n")
    return all(row.reached for row in every)


def print_series(series: Iterable[Series], console: Console) -> bool:
    """Print a table for each run of series over the same sizes; whether none grows faster than expected."""
    every = list(series)
    for (grows, sizes, metrics), group in groupby(every, key=lambda one: (one.grows, one.sizes, one.metrics)):
        units = " / ".join("MB" if metric == "peak" else f"{metric} s" for metric in metrics)
        heads = (*(f"{size:,}" for size in sizes), "exponent", "line", "expected", "")
        table = Table("what", *heads, title=f"{units} by {grows}", title_justify="left")
        for one in group:
            columns = [one.values(metric) for metric in metrics]
            cells = [" / ".join(map(_figure, values)) for values in zip(*columns, strict=True)]
            exponents = " / ".join(f"{exponent(sizes, values):.2f}" for values in columns)
            fixed, slope = line(sizes, columns[0])
            grown = f"{_figure(fixed)} + {_figure(slope * one.per)} per {one.per:,}"
            mark = "" if one.at_most is None else "ok" if one.reached else "MISSED"
            table.add_row(one.what, *cells, exponents, grown, one.expected, mark)
        console.print(table)
    return all(one.reached for one in every)


def _figure(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def _median(costs: list[Cost]) -> Cost:
    middle = statistics.median_low([cost.wall for cost in costs])
    return next(cost for cost in costs if cost.wall == middle)


_started: list[tuple[float, float, float]] = []


def _now() -> tuple[float, float, float]:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    cpu = sum(one.ru_utime + one.ru_stime for one in used)
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text("utf-8").splitlines())
    return time.perf_counter(), cpu, int(status["VmHWM"].split()[0]) / 1024


def _run(sending: Any, work: Callable[..., Facts | None], arguments: tuple[Any, ...]) -> None:
    begin()
    try:
        facts = work(*arguments)
        (wall, cpu, peak), (wall_then, cpu_then, peak_then) = _now(), _started[0]
        sending.send(Cost(wall - wall_then, cpu - cpu_then, peak - peak_then, facts or {}))
    except BaseException as error:
        sending.send(f"{type(error).__name__}: {error}")
        raise
