"""What every run needs, loaded once by importing this module in the process that runs are forked from.

Here: imports and definitions, the instance's storage among them. Nothing may stay connected to a store, or
start a thread: a fork has the parent's locks but not its threads. FAISS's OpenMP threads begin at its first
parallel work, so it is imported and not used; NumPy's OpenBLAS ends its threads before a fork.
"""

import gc
import os

import dagster as dg
import dagster._core.executor.in_process
import dagster._core.system_config.composite_descent
import numpy.random  # noqa: F401
import pymysql  # noqa: F401

from muse_assets.code_server import serving  # noqa: F401  a run's process is unpickled from it
from muse_assets.definitions import defs

defs.get_repository_def().load_all_definitions()
# Dagster imports its storage with the first instance: 0.7 s of each run.
if os.environ.get("DAGSTER_HOME"):
    with dg.DagsterInstance.get() as instance:
        instance.get_runs(limit=1)
        instance.compute_log_manager  # noqa: B018  made when asked for
# The garbage collector would walk through all of it in every run, and so copy the pages that are shared.
gc.collect()
gc.freeze()
