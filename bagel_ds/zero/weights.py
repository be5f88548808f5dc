"""This rank's share of the weights that the module computes with.

Guarantees: under ZeRO-3 nothing is gathered to load or read a weight, even with parameters on NVMe (each is read in and
written back by itself); padding stays zero.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any, Iterator

import torch
from torch import Tensor, nn

from bagel_ds.ranges import Pieces, Range, WeightSource, copy_range


def stage3_range(parameter: Any, name: str) -> Range:
    """What this rank holds of a ZeRO-3 parameter: ceil(numel / world) elements, without the last rank's padding."""
    per_rank = parameter.partition_numel()
    start = min(torch.distributed.get_rank(group=parameter.ds_process_group) * per_rank, parameter.ds_numel)
    return Range(name, start, min(per_rank, parameter.ds_numel - start))


def is_partitioned(parameter: nn.Parameter) -> bool:
    """Whether a parameter was created under `zero.Init`."""
    return hasattr(parameter, "ds_tensor")


def full_shape(parameter: Any) -> tuple[int, ...]:
    return tuple(parameter.ds_shape if is_partitioned(parameter) else parameter.shape)


@contextmanager
def held_weight(name: str, parameter: Any, write: bool = False) -> Iterator[tuple[Range, Tensor]]:
    """The share of a parameter that this rank keeps: its range and the 1-D tensor that holds it, with padding.

    Without ZeRO-3 every rank keeps the whole parameter. Changes to one on NVMe are kept only with write=True.
    """
    if not is_partitioned(parameter):
        yield Range(name, 0, parameter.numel()), parameter.data.view(-1)
        return
    swapped = parameter.ds_tensor.status.name == "NOT_AVAILABLE"
    if swapped:
        parameter.nvme_swapper.swap_in([parameter], async_op=False)
    try:
        yield stage3_range(parameter, name), parameter.ds_tensor.data.view(-1)
    finally:
        if swapped and write:
            parameter.nvme_swapper.swap_out_and_release([parameter])
        elif swapped:
            parameter.nvme_swapper.remove_partition_and_release_buffers([parameter])


def frozen_pieces(module: nn.Module) -> Iterator[Pieces]:
    """This rank's share of the parameters that don't train. Of whole copies, only rank 0 yields its own."""
    first = torch.distributed.get_rank() == 0
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            continue
        with held_weight(name, parameter) as (held, values):
            mine = held.numel > 0 and (first or is_partitioned(parameter))
            yield Pieces(name, [(held, values[: held.numel])] if mine else [])


def load_weights(module: nn.Module, source: WeightSource) -> int:
    """Fill this rank's share of every parameter from `source`; returns the bytes read. Nothing is gathered."""
    read = 0
    for name, parameter in module.named_parameters():
        with held_weight(name, parameter, write=True) as (held, tensor):
            read += copy_range(tensor[: held.numel], held, source.read)
            tensor[held.numel :].zero_()
        if is_partitioned(parameter):
            _forget_second_copy(parameter)
    return read


def _forget_second_copy(parameter: Any) -> None:
    """Drop the copy that hpZ keeps in each group: it still has the values the module was built with.

    The first step would compute with it, and every step with that of frozen parameters. DeepSpeed makes a new one when
    it next gathers the parameter.
    """
    parameter.ds_secondary_tensor = None
