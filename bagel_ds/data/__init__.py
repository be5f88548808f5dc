"""What turns files into batches.

A row is indexed (index: its token and pixel counts, nothing decoded), planned (plan: every random choice made, so its
length is known, and packed with others), then read, decoded and laid out (batches). Promises: equal files and options
give equal batches on any number of ranks and workers; a bad row is reported and never ends a run. The rooms from the
bottom: files reads rows, samples knows images, videos and draws, formats parses a row, config reads the dataset YAML,
index, plan, streams joins them per group, batches makes `PackedBatch`, inspect shows all of it. It may import model
(shapes and batch), model_folder (tokenizer), machine and processes. Begin with batches/loader.py.
"""
