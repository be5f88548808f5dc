"""Indexing in a process beside training what the run needs later.

Guarantees: rows are the same whatever this process does or fails to do: a run that needs a file earlier waits for it or
indexes it itself. The process has a low priority and ends with the run, however that ends.
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
    """The process, None where nothing is left to index; `close` ends it."""

    process: Worker | None

    def close(self) -> None:
        if self.process is None:
            return
        if self.process.connection.poll():  # the process closes it when it ends
            code = self.process.ended(_ENDING_SECONDS)
            if code:
                logger.warning("the process that indexed ahead ended with code %d; training did the rest itself", code)
        self.process.end()  # finished files are in the cache; half of one is never seen


def index_in_background(
    data_files: Sequence[DataFile], tokenizer: Tokenizer, cache_dir: str | None = None
) -> BackgroundIndex:
    """Index the files in the order given, that in which the run needs them, into the cache that the run reads."""
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
