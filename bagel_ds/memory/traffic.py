"""Bytes that one host moves in one optimizer step: between GPUs, between GPU and host memory, to and from NVMe.

Guarantees: counts what ZeRO must move, each direction once. How much of it overlaps with computation is not estimated.
"""

from __future__ import annotations

from typing import NamedTuple

from bagel_ds.memory.gathering import Gathered
from bagel_ds.memory.states import DEVICE, NVME, Sharding


class Traffic(NamedTuple):
    """Bytes of one host and optimizer step."""

    network: int  # received by its ranks from other ranks
    pcie: int  # between host memory and GPUs
    nvme: int  # read and written

    @property
    def total(self) -> int:
        return self.network + self.pcie + self.nvme


def step_traffic(s: Sharding, live: Gathered | None, ranks: int, layer_inputs: int = 0) -> Traffic:
    """Traffic of `ranks` ranks. `live` is None unless parameters are gathered (ZeRO-3).

    `layer_inputs`: bytes of one micro-batch that are offloaded to the host until the backward pass.
    """
    accumulation = s.accumulation
    others = (s.world - 1) / s.world
    trainable, share = s.elements(True), s.share(True)
    gathers = (live.total if live is not None else 0) * accumulation
    reductions = trainable * (accumulation if s.stage > 1 else 1)
    network = others * (gathers + s.communication_bytes * reductions)
    if s.stage in (0, 1, 2):
        network += others * s.weight_bytes * trainable  # updated weights (stage 0: the other half of the all-reduce)
    pcie, nvme = 2 * layer_inputs * accumulation, 0
    if s.place(s.param) != DEVICE:
        pcie += gathers // s.world
    if s.place(s.optimizer) != DEVICE:
        pcie += offloaded_gradient_bytes(s) * share
        if s.place(s.param) == DEVICE:
            pcie += s.weight_bytes * share
    if s.place(s.optimizer) == NVME:
        states = (s.master_bytes + 2 * s.moment_bytes) * share
        nvme += 2 * states  # masters and moments, in and out
        nvme += 2 * s.master_bytes * share if s.deepspeed_swaps else 0  # gradients in fp32
    if s.place(s.param) == NVME:
        nvme += gathers // s.world + s.weight_bytes * share
    return Traffic(int(network * ranks), int(pcie * ranks), int(nvme * ranks))


def offloaded_gradient_bytes(s: Sharding) -> int:
    """Bytes between GPU and host memory per step and element of a rank's share, if the optimizer is not on the GPU.

    Both directions, counted from the copies in DeepSpeed 0.19.8 (a test runs them on meta tensors).
    """
    if s.stage == 3:
        # After each backward pass to the host and back (summed on the GPU); after the last also in the masters' format.
        return 2 * s.gradient_bytes * s.accumulation + (0 if s.split_moments else s.master_bytes)
    if s.sums_on_device or s.accumulation == 1:
        return s.gradient_bytes if s.split_moments else s.master_bytes
    if s.stage == 1:
        return 2 * s.weight_bytes + s.master_bytes  # summed on the GPU, then added to an empty sum on the host
    return s.weight_bytes * (2 * s.accumulation - 1) + s.master_bytes
