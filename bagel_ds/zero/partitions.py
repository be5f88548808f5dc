"""This rank's share of weights, masters and Adam moments, as named flat ranges.

Guarantees, for every ZeRO stage and offload: the ranges in `Partitions.groups` of all ranks cover each trainable
parameter exactly once (with stage 0 every rank has all of them, and each parameter has one owner); the next step
computes with what is written through them; padding that DeepSpeed adds stays zero and is never part of a range. Written
for the internals of DeepSpeed 0.19.8's optimizers; `check_internals` fails if these have changed.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Callable, Iterable, Iterator, NamedTuple, Protocol, Sequence

import torch
from torch import Tensor, nn

from bagel_ds.ranges import COPIED_ELEMENTS, MASTER, Pieces, Range, WeightSource, copy_range
from bagel_ds.zero.weights import forget_second_copy, held_weight, stage3_range

EXP_AVG, EXP_AVG_SQ = "exp_avg", "exp_avg_sq"
MOMENTS = (EXP_AVG, EXP_AVG_SQ)


class PlacedRange(NamedTuple):
    """A range and its place in its group's flat tensors."""

    range: Range
    offset: int


@dataclass(frozen=True)
class Group:
    """Ranges that share one flat master and its moments; the unit that NVMe offload swaps."""

    index: int
    names: tuple[str, ...]  # of its parameters, the same on every rank; this rank may hold nothing of some
    ranges: tuple[PlacedRange, ...]
    owned: bool = True  # False if another rank holds the same values and saves them


Flats = dict[str, Tensor]  # "master", "exp_avg" and "exp_avg_sq" of a group, 1-D


class GroupAverage(NamedTuple):
    """An update of a group's moving average that is due. `values` are laid out like the group's master."""

    values: Tensor
    weight: float  # values += weight * (master - values)
    seed: Callable[[str], int]  # of a parameter's random rounding


class AveragedGroups(Protocol):
    """A moving average as the partitions see it, updated right after each update of a group."""

    def next(self, group: Group) -> GroupAverage | None:
        """Call once per update of the group: what to do with its average now, None for nothing."""

    def update(self, group: Group, master: Tensor) -> None:
        """Do so."""


class Partitions:
    """Masters and moments of a DeepSpeed engine's optimizer, group by group."""

    def __init__(self, engine: Any):
        self._optimizer = engine.optimizer
        self._stage = engine.zero_optimization_stage()
        self._names = {id(parameter): name for name, parameter in engine.module.named_parameters()}
        check_internals(self._optimizer, self._stage)
        self.groups: tuple[Group, ...] = tuple(self._find_groups())
        self._after_update: Callable[[Group, Tensor], None] | None = None
        self._prepare_states()

    def set_step(self, step: int) -> None:
        """Set the number of steps that Adam has taken, for its bias correction. The moments must exist."""
        for group in self.groups:
            state = self._state(group)
            if torch.is_tensor(state["step"]):
                state["step"].fill_(float(step))
            else:
                state["step"] = step

    def pieces(self, key: str) -> Iterator[Pieces]:
        """What this rank owns of "master", "exp_avg" or "exp_avg_sq", name by name, in the same order on all ranks.

        Before the first update moments are zero.
        """
        for group in self.groups:
            lacking = key in MOMENTS and EXP_AVG not in self._state(group)
            with self._open(group, write=lacking, moments=lacking) as flats:
                yield from group_pieces(group, flats[key])

    def load(self, keys: Sequence[str], fill: Callable[[str, Range, Tensor], object]) -> None:
        """Have `fill(key, range, target)` write values into 1-D targets. A range may come in several parts."""
        for group in self.groups:
            with self._open(group, write=True, moments=any(key in MOMENTS for key in keys)) as flats:
                for held, offset in group.ranges:
                    for key in keys:
                        fill(key, held, flats[key].narrow(0, offset, held.numel))

    def copy_of_masters(self, group: Group, allocate: Callable[[Tensor], Tensor]) -> Tensor:
        """The group's master in the memory that `allocate(like)` returns."""
        with self._open(group) as flats:
            return allocate(flats[MASTER]).copy_(flats[MASTER])

    @contextmanager
    def computing_with(self, values: Callable[[Group], Tensor]) -> Iterator[None]:
        """Have the network compute with `values` of the owned groups, laid out like their masters; then as before.

        Call it on all ranks between two steps. The masters bring the weights back, so nothing is held twice. Where the
        weights are the masters (stage 0 in fp32), each rank keeps its share of them in host memory meanwhile.
        """
        aside: dict[int, Tensor] = {}
        if self._stage == 0 and not hasattr(self._optimizer, "fp32_groups"):
            for group in self.groups:
                if group.owned:
                    with self._open(group) as flats:
                        aside[group.index] = flats[MASTER].detach().to("cpu", copy=True)

        @contextmanager
        def weights(group: Group) -> Iterator[Tensor]:
            if group.index in aside:
                yield aside[group.index]
            else:
                with self._open(group) as flats:
                    yield flats[MASTER]

        self.put_weights(lambda group: nullcontext(values(group)))
        yield  # without `finally`: a rank that fails must not wait for others in a collective call
        self.put_weights(weights)

    @torch.no_grad()
    def put_weights(self, values: Callable[[Group], AbstractContextManager[Tensor]]) -> None:
        """Have the network compute with `values(group)` in its weights' dtype; call it on all ranks between two steps.

        `values` is asked for the owned groups, and its tensors are laid out like the groups' masters. Masters are not
        read or written, unless the weights are the masters, and no rank holds more of the weights than before. Of the
        masters these are the weights that the last update left, bit for bit: every update ends with this cast.
        """
        if self._stage == 3:
            self._put_stage3(values)
        elif self._stage > 0:
            self._put_stage12(values)
        else:
            for group, (parameter, _) in zip(self.groups, self._whole_parameters()):
                if group.owned:
                    with values(group) as flat:
                        _copy(parameter.data.view(-1), flat)
                torch.distributed.broadcast(parameter.data, src=group.index % torch.distributed.get_world_size())

    def _put_stage3(self, values: Callable[[Group], AbstractContextManager[Tensor]]) -> None:
        self._optimizer.checkpoint_event_prologue()  # releases what an earlier forward pass gathered
        for group, parameters in zip(self.groups, self._optimizer.fp16_groups):
            by_name = dict(zip(group.names, parameters))
            with values(group) as flat:
                for placed in group.ranges:
                    held = placed.range
                    with held_weight(held.name, by_name[held.name], write=True) as (_, tensor):
                        _copy(tensor[: held.numel], flat.narrow(0, placed.offset, held.numel))
            for parameter in parameters:
                forget_second_copy(parameter)
        self._optimizer.checkpoint_event_epilogue()  # gathers the small parameters that are always whole

    def _put_stage12(self, values: Callable[[Group], AbstractContextManager[Tensor]]) -> None:
        from deepspeed.runtime.utils import all_gather_dp_groups

        optimizer = self._optimizer
        for group in self.groups:
            rank = torch.distributed.get_rank(group=optimizer.real_dp_process_group[group.index])
            with values(group) as flat:
                _copy(optimizer.parallel_partitioned_bit16_groups[group.index][rank].data, flat)
        all_gather_dp_groups(
            groups_flat=optimizer.bit16_groups_flat,
            partitioned_param_groups=optimizer.parallel_partitioned_bit16_groups,
            dp_process_group=optimizer.real_dp_process_group,
            start_alignment_factor=optimizer.nccl_start_alignment_factor,
            allgather_bucket_size=optimizer.allgather_bucket_size,
        )

    def average_with(self, average: AveragedGroups) -> None:
        """Update the average of every group right after each of the group's updates.

        With ZeRO-3 the group is then still in memory, so that a group on NVMe is not read a second time.
        """
        callback = self._after_update = average.update
        if self._stage != 3:
            return
        release = self._optimizer._release_sub_group

        def call_and_release(index: int, timer_names: Any) -> None:
            callback(self.groups[index], self._masters()[index].data.view(-1))
            release(index, timer_names)

        self._optimizer._release_sub_group = call_and_release

    def updated(self) -> None:
        """Call once after every step: updates the average in the stages that have no hook for it."""
        if self._stage != 3 and self._after_update is not None:
            for group in self.groups:
                self._after_update(group, self._masters()[group.index].data.view(-1))

    @contextmanager
    def _open(self, group: Group, write: bool = False, moments: bool = False) -> Iterator[Flats]:
        """The group's flat 1-D tensors: "master" and, once Adam has stepped, "exp_avg" and "exp_avg_sq".

        A placed range is `flats[key].narrow(0, offset, numel)`. Changes are kept only with write=True. `moments`
        creates the moments if they don't exist yet, which needs write=True.
        """
        assert write or not moments, "new moments that are not written would have no swap file"
        swapped = self._is_swapped(group)
        if swapped:
            self._optimizer._optimizer_states_and_gradient_swap_in(group.index)
        try:
            yield self._flats(group, moments)
        finally:
            if swapped and write:
                self._optimizer._optimizer_states_and_gradient_swap_out(group.index)
            elif swapped:
                self._optimizer._release_swap_buffers(group.index)

    def _prepare_states(self) -> None:
        """Have Adam begin at step 1: stage 0 in bf16 takes a step on zero gradients when it is built.

        The first real update would count as the second, and be 0.735 of what it should be.
        """
        self._adam().state.clear()
        if self._stage == 3:
            self._make_moments_before_first_update()

    def _is_swapped(self, group: Group) -> bool:
        return self._stage == 3 and bool(self._optimizer._swappable_optimizer_subgroup(group.index))

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
        """Stages 1 and 2: this rank's window of the flat group, in the order in which DeepSpeed flattened it.

        Not from `_hp_mapping`, whose offsets ignore the order that round_robin_gradients makes.
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
        """Stage 0: (parameter, its master), which are the same tensor in fp32 training."""
        if hasattr(self._optimizer, "fp32_groups"):
            low, high = self._optimizer.fp16_groups, self._optimizer.fp32_groups
            return [pair for group in zip(low, high) for pair in zip(*group)]
        return [(parameter, parameter) for group in self._optimizer.param_groups for parameter in group["params"]]

    def _masters(self) -> list[Tensor]:
        """The flat master of each group, the very tensor that is the inner optimizer's parameter."""
        optimizer = self._optimizer
        if self._stage == 3:
            return optimizer.fp32_partitioned_groups_flat
        if self._stage > 0:
            return optimizer.single_partition_of_fp32_groups
        return [master for _, master in self._whole_parameters()]

    def _adam(self) -> torch.optim.Optimizer:
        """The optimizer that `ZeroEngine` made, which DeepSpeed wraps except with stage 0 in fp32."""
        return getattr(self._optimizer, "optimizer", self._optimizer)

    def _state(self, group: Group) -> dict[str, Any]:
        return self._adam().state[self._masters()[group.index]]

    def _make_moments(self, group: Group) -> None:
        """Create Adam's state as its own first step would."""
        inner, master, state = self._adam(), self._masters()[group.index], self._state(group)
        if isinstance(inner, torch.optim.AdamW):
            fused_on_gpu = inner.defaults.get("fused") and master.is_cuda
            state["step"] = torch.zeros((), device=master.device if fused_on_gpu else "cpu")
        else:
            state["step"] = 0
        if self._is_swapped(group):
            self._make_swapped_moments(master, state)
            return
        dtype = torch.float32 if getattr(inner, "fp32_optimizer_states", True) else master.dtype
        for key in MOMENTS:
            state[key] = torch.zeros_like(master, dtype=dtype, requires_grad=False)

    def _make_swapped_moments(self, master: Tensor, state: dict[str, Any]) -> None:
        """Zeros in two free swap buffers, for a group that is swapped in and will be swapped out.

        Memory of their own would be 8 more bytes per element, while these buffers are unused.
        """
        swapper = self._optimizer.optimizer_swapper
        aligned = swapper._io_aligned_numel(master.numel())
        buffers = swapper.swap_buffer_manager.allocate(num_elems=aligned, count=len(MOMENTS), dtype=master.dtype)
        assert buffers is not None, "offload_optimizer.buffer_count is at least 4: gradient, master and two moments"
        for key, buffer in zip(MOMENTS, buffers):
            state[key] = buffer.zero_().narrow(0, 0, master.numel())
        info = swapper._get_param_swap_info(master)  # finds the new states
        info.swap_buffers += buffers
        for tensor, buffer in zip(info.tensors[1:], buffers):
            tensor.set_buffers(compute_buffer=tensor.compute_tensor, swap_buffer=buffer)

    def _make_moments_before_first_update(self) -> None:
        """Create a swapped group's moments before its first update: DeepSpeed's Adam would allocate new memory."""
        prepare = self._optimizer._prepare_sub_group

        def prepare_with_moments(index: int, timer_names: Any) -> None:
            prepare(index, timer_names)
            group = self.groups[index]
            if self._is_swapped(group) and EXP_AVG not in self._state(group):
                self._make_moments(group)

        self._optimizer._prepare_sub_group = prepare_with_moments

    def _flats(self, group: Group, moments: bool) -> dict[str, Tensor]:
        state = self._state(group)
        if moments and EXP_AVG not in state:
            self._make_moments(group)
        flats = {MASTER: self._masters()[group.index]}
        flats.update({key: state[key] for key in MOMENTS if key in state})
        return {key: tensor.data.view(-1) for key, tensor in flats.items()}


def group_pieces(group: Group, flat: Tensor) -> Iterator[Pieces]:
    """Cut a flat tensor, laid out like the group's master, into pieces by name."""
    held: dict[str, list[tuple[Range, Tensor]]] = {name: [] for name in group.names}
    if group.owned:
        for placed in group.ranges:
            held[placed.range.name].append((placed.range, flat.narrow(0, placed.offset, placed.range.numel)))
    for name, ranges in held.items():
        yield Pieces(name, ranges)


def _copy(target: Tensor, values: Tensor) -> None:
    """In pieces: torch makes a copy of what changes its dtype on the way to another device."""
    for own, found in zip(target.split(COPIED_ELEMENTS), values.split(COPIED_ELEMENTS)):
        own.copy_(found)


def load_masters(partitions: Partitions, source: WeightSource) -> None:
    """Fill the masters in the source's own precision (DeepSpeed has made them from 16-bit weights)."""
    partitions.load((MASTER,), lambda _, held, target: copy_range(target, held, source.read))


_INTERNALS = {
    3: (
        "fp16_groups",
        "fp32_partitioned_groups_flat",
        "_swappable_optimizer_subgroup",
        "_optimizer_states_and_gradient_swap_in",
        "_optimizer_states_and_gradient_swap_out",
        "_release_swap_buffers",
        "_prepare_sub_group",
        "_release_sub_group",
        "checkpoint_event_prologue",
        "checkpoint_event_epilogue",
    ),
    2: (
        "bit16_groups",
        "single_partition_of_fp32_groups",
        "real_dp_process_group",
        "round_robin_bit16_groups",
        "round_robin_bit16_offsets",
        "bit16_groups_flat",
        "parallel_partitioned_bit16_groups",
        "nccl_start_alignment_factor",
        "allgather_bucket_size",
    ),
}


def check_internals(optimizer: Any, stage: int) -> None:
    """Fail with names, not with wrong numbers, if DeepSpeed is another version than the one this file is for."""
    needed = _INTERNALS.get(2 if stage == 1 else stage, ())
    missing = [name for name in needed if not hasattr(optimizer, name)]
    assert not missing, f"DeepSpeed's stage-{stage} optimizer lacks {missing}; bagel_ds is written for deepspeed 0.19.8"
