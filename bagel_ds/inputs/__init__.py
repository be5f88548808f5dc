"""What a run is given, found and opened before any weight is loaded, without DeepSpeed and on one process.

`files.py` looks for every file that the arguments name and reports all that is missing in one message; `network.py`
finds the model folder and reads the network's shape; `data.py` opens, indexes and plans the data. Training and the
commands go through the same functions, so a command shows what training would use. May import `data`, `model_folder`,
`checkpoint`, `zero.config`, `arguments` and `model`. Begin with `open_inputs` in `data.py`.
"""
