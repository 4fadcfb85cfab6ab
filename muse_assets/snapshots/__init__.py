"""Dated snapshots: one index file a day that equals its table, with the facts that prove it.

This layer joins `embeddings` (SQL) and `ivfpq` (FAISS): the trained cluster, the bucket sync, the gate.
Not here: putting a snapshot where the server reads it (`publishing`).
"""
