"""How the ranks of a run find each other, agree, and end together.

Promises: no rank waits for one that has left; a fault that concerns all is reported once. May import arguments, doctor,
machine, zero's communication parts and `train/process`. Begin with process_group.py (`join_ranks`), then agreement.py,
which the rest of training uses.
"""
