"""Embedding tables: rows, digests, samples and vectors, through SQLAlchemy.

Not here: FAISS (`ivfpq`), or deciding what goes into an index (`snapshots`).
"""
