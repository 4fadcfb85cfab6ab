"""Puts validated snapshots where the search server loads them, and takes them back.

Here: the server directory and everything that may change in it. Not here: building or validating a
snapshot (`ivfpq`, `snapshots`), or when to deploy (the Dagster layer).
"""
