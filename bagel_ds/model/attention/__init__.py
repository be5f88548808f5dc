"""Attention over packed samples: which token sees which, and the kernels that compute it.

`layout.py` holds the mask rule, once for training and inference. `backends.py` lists the kernels by name, without
torch, and what `--attn` may take; `choice.py` tries them on a run's device. A kernel is a module here with a function
`prepare(layout) -> Attend`: `sdpa.py` runs everywhere and is the reference for the others, `varlen.py` turns a layout
into two calls of `flash_package.py` or `flash_torch.py`, `flex.py` into a table of blocks. Begin with layout.py.
"""
