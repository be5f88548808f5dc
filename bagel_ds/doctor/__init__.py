"""What a machine must have before work begins: packages, a GPU that works, folders, shared memory, a compiler.

Promises: everything is checked before anything is loaded, and each check gives one finding with its remedy; the caller
decides which findings end the run. May import `zero`, `machine`, `errors` and `units`. Begin with environment.py
(`machine_findings`): the checks of a run. `bagel-ds doctor` (report.py) also looks at hardware.py, drives.py and, over
ssh, the hosts of a hostfile (hosts.py).
"""
