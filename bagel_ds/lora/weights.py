"""Sources of weights for a network with adapters: a base model's, with adapters beside or inside its weights.

Guarantees: new adapters depend on (seed, name) only, so any number of ranks begins alike; B is zero, so the first
forward pass is the base's. A merged weight is base + alpha / rank * B A, added in fp32; what reads it rounds it once.
"""

from __future__ import annotations

import hashlib
import math
from typing import Mapping, Sequence

import torch
from torch import Tensor

from bagel_ds.lora.peft_files import AdapterFolder
from bagel_ds.model.quantized import codes_of, largest_values
from bagel_ds.model.shape.lora import LORA_A, is_adapter
from bagel_ds.model.shape.quantization import CODES, PIECE, Quantization, base_of
from bagel_ds.ranges import TensorInfo, WeightSource


class NewAdapters:
    """Adapters before their first step. A is uniform with the bound of a linear layer (as peft's), B is zero."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], seed: int):
        self._shapes = {name: shape for name, shape in shapes.items() if is_adapter(name)}
        self._seed = seed
        self._last: tuple[str, Tensor] = ("", torch.empty(0))  # it is read in pieces

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(torch.float32, self._shapes[name])

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        stop = self.info(name).numel if numel is None else start + numel
        if self._last[0] != name:
            self._last = (name, self._made(name))
        return self._last[1][start:stop]

    def _made(self, name: str) -> Tensor:
        values = torch.zeros(self.info(name).numel)
        if name.endswith(LORA_A):
            digest = hashlib.sha256(f"{self._seed} {name}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
            bound = 1 / math.sqrt(self._shapes[name][1])
            values.uniform_(-bound, bound, generator=generator)
        return values


class QuantizedBase:
    """A base model's weights, with codes and largest values of those that a network asks for in 4 or 8 bits.

    Weights are quantized as they are read, piece by piece: none is ever whole here.
    """

    def __init__(self, base: WeightSource, quantization: Quantization):
        self._base, self._quantization = base, quantization

    def __contains__(self, name: str) -> bool:
        found = base_of(name)
        return (found[0] if found else name) in self._base

    def info(self, name: str) -> TensorInfo:
        if (found := base_of(name)) is None:
            return self._base.info(name)
        numel = self._base.info(found[0]).numel
        if found[1] == CODES:
            return TensorInfo(torch.uint8, (self._quantization.codes(numel),))
        return TensorInfo(torch.bfloat16, (self._quantization.blocks(numel),))

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        if (found := base_of(name)) is None:
            return self._base.read(name, start, numel)
        weight, kind = found
        stop = self.info(name).numel if numel is None else start + numel
        elements = self._quantization.per_byte if kind == CODES else self._quantization.block  # of the weight, in one
        block = self._quantization.block
        first, last = start * elements // block, self._quantization.blocks(stop * elements)
        low, high = first * block, min(last * block, self._base.info(weight).numel)
        made = codes_of if kind == CODES else largest_values
        pieces = (self._base.read(weight, at, min(PIECE, high - at)) for at in range(low, high, PIECE))
        offset = start - low // elements
        return torch.cat([made(piece, self._quantization) for piece in pieces])[offset : offset + stop - start]


class WithAdapters:
    """A base model's weights, and those of `adapters` under the names that only a network with adapters has."""

    def __init__(self, base: WeightSource, adapters: WeightSource):
        self._base, self._adapters = base, adapters

    def _source(self, name: str) -> WeightSource:
        return self._adapters if is_adapter(name) else self._base

    def __contains__(self, name: str) -> bool:
        return name in self._source(name)

    def info(self, name: str) -> TensorInfo:
        return self._source(name).info(name)

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        return self._source(name).read(name, start, numel)


class MergedWeights:
    """A base model's weights, with the products of one or more adapter folders added: fp32 where something is added."""

    def __init__(self, base: WeightSource, adapters: Sequence[AdapterFolder], dtype: torch.dtype = torch.float32):
        """`dtype` is what readers round to; it only matters to `rounded_away`."""
        self._base, self._adapters, self._dtype = base, adapters, dtype
        self._added = self._lost = 0.0  # sums of squares, of what was read

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def info(self, name: str) -> TensorInfo:
        info = self._base.info(name)
        return TensorInfo(torch.float32, info.shape) if self._changing(name) else info

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        values = self._base.read(name, start, numel)
        if not (changing := self._changing(name)):
            return values
        before = values = values.float()
        for adapter in changing:
            layer = name.removesuffix(".weight")
            width = self._base.info(name).shape[-1]
            first, last = start // width, -(-(start + len(values)) // width)  # the rows that the range touches
            delta = (adapter.rows_of_b(layer, first, last) @ adapter.a(layer)).mul_(adapter.scale(layer)).flatten()
            values = values + delta[start - first * width :][: len(values)]
        self._added += float((values - before).square().sum())
        self._lost += float((values.to(self._dtype).float() - values).square().sum())
        return values

    def remark(self) -> str:
        """What rounding cost, for a log line; empty where it is below a thousandth."""
        share = self.rounded_away()
        changed = f"rounding to {str(self._dtype).removeprefix('torch.')} changed what the adapter adds by {share:.1%}"
        return changed if share > 0.001 else ""

    def rounded_away(self) -> float:
        """Size of what rounding to `dtype` changed, relative to what was added; of what was read so far."""
        return math.sqrt(self._lost / self._added) if self._added else 0.0

    def _changing(self, name: str) -> list[AdapterFolder]:
        layer = name.removesuffix(".weight")
        return [adapter for adapter in self._adapters if name.endswith(".weight") and layer in adapter.layers]
