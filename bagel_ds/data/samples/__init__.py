"""One sample and what it is made of: images, frames of videos, and the draws that decide every random choice.

Promises: equal plans give equal tensors in any process, pixels equal the original's, and a damaged or oversized file
raises `BadRow` with its reason and costs little memory. May import `git_lfs`, `regular_files` and what lies below them,
nothing else of `data`. Begin with `sample.py`: the plan of a sample is what the planner packs and workers read.
"""
