"""The machine that a process runs on: its device, the user's folders, its output, and signs of life in long work.

Promises: the device is decided in one place; nobody needs a home folder or a terminal; a long wait says what it is for.
Imports only `errors`, and knows nothing about training. Begin with device.py (CPU or GPU). user_folders.py finds
folders that can be written, output.py keeps printing from failing, waiting.py and liveness.py report long work.
"""
