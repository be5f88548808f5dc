"""This rank's share of weights, masters and Adam moments, as named flat ranges.

Guarantees, for every ZeRO stage and offload: the ranges of `Partitions.groups` over all ranks cover each trainable
parameter exactly once (stage 0 keeps whole copies on every rank: then each parameter has one owner); what is written
through them is what the next step computes with; padding that DeepSpeed adds stays zero and is never part of a range.
All knowledge of DeepSpeed's internals (0.19.8, pinned) lives here; `check_internals` fails loudly when they move.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Iterable, Iterator, NamedTuple

import torch
from torch import Tensor, nn

from bagel_ds.ranges import Pieces, Range, WeightSource

MASTER, EXP_AVG, EXP_AVG_SQ = "master", "exp_avg", "exp_avg_sq"
MOMENTS = (EXP_AVG, EXP_AVG_SQ)


class PlacedRange(NamedTuple):
    """A range and where it lies in its group's flat tensors."""

    range: Range
    offset: int


@dataclass(frozen=True)
class Group:
    """Ranges that share one flat fp32 master and one set of Adam states; the unit that NVMe offload swaps."""

    index: int
    names: tuple[str, ...]  # its parameters, equal on every rank; this rank may hold nothing of some
    ranges: tuple[PlacedRange, ...]
    owned: bool = True  # False where another rank holds the same values and saves them


class Partitions:
    """Masters and moments of a DeepSpeed engine's optimizer, group by group.

    Use `with partitions.open(group) as flats:`; `flats[key]` is the group's flat 1-D tensor for "master", "exp_avg" or
    "exp_avg_sq", a placed range is `flats[key].narrow(0, offset, numel)`. Changes last when opened with write=True.
    """

    def __init__(self, engine: Any):
        self._optimizer = engine.optimizer
        self._stage = engine.zero_optimization_stage()
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        check_internals(self._optimizer, self._stage)
        self.groups: tuple[Group, ...] = tuple(self._find_groups())

    @contextmanager
    def open(self, group: Group, write: bool = False) -> Iterator[dict[str, Tensor]]:
        swapped = self._stage == 3 and self._optimizer._swappable_optimizer_subgroup(group.index)
        if swapped:
            self._optimizer._optimizer_states_and_gradient_swap_in(group.index)
        try:
            yield self._flats(group)
        finally:
            if swapped and write:
                self._optimizer._optimizer_states_and_gradient_swap_out(group.index)
            elif swapped:
                self._optimizer._release_swap_buffers(group.index)

    def set_step(self, step: int) -> None:
        """Tell Adam that `step` steps have been taken (bias correction)."""
        for group in self.groups:
            state = self._adam_state(group)
            if torch.is_tensor(state["step"]):
                state["step"].fill_(float(step))
            else:
                state["step"] = step

    def pieces(self, key: str) -> Iterator[Pieces]:
        """This rank's owned share of "master", "exp_avg" or "exp_avg_sq", name by name in an order all ranks share."""
        for group in self.groups:
            with self.open(group) as flats:
                yield from group_pieces(group, flats[key])

    def _find_groups(self) -> Iterator[Group]:
        if self._stage == 3:
            for index, parameters in enumerate(self._optimizer.fp16_groups):
                yield Group(index, self._named(parameters), tuple(self._stage3_ranges(parameters)))
        elif self._stage > 0:
            for index, parameters in enumerate(self._optimizer.bit16_groups):
                yield Group(index, self._named(parameters), tuple(self._flat_ranges(index)))
        else:
            world, rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
            for index, (parameter, _) in enumerate(self._whole_parameters()):
                whole = Range(self._names[id(parameter)], 0, parameter.numel())
                yield Group(index, (whole.name,), (PlacedRange(whole, 0),), owned=index % world == rank)

    def _named(self, parameters: Iterable[nn.Parameter]) -> tuple[str, ...]:
        return tuple(self._names[id(parameter)] for parameter in parameters)

    def _stage3_ranges(self, parameters: Iterable[Any]) -> Iterator[PlacedRange]:
        offset = 0
        for parameter in parameters:
            held = stage3_range(parameter, self._names[id(parameter)])
            if held.numel:
                yield PlacedRange(held, offset)
            offset += parameter.partition_numel()

    def _flat_ranges(self, index: int) -> Iterator[PlacedRange]:
        """Stages 1 and 2: this rank's window of the flat group, in the order DeepSpeed flattened it.

        Not through `_hp_mapping`, whose offsets ignore the reordering of round_robin_gradients.
        """
        optimizer = self._optimizer
        size = optimizer.single_partition_of_fp32_groups[index].numel()
        window = torch.distributed.get_rank(group=optimizer.real_dp_process_group[index]) * size
        parameters = optimizer.round_robin_bit16_groups[index]
        for parameter, offset in zip(parameters, optimizer.round_robin_bit16_offsets[index]):
            low, high = max(offset, window), min(offset + parameter.numel(), window + size)
            if low < high:
                held = Range(self._names[id(parameter)], low - offset, high - low)
                yield PlacedRange(held, low - window)

    def _whole_parameters(self) -> list[tuple[nn.Parameter, Tensor]]:
        """Stage 0: (parameter, its fp32 master), which are the same tensor in fp32 training."""
        if hasattr(self._optimizer, "fp32_groups"):
            low, high = self._optimizer.fp16_groups, self._optimizer.fp32_groups
            return [pair for group in zip(low, high) for pair in zip(*group)]
        return [(parameter, parameter) for group in self._optimizer.param_groups for parameter in group["params"]]

    def _masters(self) -> list[Tensor]:
        """The flat fp32 tensor of each group, as the inner optimizer knows it."""
        optimizer = self._optimizer
        if self._stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        if self._stage > 0:
            return optimizer.single_partition_of_fp32_groups
        return [master for _, master in self._whole_parameters()]

    def _adam_state(self, group: Group) -> dict[str, Any]:
        """Adam's state of a group, created as its first step would create it where it does not exist yet."""
        inner = getattr(self._optimizer, "optimizer", self._optimizer)
        master = self._masters()[group.index]
        state = inner.state[master]
        if EXP_AVG not in state:
            on_device = getattr(inner, "defaults", {}).get("fused") and master.is_cuda
            is_torch = isinstance(inner, torch.optim.AdamW)
            step: Any = torch.zeros((), device=master.device if on_device else "cpu") if is_torch else 0
            dtype = torch.float32 if getattr(inner, "fp32_optimizer_states", True) else master.dtype
            state["step"] = step
            for key in MOMENTS:
                state[key] = torch.zeros_like(master, dtype=dtype, requires_grad=False)
        return state

    def _flats(self, group: Group) -> dict[str, Tensor]:
        state = self._adam_state(group)
        flats = {MASTER: self._masters()[group.index], **{key: state[key] for key in MOMENTS}}
        return {key: tensor.data.view(-1) for key, tensor in flats.items()}


def group_pieces(group: Group, flat: Tensor) -> Iterator[Pieces]:
    """Cut a flat tensor that is laid out like the group's master into pieces by name."""
    held: dict[str, list[tuple[Range, Tensor]]] = {name: [] for name in group.names}
    if group.owned:
        for placed in group.ranges:
            held[placed.range.name].append((placed.range, flat.narrow(0, placed.offset, placed.range.numel)))
    for name, ranges in held.items():
        yield Pieces(name, ranges)


def stage3_range(parameter: Any, name: str) -> Range:
    """What this rank holds of a ZeRO-3 parameter: ceil(numel / world) elements, the last rank's tail being padding."""
    per_rank = parameter.partition_numel()
    start = min(torch.distributed.get_rank(group=parameter.ds_process_group) * per_rank, parameter.ds_numel)
    return Range(name, start, min(per_rank, parameter.ds_numel - start))


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether a parameter was created under `zero.Init`."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


def held_weight(name: str, parameter: Any) -> tuple[Range, Tensor]:
    """The share of a parameter that this rank keeps, as its range and the 1-D tensor (a view) that holds it.

    Without ZeRO-3 the range is the whole parameter, on every rank.
    """
    if is_partitioned(parameter):
        held = stage3_range(parameter, name)
        return held, parameter.ds_tensor.data.view(-1)[: held.numel]
    return Range(name, 0, parameter.numel()), parameter.data.view(-1)


def frozen_pieces(module: nn.Module) -> Iterator[Pieces]:
    """This rank's share of the parameters that do not train; whole copies are handed out by rank 0 alone."""
    first = torch.distributed.get_rank() == 0
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        held, values = held_weight(name, parameter)
        mine = held.numel > 0 and (first or is_partitioned(parameter))
        yield Pieces(name, [(held, values)] if mine else [])


def load_weights(module: nn.Module, source: WeightSource) -> int:
    """Fill this rank's share of every parameter from `source`; returns the bytes read. Nothing is gathered."""
    read = 0
    for name, parameter in module.named_parameters():
        held, tensor = held_weight(name, parameter)
        if held.numel:
            values = source.read(*held)
            tensor.copy_(values)
            read += values.nbytes
        if is_partitioned(parameter):
            parameter.ds_tensor.data.view(-1)[held.numel :].zero_()  # type: ignore[attr-defined]
    return read


def load_masters(partitions: Partitions, source: WeightSource) -> None:
    """Give the fp32 masters the source's own precision (DeepSpeed made them from the 16-bit weights)."""
    for group in partitions.groups:
        with partitions.open(group, write=True) as flats:
            for placed in group.ranges:
                values = source.read(*placed.range)
                flats[MASTER].narrow(0, placed.offset, placed.range.numel).copy_(values)


_INTERNALS = {
    3: (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "_swappable_optimizer_subgroup",
        "_optimizer_states_and_gradient_swap_in",
        "_optimizer_states_and_gradient_swap_out",
        "_release_swap_buffers",
    ),
    2: (
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "real_dp_process_group",
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
    ),
}


def check_internals(optimizer: Any, stage: int) -> None:
    """Fail with names, not with wrong numbers, when DeepSpeed is another version than this file was written for."""
    needed = _INTERNALS.get(2 if stage == 1 else stage, ())
    missing = [name for name in needed if not hasattr(optimizer, name)]
    assert not missing, f"DeepSpeed's stage-{stage} optimizer lacks {missing}; bagel_ds is written for deepspeed 0.19.8"
