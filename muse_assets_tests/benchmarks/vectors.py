"""Vectors to measure on: three sets of different character, each a pure function of its arguments.

Here: arrays. Not here: putting them into a database (`tables.py`).

clustered: topics of very unequal size, each of low rank. folded: no clusters at all, a smooth surface of
ten dimensions. text: real words, so real neighbors, near-copies and topics.
"""

from __future__ import annotations

import os
import re
import sysconfig
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_DOCSTRING = re.compile(rb'"""(.*?)"""', re.DOTALL)
_WORD = re.compile(rb"[a-z]{2,}")
# 2.6 M words of docstrings: a window of 12 every 4 gives 650k rows, each sharing words with its neighbors.
_WINDOW, _STRIDE = 12, 4
_VOCABULARY = 20_000
_SVD_ROWS = 60_000


def clustered(
    rows: int, dimension: int, seed: int = 1, *, topics: int = 400, latent: int = 32
) -> NDArray[np.float32]:
    """Unit vectors (rows, dimension) float32 of a mixture: topics of unequal size, each of low rank."""
    shape = np.random.default_rng(0)
    centers = shape.standard_normal((topics, dimension), np.float32) / np.sqrt(dimension)
    spread = 0.25 * shape.standard_normal((8, latent, dimension), np.float32) / np.sqrt(dimension)
    weights = 1 / np.arange(1, topics + 1)

    def draw(block: NDArray[np.float32], random: np.random.Generator) -> None:
        random.standard_normal(dtype=np.float32, out=block)
        block *= np.float32(0.25 / np.sqrt(dimension))
        topic = random.choice(topics, len(block), p=weights / weights.sum())
        block += centers[topic]
        for kind in range(len(spread)):
            mine = np.flatnonzero(topic % len(spread) == kind)
            block[mine] += random.standard_normal((len(mine), latent), np.float32) @ spread[kind]

    return _drawn(rows, dimension, seed, draw)


def folded(rows: int, dimension: int, seed: int = 1, *, latent: int = 10) -> NDArray[np.float32]:
    """Unit vectors (rows, dimension) float32 as FAISS's SyntheticDataset has them: sines of a plane."""
    shape = np.random.default_rng(0)
    plane = shape.random((latent, dimension), np.float32) * (shape.random(dimension, np.float32) * 4 + 0.1)

    def draw(block: NDArray[np.float32], random: np.random.Generator) -> None:
        np.sin(random.standard_normal((len(block), latent), np.float32) @ plane, out=block)

    return _drawn(rows, dimension, seed, draw)


def text(rows: int, dimension: int, seed: int = 1) -> NDArray[np.float32]:
    """Unit vectors (rows, dimension) float32 of real text: latent semantic analysis of docstrings.

    Windows of twelve words of the docstrings of the standard library and of the installed packages, by
    TF-IDF and a truncated SVD, in random order. Raises ValueError when there are fewer windows.
    """
    words, vocabulary = _numbered_words()
    starts = np.arange(0, len(words) - _WINDOW, _STRIDE)
    every = words[starts[:, None] + np.arange(_WINDOW)]
    # Rows without a common word were all zeros, and so the nearest neighbors of one row in ten.
    every = every[(every < vocabulary).all(axis=1)]
    # Of equal rows any ten are right: a licence in every file would measure nothing.
    every = np.unique(np.sort(every, axis=1), axis=0)
    if rows > len(every):
        raise ValueError(f"the docstrings have {len(every):,} windows, not {rows:,}")
    random = np.random.default_rng(seed)
    windows = every[random.permutation(len(every))[:rows]]
    found_in = np.bincount(words, minlength=vocabulary + 1)
    weight = np.log(len(words) / np.maximum(found_in, 1)).astype(np.float32)
    weight[vocabulary] = 0  # words too rare to tell anything
    terms = _term_vectors(windows[:_SVD_ROWS], weight, dimension, random)
    found = np.empty((rows, dimension), np.float32)
    _in_blocks(rows, lambda at: _to_unit(_sum_of_terms(windows[at], terms, found[at])))
    return found


def _numbered_words() -> tuple[NDArray[np.int64], int]:
    """The words of the docstrings in order, as numbers by frequency; rare ones are all the last number."""
    standard, installed = (Path(sysconfig.get_path(name)) for name in ("stdlib", "purelib"))
    files = [path for path in sorted(standard.rglob("*.py")) if "site-packages" not in path.parts]
    files += sorted(installed.rglob("*.py"))
    words = [
        word
        for path in files
        for docstring in _DOCSTRING.findall(path.read_bytes())
        for word in _WORD.findall(docstring.lower())
    ]
    common = sorted(Counter(words).items(), key=lambda item: (-item[1], item[0]))[:_VOCABULARY]
    number = {word: place for place, (word, _) in enumerate(common)}
    return np.fromiter((number.get(word, len(common)) for word in words), np.int64), len(common)


def _term_vectors(
    windows: NDArray[np.int64], weight: NDArray[np.float32], dimension: int, random: np.random.Generator
) -> NDArray[np.float32]:
    """weight * the right singular vectors (terms, dimension) of the TF-IDF, by subspace iteration."""
    basis = random.standard_normal((len(weight), dimension), np.float32)
    order = np.argsort(windows, axis=None, kind="stable")
    rows_by_term = order // windows.shape[1]
    ends = np.concatenate([[0], np.cumsum(np.bincount(windows.ravel(), minlength=len(weight)))])
    scores = np.empty((len(windows), dimension), np.float32)
    for _ in range(2):
        weighted = weight[:, None] * np.linalg.qr(basis)[0]
        _in_blocks(len(windows), partial(_score, windows, weighted, scores))
        for term in range(len(weight)):
            basis[term] = weight[term] * scores[rows_by_term[ends[term] : ends[term + 1]]].sum(axis=0)
    directions: NDArray[np.float32] = np.linalg.qr(basis)[0]
    return np.multiply(weight[:, None], directions)


def _score(
    windows: NDArray[np.int64], terms: NDArray[np.float32], out: NDArray[np.float32], at: slice
) -> None:
    _sum_of_terms(windows[at], terms, out[at])


def _sum_of_terms(
    windows: NDArray[np.int64], terms: NDArray[np.float32], out: NDArray[np.float32]
) -> NDArray[np.float32]:
    out[:] = terms[windows[:, 0]]
    for place in range(1, windows.shape[1]):
        out += terms[windows[:, place]]
    return out


def _to_unit(block: NDArray[np.float32]) -> None:
    block /= np.maximum(np.linalg.norm(block, axis=1, keepdims=True), 1e-12)


def _drawn(
    rows: int, dimension: int, seed: int, draw: Callable[[NDArray[np.float32], np.random.Generator], None]
) -> NDArray[np.float32]:
    """Unit vectors that `draw` puts into each block, from the block's own generator."""
    found = np.empty((rows, dimension), np.float32)

    def fill(at: slice) -> None:
        block = found[at]
        draw(block, np.random.default_rng([seed, at.start]))
        _to_unit(block)

    _in_blocks(rows, fill)
    return found


def _in_blocks(rows: int, work: Callable[[slice], object], block: int = 8192) -> None:
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(work, (slice(at, min(at + block, rows)) for at in range(0, rows, block))))
