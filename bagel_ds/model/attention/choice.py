"""Which kernels a network attends with: what `--attn` names is tried on the run's own device, not just imported.

Guarantees: a kernel is chosen only after it gave the values, and in training the gradients, of sdpa.py in fp32 for a
small pack with every kind of segment and the network's own heads. The language model and the ViT are chosen for
separately, as their head dims differ.
"""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.model.attention.backends import DEFAULT_BACKEND, NAMES, attention_backend, backend_module
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.batch import CAUSAL, FULL, NOISE
from bagel_ds.model.shape.config import BagelConfig

_TOLERANCE = {torch.bfloat16: 3e-2, torch.float16: 5e-3, torch.float32: 1e-3}  # of norms; a wrong mask is 0.3 off


class Place(NamedTuple):
    """Where and how attention is computed. `trains`: with a backward pass."""

    device: torch.device
    dtype: torch.dtype
    trains: bool


class Heads(NamedTuple):
    queries: int
    keys: int
    dim: int


def choose_attention(config: BagelConfig, wanted: str, place: Place) -> tuple[BagelConfig, str]:
    """The network with kernels for `wanted`, a key of `NAMES`, and a line for the log that says which.

    Raises `UserError` if `wanted` names a kernel that can't be used for the language model. A ViT that it can't be used
    for gets sdpa.
    """
    llm, vit = config.llm, config.vit
    name, faults = _first_that_works(
        wanted, Heads(llm.num_attention_heads, llm.num_key_value_heads, llm.head_dim), place
    )
    if name is None:
        found = "; ".join(f"{title}: {fault}" for title, fault in faults.items())
        raise UserError(
            f"--attn {wanted} can't be used here ({found}). Leave out --attn to take the fastest kernel that works, or "
            "pass --attn sdpa; the result is the same"
        )
    line = f"attention: {_described(name, faults, wanted, place)}"
    if not config.visual_und:
        return replace(config, attention=name), line
    vit_heads = Heads(vit.num_attention_heads, vit.num_attention_heads, vit.hidden_size // vit.num_attention_heads)
    own, own_faults = _first_that_works(wanted, vit_heads, place)
    own = own or DEFAULT_BACKEND
    if own != name:
        line += f"; in the ViT {_described(own, own_faults, wanted, place)}"
    return replace(config, attention=name, vit_attention=own), line


def _first_that_works(wanted: str, heads: Heads, place: Place) -> tuple[str | None, dict[str, str]]:
    """The first kernel of `wanted` that works, and why those before it don't, by title."""
    faults: dict[str, str] = {}
    for name in NAMES[wanted]:
        if wanted == "auto" and name == "flex" and not place.trains:
            continue  # it is compiled for sizes, and every answer has others
        fault = fault_of(name, heads, place)
        if fault is None:
            return name, faults
        faults[backend_module(name).TITLE] = fault
    return None, faults


def _described(name: str, faults: dict[str, str], wanted: str, place: Place) -> str:
    """The kernel's title and why not an earlier one; "auto" on a CPU lets nobody expect one."""
    title: str = backend_module(name).TITLE
    if not faults or (wanted == "auto" and place.device.type == "cpu"):
        return title
    return f"{title} (not " + "; not ".join(f"{other}: {fault}" for other, fault in faults.items()) + ")"


def fault_of(name: str, heads: Heads, place: Place) -> str | None:
    """Why the kernel can't be used for such heads at this place; None if it can."""
    fault: str | None = backend_module(name).unsupported(place.device, place.dtype, heads.dim, place.trains)
    if fault is not None or name == DEFAULT_BACKEND:
        return fault
    try:
        error = _error(name, heads, place)
    except Exception as raised:  # whatever a package made for another torch, a driver or a compiler raises
        said = " ".join(str(raised).split())
        return f"{type(raised).__name__}: {said[:200]}"
    if not error <= _TOLERANCE[place.dtype]:  # also a NaN
        return f"its results are {error:.1%} off those of {backend_module(DEFAULT_BACKEND).TITLE}"
    return None


def _error(name: str, heads: Heads, place: Place) -> float:
    """Largest relative error, by norm, of the output and the gradients for a small pack."""
    cached = () if place.trains else (6, 0)
    layout = AttentionLayout.from_splits([24, 9], [5, 7, 4, 8, 9], [CAUSAL, NOISE, FULL, CAUSAL, CAUSAL], cached)
    generator = torch.Generator().manual_seed(0)
    keys = sum(layout.segment_lens)
    shapes = ((33, heads.queries), (keys, heads.keys), (keys, heads.keys), (33, heads.queries))
    q, k, v, weight = (
        torch.randn(*shape, heads.dim, generator=generator).to(place.device, place.dtype) for shape in shapes
    )
    found = _results(name, layout, place.trains, q, k, v, weight)
    exact = _results(DEFAULT_BACKEND, layout, place.trains, *(x.float() for x in (q, k, v, weight)))
    return max(float((one.float() - other).norm() / other.norm()) for one, other in zip(found, exact))


def _results(name: str, layout: AttentionLayout, trains: bool, *tensors: Tensor) -> list[Tensor]:
    """The output and, if the place trains, the gradients by q, k and v of its product with the last tensor."""
    q, k, v = (x.detach().requires_grad_(trains) for x in tensors[:3])
    with torch.set_grad_enabled(trains):
        output = attention_backend(name)(layout)(q, k, v)
        gradients = torch.autograd.grad(output, (q, k, v), tensors[3]) if trains else ()
    return [output.detach(), *gradients]
