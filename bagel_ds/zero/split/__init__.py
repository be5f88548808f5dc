"""Masters split in two: the 16-bit weight that the network computes with, and 16 more bits beside it.

Guarantees: together they are the fp32 master, bit for bit, and the weight is the master rounded to nearest, so that
training is that of a run with fp32 masters for half of their memory. Gradients are read as they are. Adam's moments
are fp32, bf16 or packed into 16 bits for both. What lies beside the weights is with them or on NVMe.

Read `formats.py` for the numbers, `update.py` for a step over them (`update.cpp` on the CPU, built by `kernel.py`),
`optimizer.py`, `zero2.py` and `zero3.py` for how DeepSpeed's optimizers are made to keep them, `partitions.py` for how
the rest of the trainer reads and writes them, `swapped.py` for their files on NVMe.
"""
