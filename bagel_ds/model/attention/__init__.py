"""Attention over packed samples: which token sees which, and the kernels that compute it.

`layout.py` holds the mask rule, once for training and inference. `backends.py` lists the kernels by the names that
`--attn` takes; it needs no torch. A kernel is a module here with a function `prepare(layout) -> Attend`; `sdpa.py` runs
everywhere and is the reference for the others. Begin with layout.py.
"""
