"""A server of the test's own, and no waiting between attempts."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bagel_ds.hub.transfer import Pause
from tests.hub.server import Server


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(Pause, "unit", 0.01)
    for name in ("HF_ENDPOINT", "HF_HUB_OFFLINE", "HF_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Server() as started:
        yield started
