"""Indexing what a run does not need yet, in a process of its own beside it.

Guarantees: whatever this process does or fails to do, every row is the same: a run that needs a file before it is here
waits for it, or indexes it itself. It gives way to the run's own processes and ends with them, however they end.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from typing import NamedTuple

from bagel_ds.data.index import DataFile, DataIndex, end_with_parent, tell_speed
from bagel_ds.data.tokenizer import Tokenizer

logger = logging.getLogger("bagel_ds")

_NICENESS = 10
_TIMES = "%Y-%m-%d %H:%M:%S"  # as in the training log


class BackgroundIndex(NamedTuple):
    """The process, where there is something to do; `close` ends it."""

    process: BaseProcess | None

    def close(self) -> None:
        if self.process is not None:
            if self.process.exitcode:
                code = self.process.exitcode
                logger.warning("the process that indexed ahead ended with code %d; training did the rest itself", code)
            self.process.kill()  # what it has finished is kept, and nothing else is ever seen
            self.process.join()


def index_in_background(
    data_files: Sequence[DataFile], tokenizer: Tokenizer, cache_dir: str | None = None
) -> BackgroundIndex:
    """Index the files in their order, which should be that of need, and keep the result where a run looks for it."""
    if not data_files:
        return BackgroundIndex(None)
    logger.info("%d more files are indexed while training goes on", len(data_files))
    # spawn: this process holds threads and a CUDA context, neither of which survives a fork
    context = multiprocessing.get_context("spawn")
    process = context.Process(target=_index, args=(list(data_files), tokenizer, cache_dir), name="indexing")
    process.start()
    return BackgroundIndex(process)


def _index(data_files: list[DataFile], tokenizer: Tokenizer, cache_dir: str | None) -> None:
    end_with_parent()
    os.nice(_NICENESS)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):  # meant for the run, which then ends this process
        signal.signal(number, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt=_TIMES)
    index = DataIndex(data_files, tokenizer, cache_dir)
    began, missing = time.monotonic(), index.missing()
    index.complete()
    tell_speed([index.indexes[file] for file in missing], time.monotonic() - began)
