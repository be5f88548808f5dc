"""From a training checkpoint to a model folder, without GPUs and without the ranks that wrote it.

Guarantees: one tensor is read and written at a time, in pieces of 64 MiB; what is written is the fp32 masters (or
averages) cast to the dtype asked for, so fp32 weights can be had from a bf16 run; frozen parts are there too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Iterator

import torch
from tqdm import tqdm

from bagel_ds.checkpoint.export import CHUNK_BYTES
from bagel_ds.checkpoint.folder import CONFIG_FILES, EMA, MODEL, TOKENIZER_FILES, VAE
from bagel_ds.checkpoint.state import EMA as AVERAGE
from bagel_ds.checkpoint.state import WEIGHT, StateFiles, StateSource
from bagel_ds.checkpoint.steps import STATE, checksum_fault, holds_state, manifest_fault, state_files
from bagel_ds.checkpoint.tensors import TensorFileWriter, read_header
from bagel_ds.errors import UserError
from bagel_ds.ranges import MASTER, TensorInfo, WeightSource


def export_checkpoint(checkpoint: Path, out: Path, dtype: torch.dtype, shard_bytes: int | None = None) -> list[Path]:
    """Write `out` as a model folder; the files written. With `shard_bytes`, weights are cut into files of at most that.

    Raises `UserError` where the checkpoint holds no state or is damaged.
    """
    if not holds_state(checkpoint):
        raise UserError(f"{checkpoint} holds no training state; pass a checkpoint such as .../checkpoints/step_1000.")
    fault = manifest_fault(checkpoint) or checksum_fault(checkpoint, state_files(checkpoint))
    if fault is not None:
        raise UserError(f"{checkpoint} is damaged: {fault}. Export another checkpoint.")
    header, _ = read_header(checkpoint / MODEL)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    state = StateFiles(checkpoint / STATE)
    out.mkdir(parents=True, exist_ok=True)
    for name in (*CONFIG_FILES, *TOKENIZER_FILES, VAE):
        if (checkpoint / name).is_file():
            shutil.copyfile(checkpoint / name, out / name)
    written = []
    for stem, kind in ((MODEL, MASTER), (EMA, AVERAGE)):
        source = state.source(shapes, kind, WEIGHT)
        if any(state.has(kind, name) for name in shapes):
            written += write_weights(out, stem.removesuffix(".safetensors"), source, shapes, dtype, shard_bytes)
    return written


def write_weights(
    out: Path,
    stem: str,
    source: StateSource | WeightSource,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    shard_bytes: int | None,
) -> list[Path]:
    """Write <stem>.safetensors, or shards with Hugging Face's index beside them."""
    infos = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
    shards = list(_shards(infos, shard_bytes))
    paths = [out / f"{stem}{_number(i, len(shards))}.safetensors" for i in range(len(shards))]
    total = sum(info.nbytes for info in infos.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=stem) as bar:
        for path, shard in zip(paths, shards):
            with TensorFileWriter(path, shard) as writer:
                for name, info in shard.items():
                    step = CHUNK_BYTES // 4
                    for start in range(0, info.numel, step):
                        piece = source.read(name, start, min(step, info.numel - start)).to(dtype)
                        writer.write(name, start, piece)
                        bar.update(piece.nbytes)
    if len(shards) > 1:
        names = {name: path.name for path, shard in zip(paths, shards) for name in shard}
        index = out / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=1) + "\n")
        return [*paths, index]
    return paths


def _number(index: int, count: int) -> str:
    return "" if count == 1 else f"-{index + 1:05d}-of-{count:05d}"


def _shards(infos: dict[str, TensorInfo], limit: int | None) -> Iterator[dict[str, TensorInfo]]:
    """Runs of tensors of at most `limit` bytes; a larger tensor is a run of its own."""
    shard: dict[str, TensorInfo] = {}
    size = 0
    for name, info in infos.items():
        if shard and limit is not None and size + info.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = info
        size += info.nbytes
    yield shard
