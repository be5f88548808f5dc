"""What a machine must have before work begins.

`environment.py` looks at packages, GPU, driver, folders, shared memory and the compiler, before torch is imported, and
returns a list of findings; the caller decides which of them end the run. May import `zero.ops` and `machine`.
"""
