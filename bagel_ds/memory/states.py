"""Memory that stays from step to step, by place: weights, gradients, masters, moments, moving average, buffers.

Guarantees: sizes follow DeepSpeed 0.19.8's allocations for stages 0 to 3 and every offload (see docs/low_memory.md).
Padding of partitions is counted, small rounding of buffers is not. All numbers are bytes of one rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Iterator, NamedTuple

from bagel_ds.model.shape.parameters import ParameterSize
from bagel_ds.units import MIB
from bagel_ds.zero.config.settings import SPLIT_SWAP_BUFFERS, Offload, ZeroSettings

DEVICE, HOST, NVME = "gpu", "host", "nvme"
EXACT_ABOVE_MIB = 32  # larger page-locked blocks are not rounded up or cached (train/process/allocators.py)
PARAMETER_IO = 150 * MIB  # measured: threads and handles that read and write parameters on NVMe
_PLACE = {"none": DEVICE, "cpu": HOST, "nvme": NVME}


class State(NamedTuple):
    """A block of memory. `pinned`: the number of equal page-locked blocks it consists of, 0 for pageable memory."""

    name: str
    place: str
    size: int
    pinned: int = 0


@dataclass(frozen=True)
class Sharding(ZeroSettings):
    """What decides the states: the settings of ZeRO, for these parameters on `world` ranks."""

    parameters: tuple[ParameterSize, ...]
    world: int
    on_cpu: bool  # no GPU: nothing is page-locked

    @classmethod
    def over(cls, settings: ZeroSettings, parameters: tuple[ParameterSize, ...], world: int, on_cpu: bool) -> Sharding:
        return cls(**vars(settings), parameters=parameters, world=world, on_cpu=on_cpu)

    def place(self, offload: Offload) -> str:
        """Where the optimizer's states (`self.optimizer`) or the weights (`self.param`) are."""
        return _PLACE[offload.device]

    @property
    def deepspeed_swaps(self) -> bool:
        """Whether DeepSpeed moves masters, moments and gradients to NVMe. Beside split masters the trainer does."""
        return self.place(self.optimizer) == NVME and not self.split_moments

    @property
    def sums_on_device(self) -> bool:
        """Stages 1 and 2 sum bf16 gradients in fp32 on the device, wherever the optimizer is."""
        return self.stage in (1, 2) and self.bf16 and self.gradient_bytes == 4

    @property
    def keeps_fp32_gradients(self) -> bool:
        """On CPU, the gradient buffer serves as the copy in the masters' format if it has that format."""
        return self.on_cpu and self.gradient_bytes == self.master_bytes

    def share(self, trainable: bool) -> int:
        """Elements of one rank's partition of all (or only the trainable) parameters, padding included."""
        return sum(-(-p.numel // self.world) for p in self.parameters if p.trains or not trainable)

    def elements(self, trainable: bool) -> int:
        return sum(p.numel for p in self.parameters if p.trains or not trainable)

    def whole_weights(self) -> int:
        """Bytes of all weights."""
        return sum(p.numel * p.element_bytes(self.weight_bytes) for p in self.parameters)

    def weight_share(self) -> int:
        """Bytes of one rank's partition of all weights, padding included."""
        return sum(-(-p.numel // self.world) * p.element_bytes(self.weight_bytes) for p in self.parameters)

    @property
    def bucket(self) -> int:
        """Elements of the buffer that collects gradients to reduce."""
        return self.gathering.reduce_bucket_size

    def sub_groups(self) -> list[int]:
        """Elements of this rank's share of each group of parameters that the optimizer updates together (stage 3)."""
        limit = self.sub_group_size
        shares = [-(-p.numel // self.world) for p in self.parameters if p.trains]
        if limit >= sum(shares):
            return [sum(shares)]
        groups, now = [], 0
        for index, share in enumerate(shares):
            now += share
            if now >= limit or index == len(shares) - 1:
                groups.append(now)
                now = 0
        return groups

    def whole_sub_group(self) -> int:
        """Unpartitioned elements of the largest of those groups."""
        return max(self.sub_groups()) * self.world

    def pinned(self, offload: Offload, blocks: int = 1) -> int:
        return blocks if offload.pinned and not self.on_cpu else 0


def states(sharding: Sharding, ema_bytes: int, ema_place: str | None) -> list[State]:
    """Everything that stays. `ema_bytes`: per parameter, 0 without an average; `ema_place` None: with the masters."""
    make = {0: _stage0, 1: _stage12, 2: _stage12, 3: _stage3}[sharding.stage]
    found = [state for state in make(sharding) if state.size]
    if ema_bytes:
        # Every stage shards the average over ranks. Without ZeRO each rank owns some of the parameters.
        share = sharding.share(trainable=True)
        found.append(State("EMA", ema_place or sharding.place(sharding.optimizer), ema_bytes * share))
    return found


def _stage0(s: Sharding) -> Iterator[State]:
    trainable = s.elements(True)
    yield State("weights", DEVICE, s.whole_weights())
    yield State("gradients", DEVICE, s.weight_bytes * trainable)
    if s.bf16:
        yield State("masters", DEVICE, 4 * trainable)
    yield State("Adam moments", DEVICE, 8 * trainable)


def _stage12(s: Sharding) -> Iterator[State]:
    place = s.place(s.optimizer)
    share = -(-s.elements(True) // s.world)
    yield State("weights", DEVICE, s.whole_weights())
    masters = "masters' upper halves" if s.split_moments else "masters"
    yield State(masters, place, s.master_bytes * share, s.pinned(s.optimizer) if place == HOST else 0)
    yield State("Adam moments", place, 2 * s.moment_bytes * share)
    if place == HOST:
        if s.split_moments:  # the upper halves are the weights that go to the GPU
            yield State("masters' lower halves", HOST, s.master_bytes * share)
            yield State("gradients", HOST, s.gradient_bytes * share, s.pinned(s.optimizer))
        else:
            yield State("gradients in the masters' format", HOST, s.master_bytes * share, s.pinned(s.optimizer))
            yield State("updated weights in transit to the GPU", HOST, s.weight_bytes * share, s.pinned(s.optimizer))
        largest = max(p.numel for p in s.parameters if p.trains)
        yield State("largest gradient, in transit", DEVICE, s.weight_bytes * largest)
        yield State("largest gradient, in transit", HOST, s.weight_bytes * largest, s.pinned(s.optimizer))
        if s.accumulation > 1 and not s.sums_on_device and s.master_bytes == 4:
            yield State("gradients", HOST, s.weight_bytes * share, s.pinned(s.optimizer))


def backward_states(s: Sharding) -> list[State]:
    """Gradient memory from the last backward pass of a step until its update, beyond what `states` returns."""
    found = window_gradients(s)
    if s.stage in (1, 2):
        # With overlap_comm a second buffer fills while the first is reduced.
        size = s.bucket * (2 if s.overlap_comm else 1)
        touched = min(size, s.elements(True)) if s.on_cpu else size
        found.append(State("communication buckets", DEVICE, touched * s.weight_bytes))
    elif s.deepspeed_swaps:
        shares = [-(-p.numel // s.world) for p in s.parameters if p.trains]
        small = sum(share for share in shares if 4 * share < MIB)
        found.append(State("fp32 gradients too small to swap", HOST, 4 * small))
    return [state for state in found if state.size]


def window_gradients(s: Sharding) -> list[State]:
    """Stages 1 and 2: gradients on the device from the first backward pass of a step until its update.

    These are the sums of this rank's partition, and whole gradients waiting to be reduced.
    """
    found = []
    share = -(-s.elements(True) // s.world)
    if s.sums_on_device:
        found.append(State("gradients", DEVICE, 4 * share))
    elif s.stage in (1, 2) and s.place(s.optimizer) == DEVICE:
        found.append(State("gradients", DEVICE, s.weight_bytes * share))
    if s.stage == 1:
        # Reduced only in the last backward pass of a step: immediately with overlap_comm, else at its end. Gradients
        # larger than a bucket stay whole until the update.
        waits = s.accumulation > 1 or not s.overlap_comm
        whole = sum(p.numel for p in s.parameters if p.trains and (waits or p.numel > s.bucket))
        found.append(State("whole gradients", DEVICE, s.weight_bytes * whole))
    return found


def _stage3(s: Sharding) -> Iterator[State]:
    optimizer, param = s.place(s.optimizer), s.place(s.param)
    share = s.share(trainable=True)
    groups = s.sub_groups()
    yield State("weights", param, s.weight_share(), s.pinned(s.param))
    if s.hpz_group > 1:
        copy = s.whole_weights() // s.hpz_group
        yield State("weights, second copy within the group (hpZ)", DEVICE, copy)
    gradients = HOST if optimizer != DEVICE else DEVICE
    yield State("gradients", gradients, s.gradient_bytes * share, s.pinned(s.optimizer))
    # Separate masters even in fp32: DeepSpeed would reuse the weights, but compares a device with a string first.
    yield State("masters' lower halves" if s.split_moments else "masters", optimizer, s.master_bytes * share)
    yield State("Adam moments", optimizer, 2 * s.moment_bytes * share)
    if optimizer == HOST and not s.split_moments:
        yield State(
            "gradients in the masters' format", HOST, s.master_bytes * share, s.pinned(s.optimizer, len(groups))
        )
    if optimizer == NVME and s.split_moments:
        buffers = min(SPLIT_SWAP_BUFFERS, len(groups))
        yield State("optimizer swap buffers", HOST, buffers * max(groups) * (s.master_bytes + 2 * s.moment_bytes))
    elif optimizer == NVME:
        yield State("gradients in fp32, swapped", NVME, s.master_bytes * share)
        yield State("optimizer swap buffers", HOST, s.optimizer.buffers * max(groups) * s.master_bytes)
    if param == NVME:
        yield State("parameter swap buffers", HOST, s.param.buffers * s.param.buffer_elements * s.weight_bytes)
        yield State("parameter input and output", HOST, PARAMETER_IO)
        yield State("parameter write-back buffer", HOST, s.whole_sub_group() * s.weight_bytes)
    if s.contiguous_gradients:
        touched = min(s.bucket, s.elements(True)) if s.on_cpu else s.bucket
        yield State("communication buckets", DEVICE, touched * s.communication_bytes)


def pinned_excess(found: list[State], partitions: list[int], exact_above: float) -> int:
    """Bytes that torch adds to page-locked memory: it rounds blocks up to powers of two and caches freed ones.

    `partitions` are the sizes of the parameter partitions. DeepSpeed pins each before it moves all to one block, and
    torch caches what was freed. Blocks of more than `exact_above` bytes are neither rounded nor cached.
    """
    excess = sum(_power_of_two(size) for size in partitions if size <= exact_above)
    for state in found:
        block = max(1, state.size // state.pinned) if state.pinned else 0
        if 0 < block <= exact_above:
            excess += state.pinned * (_power_of_two(block) - block)
    return excess


def _power_of_two(size: int) -> int:
    """The smallest power of two that is at least `size`."""
    return 1 << (size - 1).bit_length()
