"""One answer to what a run computes on, the same as DeepSpeed's, and the kernels it may take."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Iterator

import deepspeed
import pytest
import torch

from bagel_ds.machine.device import choose_kernels, device_type, uses_cuda

REPOSITORY = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("asked", "gpu", "expected"),
    [("cpu", True, "cpu"), ("cpu", False, "cpu"), ("cuda", True, "cuda"), (None, True, "cuda"), (None, False, "cpu")],
)
def test_the_device_is_what_deepspeed_would_take(
    asked: str | None, gpu: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: int(gpu))
    monkeypatch.setattr(deepspeed.accelerator.real_accelerator, "ds_accelerator", None)
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)
    if asked is not None:
        monkeypatch.setenv("DS_ACCELERATOR", asked)
    assert device_type() == expected and uses_cuda() == (expected == "cuda")
    assert deepspeed.accelerator.real_accelerator.get_accelerator().device_name() == expected


def test_nothing_else_asks_torch_for_a_gpu() -> None:
    files = [path for folder in ("bagel_ds", "bench", "launch") for path in (REPOSITORY / folder).rglob("*.py")]
    asking = {str(path.relative_to(REPOSITORY)) for path in files if re.search(r"is_available\(\)", path.read_text())}
    assert asking == {"bagel_ds/machine/device.py", "bagel_ds/doctor/environment.py"}


# ---------------------------------------------------------------------------------------------------------- kernels
@pytest.fixture
def as_torch_starts() -> Iterator[None]:
    """What torch allows by itself and, set by somebody, TF32 in matrix products."""

    def allow(everything: bool, matmul: bool) -> None:
        torch.backends.cuda.enable_cudnn_sdp(everything)
        torch.backends.cudnn.allow_tf32 = everything
        torch.backends.cuda.matmul.allow_tf32 = matmul

    allow(True, True)
    yield
    allow(True, False)


def test_fp32_computes_in_fp32(as_torch_starts: None) -> None:
    choose_kernels("fp32")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32


def test_bf16_leaves_tf32_as_it_is(as_torch_starts: None) -> None:
    choose_kernels("bf16")
    assert torch.backends.cudnn.allow_tf32 and torch.backends.cuda.matmul.allow_tf32


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_cudnns_attention_is_never_taken(precision: str, as_torch_starts: None) -> None:
    choose_kernels(precision)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
