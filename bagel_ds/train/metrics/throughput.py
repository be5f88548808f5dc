"""Speed of a run: FLOPs per pack, the device's peak, memory in use.

Guarantees: FLOPs are those of the network (forward and backward, without recomputation). A device whose peak is unknown
gets no utilization rather than a wrong one.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

import torch

from bagel_ds.machine.device import uses_cuda
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.flops import forward_flops
from bagel_ds.units import GIB

# Dense bf16 peak in TFLOP/s by words of the device's name; the longest match counts. From NVIDIA's data sheets, figures
# with sparsity halved; GB200 and GB300 stand for one GPU of the superchip.
PEAK_TFLOPS = {
    "GB300": 2500.0,
    "GB200": 2500.0,
    "B300": 2250.0,
    "B200": 2250.0,
    "B100": 1750.0,
    "GH200": 989.0,
    "H200": 989.0,
    "H200 NVL": 835.0,
    "H100": 989.0,
    "H100 NVL": 835.0,
    "H100 PCIe": 756.0,
    "H800": 989.0,
    "H800 PCIe": 756.0,
    "H20": 148.0,
    "A100": 312.0,
    "A800": 312.0,
    "A40": 149.7,
    "A30": 165.0,
    "A10": 125.0,
    "L40S": 362.0,
    "L40": 181.0,
    "L20": 119.5,
    "L4": 121.0,
    "RTX PRO 6000 Blackwell": 503.8,
    "RTX PRO 6000 Blackwell Max-Q": 438.9,
    "RTX PRO 6000 Blackwell Server Edition": 500.0,
    "RTX 6000 Ada": 364.0,
    "RTX A6000": 155.0,
    "RTX 5090": 209.5,
    "RTX 5080": 112.6,
    "RTX 4090": 165.2,
    "RTX 4080": 97.5,
    "RTX 3090": 71.0,
}
# Behind a name of the table these mean another chip, a slower one, or a part of one, unless the table has an entry.
_OTHER_DEVICE = r" (Ti|D|SUPER|Laptop|Max-Q|NVL|PCIe|CNX)\b|.* MIG\b"


class DeviceMemory(NamedTuple):
    """Peaks of this process on its GPU, GiB."""

    allocated: float  # by tensors
    reserved: float  # by torch for them, with fragmentation: the figure that a memory plan predicts


def peak_tflops(given: float) -> float | None:
    """`given` if it is above 0, else the device's dense bf16 peak if it is known, else None."""
    if given > 0:
        return given
    if not uses_cuda():
        return None
    name = torch.cuda.get_device_name()
    known = [part for part in PEAK_TFLOPS if re.search(rf"\b{part}\b(?!{_OTHER_DEVICE})", name)]
    return PEAK_TFLOPS[max(known, key=len)] if known else None


def pack_flops(batch: PackedBatch, config: BagelConfig) -> float:
    """FLOPs of a forward and a backward pass over a pack: the backward pass takes twice the forward's products."""
    tokens = batch.sequence_length if config.visual_gen else batch.sequence_length - len(batch.vae_indexes)
    layout = AttentionLayout.from_splits(batch.sample_lens, batch.split_lens, batch.attn_modes)
    return 3.0 * forward_flops(config, tokens, layout.pairs, len(batch.label_ids), batch.vit_seqlens)


def host_gib() -> float:
    """Anonymous and shared memory of this process, GiB; file-backed pages don't count."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    kib = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in fields)
    return kib / 2**20


def device_memory() -> DeviceMemory | None:
    """None without a GPU."""
    if not uses_cuda():
        return None
    return DeviceMemory(torch.cuda.max_memory_allocated() / GIB, torch.cuda.max_memory_reserved() / GIB)
