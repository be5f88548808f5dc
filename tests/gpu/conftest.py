"""Tests that need a CUDA device; `make test-gpu` runs them, everything else leaves them out."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bagel_ds.demo import write_demo


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "demo"
    write_demo(folder)
    return folder
