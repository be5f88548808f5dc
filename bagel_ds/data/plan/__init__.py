"""Which samples share a sequence, and in which order: the endless global sequence of packs of a run.

Promises: the plan is pure (no files, no torch, no clock) and does not depend on the number of ranks; each epoch uses
every usable row once; a saved state, a small dict, continues with exactly the next packs. The room may import
data/samples, model/shape and errors. Begin with planner.py: row_order.py gives the order of a group's rows, cost.py
prices a sample, packing.py chooses what shares a pack, rules.py holds the constants of each version.
"""
