"""The seven indexes and six programs: the only place that names an index, a table or a program.

Here: what an index is made from, its shape, its gates and its file and key names (the search server's
contract). Not here: where databases and directories are (`settings.py`). An installation changes fields
with a TOML file named by MUSE_CATALOG:

    [index.vibe]
    table = "tb_embedding_clap_v2_h"
    nlist = 2048
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from datetime import date
from pathlib import Path
from typing import Any, Literal

from muse_assets.failures import PermanentFailure

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,63}")
_NAME = re.compile(r"[a-z][a-z0-9_]{0,31}")

Encoding = Literal["npy", "float32", "json"]


def checked_identifier(name: str) -> str:
    """Return `name` if it is safe as an SQL table or column name, else raise PermanentFailure."""
    if not _IDENTIFIER.fullmatch(name):
        raise PermanentFailure(
            f"{name!r} is not a table or column name (letters, digits, underscore; at most 64).",
            next_step="correct the name in the catalog file (MUSE_CATALOG).",
        )
    return name


@dataclass(frozen=True)
class IndexSpec:
    """One index: its source column, its IVF-PQ shape, its gates.

    dimension: floats per vector. m: PQ sub-quantizers, so bytes per code at nbits 8. nlist: inverted
    lists; None follows the table (`ivfpq.training.choose_nlist`). nprobe: lists that plain search probes,
    stored in the file; None is measured. id_offset: FAISS id = idx + id_offset. verify_days: within how many
    days a daily build digests every part of the table anew (`snapshots.rotation`).
    """

    name: str
    model: Literal["clap", "bgem3"]
    legacy_type: str
    dimension: int
    table: str
    embedding_column: str
    song_key: tuple[str, ...] = ("disccommseq", "trackno")
    encoding: Encoding = "npy"
    created_at_column: str = "created_at"
    nlist: int | None = None
    m: int = 64
    nbits: int = 8
    nprobe: int | None = None
    metric: str = "l2"
    normalize: bool = False
    id_offset: int = -1
    # PQ64 alone caps recall@10 at 0.71 (1024-d) to 0.79 (512-d) on real text vectors, so an absolute
    # gate near 1 could never pass. Below 0.6 an index has lost its structure.
    recall_gate: float = 0.60
    # Of the recall that probing every list would give, the share the stored nprobe has to reach.
    probe_share: float = 0.98
    # 90 % identical rows measure 13, a shifted catalog 2: past 8 the lists no longer divide the work.
    max_imbalance: float = 8.0
    # A digest is a scan: at 100M rows of 4 KB, 2 to 4 minutes of the database's CPU, or 400 GB read cold.
    verify_days: int = 1
    max_rejected_share: float = 0.01
    max_shrink_share: float = 0.10
    # A batch corrects some rows; another model embeds them all. 1 takes any vectors.
    max_replaced_share: float = 0.5
    # recall@10 below the live file's, on the same queries. A day moves it by tenths of a point, half the
    # lists in the stored nprobe by up to 2 points.
    max_recall_drop: float = 0.05
    # The same recording on several albums is one vector more than once; past this a job writes one for many.
    max_duplicate_share: float = 0.5
    max_norm_outlier_share: float = 0.005
    # Of the dimensions; a model that lost some of its inputs writes the same numbers for every song.
    max_constant_share: float = 0.02
    # Of a program's songs, those with a row: an instrumental has no lyrics, a new song no embedding yet.
    min_coverage: float = 0.8
    # Whether a drifted table is trained anew by itself, once, at night (`automation.build_retrain_sensor`).
    auto_retrain: bool = False
    # The search server throws hits beyond this squared L2 distance away.
    distance_cut: float | None = None

    def __post_init__(self) -> None:
        for name in (self.table, self.embedding_column, self.created_at_column, *self.song_key):
            checked_identifier(name)
        problems = []
        if not _NAME.fullmatch(self.name):
            problems.append(f"name {self.name!r} is not a lowercase identifier")
        if self.metric != "l2":
            problems.append(f"metric {self.metric!r} is not supported: the server reads squared L2 distances")
        if self.encoding not in ("npy", "float32", "json"):
            problems.append(f"encoding {self.encoding!r} is none of npy, float32, json")
        if self.dimension < 1 or self.m < 1 or self.dimension % self.m:
            problems.append(f"dimension {self.dimension} is not a multiple of m {self.m}")
        if not 1 <= self.nbits <= 8:
            problems.append(f"nbits {self.nbits} is not within 1..8")
        if self.nprobe is not None and not 1 <= self.nprobe <= (self.nlist or self.nprobe):
            problems.append(f"nprobe {self.nprobe} is not within 1..nlist")
        counts = {"nlist": self.nlist, "verify_days": self.verify_days}
        problems += [
            f"{name} {count} is not a positive whole number"
            for name, count in counts.items()
            if count is not None and not (isinstance(count, int) and count >= 1)
        ]
        if not 1 <= len(self.song_key) <= 2:
            problems.append("song_key takes the disc column, or disc and track")
        for share in (
            "recall_gate",
            "probe_share",
            "max_rejected_share",
            "max_shrink_share",
            "max_replaced_share",
            "max_recall_drop",
            "max_duplicate_share",
            "max_norm_outlier_share",
            "max_constant_share",
            "min_coverage",
        ):
            if not 0 <= getattr(self, share) <= 1:
                problems.append(f"{share} {getattr(self, share)} is not within 0..1")
        if problems:
            raise PermanentFailure(
                f"Catalog entry {self.name!r}: {'; '.join(problems)}.",
                next_step="correct the entry in the catalog file (MUSE_CATALOG) or in catalog.py.",
            )

    @property
    def cluster_file(self) -> str:
        """Trained, empty index, in the work directory."""
        return f"muse_{self.name}_cluster.index"

    def snapshot_file(self, day: date) -> str:
        """Dated snapshot, in the work directory; the date is Seoul's."""
        return f"muse_{self.name}_{day:%Y%m%d}.index"

    @property
    def live_file(self) -> str:
        """What the search server loads at start, in the server directory."""
        return f"muse_{self.name}.index"

    @property
    def fallback_file(self) -> str:
        """What the search server loads when the live file fails, in the same directory."""
        return f"muse_{self.name}_backup.index"


@dataclass(frozen=True)
class Program:
    """One radio program: `id` is part of its table name and of its Redis keys."""

    id: str
    title: str

    def __post_init__(self) -> None:
        if not _NAME.fullmatch(self.id):
            raise PermanentFailure(
                f"Program id {self.id!r} is not a lowercase identifier.",
                next_step="correct the id in the catalog.",
            )

    @property
    def song_table(self) -> str:
        """The program's own table in the playlist database (the layout `song_tables`)."""
        return f"tb_song_{self.id}_m"

    def ids_key(self, index: str) -> str:
        """Redis key of the program's FAISS ids in one index."""
        return f"playlist_idx:{self.id}_{index}"

    @property
    def update_key(self) -> str:
        """Redis key of the time of the program's last refresh."""
        return f"playlist_update:{self.id}"

    @property
    def meta_key(self) -> str:
        """Redis key of what the id lists are: counts, live contents, the advised way to search them."""
        return f"playlist_meta:{self.id}"


@dataclass(frozen=True)
class Catalog:
    """All indexes and programs, in the order in which people list them."""

    indexes: tuple[IndexSpec, ...]
    programs: tuple[Program, ...]

    def index(self, name: str) -> IndexSpec:
        """The index of that name; PermanentFailure names the known ones."""
        spec: IndexSpec = _by(self.indexes, "name", name, "index")
        return spec

    def index_of_legacy(self, model: str, legacy_type: str) -> IndexSpec:
        """The index that the legacy verbs call `--model` and `--type`."""
        for spec in self.indexes:
            if (spec.model, spec.legacy_type) == (model, legacy_type):
                return spec
        known = ", ".join(f"{s.model}/{s.legacy_type}" for s in self.indexes)
        raise PermanentFailure(
            f"No index has --model {model} --type {legacy_type}.", next_step=f"use one of {known}."
        )

    def program(self, program_id: str) -> Program:
        """The program of that id; PermanentFailure names the known ones."""
        program: Program = _by(self.programs, "id", program_id, "program")
        return program


def _by(items: tuple[Any, ...], field: str, value: str, what: str) -> Any:
    for item in items:
        if getattr(item, field) == value:
            return item
    known = ", ".join(getattr(item, field) for item in items)
    raise PermanentFailure(f"There is no {what} {value!r}.", next_step=f"use one of {known}.")


# The server cuts artist, title and lyrics hits at this distance.
_CUT = 0.9
# Every song of an artist has the same name's vector.
_ANY = 1.0

CATALOG = Catalog(
    indexes=(
        IndexSpec("vibe", "clap", "song", 512, "tb_embedding_clap_h", "embedding_result"),
        IndexSpec(
            "lyrics_summary",
            "clap",
            "lyrics_summary",
            512,
            "tb_embedding_clap_lyrics_summary_h",
            "embedding_result",
        ),
        IndexSpec(
            "artist",
            "bgem3",
            "artist",
            1024,
            "tb_embedding_bgem3_artist_h",
            "artist_embedding",
            max_duplicate_share=_ANY,
            distance_cut=_CUT,
        ),
        IndexSpec(
            "title",
            "bgem3",
            "song_name",
            1024,
            "tb_embedding_bgem3_song_name_h",
            "song_name_embedding",
            max_duplicate_share=_ANY,
            distance_cut=_CUT,
        ),
        IndexSpec(
            "album_name",
            "bgem3",
            "album_name",
            1024,
            "tb_embedding_bgem3_album_name_h",
            "album_name_embedding",
            max_duplicate_share=_ANY,
            song_key=("disccommseq",),
        ),
        IndexSpec(
            "lyrics",
            "bgem3",
            "lyrics_slide",
            1024,
            "tb_embedding_bgem3_lyrics_slide_h",
            "embedding_result",
            distance_cut=_CUT,
        ),
        IndexSpec(
            "lyrics_3",
            "bgem3",
            "lyrics_3_slide",
            1024,
            "tb_embedding_bgem3_lyrics_3_slide_h",
            "embedding_result",
            distance_cut=_CUT,
        ),
    ),
    programs=(
        Program("drp", "드라이브 뮤직"),
        Program("fgy", "FM4U 굿모닝"),
        Program("k2k", "키스더라디오"),
        Program("mdi", "매일밤 음악여행"),
        Program("nmg", "남녀뮤직"),
        Program("rtc", "라디오텔레콤"),
    ),
)


def load_catalog(overrides: Path | None = None) -> Catalog:
    """The catalog with an installation's TOML overrides, if any, applied field by field.

    Raises PermanentFailure for an unreadable file, an unknown index or field, or a bad value.
    """
    if overrides is None:
        return CATALOG
    try:
        tables: Mapping[str, Any] = tomllib.loads(overrides.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PermanentFailure(
            f"Catalog file {overrides} cannot be read: {error}.",
            next_step="correct the file, or unset MUSE_CATALOG.",
        ) from error
    if unknown := set(tables) - {"index"}:
        raise PermanentFailure(
            f"Catalog file {overrides} has unknown tables {sorted(unknown)}.",
            next_step="use [index.<name>] tables.",
        )
    known = {field.name for field in fields(IndexSpec)} - {"name"}
    changed = {}
    for name, values in tables.get("index", {}).items():
        spec = CATALOG.index(name)
        if unknown := set(values) - known:
            raise PermanentFailure(
                f"Catalog file {overrides}, [index.{name}]: unknown fields {sorted(unknown)}.",
                next_step=f"use fields of {sorted(known)}.",
            )
        try:
            given: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
            changed[name] = replace(spec, **given)
        except TypeError as error:
            raise PermanentFailure(
                f"Catalog file {overrides}, [index.{name}]: {error}.",
                next_step="give each field a value of the type that catalog.py shows.",
            ) from error
    return replace(CATALOG, indexes=tuple(changed.get(spec.name, spec) for spec in CATALOG.indexes))
