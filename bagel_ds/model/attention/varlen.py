"""Exact attention of a pack by kernels that know only "causal" and "all-to-all": two calls over many sequences.

Each segment is a sequence: its own queries, and as keys its visible prefix, then itself. Causal segments go into one
call, aligned at the end (the last query sees all keys, each earlier one a key less); full and noise segments go into
another that isn't causal. Keys that several segments see stand in both calls once per segment that sees them. Rows are
gathered by indices that are built once per pack, on its device, without waiting for it.

Shape legend: Q query tokens, T tokens (keys), N keys of all sequences (N >= T), H heads, K key/value heads, D head dim.
"""

from __future__ import annotations

from itertools import accumulate
from typing import Any, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor

from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.permutation import permuted


class VarlenKernel(Protocol):
    """Attention within sequences, scale 1/sqrt(D): q [Q, H, D], k and v [N, K, D] -> [Q, H, D].

    Sequence i has queries `cu_q[i]:cu_q[i + 1]` and keys `cu_k[i]:cu_k[i + 1]`; both int32, on the device. `max_q` and
    `max_k` are the lengths of the longest. `causal`: aligned at the end of queries and keys.
    """

    def __call__(
        self, q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
    ) -> Tensor: ...


class Call(NamedTuple):
    """One call of the kernel."""

    causal: bool
    queries: int  # rows
    keys: int
    cu_q: Tensor
    cu_k: Tensor
    max_q: int
    max_k: int


class Permutation(NamedTuple):
    """Rows in another order: `order` [n] gathers them, `inverse` [n] puts them back."""

    order: Tensor
    inverse: Tensor

    def reverse(self) -> Permutation:
        return Permutation(self.inverse, self.order)


class Plan(NamedTuple):
    """What all layers need of a layout on one device. None stands for rows as they are."""

    calls: tuple[Call, ...]
    queries: Permutation | None  # into the order of the calls
    keys: Permutation | Tensor | None  # likewise; an index [N] if some stand there more than once


def varlen(layout: AttentionLayout, kernel: VarlenKernel) -> Attend:
    """Attention of a pack by `kernel`."""
    plans: dict[torch.device, Plan] = {}

    def attend(q_QHD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        if q_QHD.device not in plans:
            plans[q_QHD.device] = plan(layout, q_QHD.device)
        calls, order, keys = plans[q_QHD.device]
        queries = reordered(q_QHD, order).split([call.queries for call in calls])
        k_parts, v_parts = (reordered(x, keys).split([call.keys for call in calls]) for x in (k_TKD, v_TKD))
        outputs = [
            kernel(q, k, v, call.cu_q, call.cu_k, call.max_q, call.max_k, call.causal)
            for call, q, k, v in zip(calls, queries, k_parts, v_parts)
        ]
        whole = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return reordered(whole, order and order.reverse())

    return attend


def plan(layout: AttentionLayout, device: torch.device) -> Plan:
    """The kernel's calls for a layout with at least one query, and the order of rows that they need."""
    lens = layout.segment_lens
    key_starts = [0, *accumulate(lens)]
    query_starts = [0, *accumulate(0 if cached else n for n, cached in zip(lens, layout.is_cached))]
    groups: dict[bool, list[int]] = {True: [], False: []}  # by causal
    for segment, (causal, cached) in enumerate(zip(layout.is_causal, layout.is_cached)):
        if not cached:
            groups[causal].append(segment)
    calls, query_runs, key_runs = [], [], []
    for causal, segments in groups.items():
        if not segments:
            continue
        q_lens = [lens[segment] for segment in segments]
        k_lens = [sum(lens[seen] for seen in layout.visible[segment]) for segment in segments]
        cu = on_device([0, *accumulate(q_lens), 0, *accumulate(k_lens)], torch.int32, device)
        cu_q, cu_k = cu.split(len(segments) + 1)
        calls.append(Call(causal, sum(q_lens), sum(k_lens), cu_q, cu_k, max(q_lens), max(k_lens)))
        query_runs += [(query_starts[segment], lens[segment]) for segment in segments]
        key_runs += [(key_starts[seen], lens[seen]) for segment in segments for seen in layout.visible[segment]]
    keys = _index(key_runs, device)
    return Plan(
        tuple(calls),
        _permutation(_index(query_runs, device)),
        keys if keys is not None and len(keys) > sum(lens) else _permutation(keys),
    )


def on_device(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values` [n]; the copy to a GPU doesn't wait for its earlier work."""
    tensor = torch.tensor(values, dtype=dtype, device="cpu")
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def _index(runs: Sequence[tuple[int, int]], device: torch.device) -> Tensor | None:
    """[n] int64: the rows of runs (start, length), one after the other; None where that is 0, 1, 2, ..."""
    shifts, rows = [], 0
    for start, length in runs:
        shifts.append(start - rows)
        rows += length
    if not any(shifts):
        return None
    both = on_device([*shifts, *(length for _, length in runs)], torch.int64, device)
    shift, lengths = both.split(len(runs))
    return torch.repeat_interleave(shift, lengths, output_size=rows) + torch.arange(rows, device=device)


def _permutation(index: Tensor | None) -> Permutation | None:
    if index is None:
        return None
    inverse = torch.empty_like(index)
    inverse[index] = torch.arange(len(index), device=index.device)
    return Permutation(index, inverse)


def reordered(x: Tensor, order: Permutation | Tensor | None) -> Tensor:
    """The rows of x in the order that a plan asks for."""
    if order is None:
        return x
    if isinstance(order, Permutation):
        return permuted(x, *order)
    gathered: Tensor = _Repeated.apply(x, order)
    return gathered


class _Repeated(torch.autograd.Function):
    """Rows by an index that names some more than once; their gradients are summed in fp32."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor) -> Tensor:
        ctx.index, ctx.rows = index, len(x)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        exact = torch.promote_types(gradient.dtype, torch.float32)
        total = gradient.new_zeros((ctx.rows, *gradient.shape[1:]), dtype=exact)
        return total.index_add_(0, ctx.index, gradient.to(exact)).to(gradient.dtype), None


def varlen_reference(
    q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
) -> Tensor:
    """A `VarlenKernel` in plain operations on any device, with gradients: what the others are compared with."""
    outputs = []
    sequences = zip(q.split(cu_q.diff().tolist()), k.split(cu_k.diff().tolist()), v.split(cu_k.diff().tolist()))
    for query, key, value in sequences:
        assert len(query) <= max_q and len(key) <= max_k
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
        scores = torch.einsum("qhd,khd->hqk", query, key) / query.shape[2] ** 0.5
        if causal:
            seen = torch.ones_like(scores[0], dtype=torch.bool).tril_(len(key) - len(query))
            scores = scores.masked_fill(~seen, -torch.inf)
        outputs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), value))
    return torch.cat(outputs)
