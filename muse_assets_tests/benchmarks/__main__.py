"""`python -m muse_assets_tests.benchmarks [NAME ...]`: run benchmarks, print ratios and how costs grow."""

from __future__ import annotations

import importlib
import pkgutil
import sys
from collections.abc import Iterator

import click
from rich.console import Console

import muse_assets_tests.benchmarks as here
from muse_assets_tests.benchmarks.measuring import Row, Series, exponent, print_series, print_table

_PREFIX = "bench_"
NAMES = sorted(
    m.name[len(_PREFIX) :] for m in pkgutil.iter_modules(here.__path__) if m.name.startswith(_PREFIX)
)


@click.command()
@click.argument("names", nargs=-1, type=click.Choice(NAMES))
@click.option("--scale", type=float, default=1.0, help="Rows as a share of the full size; 0.02 is a trial.")
def bench(names: tuple[str, ...], scale: float) -> None:
    """Run the benchmarks NAMES, or all of them; exit with 1 when one misses its reach at full size."""
    console = Console(width=None if sys.stdout.isatty() else 200)
    progress = Console(stderr=True)

    def measured() -> Iterator[Row | Series]:
        for name in names or NAMES:
            for found in importlib.import_module(f"{here.__name__}.{_PREFIX}{name}").rows(scale):
                progress.print(f"{name}: {found.what}: {_told(found)}")
                yield found

    every = list(measured())
    ratios = print_table((one for one in every if isinstance(one, Row)), console)
    growth = print_series((one for one in every if isinstance(one, Series)), console)
    if not (ratios and growth) and scale == 1.0:
        sys.exit(1)


def _told(found: Row | Series) -> str:
    if isinstance(found, Row):
        return f"{found.ratio:.2f}x {found.note}"
    return f"grows with {found.grows} to the {exponent(found.sizes, found.values(found.metrics[0])):.2f}"


if __name__ == "__main__":
    bench()
