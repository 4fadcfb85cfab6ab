"""Which song is on which album, by whom, in which genre and under which name.

Here: the catalog's structure as closed forms of a song's number, so that song k is the same in a catalog
of a thousand songs and of a million, and a song key leads back to its number. Not here: vectors
(`vectors.py`), tables (`tables.py`).
Songs, discs and artists are numbered from 0; arrays are int64 (n,).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from muse_assets.sample.keyed_random import Floats, Ints, picks, uniforms
from muse_assets.sample.words import ALBUMS, ARTISTS, TITLES, Vocabulary

GENRES = 12

# Albums, EPs and singles in turn: 10 discs hold 60 songs.
_DISC_SIZES = np.array((10, 1, 6, 12, 1, 5, 11, 2, 1, 11))
_FIRST_SONG = np.cumsum(_DISC_SIZES) - _DISC_SIZES
_DISC_OF_SONG = np.repeat(np.arange(len(_DISC_SIZES)), _DISC_SIZES)
_ROUND = int(_DISC_SIZES.sum())

_GENRE_SHARES = 1 / np.arange(1, GENRES + 1)
_GENRE_BOUNDS = np.cumsum(_GENRE_SHARES / _GENRE_SHARES.sum())[:-1]


def discs_and_tracks(songs: Ints) -> tuple[Ints, Ints]:
    """The disc and the track (from 0) of each song."""
    rounds, places = np.divmod(songs, _ROUND)
    discs: Ints = _DISC_OF_SONG[places]
    return rounds * len(_DISC_SIZES) + discs, places - _FIRST_SONG[discs]


def first_songs(discs: Ints) -> Ints:
    """The first song of each disc."""
    rounds, places = np.divmod(discs, len(_DISC_SIZES))
    songs: Ints = rounds * _ROUND + _FIRST_SONG[places]
    return songs


def artists_of(seed: int, discs: Ints) -> Ints:
    """The artist of each disc.

    A disc takes any artist met so far or a new one, so early artists have many discs and most have few.
    """
    return picks(seed, "artist of disc", discs, discs // 4 + 1)


def genres_of(seed: int, artists: Ints) -> Ints:
    """The genre of each artist; genre g holds a share of about 1 / (g + 1), as in Zipf's law."""
    drawn = uniforms(seed, "genre", artists)[:, 0]
    return np.searchsorted(_GENRE_BOUNDS, drawn, side="right").astype(np.int64)


@dataclass(frozen=True)
class Phrases:
    """n names. korean: bool (n,). forms: (n,) into vocabulary.forms. words: (n, 3), one a slot."""

    vocabulary: Vocabulary
    korean: NDArray[np.bool_]
    forms: Ints
    words: Ints

    @property
    def used(self) -> NDArray[np.bool_]:
        """bool (n, 3): which slots the name's form uses."""
        by_form = [
            [f"{{{slot}}}" in korean + english for slot in range(3)]
            for korean, english in self.vocabulary.forms
        ]
        return np.array(by_form)[self.forms]

    @property
    def keys(self) -> Ints:
        """int64 (n,): equal for equal names."""
        digits = np.column_stack([self.korean, self.forms, np.where(self.used, self.words + 1, 0)])
        return digits @ 64 ** np.arange(digits.shape[1])


def titles(seed: int, songs: Ints) -> Phrases:
    """The songs' titles; nearly all are in the language that the artist sings in."""
    artists = artists_of(seed, discs_and_tracks(songs)[0])
    return _composed(TITLES, seed, "title", songs, _korean(seed, "title", songs, artists))


def album_names(seed: int, discs: Ints) -> Phrases:
    """The discs' names."""
    return _composed(ALBUMS, seed, "album", discs, _korean(seed, "album", discs, artists_of(seed, discs)))


def artist_names(seed: int, artists: Ints) -> Phrases:
    """The artists' names."""
    return _composed(ARTISTS, seed, "artist", artists, _sings_korean(seed, artists))


def spelled(phrases: Phrases) -> list[str]:
    """The names as text."""
    slots, forms = phrases.vocabulary.slots, phrases.vocabulary.forms
    return [
        forms[form][english].format(*(slots[slot][word][english] for slot, word in enumerate(words)))
        for english, form, words in zip(
            (~phrases.korean).astype(int).tolist(),
            phrases.forms.tolist(),
            phrases.words.tolist(),
            strict=True,
        )
    ]


def _sings_korean(seed: int, artists: Ints) -> NDArray[np.bool_]:
    return np.less(uniforms(seed, "language", artists)[:, 0], 0.65)


def _korean(seed: int, stream: str, keys: Ints, artists: Ints) -> NDArray[np.bool_]:
    stays = np.less(uniforms(seed, f"{stream} language", keys)[:, 0], 0.9)
    return np.equal(_sings_korean(seed, artists), stays)


def _composed(
    vocabulary: Vocabulary, seed: int, stream: str, keys: Ints, korean: NDArray[np.bool_]
) -> Phrases:
    drawn: Floats = uniforms(seed, f"{stream} name", keys, 4) ** 1.5
    sizes = [len(vocabulary.forms), *map(len, vocabulary.slots)]
    chosen = (drawn * sizes).astype(np.int64)
    return Phrases(vocabulary, korean, chosen[:, 0], chosen[:, 1:])
