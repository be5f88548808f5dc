"""Whole files from pieces in one call, as tests need them. The trainer writes its files in several steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.distributed as dist

from bagel_ds.checkpoint.gather import stream_tensors
from bagel_ds.checkpoint.state import Held, fill_rank, open_rank
from bagel_ds.model_folder.tensor_files import TensorFileWriter
from bagel_ds.ranges import Pieces, TensorInfo


def export_tensors(
    path: Path, tensors: Mapping[str, TensorInfo], pieces: Iterable[Pieces], device: torch.device
) -> None:
    """Write `path` on rank 0; call on every rank. Arguments as in `stream_tensors`."""
    with TensorFileWriter(path, tensors) if dist.get_rank() == 0 else nullcontext() as writer:
        stream_tensors(writer, tensors, pieces, device)


def write_rank(path: Path, held: list[Held], pieces: Iterable[tuple[str, Pieces]]) -> None:
    """Write one rank's training state. `held` announces every range; `pieces` brings them, by kind, in any order."""
    with open_rank(path, held) as writer:
        fill_rank(writer, held, pieces)
