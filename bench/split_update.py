"""The update of split masters beside DeepSpeed's: time and bytes per parameter, with the machine's memory as the limit.

One command: `python bench/split_update.py [--json] [--millions 32] [--rounds 7] [--threads N]`. All ways take turns in
every round, on the same gradients in bf16; a way's time is its median, and its ratio the median of its ratios to
DeepSpeed's way in the same round. DeepSpeed's way is what ZeRO-3 with its optimizer in host memory does per group:
gradients to fp32, times the clipping factor, CPU Adam, masters to bf16. `copy` is torch's copy of a large tensor, whose
bytes per second (read and written) the others' are compared with: 100 % would be an update that waits for memory alone.
Bytes are those that must be read or written once, not what caches add.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

import torch  # noqa: E402

from bagel_ds.zero.split.formats import moment_format, seed_of  # noqa: E402
from bagel_ds.zero.split.kernel import kernel  # noqa: E402
from bagel_ds.zero.split.update import Average, SplitRange, Step, update, update_by_torch  # noqa: E402

BETAS, EPS, LR, FACTOR = (0.9, 0.95), 1e-15, 2e-5, 0.5
STEP = Step(FACTOR, *BETAS, 1.2, EPS, -LR, 0.0, -9 * LR)
# Bytes per parameter, read and written: gradients 2 + 4, times the factor 8, Adam 4 + 3 x 8, weights 4 + 2.
DEEPSPEED_BYTES = 48
MOMENT_BYTES = {"fp32": 8, "bf16": 4, "8bit": 2}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--millions", type=float, default=32, help="parameters, in millions (default 32)")
    parser.add_argument("--rounds", type=int, default=7, help="timed rounds (default 7)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of every way (default: torch's)")
    options = parser.parse_args()
    if options.millions < 0.1 or options.rounds < 1 or options.threads < 1:
        parser.error("pass at least 0.1 million parameters, one round and one thread")
    torch.set_num_threads(options.threads)
    if kernel() is None:
        parser.error("the kernel can't be built here (the line above says why)")
    report = compare(int(options.millions * 1e6), options.rounds)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))


def compare(count: int, rounds: int) -> dict[str, Any]:
    ways = make_ways(count)
    for run, _ in ways.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds):
        print(f"\rround {number + 1} of {rounds}", end="", file=sys.stderr, flush=True)
        for name, (run, _) in ways.items():
            began = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - began)
    print(file=sys.stderr)
    report: dict[str, Any] = {"parameters": count, "threads": torch.get_num_threads(), "rounds": rounds, "ways": {}}
    rate = {name: count * size / statistics.median(seconds[name]) for name, (_, size) in ways.items()}
    for name, (_, size) in ways.items():
        base = seconds["DeepSpeed, average" if name.endswith("average") else "DeepSpeed"]
        report["ways"][name] = {
            "ns_per_parameter": round(1e9 * statistics.median(seconds[name]) / count, 3),
            "ratio": round(statistics.median(own / other for own, other in zip(seconds[name], base)), 3),
            "bytes_per_parameter": size,
            "of_copy_bandwidth": round(rate[name] / rate["copy"], 2),
        }
    return report


def split_bytes(moments: str, average: int = 0) -> int:
    """Bytes per parameter of a split update: gradients, and both ways of masters, moments and the average."""
    return 2 + 2 * (4 + MOMENT_BYTES[moments] + average)


def make_ways(count: int) -> dict[str, tuple[Callable[[], object], float]]:
    """What is timed, with the bytes that it must move per parameter."""
    generator = torch.Generator().manual_seed(0)
    masters = torch.randn(count, generator=generator) * 0.02
    gradients = (torch.randn(count, generator=generator) * 1e-3).bfloat16()
    source, target = torch.zeros(count), torch.zeros(count)
    ways: dict[str, tuple[Callable[[], object], float]] = {"copy": (lambda: target.copy_(source), 8)}
    ways["DeepSpeed"] = (deepspeed_way(masters, gradients, average=False), DEEPSPEED_BYTES)
    ways["DeepSpeed, average"] = (deepspeed_way(masters, gradients, average=True), DEEPSPEED_BYTES + 12)
    for kind in MOMENT_BYTES:
        ways[f"split, {kind} moments"] = (split_way(masters, gradients, kind, update, None), split_bytes(kind))
    for kind in MOMENT_BYTES:
        average = masters.bfloat16()
        run = split_way(masters, gradients, kind, update, average)
        ways[f"split, {kind} moments, bf16 average"] = (run, split_bytes(kind, average=2))
    by_torch = split_way(masters, gradients, "fp32", update_by_torch, None)
    ways["split, fp32 moments, by torch"] = (by_torch, split_bytes("fp32"))
    return ways


def deepspeed_way(masters: torch.Tensor, gradients: torch.Tensor, average: bool) -> Callable[[], None]:
    from deepspeed.ops.adam import DeepSpeedCPUAdam

    parameter = torch.nn.Parameter(masters.clone())
    parameter.grad = torch.zeros_like(masters)
    adam = DeepSpeedCPUAdam([parameter], lr=LR, betas=BETAS, eps=EPS, weight_decay=0.0)
    weights, factor, averaged = masters.bfloat16(), torch.tensor(FACTOR), masters.clone()

    @torch.no_grad()
    def run() -> None:
        assert parameter.grad is not None
        parameter.grad.copy_(gradients)
        parameter.grad.mul_(factor)
        adam.step()
        weights.copy_(parameter.data)
        if average:
            averaged.lerp_(parameter.data, 1e-4)

    return run


def split_way(
    masters: torch.Tensor, gradients: torch.Tensor, kind: str, by: Any, average: torch.Tensor | None
) -> Callable[[], None]:
    moments, count = moment_format(kind, BETAS), masters.numel()
    kept = SplitRange(torch.empty(count, dtype=torch.bfloat16), 0)
    kept.hold(torch.empty(count, dtype=torch.int16), *moments.allocate(count, torch.device("cpu")))
    kept.put(masters)
    averaged = None if average is None else Average(average, 1e-4, seed_of("w", 1, 1))
    return lambda: by(kept, moments, gradients, STEP, seed_of("w", 1), averaged)


def lines(report: dict[str, Any]) -> list[str]:
    found = [
        f"{report['parameters'] / 1e6:.0f} M parameters, {report['threads']} threads, {report['rounds']} rounds",
        f"{'':34} {'ns/parameter':>12} {'ratio':>6} {'bytes':>6} {'of copy':>8}",
    ]
    for name, way in report["ways"].items():
        ratio = "" if name == "copy" else f"{way['ratio']:.2f}"
        found.append(
            f"{name:34} {way['ns_per_parameter']:12.2f} {ratio:>6} {way['bytes_per_parameter']:6.0f} "
            f"{100 * way['of_copy_bandwidth']:7.0f} %"
        )
    return found


if __name__ == "__main__":
    main()
