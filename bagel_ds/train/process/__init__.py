"""What concerns the process of one rank: signals and stops, stalls, memory that runs out, allocators, quiet starts.

Promises: a rank ends with a message and an exit code, never silently, and nothing that it started outlives it. May
import machine, processes, memory and `train/ranks`, but nothing else of train. Begin with detach.py, then stop.py.
"""
