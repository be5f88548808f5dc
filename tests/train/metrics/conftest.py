"""Tests of metrics leave the logger and the environment as they found them."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest


@pytest.fixture(autouse=True)
def quiet_logger(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Leave the logger "bagel_ds" and the environment as they were found."""
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "BAGEL_DS_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
    yield
    logger = logging.getLogger("bagel_ds")
    for handler in list(logger.handlers):
        logger.removeHandler(handler)
        handler.close()
    logger.propagate = True
    logger.setLevel(logging.NOTSET)
