"""AdamW over a range of split masters: one pass over memory that reads gradients, updates, and averages.

Guarantees: the same step by a compiled kernel on the CPU and by torch elsewhere (and where the kernel can't be built,
which is logged once). With fp32 moments the kernel's results are those of DeepSpeed's CPU Adam, bit for bit; torch's
differ in the last bit.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bagel_ds.zero.split.formats import MomentFormat, PackedMoments, join, random_bits, round_stochastically, split
from bagel_ds.zero.split.kernel import kernel

_CHUNK = 2**22  # elements that torch updates at once


class Average(NamedTuple):
    """A moving average to update: values += weight * (master - values); bf16 values are rounded by the seed."""

    values: Tensor
    weight: float
    seed: int


class Step(NamedTuple):
    """Numbers of one AdamW step, after DeepSpeed's: directions are exp_avg / (sqrt(exp_avg_sq) * bias2 + eps)."""

    factor: float  # of gradients, for clipping
    beta1: float
    beta2: float
    bias2: float
    eps: float
    step_size: float  # -lr / bias1
    decay: float  # -lr * weight decay
    carried: float  # -lr * beta1 / (1 - beta1): what is lost of exp_avg / sqrt(exp_avg_sq) moves the master so much


class SplitRange:
    """The states of a contiguous part of a tensor. All tensors are 1-D with the same number of elements.

    Before it is used it must `hold` what lies beside the weights, whose place changes if it comes from NVMe.
    """

    low: Tensor
    moments: tuple[Tensor, ...]

    def __init__(self, high: Tensor, start: int):
        self.high = high
        self.start = start  # in the whole tensor
        self.fused = high.numel()  # of these, elements that DeepSpeed's CPU Adam computes in whole vectors
        self.ties = torch.empty(0, dtype=torch.int64, device=high.device)

    def hold(self, low: Tensor, *moments: Tensor) -> None:
        self.low, self.moments = low, moments

    def parts(self) -> Iterator[tuple[slice, Tensor]]:
        """Pieces small enough for torch's temporary tensors, each with the positions of its ties."""
        for at in range(0, self.high.numel(), _CHUNK):
            yield slice(at, at + _CHUNK), self.ties[(self.ties >= at) & (self.ties < at + _CHUNK)] - at

    def master(self, part: slice = slice(None)) -> Tensor:
        """The fp32 masters of a part, which must begin at a position that is not negative."""
        high, start = self.high[part], part.start or 0
        return join(high, self.low[part], self.ties[(self.ties >= start) & (self.ties < start + len(high))] - start)

    def put(self, master: Tensor) -> None:
        """Split fp32 masters."""
        self.ties = split(master, self.high, self.low)


def update(
    kept: SplitRange, moments: MomentFormat, gradients: Tensor, step: Step, seed: int, average: Average | None = None
) -> None:
    """One step. `gradients`: fp32 or bf16, as long as the range; not changed."""
    library = kernel() if kept.high.device.type == "cpu" else None
    if library is not None:
        _update_by_kernel(library, kept, moments, gradients, step, seed, average)
    else:
        update_by_torch(kept, moments, gradients, step, seed, average)


@torch.no_grad()
def update_by_torch(
    kept: SplitRange, moments: MomentFormat, gradients: Tensor, step: Step, seed: int, average: Average | None = None
) -> None:
    left = [kept.ties[:0]]
    for part, ties in kept.parts():
        high, low = kept.high[part], kept.low[part]
        states = tuple(each[part] for each in kept.moments)
        master = join(high, low, ties)
        exp_avg, exp_avg_sq = moments.read(states)
        gradient = gradients[part].float() * step.factor
        exp_avg = torch.add(exp_avg * step.beta1, gradient, alpha=1 - step.beta1)
        exp_avg_sq = torch.addcmul(exp_avg_sq * step.beta2, gradient, gradient, value=1 - step.beta2)
        direction = exp_avg / (exp_avg_sq.sqrt() * step.bias2 + step.eps)
        if step.decay:
            master = torch.add(master, master, alpha=step.decay)
        master = torch.add(master, direction, alpha=step.step_size)
        random = random_bits(seed, kept.start + part.start, len(high), high.device) if moments.kind else None
        lacking = moments.write(states, exp_avg, exp_avg_sq, random)
        if lacking is not None:
            master = torch.add(master, lacking, alpha=step.carried)
        left.append(part.start + split(master, high, low))
        if average is not None:
            update_average(average._replace(values=average.values[part]), master, kept.start + part.start)
    kept.ties = torch.cat(left)


def update_average(average: Average, master: Tensor, start: int) -> None:
    """Values from the place `start` of their whole tensor. Exact where the two are equal."""
    values = average.values
    if values.dtype == torch.float32:
        values.lerp_(master, average.weight)
    else:
        random = random_bits(average.seed, start, len(values), values.device) >> 16
        values.copy_(round_stochastically(values.float().lerp_(master, average.weight), random))


# ------------------------------------------------------------------------------------------------- the compiled kernel
class _Step(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_float) for name in ("factor", "beta1", "beta1_rest", "beta2", "beta2_rest", "bias2", "eps")),
        *((name, ctypes.c_float) for name in ("step_size", "decay", "bound", "carried", "weight")),
        *((name, ctypes.c_uint32) for name in ("seed", "average_seed")),
    ]


def _update_by_kernel(
    library: Any,
    kept: SplitRange,
    moments: MomentFormat,
    gradients: Tensor,
    step: Step,
    seed: int,
    average: Average | None,
) -> None:
    single = ctypes.c_float
    numbers = _Step(
        step.factor,
        step.beta1,
        # In single precision, as DeepSpeed computes them.
        single(1 - single(step.beta1).value).value,
        step.beta2,
        single(1 - single(step.beta2).value).value,
        step.bias2,
        step.eps,
        step.step_size,
        step.decay,
        moments.bound if isinstance(moments, PackedMoments) else 0.0,
        step.carried * moments.unit if isinstance(moments, PackedMoments) else 0.0,
        0.0 if average is None else average.weight,
        seed,
        0 if average is None else average.seed,
    )
    tensors = [kept.high, kept.low, gradients, *kept.moments, *([] if average is None else [average.values])]
    assert all(tensor.is_contiguous() and tensor.numel() == kept.high.numel() for tensor in tensors)
    pointer = ctypes.c_void_p
    count = library.bagel_ds_update(
        pointer(kept.high.data_ptr()),
        pointer(kept.low.data_ptr()),
        pointer(kept.ties.data_ptr()),
        ctypes.c_int64(kept.ties.numel()),
        pointer(gradients.data_ptr()),
        ctypes.c_int(1 if gradients.dtype == torch.bfloat16 else 0),
        pointer(kept.moments[0].data_ptr()),
        pointer(kept.moments[-1].data_ptr()),
        ctypes.c_int(moments.kind),
        pointer(None if average is None else average.values.data_ptr()),
        ctypes.c_int(0 if average is None else 2 if average.values.dtype == torch.bfloat16 else 1),
        ctypes.c_int64(kept.high.numel()),
        ctypes.c_int64(kept.fused),
        ctypes.c_int64(kept.start),
        ctypes.byref(numbers),
        ctypes.c_int(torch.get_num_threads()),
    )
    kept.ties = torch.empty(count, dtype=torch.int64)
    if count:
        library.bagel_ds_ties(pointer(kept.ties.data_ptr()))
