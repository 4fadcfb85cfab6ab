"""Embeddings with structure: what is alike in the catalog is near in the index.

Here: a latent vector for every row (genre + artist + album + song + part, or the words of a text) and the
fixed map from latent space to a model's embedding space. Not here: the catalog (`songs.py`), bytes and
SQL (`tables.py`).

Row r of an index is a closed form of r: part r % parts of song r // parts, or disc r.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from muse_assets.catalog import IndexSpec
from muse_assets.failures import PermanentFailure
from muse_assets.sample.keyed_random import Floats, Ints, normals, picks, random_words
from muse_assets.sample.songs import (
    Phrases,
    album_names,
    artist_names,
    artists_of,
    discs_and_tracks,
    first_songs,
    genres_of,
    titles,
)
from muse_assets.sample.words import TITLES

Vectors = NDArray[np.float32]

LATENT = 16
_NOISE = 0.25
_BEND = np.float32(0.5)
# Latents in 64ths, maps in quarters, and variance 1 after the map.
_SCALE = np.float32(1 / (64 * 4 * np.sqrt(LATENT)))
# Rows at a time. Their arrays stay in the processor's cache: 1,024 floats a row took 45,000 rows/s in one
# piece and 137,000 by 32. Products of 128 rows start BLAS's threads, which on busy cores gave 7,000.
_CACHED = 32


@dataclass(frozen=True)
class Content:
    """What the rows of one index stand for.

    parts: rows a song, 0 for one row a disc. part_column: the column that numbers them from 0.
    draw: (seed, songs or discs, parts) -> latents float64 (n, LATENT) and noise keys (n,); rows with
    equal latents and keys get equal vectors.
    """

    parts: int
    part_column: str | None
    draw: Callable[[int, Ints, Ints], tuple[Floats, Ints]]

    def rows(self, songs: int) -> int:
        """How many rows the first `songs` songs have."""
        if self.parts:
            return songs * self.parts
        return int(discs_and_tracks(np.array([songs - 1]))[0][0]) + 1 if songs else 0

    def songs(self, rows: int) -> int:
        """How many songs the first `rows` rows reach into; the least number for discs."""
        if self.parts:
            return -(-rows // self.parts)
        return int(first_songs(np.array([rows - 1]))[0]) + 1 if rows else 0

    def places(self, rows: Ints) -> tuple[Ints, Ints, Ints]:
        """Disc, track and part of each row, all from 0."""
        if not self.parts:
            return rows, np.zeros_like(rows), np.zeros_like(rows)
        songs, parts = np.divmod(rows, self.parts)
        return *discs_and_tracks(songs), parts

    def vectors(self, spec: IndexSpec, seed: int, rows: Ints) -> Vectors:
        """float32 (n, spec.dimension), unit length."""
        things, parts = np.divmod(rows, self.parts or 1)
        latents, noise_keys = self.draw(seed, things, parts)
        return _embedded(spec, seed, latents, noise_keys)


def content_of(spec: IndexSpec) -> Content:
    """What the sample puts into that index; PermanentFailure for an index it does not know."""
    if spec.name not in _CONTENTS:
        raise PermanentFailure(
            f"The sample has no content for index {spec.name!r}.",
            next_step=f"write the sample with indexes of {', '.join(_CONTENTS)} only.",
        )
    return _CONTENTS[spec.name]


def moved(vectors: Vectors, spec: IndexSpec, seed: int, stream: str, keys: Ints) -> Vectors:
    """The vectors as a slightly different model would give them: a squared distance of about 0.02 away."""
    offsets = normals(seed, f"{spec.name}/{stream}", keys, spec.dimension) / np.sqrt(spec.dimension)
    return _unit(vectors + 0.15 * offsets)


def _audio(seed: int, songs: Ints, chunks: Ints) -> tuple[Floats, Ints]:
    discs, _ = discs_and_tracks(songs)
    artists = artists_of(seed, discs)
    rows = songs * 8 + chunks
    latents = (
        1.0 * normals(seed, "genre sound", genres_of(seed, artists), LATENT)
        + 0.7 * normals(seed, "artist sound", artists, LATENT)
        + 0.35 * normals(seed, "album sound", discs, LATENT)
        + 0.4 * normals(seed, "song sound", songs, LATENT)
        + 0.3 * normals(seed, "chunk sound", rows, LATENT)
    )
    return latents, rows


def _summary(seed: int, songs: Ints, summaries: Ints) -> tuple[Floats, Ints]:
    rows = songs * 8 + summaries
    return _topic(seed, songs) + 0.3 * normals(seed, "summary", rows, LATENT), rows


def _lyrics(seed: int, songs: Ints, windows: Ints, *, lines: int) -> tuple[Floats, Ints]:
    """Windows of `lines` lines, each one line further than the last, so neighbors share most of them."""
    text = sum(normals(seed, "line", songs * 16 + windows + line, LATENT) for line in range(lines))
    return _topic(seed, songs) + 0.5 * text / np.sqrt(lines), songs * 8 + windows


def _artist(seed: int, songs: Ints, _parts: Ints) -> tuple[Floats, Ints]:
    return _text(seed, artist_names(seed, artists_of(seed, discs_and_tracks(songs)[0])))


def _title(seed: int, songs: Ints, _parts: Ints) -> tuple[Floats, Ints]:
    return _text(seed, titles(seed, songs))


def _album(seed: int, discs: Ints, _parts: Ints) -> tuple[Floats, Ints]:
    return _text(seed, album_names(seed, discs))


def _topic(seed: int, songs: Ints) -> Floats:
    """What a song is about and how its artist says it: the title and one more feeling, genre and voice."""
    artists = artists_of(seed, discs_and_tracks(songs)[0])
    feelings = np.array([zlib.crc32(korean.encode()) for korean, _ in TITLES.slots[1]])
    other = feelings[picks(seed, "topic", songs, len(feelings))]
    return (
        0.6 * _meaning(seed, titles(seed, songs))
        + 0.5 * normals(seed, "word", other, LATENT)
        + 0.5 * normals(seed, "genre theme", genres_of(seed, artists), LATENT)
        + 0.9 * normals(seed, "voice", artists, LATENT)
        + 0.3 * normals(seed, "topic", songs, LATENT)
    )


def _text(seed: int, names: Phrases) -> tuple[Floats, Ints]:
    """Equal names have equal vectors, as a text model gives them."""
    latents = (
        _meaning(seed, names)
        + 0.25 * normals(seed, "form", names.forms, LATENT)
        + 0.25 * normals(seed, "language", names.korean.astype(np.int64), LATENT)
        + 0.3 * normals(seed, "wording", names.keys, LATENT)
    )
    return latents, names.keys


def _meaning(seed: int, names: Phrases) -> Floats:
    """The sum of the words' latents, unit variance; a word and its translation mean the same."""
    weights = names.used * np.array([1.0, 0.9, 0.7])
    weights /= np.linalg.norm(weights, axis=1, keepdims=True)
    meaning = np.zeros((len(names.forms), LATENT))
    for slot, pairs in enumerate(names.vocabulary.slots):
        words = np.array([zlib.crc32(korean.encode()) for korean, _ in pairs])
        meaning += weights[:, slot, None] * normals(seed, "word", words[names.words[:, slot]], LATENT)
    return meaning


def _embedded(spec: IndexSpec, seed: int, latents: Floats, noise_keys: Ints) -> Vectors:
    """Latents through the model's map, plus noise, at unit length.

    Latents in 64ths times maps of integers within +-32 stay below 2**24, so float32 products are exact in
    whatever order BLAS adds them: a row's bits do not depend on the rows beside it.
    """
    quantized = np.rint(latents * 64).clip(-1024, 1024).astype(np.float32)
    straight, bent = _maps(spec.model, spec.dimension, seed)
    vectors = np.empty((len(quantized), spec.dimension), np.float32)
    for start in range(0, len(quantized), _CACHED):
        rows = slice(start, start + _CACHED)
        curve = (quantized[rows] @ bent) * _SCALE
        noise = _noise(spec, seed, noise_keys[rows])
        line = (quantized[rows] @ straight) * _SCALE
        vectors[rows] = _unit(line + _BEND * curve / np.sqrt(1 + curve * curve) + noise)
    return vectors


def _noise(spec: IndexSpec, seed: int, keys: Ints) -> Vectors:
    """float32 (n, dimension), uniform, standard deviation `_NOISE`."""
    words = random_words(seed, f"{spec.name}/noise", keys, -(-spec.dimension // 8))
    # Little-endian wherever this runs, so that the bytes come in one order.
    signed = words.astype("<u8", copy=False).view(np.int8)[:, : spec.dimension].astype(np.float32)
    return (signed + np.float32(0.5)) * np.float32(_NOISE / 73.9)


@lru_cache(maxsize=8)
def _maps(model: str, dimension: int, seed: int) -> tuple[Vectors, Vectors]:
    """Two maps from latent to embedding space, float32 (LATENT, dimension), integers within +-32."""
    straight, bent = (
        (4 * normals(seed, f"{model}/{name}", np.arange(LATENT), dimension)).astype(np.float32)
        for name in ("straight", "bent")
    )
    return straight, bent


def _unit(vectors: NDArray[np.floating]) -> Vectors:
    # einsum in float64: a float32 sum differs in the last bit between processors.
    squares = np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)
    scaled: Vectors = (vectors * (1 / np.sqrt(squares))[:, None].astype(np.float32)).astype(np.float32)
    return scaled


_CONTENTS = {
    "vibe": Content(3, "chunk_num", _audio),
    "lyrics_summary": Content(2, "summary_num", _summary),
    "artist": Content(1, None, _artist),
    "title": Content(1, None, _title),
    "album_name": Content(0, None, _album),
    "lyrics": Content(3, "slide_num", partial(_lyrics, lines=6)),
    "lyrics_3": Content(3, "slide_num", partial(_lyrics, lines=3)),
}
