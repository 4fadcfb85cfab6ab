"""How each outside system is reached: one module each, with its failures put into an operator's words.

Not here: what is asked of them (`embeddings`, `playlists`), or Dagster's view of them (`resources.py`).
"""
