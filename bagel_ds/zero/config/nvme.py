"""What a run swaps to NVMe, and how: derived from --nvme_path, the configuration file and the network.

Guarantees: files are below one folder per run and host (swap_folders.py). Buffers hold the largest parameter. A setting
with which DeepSpeed crashes, or silently keeps in memory what it should swap, is a fault. Needs no deepspeed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from bagel_ds.errors import UserError
from bagel_ds.units import MIB
from bagel_ds.zero.config.draft import AUTO, Draft
from bagel_ds.zero.config.settings import offload_device
from bagel_ds.zero.swap_folders import run_folder

SWAPPED_FROM_BYTES = MIB  # of one rank's share of a tensor; smaller shares stay in memory (DeepSpeed 0.19.8)
LAYER_WEIGHTS = 14  # matrices of one decoder layer: q, k, v, o, gate, up and down of each expert
_LEAST_PARAM_BUFFERS, _PARAM_BUFFERS, _OPTIMIZER_BUFFERS = 5, 8, 4  # the last: gradient, master and two moments


def settle_nvme(draft: Draft) -> None:
    """Fill in the folders, and refuse settings that don't work, where the optimizer or the weights go to NVMe."""
    swapped = [what for what in ("optimizer", "param") if offload_device(draft.ds, what) == "nvme"]
    if not swapped:
        return
    training = draft.config.training
    for what in swapped:
        section = draft.section("zero_optimization", f"offload_{what}")
        if section.get("nvme_path", AUTO) != AUTO:
            continue
        if training.nvme_path is None:
            draft.fault(f"offload_{what} goes to NVMe: pass --nvme_path with a folder on a local SSD")
        else:
            section["nvme_path"] = str(run_folder(Path(training.nvme_path), training.checkpoint_dir))
    _settle_transfers(draft)
    if "param" in swapped:
        _settle_param(draft)
    if "optimizer" in swapped:
        _check_optimizer(draft)


def _settle_transfers(draft: Draft) -> None:
    aio = draft.section("aio")
    if aio.get("intra_op_parallelism", AUTO) == AUTO:
        # DeepSpeed lays tensors out at multiples of 1024 bytes times this number; 4096 is a whole sector (swap_io.py).
        aio["intra_op_parallelism"] = 4
    if aio.get("use_gds", AUTO) not in (AUTO, False, None):
        draft.fault("aio.use_gds is not supported: a failed transfer would go unnoticed; remove the key")
    block = _number(aio, "block_size", MIB)
    if block > SWAPPED_FROM_BYTES:
        draft.fault(
            f"aio.block_size is {block:,}: DeepSpeed silently keeps smaller shares in memory; write 1048576 or less"
        )


def _settle_param(draft: Draft) -> None:
    section = draft.section("zero_optimization", "offload_param")
    # DeepSpeed's default silently keeps the first 1e9 elements in memory.
    kept = section["max_in_cpu"] = _number(section, "max_in_cpu", 0)
    if kept > 0:
        draft.fault(f"offload_param.max_in_cpu is {kept:,}: DeepSpeed silently keeps that many in memory; write 0")


def _check_optimizer(draft: Draft) -> None:
    section = draft.section("zero_optimization", "offload_optimizer")
    buffers = _number(section, "buffer_count", _OPTIMIZER_BUFFERS)
    if buffers < _OPTIMIZER_BUFFERS:
        draft.fault(
            f"offload_optimizer.buffer_count is {buffers}, but the gradient, the master and two moments need "
            f"{_OPTIMIZER_BUFFERS}; write {_OPTIMIZER_BUFFERS}"
        )
    for key in ("pipeline_read", "pipeline_write"):
        if section.get(key, AUTO) not in (AUTO, False, None):
            draft.fault(f"offload_optimizer.{key} crashes in DeepSpeed 0.19; write false")


def _number(section: dict[str, Any], key: str, default: int) -> int:
    value = section.get(key, AUTO)
    return default if value in (AUTO, None) else int(float(value))


def fit_buffers(ds: dict[str, Any], largest_parameter: int, world_size: int, recomputes_frozen: bool = False) -> None:
    """Size and count the buffers of weights on NVMe for the network, where the file leaves that open.

    `recomputes_frozen`: a layer with frozen weights is recomputed in the backward pass. DeepSpeed then holds all of
    them until that layer is done, instead of one at a time.
    """
    if offload_device(ds, "param") != "nvme":
        return
    section = ds["zero_optimization"]["offload_param"]
    _refuse_persistent(ds, largest_parameter, world_size)
    least, chosen = (LAYER_WEIGHTS + 2,) * 2 if recomputes_frozen else (_LEAST_PARAM_BUFFERS, _PARAM_BUFFERS)
    if int(section.setdefault("buffer_count", chosen)) < least:
        raise UserError(
            f"ds_config: offload_param.buffer_count is {section['buffer_count']}, this run needs {chosen}"
            + (" (layers with frozen weights are recomputed)" if recomputes_frozen else "")
            + '; write "auto"'
        )
    needed = -(-largest_parameter // world_size)
    given = section.setdefault("buffer_size", needed)
    if int(given) < needed:
        raise UserError(
            f"ds_config: offload_param.buffer_size is {int(given):,} elements, but the largest parameter has "
            f'{largest_parameter:,}, {needed:,} per rank on {world_size}; write "auto" or at least {needed:,}'
        )


def _refuse_persistent(ds: dict[str, Any], largest_parameter: int, world_size: int) -> None:
    """DeepSpeed gathers persistent parameters after each step without reading them from NVMe first."""
    persistent = int(float(ds["zero_optimization"].get("stage3_param_persistence_threshold", 100_000)))
    itemsize = 2 if ds["bf16"]["enabled"] else 4
    most = SWAPPED_FROM_BYTES // itemsize * world_size - world_size  # elements of a parameter that stays in memory
    if min(persistent, largest_parameter) > most:
        raise UserError(
            f"ds_config: stage3_param_persistence_threshold is {persistent:,}, but on {world_size} ranks parameters of "
            f"more than {most:,} elements go to NVMe, where DeepSpeed can't keep them gathered; write {most:,} or less"
        )
