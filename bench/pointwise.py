"""Norms, rotations and SwiGLU of a layer by fused kernels beside torch's own, forward and backward.

One command: `python bench/pointwise.py [--json]`. On a GPU bf16 in the 7B's widths and 16,384 tokens, on a CPU fp32 and
few. Both ways take turns, and a ratio is the median over rounds of the time of torch's own kernels over that of the
fused ones (above 1 the fused ones are faster). "GB/s" counts what must be read and written at least. Results are
compared first, as at the start of a run; the report has the seconds that this and compiling take.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from bagel_ds.machine.device import choose_kernels, device_type  # noqa: E402
from bagel_ds.model.attention.choice import Place  # noqa: E402
from bagel_ds.model.embeddings import apply_rope, rope_tables  # noqa: E402
from bagel_ds.model.layers import RMSNorm, swiglu  # noqa: E402
from bagel_ds.model.pointwise.choice import fault_of  # noqa: E402
from bagel_ds.model.pointwise.kernels import PointwiseKernels, pointwise_kernels  # noqa: E402
from bagel_ds.model.shape.config import BagelConfig, LLMConfig  # noqa: E402

WAYS = {"torch's own": False, "fused": True}


class Part(NamedTuple):
    """One kind of operation: how often a layer does it, and how many tensors of the output's size it must move."""

    name: str
    times: int
    moved: tuple[int, int]  # forward, backward
    compute: Callable[[PointwiseKernels], Tensor]
    inputs: tuple[Tensor, ...]  # that get gradients


def main() -> None:
    device = torch.device(device_type())
    on_gpu = device.type == "cuda"
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--json", action="store_true", help="print one JSON object")
    add("--tokens", type=int, default=16384 if on_gpu else 512)
    add("--width", type=int, default=3584, help="default: the 7B's, 3584; 28 query heads, 4 key heads")
    add("--inner", type=int, default=18944, help="width of the MLP; default: the 7B's, 18944")
    add("--rounds", type=int, default=15 if on_gpu else 5, help="in which both ways take turns")
    add("--precision", choices=("bf16", "fp32"), default="bf16" if on_gpu else "fp32")
    options = parser.parse_args()
    if options.width % 56 or options.tokens < 2 or options.rounds < 1:
        parser.error("expected a width that 56 divides, two or more tokens and one or more rounds")
    place = Place(device, {"bf16": torch.bfloat16, "fp32": torch.float32}[options.precision], trains=True)
    choose_kernels(options.precision)
    llm = LLMConfig(hidden_size=options.width, intermediate_size=options.inner)
    began = time.perf_counter()
    if fault := fault_of(BagelConfig(llm=llm), place):
        sys.exit(f"pointwise: fused kernels can't be used here: {fault}")
    report = {
        "device": torch.cuda.get_device_name() if on_gpu else "CPU",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "precision": options.precision,
        "tokens": options.tokens,
        "width": options.width,
        "inner": options.inner,
        "compiled_and_tried_seconds": time.perf_counter() - began,
    }
    report |= measured(list(parts(llm, options.tokens, place)), options.rounds)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))


def parts(llm: LLMConfig, tokens: int, place: Place) -> Iterable[Part]:
    def drawn(*shape: int) -> Tensor:
        return torch.randn(shape, device=place.device, dtype=place.dtype, requires_grad=True)

    def normed(x: Tensor) -> tuple[Callable[[PointwiseKernels], Tensor], tuple[Tensor, ...]]:
        module = RMSNorm(x.shape[-1], llm.rms_norm_eps).to(place.device, place.dtype)
        torch.nn.init.ones_(module.weight)

        def compute(kernels: PointwiseKernels) -> Tensor:
            module.kernels = kernels
            return module(x)

        return compute, (x, module.weight)

    yield Part("norm of a layer's width", 2, (2, 3), *normed(drawn(tokens, llm.hidden_size)))
    tables = rope_tables(torch.arange(tokens, device=place.device), llm.head_dim, llm.rope_theta, place.dtype)
    for name, heads in (("queries", llm.num_attention_heads), ("keys", llm.num_key_value_heads)):
        x = drawn(tokens, heads, llm.head_dim)
        yield Part(f"norm of {name}", 1, (2, 3), *normed(x))
        yield Part(f"rotation of {name}", 1, (2, 2), lambda kernels, x=x: apply_rope(x, *tables, kernels), (x,))
    gate, up = (drawn(tokens, llm.intermediate_size) for _ in range(2))
    yield Part("SwiGLU", 1, (3, 5), lambda kernels: swiglu(gate, up, kernels), (gate, up))


def measured(every: list[Part], rounds: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    whole = dict.fromkeys(WAYS, 0.0)
    for part in every:
        print(part.name, file=sys.stderr)
        times: dict[str, list[tuple[float, float]]] = {way: [] for way in WAYS}
        for number in range(rounds + 1):  # the first one warms up
            for way in list(WAYS)[:: 1 if number % 2 else -1]:
                times[way].append(timed(part, pointwise_kernels(WAYS[way])))
        one = {}
        for which, direction in enumerate(("forward", "backward")):
            seconds = {way: [took[which] for took in times[way][1:]] for way in WAYS}
            ratios = [slow / fast for slow, fast in zip(*seconds.values(), strict=True)]
            moved = part.moved[which] * part.inputs[0].nbytes
            middle = {way: statistics.median(took) for way, took in seconds.items()}
            one[direction] = {
                "ratio": statistics.median(ratios),
                "ms": {way: 1e3 * took for way, took in middle.items()},
                "gb_per_second": {way: moved / took / 1e9 for way, took in middle.items()},
            }
            for way, took in middle.items():
                whole[way] += part.times * took
        found[part.name] = one
    own, fused = whole.values()
    return {"parts": found, "layer": {"ratio": own / fused, "ms": {way: 1e3 * took for way, took in whole.items()}}}


def timed(part: Part, kernels: PointwiseKernels) -> tuple[float, float]:
    """Seconds of the forward and of the backward pass."""
    output, forward = clocked(lambda: part.compute(kernels), part.inputs[0].device)
    gradient = torch.ones_like(output)
    _, backward = clocked(lambda: torch.autograd.grad(output, part.inputs, gradient), output.device)
    return forward, backward


def clocked(work: Callable[[], Any], device: torch.device) -> tuple[Any, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    began = time.perf_counter()
    result = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - began


def lines(report: dict[str, Any]) -> Iterable[str]:
    yield (
        f"{report['device']}, {report['precision']}, {report['tokens']:,} tokens; compiled and tried in "
        f"{report['compiled_and_tried_seconds']:.0f} s"
    )
    for name, one in report["parts"].items():
        for direction, found in one.items():
            took = ", ".join(
                f"{way} {found['ms'][way]:.2f} ms ({found['gb_per_second'][way]:.0f} GB/s)" for way in WAYS
            )
            yield f"{name + ', ' + direction:32} {found['ratio']:5.2f}  {took}"
    layer = report["layer"]
    yield f"{'all of one layer':32} {layer['ratio']:5.2f}  " + ", ".join(
        f"{way} {layer['ms'][way]:.1f} ms" for way in WAYS
    )


if __name__ == "__main__":
    main()
