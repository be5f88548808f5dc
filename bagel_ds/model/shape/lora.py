"""Low-rank adapters (LoRA, Hu et al. 2021): which linear layers get one, and of what size.

An adapted layer computes x W^T + alpha / rank * dropout(x) A^T B^T, where only A [rank, inputs] and B [outputs, rank]
train. Both are parameters of the layer itself, `lora_A` and `lora_B` beside `weight`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from bagel_ds.model.shape.quantization import QUANTIZATIONS, Quantization

LORA_A, LORA_B = "lora_A", "lora_B"
_LAYERS = r"language_model\.model\.layers\.\d+\."
_LINEAR = r"(q|k|v|o|gate|up|down)_proj"
# Each is matched with a module's whole name.
NAMED_TARGETS = {
    "gen": rf"{_LAYERS}(self_attn\.{_LINEAR}_moe_gen|mlp_moe_gen\.{_LINEAR})",
    "und": rf"{_LAYERS}(self_attn|mlp)\.{_LINEAR}",
    "both": rf"{_LAYERS}(self_attn|mlp|mlp_moe_gen)\.{_LINEAR}(_moe_gen)?",
}


@dataclass(frozen=True)
class LoRA:
    """`targets` is a regular expression that a layer's whole name must match, or a key of `NAMED_TARGETS`.

    Layers in `frozen_parts` (names as of `parts.part_of`) get none. With `base_precision`, a key of `QUANTIZATIONS`,
    all linear layers of the language model's decoder keep their own weights in 4 or 8 bits (QLoRA).
    """

    rank: int
    alpha: float
    dropout: float = 0.0
    targets: str = "both"
    frozen_parts: frozenset[str] = frozenset()
    base_precision: str | None = None

    @property
    def quantization(self) -> Quantization | None:
        return None if self.base_precision is None else QUANTIZATIONS[self.base_precision]

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def names(self, layer: str) -> bool:
        """Whether `targets` names this layer."""
        return re.fullmatch(NAMED_TARGETS.get(self.targets, self.targets), layer) is not None


def is_decoder_linear(layer: str) -> bool:
    """Whether a module is a linear layer of the language model's decoder layers, of either expert."""
    return re.fullmatch(NAMED_TARGETS["both"], layer) is not None


def is_adapter(parameter: str) -> bool:
    """Whether a parameter belongs to an adapter."""
    return parameter.rpartition(".")[2] in (LORA_A, LORA_B)
