"""Checkpoints of a run: where it starts from, what it writes, and what becomes of earlier runs.

Promises: a checkpoint is complete or absent, one run at a time writes to a checkpoint_dir, and no run destroys
another's. May import checkpoint, model_folder, zero, `train/ranks` and `train/process`. Begin with save.py (one
checkpoint) and overlap.py (when saves begin and end); start.py decides where a run starts, restore.py opens it.
"""
