"""The machine that a process runs on: its device, the user's folders, its output, and signs of life in long work.

`device.py` decides between CPU and GPU, `user_folders.py` finds folders that can be written, `output.py` keeps printing
from failing, and `waiting.py` and `liveness.py` report work that takes long. Imports only `errors`, `regular_files` and
`units`; nothing here knows about training.
"""
