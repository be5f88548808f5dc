"""Whole files for tests: one rank's training state, and weights gathered from all ranks."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Iterable, Mapping

import torch
import torch.distributed as dist

from bagel_ds.checkpoint.gather import Gathering
from bagel_ds.checkpoint.state import Held, fill_rank, open_rank
from bagel_ds.model_folder.tensor_files import TensorFileWriter
from bagel_ds.ranges import Pieces, TensorInfo


def write_rank(path: Path, held: Iterable[Held], pieces: Iterable[tuple[str, Pieces]]) -> None:
    """One rank's training state."""
    held = list(held)
    with open_rank(path, held) as writer:
        fill_rank(writer, held, pieces)


def export_tensors(
    path: Path, tensors: Mapping[str, TensorInfo], pieces: Iterable[Pieces], device: torch.device
) -> None:
    """Write `path` on rank 0; call on every rank. `device` as in `Gathering`, the rest as in `collect`."""
    with TensorFileWriter(path, tensors) if dist.get_rank() == 0 else nullcontext() as writer:
        _gathering(device).collect(writer, tensors, pieces)


def _gathering(device: torch.device) -> Gathering:
    """One for all files of a process group: each has connections and threads of its own."""
    world = dist.group.WORLD
    if not _made or _made[-1][:2] != (world, device):
        _made.append((world, device, Gathering(device)))
    return _made[-1][2]


_made: list[tuple[object, torch.device, Gathering]] = []
