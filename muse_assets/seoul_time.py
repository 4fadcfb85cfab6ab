"""The time zone of every date here, and the hours of a day's work.

Here: plain dates and times, so that a command knows today without Dagster, which takes a second to import.
Not here: the partitions made of such days (`partitions`).
"""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

SEOUL = ZoneInfo("Asia/Seoul")

# A day's build starts at the one and is live by the other, Seoul time.
DAILY_BUILD, DEADLINE = time(16, 58), time(17, 30)


def seoul_today() -> date:
    """Today's date in Seoul: the partition of a run started now."""
    return datetime.now(SEOUL).date()


def due_day(now: datetime) -> date:
    """The newest day whose deadline has passed: what is live should be of that day or a later one."""
    local = now.astimezone(SEOUL)
    return local.date() - timedelta(days=local.time() < DEADLINE)
