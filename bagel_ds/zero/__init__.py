"""DeepSpeed, and everything that must know how it works.

Promises: with every ZeRO stage and offload the engine takes the same step, loads weights in the source's own precision,
and shows each rank's masters, moments and average as ranges of named parameters (`ranges.py`), which files of any
number of ranks are made of. Nothing that a run leaves on NVMe or in /dev/shm outlives it. Other packages see a
configuration only as `ZeroSettings`; where DeepSpeed's internals are touched, tests fail when they change. May import
`ranges`, `arguments`, `machine` and the shapes of `model`; knows neither checkpoint files nor data. Begin with
`engine.py`, which is a run from weights to updates, then `partitions.py`; `split/` keeps masters in half of their
memory; `config/` leads from a configuration file to `ZeroSettings`.
"""
