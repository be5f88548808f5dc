"""What every test can rely on: hypothesis draws the same examples each time and never fails for being slow; what a
test sets up for logging goes when it ends; signals are not ignored because the process that started the tests ignores
them (nohup, a shell's background job), which children inherit.
"""

from __future__ import annotations

import logging
import signal
from collections.abc import Iterator

import pytest
from hypothesis import settings

settings.register_profile("bagel_ds", deadline=None, derandomize=True)
settings.load_profile("bagel_ds")

for number, usual in ((signal.SIGINT, signal.default_int_handler), (signal.SIGHUP, signal.SIG_DFL)):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, usual)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A gloo process group of one rank, for what talks to all ranks."""
    import torch.distributed as dist

    store = tmp_path_factory.mktemp("store") / "file"
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """A command's log handler writes to the stderr of its test, which is closed in the next."""
    logger = logging.getLogger("bagel_ds")
    before, propagates, level = list(logger.handlers), logger.propagate, logger.level
    yield
    for handler in set(logger.handlers) - set(before):
        handler.close()
    logger.handlers[:], logger.propagate = before, propagates
    logger.setLevel(level)
