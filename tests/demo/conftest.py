"""One demo folder for all tests of the demo."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.demo import write_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly written demo; read only."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    return folder
