"""Parameters and optimizer states on NVMe: where the files lie and what must hold before training.

Guarantees: a path that can't work is reported before training, with the remedy: too little space, a disk that is
memory, settings under which DeepSpeed silently keeps everything in memory. Files are below one folder per run and host
(swap_folders.py), which goes away however the run ends. Needs no deepspeed.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from bagel_ds.errors import UserError, all_faults
from bagel_ds.units import GIB, MIB
from bagel_ds.zero.config.draft import Draft, offload_device
from bagel_ds.zero.swap_folders import run_folder

MEMORY_FILE_SYSTEMS = ("tmpfs", "ramfs", "devtmpfs", "overlay-tmpfs")
SWAPPED_FROM_BYTES = MIB  # of one rank's share of a tensor; what is smaller stays in memory (DeepSpeed 0.19.8)
LAYER_WEIGHTS = 14  # matrices of one decoder layer: q, k, v, o, gate, up and down of each expert


def settle_nvme(draft: Draft, part: str) -> None:
    """Fill path and buffers of one offload section ("optimizer" or "param") whose device is nvme."""
    section = draft.section("zero_optimization", f"offload_{part}")
    aio = draft.section("aio")
    if aio.get("intra_op_parallelism", "auto") == "auto":
        # DeepSpeed lays tensors out at multiples of 1024 bytes times this number; 4096 is a whole sector (swap_io.py).
        aio["intra_op_parallelism"] = 4
    path = draft.config.training.nvme_path
    if section.get("nvme_path", "auto") == "auto":
        if path is None:
            draft.fault(f"offload_{part} goes to NVMe: pass --nvme_path with a folder on a local SSD")
        else:
            section["nvme_path"] = str(run_folder(Path(path), draft.config.training.checkpoint_dir))
    if part == "param" and section.get("max_in_cpu", "auto") == "auto":
        section["max_in_cpu"] = 0  # DeepSpeed's default keeps the first 1e9 elements in memory and says nothing


def fit_buffers(ds: dict[str, Any], largest_parameter: int, world_size: int, recomputes_frozen: bool = False) -> None:
    """Size and count the parameter buffers for the network, where the file leaves that open.

    `recomputes_frozen`: a layer with frozen weights is recomputed in the backward pass. DeepSpeed then holds all of
    them until that layer is done, instead of one at a time.
    """
    if offload_device(ds, "param") != "nvme":
        return
    section = ds["zero_optimization"]["offload_param"]
    _refuse_persistent_on_nvme(ds, largest_parameter, world_size)
    buffers = LAYER_WEIGHTS + 2 if recomputes_frozen else 8
    if int(section.setdefault("buffer_count", buffers)) < (buffers if recomputes_frozen else 5):
        raise UserError(
            f"ds_config: offload_param.buffer_count is {section['buffer_count']}, this run needs {buffers}"
            + (" (layers with frozen weights are recomputed)" if recomputes_frozen else "")
            + '; write "auto"'
        )
    needed = -(-largest_parameter // world_size)
    given = section.get("buffer_size", "auto")
    if given == "auto":
        section["buffer_size"] = needed
    elif int(given) < needed:
        raise UserError(
            f"ds_config: offload_param.buffer_size is {int(given):,} elements, but the largest parameter has "
            f'{largest_parameter:,}, {needed:,} per rank on {world_size}; write "auto" or at least {needed:,}'
        )


def _refuse_persistent_on_nvme(ds: dict[str, Any], largest_parameter: int, world_size: int) -> None:
    """DeepSpeed gathers persistent parameters after each step without reading them from NVMe first."""
    persistent = int(float(ds["zero_optimization"].get("stage3_param_persistence_threshold", 100_000)))
    itemsize = 2 if ds.get("bf16", {}).get("enabled") else 4
    most = SWAPPED_FROM_BYTES // itemsize * world_size - world_size  # elements of a parameter that stays in memory
    if min(persistent, largest_parameter) > most:
        raise UserError(
            f"ds_config: stage3_param_persistence_threshold is {persistent:,}, but on {world_size} ranks parameters of "
            f"more than {most:,} elements go to NVMe, where DeepSpeed can't keep them gathered; write {most:,} or less"
        )


def nvme_folders(ds: dict[str, Any]) -> list[Path]:
    """Folders that a resolved configuration swaps to."""
    zero = ds.get("zero_optimization", {})
    parts = [part for part in ("optimizer", "param") if offload_device(ds, part) == "nvme"]
    return sorted({Path(zero[f"offload_{part}"]["nvme_path"]) for part in parts})


def nvme_bytes(ds: dict[str, Any], parameters: int, trained: int, average_bytes: int) -> int:
    """Bytes that all ranks keep on NVMe; `average_bytes` per trained parameter for the EMA, 0 without one."""
    total = 0
    if offload_device(ds, "optimizer") == "nvme":
        total += (16 + average_bytes) * trained  # master, two moments, gradient; average
    if offload_device(ds, "param") == "nvme":
        total += (2 if ds.get("bf16", {}).get("enabled") else 4) * parameters
    return total


def average_folder(ds: dict[str, Any], rank: int) -> Path | None:
    """Where the moving average lies: beside an optimizer on NVMe, else in memory (None)."""
    if offload_device(ds, "optimizer") != "nvme":
        return None
    return Path(ds["zero_optimization"]["offload_optimizer"]["nvme_path"]) / "ema" / f"rank{rank}"


def check_nvme(ds: dict[str, Any], bytes_needed: int) -> list[str]:
    """Raise `UserError` unless the folder can hold `bytes_needed` (this host's ranks); remarks for the log."""
    notes: list[str] = []
    faults: list[str] = []
    for folder in nvme_folders(ds):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".bagel_ds_probe_{os.getpid()}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            faults.append(f"--nvme_path: {folder} can't be written ({error.strerror}); pass a folder on a local SSD")
            continue
        kind = file_system(folder)
        if kind in MEMORY_FILE_SYSTEMS:
            faults.append(f"--nvme_path: {folder} lies on {kind}, which is memory; pass a folder on a local SSD")
        free = shutil.disk_usage(folder).free
        if free < bytes_needed:
            faults.append(
                f"--nvme_path: {folder} has {_size(free)} free, this run needs {_size(bytes_needed)}; "
                "free some there, take another disk, or a preset that keeps more in memory (zero3_cpu)"
            )
        notes.append(f"NVMe: {folder} ({kind}), {_size(free)} free, {_size(bytes_needed)} needed")
    faults += _silent_faults(ds)
    all_faults(faults, "Offload to NVMe can't work as configured:")
    return notes


def file_system(path: Path) -> str:
    """Type of the file system that `path` lies on, as the kernel names it."""
    best, kind = "", "unknown"
    resolved = str(path.resolve())
    for line in Path("/proc/mounts").read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        _, mount, name = line.split()[:3]
        mount = mount.replace("\\040", " ")
        inside = resolved == mount or resolved.startswith(mount.rstrip("/") + "/")
        if inside and len(mount) >= len(best):
            best, kind = mount, name
    return kind


def _size(count: int) -> str:
    return f"{count / GIB:.0f} GiB" if count >= 10 * GIB else f"{count / MIB:.0f} MiB"


def _silent_faults(ds: dict[str, Any]) -> list[str]:
    """Settings under which DeepSpeed keeps in memory what it was told to swap (DEEPSPEED.md)."""
    faults = []
    aio = ds.get("aio", {}) if nvme_folders(ds) else {}
    if aio.get("use_gds"):
        faults.append("aio.use_gds is not supported: transfers that fail would go unnoticed; remove the key")
    block = int(aio.get("block_size", 2**20))
    if block > SWAPPED_FROM_BYTES:
        faults.append(
            f"aio.block_size {block:,}: shards below it silently stay in memory; use 1048576 or less in the ds_config"
        )
    if offload_device(ds, "param") == "nvme":
        kept = int(ds["zero_optimization"]["offload_param"].get("max_in_cpu", 0))
        if kept > 0:
            faults.append(
                f"offload_param.max_in_cpu {kept:,}: that many elements silently stay in memory; use 0 in the ds_config"
            )
    if offload_device(ds, "optimizer") == "nvme":
        optimizer = ds["zero_optimization"]["offload_optimizer"]
        if int(optimizer.get("buffer_count", 4)) < 4:
            faults.append("offload_optimizer.buffer_count: at least 4 (gradient, master and two moments)")
        for key in ("pipeline_read", "pipeline_write"):
            if optimizer.get(key):
                faults.append(f"offload_optimizer.{key} crashes in DeepSpeed 0.19; set it to false")
    return faults
