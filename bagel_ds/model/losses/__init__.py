"""From the network's outputs to the loss of a step, for training and evaluation.

head.py computes cross entropy without holding the logits, normalization.py averages over all ranks and micro-batches of
a step, breakdown.py splits the same losses by dataset and timestep for the log. Begin with normalization.py.
"""
