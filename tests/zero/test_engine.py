"""What of the engine can be seen without a launch; updates are compared in tests/distributed/test_adam.py."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from bagel_ds.zero import engine as engine_module
from bagel_ds.zero.engine import ZeroEngine
from tests.live_tensors import LiveTensors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_norm_of_whole_gradients_is_summed_in_fp32_without_copies_of_them(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(engine_module, "COPIED_ELEMENTS", 2**10)
    generator = torch.Generator().manual_seed(0)
    module = nn.ParameterList(nn.Parameter(torch.zeros(size, dtype=dtype)) for size in (2**16, 300, 2**15))
    for parameter in module:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(dtype)
    module.append(nn.Parameter(torch.zeros(5)))  # one without a gradient
    engine: Any = SimpleNamespace(module=module)
    with LiveTensors() as live:
        found = ZeroEngine._unpartitioned_norm(engine)
    exact = sum(float(each.grad.double().square().sum()) for each in module if each.grad is not None) ** 0.5
    assert found.dtype == torch.float32 and float(found) == pytest.approx(exact, rel=1e-6)
    held = sum(each.grad.nbytes for each in module if each.grad is not None)
    assert live.peak - held < 3 * 4 * 2**10, "bytes: a piece in fp32, the next one, and a number for each"


@pytest.mark.parametrize("applied", [True, False])
def test_an_update_takes_deepspeeds_word_and_does_not_wait_for_the_norm(applied: bool) -> None:
    updates: list[str] = []
    with FakeTensorMode():  # reading a value of its tensors is an error
        norm = torch.ones(())
    deepspeed_engine = SimpleNamespace(
        is_gradient_accumulation_boundary=lambda: True,
        optimizer=SimpleNamespace(param_groups=[{}]),
        step=lambda: updates.append("step"),
        was_step_applied=lambda: applied,
        get_global_grad_norm=lambda: norm,
    )
    partitions = SimpleNamespace(updated=lambda: updates.append("average"))
    engine: Any = SimpleNamespace(stage=3, _engine=deepspeed_engine, partitions=partitions)
    assert ZeroEngine.update(engine, 0.1) == (applied, norm)
    assert updates == ["step", "average"][: 1 + applied]
    assert deepspeed_engine.optimizer.param_groups == [{"lr": 0.1}]
