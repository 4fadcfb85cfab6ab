"""IVF-PQ indexes: training, encoding, contents, files and quality, on numpy arrays and FAISS alone.

Not here: where vectors come from (`embeddings`) or which file is which day's (`snapshots`).
"""
