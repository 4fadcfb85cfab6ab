"""The account of injected faults: how many, what they broke, how long recovery took; one table at the end.

Here: counting and printing. Not here: injecting anything, or what should hold (the tests beside this).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from rich.console import Console
from rich.table import Table

PROPERTY = "fault"
SECRETS = "secrets"
_SHOWN_VIOLATIONS = 10


@dataclass
class Ledger:
    """One fault of the list in docs/reliability.md. numbers: its places there. recoveries: seconds.

    note: a measured figure for the table, such as "0.8 MB a day".
    """

    numbers: str
    fault: str
    injected: int = 0
    violations: list[str] = field(default_factory=list)
    recoveries: list[float] = field(default_factory=list)
    note: str = ""

    @contextlib.contextmanager
    def injection(self, label: object) -> Iterator[None]:
        """One injected fault and all that has to hold after it; what does not is a violation."""
        self.injected += 1
        try:
            yield
        except Exception as error:
            # Counted and not raised: the table says how many of how many.
            self.violations.append(f"{label}: {type(error).__name__}: {error}")

    @contextlib.contextmanager
    def recovery(self) -> Iterator[None]:
        """The clean run after a fault, or the run that met it and survived."""
        started = time.monotonic()
        yield
        self.recoveries.append(time.monotonic() - started)

    def require_clean(self) -> None:
        """Fail unless faults were injected and none broke anything."""
        assert self.injected, f"{self.fault}: nothing was injected"
        shown = "\n".join(self.violations[:_SHOWN_VIOLATIONS])
        assert not self.violations, f"{len(self.violations)} of {self.injected} violated:\n{shown}"


Injecting = Callable[[str, str], AbstractContextManager[Ledger]]


def injecting(record_property: Callable[[str, object], None]) -> Injecting:
    """A way to open ledgers whose outcome is recorded with the test; closing one fails if it is not clean."""

    @contextlib.contextmanager
    def open_ledger(numbers: str, fault: str) -> Iterator[Ledger]:
        ledger = Ledger(numbers, fault)
        try:
            yield ledger
        except BaseException as error:
            ledger.violations.append(f"the test broke off: {type(error).__name__}: {error}")
            raise
        finally:
            record_property(PROPERTY, asdict(ledger))
        ledger.require_clean()

    return open_ledger


def faults_table(properties: list[tuple[str, Any]]) -> str:
    """All recorded ledgers as one table, in the order of the list; empty text if there are none."""
    ledgers = [Ledger(**value) for name, value in properties if name == PROPERTY]
    if not ledgers:
        return ""
    table = Table("no.", "fault", "injected", "violations", "worst recovery (s)", "note")
    for column in table.columns[2:5]:
        column.justify = "right"
    merged: dict[tuple[str, str], Ledger] = {}
    for ledger in ledgers:
        total = merged.setdefault((ledger.numbers, ledger.fault), Ledger(ledger.numbers, ledger.fault))
        total.injected += ledger.injected
        total.violations += ledger.violations
        total.recoveries += ledger.recoveries
        total.note = ledger.note or total.note
    for ledger in sorted(merged.values(), key=lambda one: (_first(one.numbers), one.fault)):
        worst = f"{max(ledger.recoveries):.2f}" if ledger.recoveries else ""
        table.add_row(
            ledger.numbers,
            ledger.fault,
            f"{ledger.injected:,}",
            f"{len(ledger.violations):,}",
            worst,
            ledger.note,
        )
    table.add_section()
    table.add_row(
        "",
        "all",
        f"{sum(one.injected for one in ledgers):,}",
        f"{sum(len(one.violations) for one in ledgers):,}",
        f"{max((seconds for one in ledgers for seconds in one.recoveries), default=0):.2f}",
    )
    scans = [value for name, value in properties if name == SECRETS]
    places, hits = sum(scan["places"] for scan in scans), sum(len(scan["hits"]) for scan in scans)
    table.add_row(
        "30", "secret found in files, output, logs after the above (places read)", f"{places:,}", f"{hits:,}"
    )
    console = Console(width=140, no_color=True)
    with console.capture() as capture:
        console.print(table)
    return capture.get()


def _first(numbers: str) -> int:
    first = numbers.split(",", maxsplit=1)[0].strip()
    return int(first) if first.isdigit() else 99
