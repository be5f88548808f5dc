"""Groups of a dataset config as numbered rows that can be planned, located and read.

Promises: planning a sample reads no file and gives the same sample in every process; a worker needs an address, not the
index; unusable rows are counted once and named. It imports `plan` (for the order of need), `index`, `config` and what
lies below. Begin with `opening.py`, `open_streams`, then `stream.py`.
"""
