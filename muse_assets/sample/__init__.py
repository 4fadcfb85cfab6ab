"""A made-up music catalog in the real schema, so that everything can be tried without a real one.

Here: a deterministic catalog of songs, vectors with structure worth searching, and writing both into any
SQL database, for newcomers, tests and benchmarks. Not here: anything the pipeline itself needs; no other
package imports this one.

    keyed_random -> songs (words) -> vectors -> tables -> day_one, further_days, embedded
"""

from muse_assets.sample.day_one import SampleSummary, sample_written, write_sample
from muse_assets.sample.embedded import write_embedded_sample
from muse_assets.sample.further_days import DaySummary, TableDay, write_days

__all__ = [
    "DaySummary",
    "SampleSummary",
    "TableDay",
    "sample_written",
    "write_days",
    "write_embedded_sample",
    "write_sample",
]
