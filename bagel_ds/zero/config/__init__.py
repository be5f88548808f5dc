"""From a DeepSpeed configuration file to what a run takes.

Promises: a resolved configuration holds no "auto" and leaves nothing to DeepSpeed's silent defaults; whatever
contradicts the arguments, or DeepSpeed would ignore, is reported at once, before anything is loaded. Works without
deepspeed, except `check.py` and `known_keys.py`. May import `arguments`, `config_files` and the shapes of `model`.
Begin with `resolve.py`: it reads the file (`files.py`), settles stage and offload (`sharding.py`), NVMe (`nvme.py`) and
the rest in a `Draft`, and fits the result to the network. `settings.py` says what other packages get of it.
"""
