"""The base model of an adapter: recognizing it, and finding the weights that the adapter was trained on.

Guarantees: the same weights have the same fingerprint, however their files are cut; a model whose tensors have other
names, shapes or number formats, or that was trained further, has another.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Sequence

import torch

from bagel_ds.errors import UserError
from bagel_ds.lora.peft_files import AdapterFolder, named_base
from bagel_ds.model.shape.parts import POSITION_TABLES
from bagel_ds.model_folder.average import average_or_weights
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.model_folder.tensor_files import TensorFiles

_ELEMENTS = 4096  # of each tensor: training changes all of them


def base_fingerprint(files: TensorFiles) -> str:
    """A digest of the beginnings of all tensors but the position tables, which are computed."""
    digest = hashlib.sha256()
    for name in sorted(set(files.names) - set(POSITION_TABLES)):
        info = files.info(name)
        values = files.read(name, 0, min(_ELEMENTS, info.numel))
        digest.update(f"{name} {info.dtype} {list(info.shape)}".encode())
        digest.update(values.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def base_folder(adapter: Path, named: str | Path | None) -> Path:
    """The folder of an adapter's base model: `named`, else the one that the adapter names. Raises `UserError`."""
    base = named or named_base(adapter)
    if base is None or not Path(base).is_dir():
        known = base or "an unnamed model"
        raise UserError(f"{adapter} is an adapter of {known}: pass --model_path with that model's folder")
    return Path(base)


def base_files(model_path: Path, adapters: Sequence[AdapterFolder]) -> TensorFiles:
    """The weights of `model_path` that all `adapters` were trained on. Raises `UserError`.

    If no adapter says which, the folder's own rule decides between its average and its weights.
    """
    folder = ModelFolder(model_path)
    wanted = {adapter.fingerprint: adapter for adapter in adapters if adapter.fingerprint is not None}
    if not wanted:
        return TensorFiles(folder.weight_files(average_or_weights(model_path).stem))
    if len(wanted) > 1:
        named = " and ".join(str(adapter.folder) for adapter in wanted.values())
        raise UserError(f"{named} were trained on different base models; use one at a time")
    ((fingerprint, adapter),) = wanted.items()
    found = []
    for stem in ("ema", "model"):
        if paths := folder.weight_files(stem):
            files = TensorFiles(paths)
            if base_fingerprint(files) == fingerprint:
                return files
            found.append(paths[0].name)
    held = " and ".join(found) or "no weights"
    raise UserError(
        f"{model_path} is not the model that the adapter {adapter.folder} was trained on (it holds {held} with another "
        f"fingerprint than {fingerprint}); pass {adapter.base or 'that model'}, or wherever it is now"
    )
