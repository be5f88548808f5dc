"""Indexing what a run does not need yet, in a process of its own beside it.

Guarantees: whatever this process does or fails to do, every row is the same: a run that needs a file before it is here
waits for it, or indexes it itself. It gives way to the run's own processes and ends with them, however they end.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import NamedTuple

from bagel_ds.data.index.index import DataFile, DataIndex, tell_speed
from bagel_ds.model_folder.tokenizer import Tokenizer
from bagel_ds.processes import Worker, start_worker

logger = logging.getLogger("bagel_ds")

_NICENESS = 10
_ENDING_SECONDS = 5.0
_TIMES = "%Y-%m-%d %H:%M:%S"  # as in the training log


class BackgroundIndex(NamedTuple):
    """The process, where there is something to do; `close` ends it."""

    process: Worker | None

    def close(self) -> None:
        if self.process is None:
            return
        if self.process.connection.poll():  # which it closes at its end
            code = self.process.ended(_ENDING_SECONDS)
            if code:
                logger.warning("the process that indexed ahead ended with code %d; training did the rest itself", code)
        self.process.end()  # what it has finished is kept, and nothing else is ever seen


def index_in_background(
    data_files: Sequence[DataFile], tokenizer: Tokenizer, cache_dir: str | None = None
) -> BackgroundIndex:
    """Index the files in their order, which should be that of need, and keep the result where a run looks for it."""
    if not data_files:
        return BackgroundIndex(None)
    logger.info("%d more files are indexed while training goes on", len(data_files))
    process = start_worker(_index, list(data_files), cache_dir, name="indexing process", shared=tokenizer)
    process.doing = lambda: "it indexed ahead"
    return BackgroundIndex(process)


def _index(connection: Connection, tokenizer: Tokenizer, data_files: list[DataFile], cache_dir: str | None) -> None:
    os.nice(_NICENESS)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="[%(asctime)s] %(message)s", datefmt=_TIMES)
    index = DataIndex(data_files, tokenizer, cache_dir)
    began, missing = time.monotonic(), index.missing()
    index.complete()
    tell_speed([index.indexes[file] for file in missing], time.monotonic() - began)
