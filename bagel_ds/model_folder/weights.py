"""The weights of a model folder as a source for every parameter of the network.

Guarantees: names and shapes are checked before the first weight is read, and all faults are in one message. A missing
weight is an error, never random numbers. Position tables are computed, not loaded.
"""

from __future__ import annotations

from typing import Mapping

import torch
from torch import Tensor

from bagel_ds.errors import UserError, all_faults
from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.parts import POSITION_TABLES, generation_twin
from bagel_ds.model_folder.tensor_files import TensorFiles, dtype_fault
from bagel_ds.ranges import TensorInfo

LATENT_TABLE = "latent_pos_embed.pos_embed"


def check_tensors(found: TensorFiles, expected: Mapping[str, tuple[int, ...]], where: str) -> None:
    """Check that every expected tensor exists with its shape and a dtype to train. One `UserError` lists all faults."""
    if fault := dtype_fault(found, expected):
        raise UserError(f"{where}: {fault}.")
    faults = []
    for name, shape in expected.items():
        if name not in found:
            alike = next((other for other in found.names if other.endswith(f".{name}")), None)
            faults.append(f"tensor {name} is missing" + (f" (there is {alike})" if alike else ""))
        elif found.info(name).shape != shape:
            faults.append(
                f"tensor {name} has shape {list(found.info(name).shape)}, the configuration needs {list(shape)}"
            )
    if len(faults) > 8:
        faults = faults[:8] + [f"... and {len(faults) - 8} more"]
    all_faults(
        [f"{where}: {fault}. The weights don't match the folder's *_config.json." for fault in faults]
        if len(faults) == 1
        else faults,
        f"{where}: the weights don't match the folder's *_config.json:",
    )


class BagelWeights:
    """A `WeightSource` for every parameter of a network: from files, computed (position tables), or a copied expert.

    Construction raises `UserError` if a tensor is missing or has another shape.
    """

    def __init__(self, files: TensorFiles, shapes: Mapping[str, tuple[int, ...]], copy_init_moe: bool, where: str):
        self.files, self._shapes = files, dict(shapes)
        self._check_latent_side(where)
        self.copied: dict[str, str] = {}
        for name in shapes:
            twin = generation_twin(name)
            if copy_init_moe and twin is not None and name not in files and twin in files:
                self.copied[name] = twin
        loaded = {
            name: shape for name, shape in shapes.items() if name not in POSITION_TABLES and name not in self.copied
        }
        check_tensors(files, loaded, where)
        self.loaded = list(loaded)
        self.unexpected = sorted(set(files.names) - set(shapes))
        self._tables = {
            name: position_table(shapes[name][1], int(shapes[name][0] ** 0.5)).flatten()
            for name in POSITION_TABLES
            if name in shapes
        }

    def _check_latent_side(self, where: str) -> None:
        wanted = round(self._shapes[LATENT_TABLE][0] ** 0.5)
        found = latent_side(self.files) or wanted
        if found != wanted:
            raise UserError(
                f"max_latent_size={wanted} but latent_pos_embed in {where} holds {found}x{found} positions; "
                f"pass --max_latent_size {found}, or leave it out to use the checkpoint's size."
            )

    @property
    def names(self) -> list[str]:
        return list(self._shapes)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def info(self, name: str) -> TensorInfo:
        if name in self._tables:
            return TensorInfo(torch.float32, self._shapes[name])
        return self.files.info(self.copied.get(name, name))

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        if name in self._tables:
            table = self._tables[name]
            return table[start:] if numel is None else table[start : start + numel]
        return self.files.read(self.copied.get(name, name), start, numel)


def latent_side(files: TensorFiles) -> int | None:
    """Side of the latent position table in a checkpoint; None if it has no table."""
    if LATENT_TABLE not in files:
        return None
    shape = files.info(LATENT_TABLE).shape
    side = round(shape[0] ** 0.5) if len(shape) == 2 else 0
    if side < 1 or side**2 != shape[0]:
        raise UserError(
            f"{files.paths[0]}: tensor {LATENT_TABLE} has shape {list(shape)}, expected a square number of rows. "
            "Download or copy it again."
        )
    return side
