"""Whether a run computes norms, rotations and SwiGLU with fused kernels: compiled and tried first, on its own device.

Guarantees: they are used only after each gave the values and gradients of torch's own kernels for the network's widths
and the run's precision, for many rows, few, one and none. Whatever else they do, torch's own are used instead and the
log says why. All that a run needs is compiled here.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from bagel_ds.model.attention.choice import Place
from bagel_ds.model.pointwise.kernels import pointwise_kernels
from bagel_ds.model.shape.config import BagelConfig

_WHAT = "norms, rotations and SwiGLU"
_ROWS = (2048, 0, 1, 2, 33)
# For norms, whose sums over rows torch compiles another way from some number of rows on: 4096 on a CPU, and twice the
# width and 5 * 2^20 elements on a GPU. A run would compile what isn't met here when it gets there.
_ROWS_OF_NORMS = (257, 1000, 5000, 10000, 16384)
_ELEMENTS_OF_NORMS = 2**23
# Of norms. fp32: sums in another order. bf16: few elements lie so near a tie that they are rounded the other way. One
# rounding that eager.py makes and a kernel leaves out is 2e-3 off, or more.
_TOLERANCE = {torch.float32: 3e-5, torch.bfloat16: 1e-3}


def is_wanted(fused_kernels: bool | None, place: Place) -> bool:
    """`fused_kernels`: the option of that name. By default on a GPU, where the kernels wait for memory."""
    return place.device.type == "cuda" if fused_kernels is None else fused_kernels


def with_kernels(config: BagelConfig, is_fused: bool, fault: str | None = None) -> tuple[BagelConfig, str]:
    """The network with these kernels, and a line for the log. `fault`: why they can't be the fused ones."""
    if is_fused and fault is None:
        return replace(config, fused_kernels=True), f"{_WHAT}: fused kernels, compiled by torch"
    reason = "" if fault is None else f" (not fused: {fault})"
    return replace(config, fused_kernels=False), f"{_WHAT}: torch's own kernels{reason}"


def fault_of(config: BagelConfig, place: Place) -> str | None:
    """Why fused kernels can't be used for this network at this place; None if they can. Compiles them."""
    on_gpu = place.device.type == "cuda"
    try:
        with torch.no_grad(), torch.cuda.device(place.device) if on_gpu else nullcontext():
            for name, arguments in _trials(config, place):
                error = _error(*(getattr(pointwise_kernels(fused), name)(*arguments) for fused in (True, False)))
                if not error <= _TOLERANCE[place.dtype]:  # also a NaN
                    return f"{name} for {len(arguments[0])} rows is {error:.1e} off torch's own"
    except Exception as raised:  # whatever a compiler, a driver or a torch of another version raises
        return f"{type(raised).__name__}: {' '.join(str(raised).split())[:200]}"
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
    return None


def _error(found: Any, expected: Any) -> float:
    """The largest distance between results of two kernels, relative to the norm of the second's."""
    errors = [0.0]
    for one, other in zip(*(x if isinstance(x, tuple) else (x,) for x in (found, expected)), strict=True):
        if one is None or other is None:
            assert one is other, "a gradient that isn't wanted"
            continue
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        distance, size = (float(x.float().norm()) for x in (one.float() - other.float(), other))
        errors.append(distance / size if size else distance)
    return float(torch.tensor(errors).max())  # a NaN if there is one


def _trials(config: BagelConfig, place: Place) -> Iterator[tuple[str, tuple[Any, ...]]]:
    """Names of kernels and what to call them with."""
    llm = config.llm
    generator = torch.Generator(place.device).manual_seed(0)
    draw = partial(torch.randn, generator=generator, device=place.device, dtype=place.dtype)
    heads = {(llm.num_attention_heads, llm.head_dim), (llm.num_key_value_heads, llm.head_dim)}
    for width in [llm.hidden_size, *([llm.head_dim] if llm.qk_norm else [])]:
        for rows in (max(*_ROWS_OF_NORMS, _ELEMENTS_OF_NORMS // width), *_ROWS_OF_NORMS, *_ROWS):
            x, gradient, weight = draw(rows, width), draw(rows, width), draw(width)
            yield "norm", (x, weight, llm.rms_norm_eps)
            factor = pointwise_kernels(False).norm(x, weight, llm.rms_norm_eps)[1]
            # Without the weight's where it is frozen, beside adapters.
            for wanted in ((True, True), (True, False))[: 2 * place.trains]:
                yield "norm_backward", (gradient, x, weight, factor, wanted)
    for rows in _ROWS:
        for head in heads:
            x, cos, sin = draw(rows, *head), *(draw(rows, llm.head_dim // 2).repeat(1, 2) for _ in range(2))
            for back in (False, True)[: 1 + place.trains]:
                yield "rotate", (x, cos, sin, back)
        gate, up, gradient = (draw(rows, llm.intermediate_size) for _ in range(3))
        yield "swiglu", (gate, up)
        if place.trains:
            yield "swiglu_backward", (gradient, gate, up)
