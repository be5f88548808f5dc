"""The server's process: `python -m bagel_ds.processes DESCRIPTOR STARTER`, started by `worker.py`."""

import sys

from bagel_ds.processes.server import main

main(*map(int, sys.argv[1:]))
