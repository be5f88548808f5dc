"""Which base model an adapter was trained on.

Guarantees: the same weights have the same fingerprint, however their files are cut; a model whose tensors have other
names, shapes or number formats, or that was trained further, has another.
"""

from __future__ import annotations

import hashlib
from typing import Iterable

import torch

from bagel_ds.ranges import WeightSource

_ELEMENTS = 4096  # of each tensor: training changes all of them


def base_fingerprint(source: WeightSource, names: Iterable[str]) -> str:
    """A digest of the beginnings of these tensors."""
    digest = hashlib.sha256()
    for name in sorted(names):
        info = source.info(name)
        values = source.read(name, 0, min(_ELEMENTS, info.numel)).contiguous()
        digest.update(f"{name} {info.dtype} {info.shape}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]
