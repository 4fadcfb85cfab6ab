"""Vectors to measure on: made ones with the structure of embeddings, and real text embeddings.

Here: arrays. Not here: putting them into a database (`tables.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_BLOCK = 65_536


def clustered(
    rows: int, dimension: int, seed: int = 1, *, topics: int = 400, latent: int = 32
) -> NDArray[np.float32]:
    """Unit vectors (rows, dimension) float32 of a mixture: topics of unequal size, each of low rank."""
    shape = np.random.default_rng(0)
    centers = shape.standard_normal((topics, dimension), np.float32) / np.sqrt(dimension)
    spread = shape.standard_normal((8, latent, dimension), np.float32) / np.sqrt(dimension)
    weights = 1 / np.arange(1, topics + 1)
    random = np.random.default_rng(seed)
    found = np.empty((rows, dimension), np.float32)
    for start in range(0, rows, _BLOCK):
        block = found[start : start + _BLOCK]
        topic = random.choice(topics, len(block), p=weights / weights.sum())
        block[:] = centers[topic]
        for kind in range(len(spread)):
            mine = topic % len(spread) == kind
            block[mine] += 0.25 * random.standard_normal((int(mine.sum()), latent), np.float32) @ spread[kind]
        block += 0.25 / np.sqrt(dimension) * random.standard_normal(block.shape, np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return found
