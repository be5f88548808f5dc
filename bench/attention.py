"""Attention of packs by every kernel that works here: time and memory, forward and backward, beside sdpa.

One command: `python bench/attention.py [--json]`. On a GPU bf16 in the 7B's heads and packs of 8k to 32k tokens, on a
CPU fp32 and small ones. All ways take turns, and a ratio is the median over rounds of sdpa's time over the way's
(above 1 is faster). "original" is the original's way: a dense float mask per sample, keys and values copied for each
query head. `--sweep` instead shrinks the segments that share a prefix, until its copies in the varlen calls don't pay.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import Tensor  # noqa: E402

from bagel_ds.machine.device import choose_kernels, device_type  # noqa: E402
from bagel_ds.model.attention import flash_package, flash_torch  # noqa: E402
from bagel_ds.model.attention.backends import BACKENDS, Attend, attention_backend  # noqa: E402
from bagel_ds.model.attention.choice import Heads, Place, fault_of  # noqa: E402
from bagel_ds.model.attention.layout import AttentionLayout  # noqa: E402
from bagel_ds.model.attention.varlen import VarlenKernel, plan, reordered, varlen, varlen_reference  # noqa: E402
from bagel_ds.units import GIB  # noqa: E402
from bench.attention_packs import KINDS, random_pack, recorded_packs, shared_prefix  # noqa: E402

Ways = Mapping[str, Callable[[AttentionLayout], Attend]]
SEGMENTS = (16, 32, 64, 128, 256, 512, 1024, 2048)


class Inputs(NamedTuple):
    q: Tensor  # [T, H, D]
    k: Tensor  # [T, K, D]
    v: Tensor  # [T, K, D]
    gradient: Tensor  # [T, H, D], of the output


class Took(NamedTuple):
    """Of one run: seconds, and bytes beyond the inputs (None on a CPU)."""

    forward: float
    backward: float
    peak: int | None

    @property
    def whole(self) -> float:
        return self.forward + self.backward


def main() -> None:
    device = torch.device(device_type())
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--sweep", action="store_true", help="measure the copies of a shared prefix instead")
    add("--lengths", type=int, nargs="+", default=[8192, 16384, 32768] if on_gpu else [1024, 2048], help="tokens")
    add("--kinds", nargs="+", default=[*KINDS, "recorded"], choices=[*KINDS, "recorded"], help="of packs")
    add("--heads", type=int, nargs=3, default=[28, 4, 128], metavar=("H", "K", "D"), help="default: the 7B's, 28 4 128")
    add("--rounds", type=int, default=9 if on_gpu else 5, help="in which all ways take turns")
    add("--precision", choices=("bf16", "fp32"), default="bf16" if on_gpu else "fp32")
    options = parser.parse_args()
    place = Place(device, {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision], trains=True)
    choose_kernels(options.precision)
    report = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": options.precision,
        "heads": options.heads,
        "rounds": options.rounds,
    }
    report |= (swept if options.sweep else compared)(Heads(*options.heads), place, options)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))


# ---------------------------------------------------------------------------------------------------------- packs
def compared(heads: Heads, place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Every way that works here, over all packs."""
    faults = {name: fault for name in BACKENDS if (fault := fault_of(name, heads, place))}
    ways: Ways = {name: attention_backend(name) for name in BACKENDS if name not in faults} | {"original": original}
    cases = []
    for length in options.lengths:
        packs = {kind: random_pack(kind, length) for kind in options.kinds if kind != "recorded"}
        packs |= recorded_packs(length) if "recorded" in options.kinds else {}
        for kind, layout in packs.items():
            print(f"{kind}, {length:,} tokens", file=sys.stderr)
            inputs = drawn(layout, heads, place)
            ready = {name: (prepare(layout), inputs) for name, prepare in ways.items()}
            cases.append({"pack": kind, "tokens": length, **measured(ready, layout, heads, options.rounds)})
    return {"unavailable": faults, "cases": cases}


def original(layout: AttentionLayout) -> Attend:
    """A dense float mask per sample, made once per pack; keys and values copied for each query head."""
    masks: dict[torch.dtype, list[Tensor]] = {}

    def attend(q_THD: Tensor, k_TKD: Tensor, v_TKD: Tensor) -> Tensor:
        if q_THD.dtype not in masks:
            masks[q_THD.dtype] = [mask.to(q_THD.device, q_THD.dtype) for mask in sample_masks(layout)]
        groups = q_THD.shape[1] // k_TKD.shape[1]
        k_THD, v_THD = k_TKD.repeat_interleave(groups, 1), v_TKD.repeat_interleave(groups, 1)
        lens = [len(mask) for mask in masks[q_THD.dtype]]
        outputs = [
            F.scaled_dot_product_attention(*(x.transpose(0, 1)[None] for x in parts), attn_mask=mask)[0].transpose(0, 1)
            for *parts, mask in zip(q_THD.split(lens), k_THD.split(lens), v_THD.split(lens), masks[q_THD.dtype])
        ]
        return torch.cat(outputs)

    return attend


def sample_masks(layout: AttentionLayout) -> list[Tensor]:
    """Of each sample [n, n]: 0 where a token sees another, else -inf."""
    starts = [0, *accumulate(layout.segment_lens)]
    firsts = [number for number, seen in enumerate(layout.visible) if seen == (number,) and begins(layout, number)]
    found = []
    for first, end in zip(firsts, [*firsts[1:], len(layout.visible)]):
        begin = starts[first]
        mask = torch.full((starts[end] - begin,) * 2, -torch.inf)
        for segment in range(first, end):
            rows = slice(starts[segment] - begin, starts[segment + 1] - begin)
            for other in layout.visible[segment]:
                mask[rows, starts[other] - begin : starts[other + 1] - begin] = 0
            if layout.is_causal[segment]:
                own = mask[rows, rows]
                own.masked_fill_(torch.ones_like(own, dtype=torch.bool).triu_(1), -torch.inf)
        found.append(mask)
    return found


def begins(layout: AttentionLayout, number: int) -> bool:
    """Whether no later segment sees one before this, which sees itself only: it can be computed by itself."""
    return all(min(seen) >= number for seen in layout.visible[number:])


# ---------------------------------------------------------------------------------------------------------- sweep
def swept(heads: Heads, place: Place, options: argparse.Namespace) -> dict[str, Any]:
    """Segments of falling length that share a prefix of half the pack: copies cost ever more beside the kernel's work.

    "kernel" is the varlen kernel on keys that were gathered before; flex copies nothing.
    """
    kernels = {"flash_package": flash_package.kernel, "flash_torch": flash_torch.kernel}
    working = [name for name in kernels if fault_of(name, heads, place) is None]
    name = working[0] if working else "varlen_reference"  # plain operations, where only the command is tried
    kernel = kernels[name] if working else varlen_reference
    ways: dict[str, Callable[[AttentionLayout], Attend]] = {"varlen": partial(varlen, kernel=kernel)}
    ways |= {other: attention_backend(other) for other in ("sdpa", "flex") if fault_of(other, heads, place) is None}
    cases = []
    for length in options.lengths:
        for segment in (each for each in reversed(SEGMENTS) if each <= length // 4):
            print(f"{length:,} tokens, segments of {segment}", file=sys.stderr)
            layout = shared_prefix(length // 2, length // 2, segment)
            inputs = drawn(layout, heads, place)
            ready = {way: (prepare(layout), inputs) for way, prepare in ways.items()}
            ready["kernel"] = without_copies(kernel, layout, inputs)
            cases.append({"segment": segment, "tokens": length, **measured(ready, layout, heads, options.rounds)})
    return {"kernel": name, "sweep": cases}


def without_copies(kernel: VarlenKernel, layout: AttentionLayout, inputs: Inputs) -> tuple[Attend, Inputs]:
    """The calls of a layout on rows that are already in their places: the work without the copies."""
    calls, order, keys = plan(layout, inputs.q.device)
    with torch.no_grad():
        rows = [reordered(inputs.q, order), reordered(inputs.k, keys), reordered(inputs.v, keys)]

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        parts = (x.split([call.keys for call in calls]) for x in (k, v))
        queries = q.split([call.queries for call in calls])
        return torch.cat([kernel(*three, *call[3:], call.causal) for call, *three in zip(calls, queries, *parts)])

    return attend, Inputs(*(x.contiguous().requires_grad_() for x in rows), inputs.gradient)


# ------------------------------------------------------------------------------------------------------ measuring
def described(layout: AttentionLayout) -> dict[str, Any]:
    """`keys_per_token`: how often a key stands in the varlen calls, on average."""
    keys = sum(layout.segment_lens[seen] for segment in layout.visible for seen in segment)
    return {
        "segments": len(layout.segment_lens),
        "pairs": layout.pairs,
        "keys_per_token": round(keys / sum(layout.segment_lens), 2),
    }


def drawn(layout: AttentionLayout, heads: Heads, place: Place) -> Inputs:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(layout.segment_lens)
    q, k, v, gradient = (
        torch.randn(tokens, count, heads.dim, generator=generator).to(place.device, place.dtype)
        for count in (heads.queries, heads.keys, heads.keys, heads.queries)
    )
    return Inputs(q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), gradient)


def measured(
    ways: Mapping[str, tuple[Attend, Inputs]], layout: AttentionLayout, heads: Heads, rounds: int
) -> dict[str, Any]:
    """Medians of each way over rounds in which all take turns, after one that doesn't count."""
    took: dict[str, list[Took]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, (attend, inputs) in ways.items():
            found = timed(attend, inputs)
            if number:
                took[name].append(found)
    flop = 4 * layout.pairs * heads.queries * heads.dim * 3.5  # two products forward, five backward
    return {**described(layout), "ways": {name: summary(found, took["sdpa"], flop) for name, found in took.items()}}


def timed(attend: Attend, inputs: Inputs) -> Took:
    device = inputs.q.device
    on_gpu = device.type == "cuda"
    before = 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    moments = [now(device)]
    output = attend(*inputs[:3])
    moments.append(now(device))
    torch.autograd.grad(output, inputs[:3], inputs.gradient)
    moments.append(now(device))
    peak = torch.cuda.max_memory_allocated() - before if on_gpu else None
    return Took(moments[1] - moments[0], moments[2] - moments[1], peak)


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def summary(found: list[Took], sdpa: list[Took], flop: float) -> dict[str, Any]:
    ratios = sorted(other.whole / one.whole for one, other in zip(found, sdpa))
    whole = statistics.median(one.whole for one in found)
    peaks = [one.peak for one in found if one.peak is not None]
    return {
        "forward_ms": round(1e3 * statistics.median(one.forward for one in found), 2),
        "backward_ms": round(1e3 * statistics.median(one.backward for one in found), 2),
        "peak_gib": round(max(peaks) / GIB, 3) if peaks else None,
        "tflops": round(flop / whole / 1e12, 3),
        "ratio": round(statistics.median(ratios), 3),
        "ratio_spread": [round(ratios[0], 3), round(ratios[-1], 3)],
    }


def lines(report: dict[str, Any]) -> list[str]:
    found = [
        f"{report['device']}, {report['threads']} threads, torch {report['torch']}, {report['precision']}, heads "
        f"{report['heads']}; ratio: sdpa's time over the way's, forward and backward",
        *(f"  without {name}: {fault}" for name, fault in report.get("unavailable", {}).items()),
    ]
    for case in report.get("cases", report.get("sweep", [])):
        what = case.get("pack") or f"segments of {case['segment']}, kernel {report['kernel']}"
        found.append(
            f"{what}, {case['tokens']:,} tokens in {case['segments']} segments, each key {case['keys_per_token']} times"
        )
        for name, one in case["ways"].items():
            peak = "" if one["peak_gib"] is None else f", {one['peak_gib']:.2f} GiB"
            low, high = one["ratio_spread"]
            found.append(
                f"  {name:16} {one['ratio']:6.2f} ({low:.2f} to {high:.2f}): {one['forward_ms']:.1f} + "
                f"{one['backward_ms']:.1f} ms, {one['tflops']:.2f} TFLOP/s{peak}"
            )
    return found


if __name__ == "__main__":
    main()
