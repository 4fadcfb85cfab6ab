"""The asset graph in Dagster's words: thin functions around the pipeline's own packages.

Here: keys, dependencies, configuration, metadata. Not here: any work on rows, indexes or files.
"""
