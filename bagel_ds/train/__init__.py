"""Training: turns batches into weights, and wires data, model, zero and checkpoint together.

Promises: every rank does the same thing at the same time, or all of them stop with one message; a run can end at any
moment and resume exactly. May import every room but cli and demo. Begin with trainer.py, which is the run from top to
bottom, then step.py. main.py is what the launcher starts, prepare.py checks and opens a run's inputs, build.py makes
its engine. ranks/ is about ranks meeting and agreeing, process/ about one rank's process, saves/ about checkpoints,
metrics/ about what is logged.
"""
