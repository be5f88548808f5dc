"""A pack on disk: what `bagel-ds inspect --pack` shows and training can be replayed from.

Guarantees: `load_batch` returns what `save_batch` was given, to the bit, on the CPU.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from bagel_ds.model.batch import PackedBatch


def save_batch(stem: Path, batch: PackedBatch) -> None:
    """Write <stem>.safetensors (the tensors) and <stem>.json (the rest). Raises OSError, SafetensorError."""
    stem.parent.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {}
    rest: dict[str, object] = {}
    for field in dataclasses.fields(batch):
        value = getattr(batch, field.name)
        if isinstance(value, Tensor):
            tensors[field.name] = value.cpu().contiguous()
        elif field.name == "images":
            # An image for both ViT and VAE is one tensor twice, which safetensors refuses.
            tensors |= {f"images.{number}": image.cpu().clone() for number, image in enumerate(value)}
        else:
            rest[field.name] = value
    save_file(tensors, stem.with_suffix(".safetensors"))
    stem.with_suffix(".json").write_text(json.dumps(rest, indent=1))


def load_batch(stem: Path) -> PackedBatch:
    """What `save_batch` wrote to `stem`."""
    tensors: dict[str, Any] = load_file(stem.with_suffix(".safetensors"))
    described = json.loads(stem.with_suffix(".json").read_text())
    rest: dict[str, Any] = {name: _tuples(value) for name, value in described.items()}
    images = tuple(tensors.pop(f"images.{n}") for n in range(sum(name.startswith("images.") for name in tensors)))
    return PackedBatch(**tensors, **rest, images=images)


def _tuples(value: object) -> object:
    return tuple(_tuples(part) for part in value) if isinstance(value, list) else value
