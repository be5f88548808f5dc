"""The least time that a training step can take: what it must compute and move, over what the machine can do.

Guarantees: products are those that the data plan prices (`bagel_ds/data/plan/cost.py`): the forward pass, its
recomputation, and in the backward pass only the gradients that are needed. Each resource has a limit of its own, as if
all of them worked at the same time; one whose rate is unknown has none, nor has NVMe. PCIe counts as one direction.
"""

from __future__ import annotations

import statistics
import time
from typing import Any, Callable, NamedTuple, Sequence

import torch

from bagel_ds.data.plan.cost import UNIT, CostModel, Work
from bagel_ds.machine.device import uses_cuda
from bagel_ds.memory.planner import MemoryPlan
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.flops import llm_matmul_parameters
from bagel_ds.zero.config.settings import ZeroSettings
from bench.split_update import DEEPSPEED_BYTES, split_bytes

_ROUNDS = 5  # of a copy; the first is not counted
COMPUTE, PCIE, UPDATE = "compute", "pcie", "update"


class Rates(NamedTuple):
    """Of this machine, per second. None: unknown, or it has no GPU."""

    flops: float | None  # dense bf16 products of the GPU, from its data sheet
    pcie: float | None  # bytes to or from page-locked memory, of the faster direction
    host: float  # bytes that a copy in host memory reads and writes


class Demand(NamedTuple):
    """What a step must do."""

    flops: float  # all products
    layer_flops: float  # those of the language model's linear layers: 8 FLOP per weight and token where weights train
    pcie_bytes: float  # that ZeRO moves between GPU and host memory
    update_bytes: float  # that CPU Adam reads and writes


def demand(
    work: Sequence[Work], cost: CostModel, plan: MemoryPlan, settings: ZeroSettings, trained: int, steps: int
) -> Demand:
    """Mean over `steps`, whose packs' `work` this is. `plan` is that of one rank, `trained` counts parameters."""
    prices = [cost.price(pack) for pack in work]
    layers = sum(pack.und_tokens * cost.und_token + pack.gen_tokens * cost.gen_token for pack in work)
    return Demand(
        flops=UNIT * sum(price.llm + price.vision for price in prices) / steps,
        layer_flops=layers / steps,
        pcie_bytes=plan.traffic.pcie,
        update_bytes=trained * update_bytes(settings),
    )


def update_bytes(settings: ZeroSettings) -> int:
    """Bytes of host memory per trained parameter that an update reads and writes, without a moving average."""
    if settings.optimizer.device == "none":
        return 0
    return split_bytes(settings.split_moments) if settings.split_moments else DEEPSPEED_BYTES


def flops_per_weight(cost: CostModel, config: BagelConfig) -> dict[str, int]:
    """FLOP of a step per token and weight of a linear layer, by expert.

    8 where the weights train: 2 for the forward pass, 2 for its recomputation, 4 for the backward pass. 6 where only
    gradients of the layer's input are needed, 4 where none are.
    """
    weights = llm_matmul_parameters(config.llm)
    return {"understanding": cost.und_token // weights, "generation": cost.gen_token // weights}


def limits(least: Demand, rates: Rates) -> dict[str, float | None]:
    """Seconds by resource; None where its rate is unknown."""
    return {
        COMPUTE: _seconds(least.flops, rates.flops),
        PCIE: _seconds(least.pcie_bytes, rates.pcie),
        UPDATE: _seconds(least.update_bytes, rates.host),
    }


def beside_limits(least: Demand, rates: Rates, step_seconds: float) -> dict[str, Any]:
    """The limits of a step, and which share of them a measured one reaches (1: it takes no longer).

    `layers_attainable` is the share of the layers' limit that a step as long as the largest limit reaches.
    """
    seconds = limits(least, rates)
    known = {name: value for name, value in seconds.items() if value is not None}
    largest = max(known, key=lambda name: known[name])
    layers = _seconds(least.layer_flops, rates.flops)
    return {
        **least._asdict(),
        "seconds": seconds,
        "largest": largest,
        "reached": known[largest] / step_seconds,
        "layers_seconds": layers,
        "layers_reached": None if layers is None else layers / step_seconds,
        "layers_attainable": None if layers is None else layers / max(layers, known[largest]),
    }


def measure_rates(tflops: float | None) -> Rates:
    """Of this machine, with the GPU's peak as given."""
    return Rates(None if tflops is None else 1e12 * tflops, pcie_bandwidth(), host_bandwidth())


def host_bandwidth(size: int = 2**29) -> float:
    """Bytes per second, read and written, of torch's copy of a tensor of `size` bytes."""
    source, target = torch.zeros(size // 4), torch.zeros(size // 4)
    return 2 * size / _median_seconds(lambda: target.copy_(source))


def pcie_bandwidth(size: int = 2**30) -> float | None:
    """Bytes per second of the faster direction between page-locked memory and the GPU; None without a GPU."""
    if not uses_cuda():
        return None
    host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(size, dtype=torch.uint8, device="cuda")
    return size / min(_median_seconds(lambda: device.copy_(host)), _median_seconds(lambda: host.copy_(device)))


def _median_seconds(copy: Callable[[], object]) -> float:
    """Of a copy that has ended when it returns."""
    seconds = []
    for _ in range(1 + _ROUNDS):
        began = time.perf_counter()
        copy()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds[1:])


def _seconds(amount: float, rate: float | None) -> float | None:
    return None if rate is None else amount / rate
