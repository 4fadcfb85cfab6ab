"""The code location's server: Dagster's own, whose runs begin in milliseconds.

`serving` starts Dagster's gRPC server, `forking` makes a run's process out of a warm one, `warm` is what that
one has loaded. Not here: what is served (`definitions`), or when it runs (`automation`).
"""
