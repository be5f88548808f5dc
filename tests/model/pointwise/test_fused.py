"""Compiled by torch for this CPU: values, gradients and rounding are eager's, and packs of all sizes share the kernels.

C++ instead of Triton, else what a GPU does: the same graphs, guards and autograd functions.
"""

from __future__ import annotations

import random
import subprocess
import sys
from typing import Any, Callable

import pytest
import torch
from torch import Tensor

from bagel_ds.model.bagel import Bagel
from bagel_ds.model.embeddings import apply_rope, rope_tables
from bagel_ds.model.layers import RMSNorm, SwiGLUMLP
from bagel_ds.model.pointwise import eager, fused
from bagel_ds.model.pointwise.kernels import PointwiseKernels
from bagel_ds.model.recompute import MODES, recompute_mode
from bagel_ds.model.shape.lora import LoRA
from tests.memory.test_phases import network, pack
from tests.model.test_offload import PACKS

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in modules that torch's compiler imports

ROWS = [0, 1, 2, 33, 64, 301]  # 64 is also a width
# Of norms. fp32: sums in another order. bf16: few elements lie so near to a tie that this rounds them another way; one
# rounding left out is 2e-3 off, or more.
TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 5e-4}


def graphs() -> int:
    """Compiled so far in this process."""
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + seed)).to(dtype)


def transposed(x: Tensor) -> Tensor:
    """The same values in another order in memory, as attention by sdpa.py gives gradients."""
    return x.transpose(0, 1).contiguous().transpose(0, 1) if x.dim() > 1 else x


def sliced(x: Tensor) -> Tensor:
    """The same values within a larger tensor, as one expert's rows are."""
    return torch.cat([x.new_ones(3, *x.shape[1:]), x])[3:]


def norm(kernels: PointwiseKernels, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    module = RMSNorm(x.shape[-1], 1e-6, kernels).to(dtype)
    module.weight.data.copy_(values(x.shape[-1], seed=1).abs() + 0.5)
    return module(x), [x, module.weight]


def rotation(kernels: PointwiseKernels, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    return apply_rope(x, *rope_tables(torch.arange(len(x)) * 7, x.shape[-1], 1e6, dtype), kernels), [x]


def swiglu(kernels: PointwiseKernels, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, list[Tensor]]:
    module = SwiGLUMLP(x.shape[-1], 96, kernels=kernels).to(dtype)
    parameters = list(module.parameters())
    for seed, parameter in enumerate(parameters):
        parameter.data.copy_(values(*parameter.shape, seed=seed) / 8)
    return module(x), [x, *parameters]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    "part, shape", [(norm, (64,)), (norm, (4, 32)), (rotation, (4, 32)), (rotation, (2, 32)), (swiglu, (64,))]
)
def test_values_and_gradients_are_those_of_eager(part: Callable[..., Any], shape: tuple[int, ...], dtype: Any) -> None:
    before = None
    for rows in ROWS:
        for laid_out in (Tensor.clone, transposed, sliced):
            results = []
            for kernels in (eager.KERNELS, fused.KERNELS):
                x = laid_out(values(rows, *shape, dtype=dtype)).requires_grad_()
                output, inputs = part(kernels, x, dtype)
                gradients = torch.autograd.grad(output, inputs, laid_out(values(*output.shape, seed=2, dtype=dtype)))
                results.append([output.detach(), *gradients])
            for found, expected in zip(*results, strict=True):
                assert found.dtype == expected.dtype and found.shape == expected.shape
                error = float((found.double() - expected.double()).norm())
                assert error <= TOLERANCE[dtype] * float(expected.double().norm()), (rows, laid_out.__name__)
        if rows == 33:
            before = graphs()
    assert graphs() == before, "all packs of two and more rows share kernels"


def test_a_tolerance_of_bf16_notices_a_rounding_that_is_left_out() -> None:
    x, weight = values(301, 64, dtype=torch.bfloat16), values(64, dtype=torch.bfloat16)
    rounded, factor = fused.norm(x, weight, 1e-6)
    at_the_end = (x.float() * factor * weight.float()).bfloat16()
    assert (rounded != at_the_end).float().mean() > 0.1
    assert (rounded.float() - at_the_end.float()).norm() > 2 * TOLERANCE[torch.bfloat16] * rounded.float().norm()
    assert (rounded != eager.norm(x, weight, 1e-6)[0]).float().mean() < 0.01


@pytest.mark.parametrize("frozen", ["input", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen: str) -> None:
    module, x = RMSNorm(64, 1e-6, fused.KERNELS), values(33, 64).requires_grad_()
    torch.nn.init.ones_(module.weight)
    (x if frozen == "input" else module.weight).requires_grad_(False)
    module(x).sum().backward()
    assert (x.grad is None) == (frozen == "input") and (module.weight.grad is None) == (frozen == "weight")


# ----------------------------------------------------------------------------------------------------- a whole network
def built(is_fused: bool, mode: str = "none", **switches: Any) -> Bagel:
    sizes = {"width": 64, "inner": 96, **switches}
    model = Bagel(network(fused_kernels=is_fused, **sizes), recompute_mode(mode))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dtype.is_floating_point:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
            else:
                parameter.copy_(torch.randint(256, parameter.shape, generator=generator))
    if model.config.lora is not None:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
    return model


def trained(model: Bagel, tokens: tuple[int, int, int]) -> tuple[Tensor, dict[str, Tensor]]:
    output = model(pack(*tokens), values(tokens[1], 64))
    loss = output.ce.sum() + output.mse.sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {name: found.grad for name, found in model.named_parameters() if found.grad is not None}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    whole = torch.stack([gradient.norm() for gradient in expected.values()]).norm()
    for name, gradient in expected.items():
        assert float((found[name] - gradient).norm()) <= 1e-5 * float(gradient.norm()) + 1e-7 * float(whole), name


@pytest.mark.parametrize("switches", [{}, {"lora": LoRA(4, 8.0)}, {"lora": LoRA(4, 8.0, base_precision="nf4")}])
@pytest.mark.parametrize("mode", MODES)
def test_a_network_trains_as_with_eager_kernels(mode: str, switches: dict[str, Any]) -> None:
    by_torch, compiled = built(False, **switches), built(True, mode, **switches)
    for tokens in PACKS:
        (expected, gradients), (loss, found) = trained(by_torch, tokens), trained(compiled, tokens)
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)
        assert_same(found, gradients)


def test_thirty_packs_of_random_sizes_share_the_kernels_of_the_first() -> None:
    draw, compiled = random.Random(0), built(True, "selective")
    trained(compiled, (9, 6, 5))
    before = graphs()
    for _ in range(30):
        few, some = draw.choice([0, 1, 2, 64]), draw.randint(0, 200)
        kinds = [few, some, draw.randint(0, 3)]
        draw.shuffle(kinds)
        trained(compiled, (kinds[0], kinds[1], kinds[2]))
    assert graphs() == before


@pytest.mark.parametrize("mode", MODES)
def test_nothing_more_is_kept_for_the_backward_pass(mode: str) -> None:
    kept = []
    for is_fused in (False, True):
        model = built(is_fused, mode)
        found: dict[int, int] = {}

        def keep(tensor: Tensor, found: dict[int, int] = found) -> Tensor:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(pack(30, 20, 10), values(20, 64))
        kept.append(sum(found.values()))
        (output.ce.sum() + output.mse.sum()).backward()
    assert kept[1] <= kept[0]


def test_a_prediction_without_gradients_is_the_same() -> None:
    found = []
    with torch.no_grad():
        for is_fused in (False, True):
            output = built(is_fused)(pack(9, 6, 5), values(6, 64))
            found.append(torch.cat([output.ce, output.mse.flatten()]))
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)


def test_the_compiler_is_loaded_only_when_it_has_something_to_compile() -> None:
    program = """
import sys, torch
from bagel_ds.model.pointwise import fused
from bagel_ds.model.pointwise.kernels import pointwise_kernels
assert pointwise_kernels(True) is fused.KERNELS
sys.exit(any(name.startswith(("torch._dynamo", "torch._inductor")) for name in sys.modules))
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=300)
