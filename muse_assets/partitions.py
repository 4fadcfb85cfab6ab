"""The two ways the graph is partitioned.

Here: partition definitions. Not here: what a partition covers (`snapshots.building`), or what day it is
(`seoul_time`).
"""

from __future__ import annotations

import dagster as dg

from muse_assets.catalog import Catalog

# end_offset=1: today's partition exists from midnight on, since it is built at 16:58 of its own day.
DAYS = dg.DailyPartitionsDefinition(start_date="2026-01-01", timezone="Asia/Seoul", end_offset=1)


def program_partitions(catalog: Catalog) -> dg.StaticPartitionsDefinition:
    """One partition a radio program."""
    return dg.StaticPartitionsDefinition([program.id for program in catalog.programs])
