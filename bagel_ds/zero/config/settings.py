"""A resolved DeepSpeed configuration as plain values: what other packages get to see of it.

Guarantees: the values hold on every rank, and a key that is absent has DeepSpeed's own default (0.19.8). Needs no
deepspeed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_TYPE_BYTES = {"fp32": 4, "float32": 4, "fp16": 2, "bf16": 2, "float16": 2, "bfloat16": 2}
SPLIT_MASTERS = "split_masters"  # the trainer's own section of a configuration
SPLIT_SWAP_BUFFERS = 3  # groups in memory where states beside split masters are on NVMe: read, updated, written
SPLIT_MOMENTS = {"fp32": 4, "bf16": 2, "8bit": 1}  # bytes of one moment


class Offload(NamedTuple):
    """Where the optimizer's states, or the weights, are kept between uses."""

    device: str = "none"  # "none" is the GPU, else "cpu" or "nvme"
    pinned: bool = False  # page-locked where in host memory
    folder: Path | None = None  # of the swap files, on this host; None unless on NVMe
    buffers: int = 0  # in host memory, through which swap files are read and written
    buffer_elements: int = 0  # of each buffer of the weights; one of the optimizer holds its largest sub-group


class Gathering(NamedTuple):
    """What limits how many elements ZeRO-3 gathers at a time. The names are DeepSpeed's, most without `stage3_`."""

    prefetch_bucket_size: int = 50_000_000
    param_persistence_threshold: int = 100_000
    max_live_parameters: int = 1_000_000_000
    max_reuse_distance: int = 1_000_000_000
    reduce_bucket_size: int = 500_000_000


@dataclass(frozen=True)
class ZeroSettings:
    """How a run shards and offloads its states."""

    stage: int
    bf16: bool  # weights and activations; else fp32
    accumulation: int  # micro-batches per optimizer step
    split_moments: str  # number format of the moments beside split masters: "fp32", "bf16", "8bit"; "" without these
    # Bytes of one element:
    weight_bytes: int
    master_bytes: int  # of split masters, what the weight lacks
    moment_bytes: int
    gradient_bytes: int  # where micro-batches are summed
    communication_bytes: int
    optimizer: Offload
    param: Offload
    gathering: Gathering
    sub_group_size: int  # elements of trained parameters that stage 3 updates at a time, over all ranks
    overlap_comm: bool
    contiguous_gradients: bool
    hpz_group: int  # ranks that keep a second copy of the weights together; 1: no such copy

    @classmethod
    def of(cls, ds: dict[str, Any]) -> ZeroSettings:
        """Of a configuration from `resolve_ds_config`."""
        zero, bf16 = ds.get("zero_optimization", {}), ds.get("bf16", {})
        is_bf16 = bool(bf16.get("enabled"))
        split_moments = ds.get(SPLIT_MASTERS, {}).get("moments", "")
        masters16 = is_bf16 and bf16.get("bf16_master_weights_and_grads") is True
        moments16 = is_bf16 and bf16.get("bf16_optimizer_states") is True
        weight_bytes = 2 if is_bf16 else 4
        gradients, messages = ds.get("data_types", {}).get("grad_accum_dtype"), ds.get("communication_data_type")
        stage, overlaps = int(zero.get("stage", 0)), zero.get("overlap_comm")
        limits = {name: zero.get(f"stage3_{name}", zero.get(name)) for name in Gathering._fields}
        return cls(
            stage=stage,
            bf16=is_bf16,
            accumulation=int(ds.get("gradient_accumulation_steps", 1)),
            weight_bytes=weight_bytes,
            split_moments=split_moments,
            master_bytes=2 if split_moments or masters16 else 4,
            moment_bytes=SPLIT_MOMENTS.get(split_moments, 2 if moments16 else 4),
            gradient_bytes=_TYPE_BYTES.get(str(gradients), weight_bytes),
            communication_bytes=_TYPE_BYTES.get(str(messages), weight_bytes),
            optimizer=_offload(ds, "optimizer"),
            param=_offload(ds, "param"),
            gathering=Gathering(**{name: _int(value) for name, value in limits.items() if value is not None}),
            sub_group_size=_int(zero.get("sub_group_size", 1e9)),
            overlap_comm=stage == 3 if overlaps is None else bool(overlaps),
            contiguous_gradients=bool(zero.get("contiguous_gradients", True)),
            hpz_group=int(zero.get("zero_hpz_partition_size", 1)),
        )

    @property
    def swap_folders(self) -> list[Path]:
        """Folders of swap files on this host; none where nothing is on NVMe."""
        return sorted({each.folder for each in (self.optimizer, self.param) if each.folder is not None})

    def split_folder(self, rank: int) -> Path | None:
        """Of what split masters keep beside the weights; None if that is in memory."""
        folder = self.optimizer.folder
        return None if folder is None or not self.split_moments else folder / "split" / f"rank{rank}"

    def average_folder(self, rank: int) -> Path | None:
        """Of the moving average, beside an optimizer on NVMe; None if the average is in memory."""
        folder = self.optimizer.folder
        return None if folder is None else folder / "ema" / f"rank{rank}"


def offload_device(ds: dict[str, Any], what: str) -> str:
    """Where "optimizer" or "param" is: on "none" (the GPU), "cpu" or "nvme"."""
    section = ds.get("zero_optimization", {}).get(f"offload_{what}")
    return str(section.get("device", "none")) if isinstance(section, dict) else "none"


def _offload(ds: dict[str, Any], what: str) -> Offload:
    device = offload_device(ds, what)
    if device == "none":
        return Offload()
    section = ds["zero_optimization"][f"offload_{what}"]
    return Offload(
        device,
        pinned=section.get("pin_memory") is True,
        folder=Path(section["nvme_path"]) if device == "nvme" else None,
        buffers=int(section.get("buffer_count", 4 if what == "optimizer" else 5)),
        buffer_elements=_int(section.get("buffer_size", 1e8)),
    )


def _int(value: Any) -> int:
    """Of a number as files have it, such as 5e8."""
    return int(float(value))
