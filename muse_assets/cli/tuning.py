"""The command that chooses an index's shape: candidates measured on a sample of its table.

Here: words, a table and a picture for a terminal. Not here: the candidates or their measurement
(`ivfpq.tuning`).
"""

from __future__ import annotations

import io
import math
import string
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.console import Console

    from muse_assets.catalog import IndexSpec
    from muse_assets.embeddings.sampling import Sample as Drawn
    from muse_assets.ivfpq.tuning import Operating, Sample
    from muse_assets.settings import Settings
    from muse_assets.snapshots.progress import Progress

_SEED = 20241128
# Beside the code: its id, and the two floats that RaBitQ keeps.
_BESIDE_CODES = 16
_PICTURE_WIDTH, _PICTURE_HEIGHT = 90, 20
_SVG_WIDTH = 180
_COLUMNS = (
    *("line", "codes", "lists", "coarse", "nprobe", "recall@10", "codes scanned", "ms", "bytes"),
    *("GB in 32", "train s", "fill s", "present server", "built here", "chosen"),
)

Line = tuple[str, int, str]
"""One curve: codes, lists, coarse quantizer."""


@click.command(short_help="Choose an index's shape: recall, time and bytes of many.")
@click.argument("index")
@click.option(
    "--recall", type=click.FloatRange(0, 1), default=0.9, show_default=True, help="recall@10 wanted."
)
@click.option(
    "--bytes-per-vector",
    "bytes_a_vector",
    type=click.IntRange(min=9),
    help="At most, code and id (8 bytes); default: the catalog's code and 16.",
)
@click.option(
    "--rows", type=click.IntRange(min=200), default=100_000, show_default=True, help="Rows to sample."
)
@click.option(
    "--queries", type=click.IntRange(min=10), default=500, show_default=True, help="Rows held out to ask."
)
@click.option(
    "--any-server", is_flag=True, help="Try OPQ and RaBitQ too, for another server than the present."
)
@click.option(
    "--svg",
    type=click.Path(dir_okay=False, writable=True, path_type=Path),
    help="Write table and picture to this file too.",
)
def tune(
    index: str,
    recall: float,
    bytes_a_vector: int | None,
    rows: int,
    queries: int,
    any_server: bool,
    svg: Path | None,
) -> None:
    """Try shapes of an index on random rows of its table; no index is written or replaced.

    Prints what no other shape beats in recall@10, time and bytes, and the lines for the file of MUSE_CATALOG.
    """
    from rich.console import Console

    from muse_assets.cli.configuring import read_settings
    from muse_assets.cli.running import progress
    from muse_assets.cli.summary import terminal
    from muse_assets.ivfpq.tuning import Tuner, candidate_shapes, choose, pareto, split_sample

    settings = read_settings()
    spec = settings.load_catalog().index(index)
    allowed = bytes_a_vector or -(-spec.m * spec.nbits // 8) + _BESIDE_CODES
    found: list[Operating] = []
    with progress() as report:
        drawn = _draw(settings, spec, rows + queries, report)
        sample = split_sample(drawn.vectors, drawn.table_rows, queries)
        shapes = candidate_shapes(spec.dimension, sample, allowed, any_server=any_server)
        tuner = Tuner(sample)
        for number, shape in enumerate(shapes):
            report(f"{shape.codes} in {shape.nlist:,} lists", number, len(shapes))
            found += tuner.measure(shape)
    chosen = choose(found, recall)
    table = [(one, one == chosen) for one in pareto(found)]
    if not any(is_chosen for _, is_chosen in table):
        table.append((chosen, True))
    _show(terminal(), table, found)
    if svg is not None:
        drawing = Console(record=True, width=_SVG_WIDTH, file=io.StringIO(), highlight=False)
        _show(drawing, table, found)
        drawing.save_svg(str(svg), title=f"muse tune {spec.name}")
    click.echo(_meaning(sample, chosen, recall, allowed))
    click.echo(f"\nFor the file of MUSE_CATALOG; then retrain {spec.name}, build and deploy:\n")
    click.echo(catalog_lines(spec, sample, chosen))


def catalog_lines(spec: IndexSpec, sample: Sample, chosen: Operating) -> str:
    """The index's block for the catalog's TOML file, its figures as a comment."""
    from muse_assets.ivfpq.training import choose_nlist

    shape = chosen.shape
    follows = shape.nlist == choose_nlist(sample.table_rows)
    lines = [
        f"# muse tune, {date.today()}, on {len(sample.rows):,} of {sample.table_rows:,} rows: recall@10 "
        f"{chosen.recall:.3f}, {chosen.codes_scanned:,.0f} codes and {chosen.milliseconds:.2f} ms a query, "
        f"{chosen.bytes_a_vector} bytes a vector",
        f"[index.{spec.name}]",
        f"# nlist follows the table: {shape.nlist:,} now" if follows else f"nlist = {shape.nlist}",
        f"m = {shape.m}",
        f"nbits = {shape.nbits}",
        f"nprobe = {chosen.nprobe}",
    ]
    # The gate asks other queries: recall differs by chance, rarely by two standard errors.
    room = 1 / math.sqrt(len(sample.queries))
    if chosen.recall < spec.recall_gate + room:
        gate = math.floor(100 * (chosen.recall - room)) / 100
        lines.append(f"recall_gate = {max(gate, 0.0)}  # {spec.recall_gate} may refuse it")
    return "\n".join(lines)


def _draw(settings: Settings, spec: IndexSpec, wanted: int, report: Progress) -> Drawn:
    """Random usable rows of the index's table."""
    from muse_assets.connections.databases import engine_for
    from muse_assets.embeddings.sampling import sample_vectors

    return sample_vectors(
        engine_for(settings.embedding_url()),
        spec,
        lambda rows: wanted,
        doing=f"sampling {spec.table} to tune {spec.name}",
        seed=_SEED,
        on_rows=lambda done, target: report("sampling", done, target),
    )


def _show(console: Console, table: Sequence[tuple[Operating, bool]], found: Sequence[Operating]) -> None:
    """The table, and the picture of everything that was measured."""
    from muse_assets.cli.summary import show_rows

    letters = _letters(found)
    rows = [
        (
            letters[_line(one)],
            one.shape.codes,
            one.shape.nlist,
            one.coarse,
            one.nprobe,
            f"{one.recall:.3f}",
            f"{one.codes_scanned:,.0f}",
            f"{one.milliseconds:.3f}",
            one.bytes_a_vector,
            f"{one.server_bytes / 1e9:.1f}",
            f"{one.train_seconds:.1f}",
            f"{one.fill_seconds:.1f}",
            "yes" if one.shape.present_server else "no",
            "yes" if one.buildable else "no",
            "<--" if chosen else "",
        )
        for one, chosen in table
    ]
    show_rows(console, _COLUMNS, rows)
    console.print(_picture(found, letters), markup=False)


def _line(one: Operating) -> Line:
    return one.shape.codes, one.shape.nlist, one.coarse


def _letters(found: Sequence[Operating]) -> dict[Line, str]:
    """A letter for each curve of the picture, the same in the table."""
    return dict(zip(dict.fromkeys(map(_line, found)), string.ascii_letters, strict=False))


def _picture(found: Sequence[Operating], letters: Mapping[Line, str]) -> str:
    """Recall against milliseconds, these logarithmic: one curve a shape and coarse quantizer, by nprobe."""
    import plotille

    figure = plotille.Figure()
    figure.width, figure.height = _PICTURE_WIDTH, _PICTURE_HEIGHT
    figure.with_colors, figure.origin = False, False
    figure.x_label, figure.y_label = "ms", "recall@10"
    figure.x_ticks_fkt = lambda value, _: f"{10**value:.2g}"
    figure.y_ticks_fkt = lambda value, _: f"{value:.2f}"
    for line, letter in letters.items():
        mine = [one for one in found if _line(one) == line]
        codes, lists, coarse = line
        figure.plot(
            [math.log10(one.milliseconds) for one in mine],
            [one.recall for one in mine],
            marker=letter,
            label=f"{codes}, {lists:,} lists, {coarse}",
        )
    picture: str = figure.show(legend=True)
    return picture


def _meaning(sample: Sample, chosen: Operating, recall: float, allowed: int) -> str:
    """What the figures stand for, whether the wish is met, and what the server has to know."""
    from muse_assets.ivfpq.tuning import SERVER_PROCESSES

    lines = [
        f"Recall is that of {len(sample.queries):,} queries in {len(sample.rows):,} of {sample.table_rows:,} "
        f"rows; codes scanned, ms of one thread, GB in {SERVER_PROCESSES} server processes and seconds to "
        "fill are the whole table's."
    ]
    if chosen.recall < recall:
        lines.append(
            f"No shape of {allowed} bytes a vector or less reaches recall@10 {recall:g}: nearest comes "
            f"{chosen.recall:.3f}. More lists do not change that, more bytes do (--bytes-per-vector)."
        )
    lines.append(
        f"The server: IndexIVFPQ over {'an' if chosen.coarse == 'HNSW' else 'a'} {chosen.coarse} quantizer, "
        f"squared L2. Plain search takes nprobe {chosen.nprobe} from the file, a playlist's search "
        f"{max(chosen.nprobe, 100)}."
    )
    return "\n".join(lines)
