"""One demo folder for all launches."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.demo import write_demo


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A freshly written demo; read only, but for the index that runs keep beside the data."""
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    return folder
