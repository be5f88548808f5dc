"""Tests of metrics see none of the user's settings."""

from __future__ import annotations

import pytest


@pytest.fixture(autouse=True)
def no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL", "NETRC", "BAGEL_DS_PROGRESS"):
        monkeypatch.delenv(name, raising=False)
