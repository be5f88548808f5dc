"""What a machine must have before work begins: packages, a GPU that works, folders, shared memory, a compiler.

Promises: everything is checked before anything is loaded, and each check gives one finding with its remedy; the caller
decides which findings end the run. May import `zero.ops`, `machine`, `errors` and `units`. Begin with environment.py
(`machine_findings`).
"""
