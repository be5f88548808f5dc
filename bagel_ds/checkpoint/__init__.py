"""What outlives a run, as files: checkpoint folders, the training state in them, and model folders made from them.

Promises: a folder named step_N is complete and was compared with its manifest; any number of ranks reads what any other
number wrote; no process ever holds a whole model; nothing is pickled. May import `model_folder`, `model`, `ranges`,
`machine`, `config_files`, `errors` and `units`; knows no DeepSpeed, data or arguments. Begin with step_folders.py
(find, check, finish and thin out checkpoints) and state.py (ranges in files). gather.py collects weights from several
hosts, export.py makes a model folder of a checkpoint, serving.py gives it the layout that another program reads.
"""
