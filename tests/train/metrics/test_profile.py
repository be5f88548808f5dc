"""A profile is of the steps after the first ones, names the parts of a step, and says when there was none."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from bagel_ds.train.metrics.profile import LAYER, PHASES, SKIPPED, StepProfile, _rows, phase_of_step


class Layer(nn.Module):
    """Two operations."""

    def forward(self, x: Tensor) -> Tensor:
        return (x @ x).relu()


class Stack(nn.Module):
    """Layers that are computed again in the backward pass, which stops each as soon as it has what it needs."""

    def __init__(self, layers: int):
        super().__init__()
        self.layers = nn.ModuleList(Layer() for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False)
        return x


def run(folder: Path, profiled: int, steps: int, stack: Stack | None = None) -> None:
    profile = StepProfile(folder, profiled, [] if stack is None else stack.layers)
    for step in range(steps):
        for name in PHASES:
            with phase_of_step(name):
                x = torch.ones(800, 800, requires_grad=stack is not None)
                y = x @ x if stack is None else stack(x)
                if stack is not None and name == "backward":
                    y.sum().backward()
        profile.step(step)
    profile.close()


def test_so_many_steps_after_the_first_ones_are_written(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "bagel_ds"):
        run(tmp_path / "profile", 2, SKIPPED + 4)
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    names = [event.get("name") for event in trace["traceEvents"] if event.get("cat") == "user_annotation"]
    assert [names.count(name) for name in PHASES] == [2] * len(PHASES)
    table = (tmp_path / "profile" / "table.txt").read_text()
    assert table.startswith("2 steps of rank 0") and "aten::mm" in table
    rows = {
        line[:20].strip(): [float(n) for n in line[20:].split()] for line in table.splitlines()[3 : 4 + len(PHASES)]
    }
    assert set(rows) == {*PHASES, "together"}
    for name in PHASES:
        milliseconds, operations = rows[name]
        assert milliseconds > 0 and operations == 2, "ones and matmul"
    assert rows["together"] == pytest.approx([sum(rows[name][of] for name in PHASES) for of in (0, 1)], abs=0.5)
    assert any("table.txt" in message for message in caplog.messages)
    assert not StepProfile.active


@pytest.mark.parametrize("steps", [0, SKIPPED, SKIPPED + 1])
def test_a_run_that_is_too_short_says_so(tmp_path: Path, steps: int, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "bagel_ds"):
        run(tmp_path / "profile", 2, steps)
    assert any("nothing was written" in message and f"{SKIPPED + 2} steps" in message for message in caplog.messages)
    assert not (tmp_path / "profile").exists()


def test_exactly_enough_steps_are_enough(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run(tmp_path / "profile", 1, SKIPPED + 1)
    assert (tmp_path / "profile" / "trace.json.gz").is_file() and not caplog.messages


def test_operations_of_a_layer_are_those_of_its_calls(tmp_path: Path) -> None:
    stack = Stack(3)
    run(tmp_path / "profile", 2, SKIPPED + 2, stack)
    assert "operations of a call of a decoder layer: 2" in (tmp_path / "profile" / "table.txt").read_text()
    trace = json.loads(gzip.decompress((tmp_path / "profile" / "trace.json.gz").read_bytes()))
    calls = [event for event in trace["traceEvents"] if event.get("name") == LAYER]
    assert len(calls) == 2 * 3 * (len(PHASES) + 1), "steps, layers, phases and once more in the backward pass"
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in stack.layers)


def test_on_a_gpu_both_times_and_launches_are_shown() -> None:
    def event(name: str, start: float, end: float, device: str = "DeviceType.CPU") -> SimpleNamespace:
        return SimpleNamespace(name=name, time_range=SimpleNamespace(start=start, end=end), device_type=device)

    launches = [event("cudaLaunchKernel", at, at + 1) for at in (1500, 1600, 2600, 9000)]
    events = [
        event("forward", 1000, 2000),
        event("backward", 2500, 4500),
        event(LAYER, 1550, 1700),
        event("forward", 1800, 8800, "DeviceType.CUDA"),
        *launches,
    ]
    rows = _rows(events, 1, on_gpu=True)
    assert rows[0].split() == ["host", "GPU", "kernel", "launches"]
    assert [row.split()[-3:] for row in rows[3:5]] == [["1.0", "7.0", "2"], ["2.0", "0.0", "1"]]
    assert rows[-1] == "kernel launches of a call of a decoder layer: 1"
