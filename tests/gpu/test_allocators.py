"""What torch's allocator of GPU memory was asked for, it does."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.gpu.launches import only_on_a_gpu

CODE = """
import torch
from bagel_ds.train.process.allocators import exact_pinned_memory, expandable_segments
exact_pinned_memory()
expandable_segments()
held = torch.empty(2**26, device="cuda")
print({segment["is_expandable"] for segment in torch.cuda.memory_snapshot()})
"""


@only_on_a_gpu
@pytest.mark.parametrize(("given", "grows"), [("", True), ("expandable_segments:False", False)])
def test_segments_grow_unless_the_user_says_otherwise(given: str, grows: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", given)
    printed = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True).stdout
    assert printed.strip() == str({grows})
