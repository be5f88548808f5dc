"""Tests that need a CUDA device: `make test-gpu` runs them, all other targets leave them out.

BAGEL_GPU_REHEARSAL=1 (launches.py) runs them on a CPU, which shows that the tests themselves work.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.demo import write_demo
from tests.gpu.launches import GPUS


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    for item in items:
        if here in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not GPUS:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gpu") / "demo"
    write_demo(folder)
    return folder
