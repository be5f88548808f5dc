"""The registry of attention kernels. Importing it needs no torch, so the command line can read it for `--help`.

To add a kernel, write a module with `prepare(layout) -> Attend` and name it here. tests/reference/test_masks.py then
compares it with a dense mask. `--attn` takes the names in arguments/options.py.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Callable, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from bagel_ds.model.attention.layout import AttentionLayout

BACKENDS = {"sdpa": "bagel_ds.model.attention.sdpa"}  # name -> module
DEFAULT_BACKEND = "sdpa"


class Attend(Protocol):
    """Softmax attention of one pack, scale 1/sqrt(D): q [Q, H, D], k and v [T, K, D] -> [Q, H, D].

    Key/value head j serves query heads [j*H/K, (j+1)*H/K). T counts all tokens of the layout, Q those of its queries.
    """

    def __call__(self, q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor: ...


# Called once per pack, so that a kernel can build what all layers share (a block mask, sequence offsets).
Backend = Callable[["AttentionLayout"], Attend]


def attention_backend(name: str) -> Backend:
    """The kernel of this name. It accepts every layout; one without segments gives no rows but a connected graph."""
    kernel: Backend = import_module(BACKENDS[name]).prepare
    return lambda layout: kernel(layout) if layout.segment_lens else _attend_to_nothing


def _attend_to_nothing(q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    # Under ZeRO-3 a rank without tokens must still produce (zero) gradients, or the other ranks wait for it.
    return q_QHD + 0 * (k_TKD.sum() + v_TKD.sum())
