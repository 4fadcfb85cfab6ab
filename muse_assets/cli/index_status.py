"""Whether an index is fresh, exact and live, in an operator's words.

Here: pure answers from facts that were read before, at a given time. Not here: reading them, or printing
(`inspecting`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta

from muse_assets.manifest import Manifest
from muse_assets.publishing.live import ADOPTED, LiveFile
from muse_assets.publishing.pinning import Pin
from muse_assets.seoul_time import DAILY_BUILD, DEADLINE, SEOUL, due_day
from muse_assets.snapshots.gate import ID_PARITY

FRESH, EXACT = "fresh", "yes"


@dataclass(frozen=True)
class IndexStatus:
    """What was found of one index. live: None if there is none; built: facts of the newest snapshot."""

    index: str
    live: LiveFile | None
    built: Manifest | None
    pin: Pin | None

    @property
    def facts(self) -> Manifest | None:
        """Of the live file; None if there is none or its bytes are unknown."""
        return self.live.manifest if self.live else None

    @property
    def live_day(self) -> str:
        """The day of the live rows, or what there is instead."""
        if self.facts is None:
            return "DAMAGED" if self.live else "none"
        return "unknown" if self.facts.mode == ADOPTED else self.facts.partition

    def freshness(self, now: datetime) -> str:
        """ "fresh", "due by 17:30" while the day's build runs, "late since" the first deadline missed."""
        if self.facts is None or self.facts.mode == ADOPTED:
            return "unknown"
        local, day = now.astimezone(SEOUL), self.facts.day
        if day < due_day(now):
            missed = day + timedelta(days=1)
            return f"late since {'' if missed == local.date() else f'{missed} '}{DEADLINE:%H:%M}"
        if day < local.date() and local.time() >= DAILY_BUILD:
            return f"due by {DEADLINE:%H:%M}"
        return FRESH

    @property
    def table_rows(self) -> int | None:
        """Rows of the table when the live file was built, the rejected ones too; None if nobody counted."""
        return self.facts.checks.get(ID_PARITY, {}).get("table_rows") if self.facts else None

    @property
    def exact(self) -> str:
        """Whether the ids in the live file were the table's valid rows, no more and no fewer."""
        if self.facts is None or self.table_rows is None:
            return "unknown"
        same = self.facts.rows + sum(self.facts.rejected.values()) == self.table_rows
        return EXACT if same and self.facts.checks[ID_PARITY]["passed"] else "NO"

    def troubles(self, now: datetime) -> list[str]:
        """Why it is not fresh, exact and live; empty if it is."""
        if self.live is None:
            return ["nothing is live"]
        if self.facts is None:
            return ["the live file is not what was published"]
        found = [f"of {self.live_day}, {fresh}"] if (fresh := self.freshness(now)) != FRESH else []
        if self.exact != EXACT:
            found.append(f"exact: {self.exact}")
        if self.pin:
            found.append(self.pin.what)
        elif self.built and self.built.sha256 != self.live.sha256 and self.built.day >= self.facts.day:
            found.append(f"its newest build of {self.built.partition} is not live")
        return found


def answer(statuses: Sequence[IndexStatus], now: datetime) -> str:
    """One sentence: are all of them fresh, exact and live?"""
    troubles = {status.index: found for status in statuses if (found := status.troubles(now))}
    good, total = len(statuses) - len(troubles), len(statuses)
    if not troubles:
        days = sorted({status.live_day for status in statuses})
        who = f"All {total} are" if total > 1 else f"{statuses[0].index} is"
        return f"{who} fresh, exact and live, of {' and '.join(days)}."
    who = f"{good or 'None'} of {total} {'is' if good == 1 else 'are'}" if total > 1 else "It is not"
    why = " ".join(f"{index}: {'; '.join(found)}." for index, found in troubles.items())
    return f"{who} fresh, exact and live. {why}"
