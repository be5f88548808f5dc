"""How fast a run is: arithmetic per pack, peak of the device, memory in use.

Guarantees: FLOPs are the network's own (forward and backward, recomputation not counted), each token at its own expert;
on a device whose peak is unknown there is no utilisation rather than a wrong one.
"""

from __future__ import annotations

import re
from pathlib import Path

import torch

from bagel_ds.model.attention import AttentionLayout
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.config import BagelConfig
from bagel_ds.model.mot import llm_matmul_parameters
from bagel_ds.units import GIB

# Dense bf16 peak in TFLOP/s by whole words of the device's name, most specific first (vendors' data sheets).
PEAK_TFLOPS = (
    ("H200", 989.0),
    ("H100 NVL", 835.0),
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H800", 989.0),
    ("H20", 148.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("A800", 312.0),
    ("L40S", 362.0),
    ("L40", 181.0),
    ("L20", 119.5),
    ("A6000", 155.0),
    ("RTX 6000 Ada", 364.0),
    ("RTX 5090", 209.5),
    ("RTX 4090", 165.2),
    ("RTX 3090", 71.0),
    ("A40", 149.7),
    ("A10", 125.0),
    ("V100", 0.0),
)
_OTHER_DEVICE = " (Ti|D|SUPER|Laptop|Max-Q)"  # behind a name of the table: another chip, or a slower one


def peak_tflops(given: float) -> float | None:
    """`given` where above 0, else the device's dense bf16 peak, else None."""
    if given > 0:
        return given
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next(
        (peak for part, peak in PEAK_TFLOPS if peak and re.search(rf"\b{part}\b(?!{_OTHER_DEVICE})", name)), None
    )


def pack_flops(batch: PackedBatch, config: BagelConfig) -> float:
    """FLOPs of one forward and backward pass over a pack: 6 per parameter and token, and attention's two products."""
    llm, vit = config.llm, config.vit
    generation = len(batch.vae_indexes) if config.visual_gen else 0
    understanding = batch.sequence_length - len(batch.vae_indexes)
    linear = 6.0 * llm_matmul_parameters(llm) * (understanding + generation)
    linear += 6.0 * llm.hidden_size * llm.vocab_size * len(batch.label_ids)
    layout = AttentionLayout.from_splits(batch.sample_lens, batch.split_lens, batch.attn_modes)
    attention = 12.0 * llm.num_hidden_layers * llm.hidden_size * attended_pairs(layout)
    patches = sum(batch.vit_seqlens)
    vit_parameters = vit.num_layers * (4 * vit.hidden_size**2 + 2 * vit.hidden_size * vit.intermediate_size)
    vit_pairs = sum(length**2 for length in batch.vit_seqlens)
    vision = 6.0 * vit_parameters * patches + 12.0 * vit.num_layers * vit.hidden_size * vit_pairs
    return linear + attention + (vision if config.visual_und else 0.0)


def attended_pairs(layout: AttentionLayout) -> int:
    """Query-key pairs that the mask lets through."""
    pairs = 0
    for segment, seen in enumerate(layout.visible):
        length = layout.segment_lens[segment]
        pairs += length * sum(layout.segment_lens[other] for other in seen)
        if layout.is_causal[segment]:
            pairs -= length * (length - 1) // 2
    return pairs


def host_gib() -> float:
    """Memory of this process that no file backs (anonymous and shared), GiB."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    kib = sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssShmem") if name in fields)
    return kib / 2**20


def device_gib() -> float | None:
    """Peak of this process's CUDA allocations, GiB; None without a GPU."""
    return torch.cuda.max_memory_allocated() / GIB if torch.cuda.is_available() else None
