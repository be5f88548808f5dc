"""The network in pure torch: BAGEL, its autoencoder, and the batch that both read.

Promises: parameter names, shapes and values of the original; every module is called once per batch in one order, so
ZeRO-3 can gather weights without a rank waiting for another; the same layers train and predict. May import nothing of
the package but `errors` and `units`: it knows no DeepSpeed, no data files and no arguments.

Begin with batch.py (the input), bagel.py (the forward pass) and mot.py (the layers). attention/ says which token sees
which and computes it, pointwise/ computes what lies between matrix products, losses/ makes a step's loss of the
outputs, shape/ describes a network and its costs as plain numbers without torch.
"""
