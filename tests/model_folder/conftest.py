"""A model folder to read."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.demo import write_demo


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo's model folder; read only."""
    folder = tmp_path_factory.mktemp("folder") / "demo"
    write_demo(folder)
    return folder / "model"
