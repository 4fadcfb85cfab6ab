"""The two ways the graph is partitioned, the time zone of its days, and the hours of a day's work.

Here: partition definitions. Not here: what a partition covers (`snapshots.building`).
"""

from __future__ import annotations

from datetime import date, datetime, time, timedelta
from zoneinfo import ZoneInfo

import dagster as dg

from muse_assets.catalog import Catalog

SEOUL = ZoneInfo("Asia/Seoul")

# A day's build starts at the one and is live by the other, Seoul time.
DAILY_BUILD, DEADLINE = time(16, 58), time(17, 30)

# end_offset=1: today's partition exists from midnight on, since it is built at 16:58 of its own day.
DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01", timezone="Asia/Seoul", end_offset=1)


def program_partitions(catalog: Catalog) -> dg.StaticPartitionsDefinition:
    """One partition a radio program."""
    return dg.StaticPartitionsDefinition([program.id for program in catalog.programs])


def seoul_today() -> date:
    """Today's date in Seoul: the partition of a run started now."""
    return datetime.now(SEOUL).date()


def due_day(now: datetime) -> date:
    """The newest day whose deadline has passed: what is live should be of that day or a later one."""
    local = now.astimezone(SEOUL)
    return local.date() - timedelta(days=local.time() < DEADLINE)
