"""A network described by plain numbers: its configuration, its parameters by name, and what it costs.

Promises: nothing here imports torch, so the planners answer in milliseconds; each cost is counted in one place, and
tests compare the counts with the real modules. config.py describes the network, parts.py groups its parameters,
parameters.py lists them with the order in which a step uses them, flops.py counts arithmetic, activations.py memory.
"""
