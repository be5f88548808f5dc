"""Attention over packed samples: which token sees which, and the kernels that compute it.

`layout.py` holds the mask rule, once for training and inference. `backends.py` lists the kernels by name, without
torch; `--attn` takes the names in `arguments/options.py`. A kernel is a module here with a function
`prepare(layout) -> Attend`; `sdpa.py` runs everywhere and is the reference for the others. Begin with layout.py.
"""
