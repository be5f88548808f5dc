"""Fused kernels are wanted, compiled, compared with torch's own, and left alone where anything is wrong."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from bagel_ds.model.attention.choice import Place
from bagel_ds.model.pointwise import fused
from bagel_ds.model.pointwise.choice import fault_of, is_wanted, with_kernels
from tests.memory.test_phases import network
from tests.model.pointwise.test_fused import built, graphs, trained

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in modules that torch's compiler imports

CPU = Place(torch.device("cpu"), torch.float32, True)
GPU = Place(torch.device("cuda", 0), torch.bfloat16, True)
CONFIG = network(width=64, inner=96)


def test_by_default_they_are_for_a_gpu() -> None:
    assert is_wanted(None, GPU) and not is_wanted(None, CPU)
    assert is_wanted(True, CPU) and not is_wanted(False, GPU)


def test_the_line_for_the_log_says_which_and_why() -> None:
    config, line = with_kernels(CONFIG, True)
    assert config.fused_kernels and "fused kernels" in line
    config, line = with_kernels(CONFIG, False)
    assert not config.fused_kernels and line.endswith("torch's own kernels")
    config, line = with_kernels(CONFIG, True, "no compiler on node1")
    assert not config.fused_kernels and line.endswith("torch's own kernels (not fused: no compiler on node1)")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("trains", [True, False])
@pytest.mark.parametrize("switches", [{}, {"width": 256, "inner": 1344, "heads": (4, 4)}])
def test_kernels_that_are_right_pass(switches: dict[str, Any], trains: bool, dtype: torch.dtype) -> None:
    before = torch.random.get_rng_state()
    assert fault_of(network(**switches), Place(CPU.device, dtype, trains)) is None
    assert torch.equal(torch.random.get_rng_state(), before)  # the run's random numbers stay what they were


def test_the_trial_compiles_all_that_a_run_needs() -> None:
    """In another thread, as the first rank of a host does it while it keeps in touch with the others."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(fault_of, network(width=128, inner=80), CPU).result() is None
    before = graphs()
    for is_frozen in (False, True):
        model = built(True, "full", width=128, inner=80)
        for name, parameter in model.named_parameters():
            if is_frozen and "norm" in name:
                parameter.requires_grad_(False)
        for tokens in ((9, 6, 5), (40, 1, 0), (0, 301, 2)):
            trained(model, tokens)
    for rows in (2, 257, 4096, 4097, 20_000, 50_000):  # torch compiles long sums another way
        x = torch.randn(rows, 128)
        with torch.no_grad():
            normed, factor = fused.norm(x, x[0], 1e-6)
            fused.norm_backward(normed, x, x[0], factor, (True, True))
    assert graphs() == before


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("_norm", lambda x, weight, eps: (x * weight, x[:, :1] + 0)),
        ("_norm_backward", lambda gradient, x, weight, factor, trains: (gradient + 0, weight + 0 if trains else None)),
        ("_rotate", lambda x, cos, sin, back: x * cos[:, None]),
        ("_swiglu", lambda gate, up: torch.sigmoid(gate) * up),
        ("_swiglu_backward", lambda gradient, gate, up: (gradient * torch.nan, gradient * gate)),
    ],
)
def test_a_kernel_that_is_wrong_is_found_out(name: str, wrong: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, name, wrong)
    fault = fault_of(CONFIG, CPU)
    assert fault is not None and fault.startswith(f"{name[1:]} for ") and fault.endswith("off torch's own")


def test_a_rounding_that_is_left_out_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    def rounded_at_the_end(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
        return (torch.nn.functional.silu(gate.float()) * up.float()).to(gate.dtype)

    monkeypatch.setattr(fused, "_swiglu", rounded_at_the_end)
    fault = fault_of(CONFIG, Place(CPU.device, torch.bfloat16, True))
    assert fault is not None and fault.startswith("swiglu for 2048 rows is 2.")


def test_a_compiler_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> Any:
        raise RuntimeError("no g++\nhere")

    monkeypatch.setattr(fused, "_compiled", failing)
    assert fault_of(CONFIG, CPU) == "RuntimeError: no g++ here"
