"""Keeps the MUSE search indexes fresh, exact and safely deployed.

The folders are the pipeline: `embeddings` reads the tables, `ivfpq` trains and encodes, `snapshots`
keeps a dated index equal to its table, `publishing` puts it where the search server reads it,
`playlists` caches the programs' ids. `assets`, `automation` and `definitions` say it in Dagster's words.
"""
