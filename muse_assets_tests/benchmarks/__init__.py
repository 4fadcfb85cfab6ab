"""Benchmarks: what the work costs beside what one would use instead, measured in the same run.

`make bench` runs every `bench_*.py`; each is a function `rows(scale) -> Iterator[Row]`. Not part of the
tests: a machine that is busy says nothing about the code.
"""
