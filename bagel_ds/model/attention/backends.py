"""The registry of attention kernels. Importing it needs no torch, so the command line can read it for `--help`.

To add a kernel, write a module like sdpa.py, name it in BACKENDS and put it where `--attn` should find it in NAMES.
`choice.py` tries it before a run uses it; tests/model/attention compares it with a dense mask.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any, Callable, Protocol

if TYPE_CHECKING:
    from torch import Tensor

    from bagel_ds.model.attention.layout import AttentionLayout

BACKENDS = {  # name -> module
    "sdpa": "bagel_ds.model.attention.sdpa",
    "flash_package": "bagel_ds.model.attention.flash_package",
    "flash_torch": "bagel_ds.model.attention.flash_torch",
    "flex": "bagel_ds.model.attention.flex",
}
DEFAULT_BACKEND = "sdpa"
CHOICES = ("auto", "flash", "flex", "sdpa")  # of `--attn`
# The values of `--attn` (and `--use_flex True`), and the kernels that each may take, the best first.
NAMES = {
    "auto": ("flash_package", "flash_torch", "flex", "sdpa"),
    "flash": ("flash_package", "flash_torch"),
    "flex": ("flex",),
    "sdpa": ("sdpa",),
    "use_flex": ("flex", "sdpa"),  # the original's option: a wish, as the guides pass it everywhere
}


class Attend(Protocol):
    """Softmax attention of one pack, scale 1/sqrt(D): q [Q, H, D], k and v [T, K, D] -> [Q, H, D].

    Key/value head j serves query heads [j*H/K, (j+1)*H/K). T counts all tokens of the layout, Q those of its queries.
    """

    def __call__(self, q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor: ...


# Called once per pack, so that a kernel can build what all layers share (a block mask, sequence offsets).
Backend = Callable[["AttentionLayout"], Attend]


def backend_module(name: str) -> Any:
    """The module of a kernel: `prepare(layout) -> Attend`, `unsupported(device, dtype, head_dim, trains)` and TITLE."""
    return import_module(BACKENDS[name])


def attention_backend(name: str) -> Backend:
    """The kernel of this name. It accepts every layout; one without segments gives no rows but a connected graph."""
    kernel: Backend = backend_module(name).prepare
    return lambda layout: kernel(layout) if layout.segment_lens else _attend_to_nothing


def _attend_to_nothing(q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
    # Under ZeRO-3 a rank without tokens must still produce (zero) gradients, or the other ranks wait for it.
    return q_QHD + 0 * (k_TKD.sum() + v_TKD.sum())
