"""From a training checkpoint to a model folder, without GPUs and without the ranks that wrote it.

Guarantees: one tensor is read and written at a time, in pieces of 64 MiB; what is written is the fp32 masters (or
averages) cast to the dtype asked for, so fp32 weights can be had from a bf16 run; frozen parts are there too. Files are
written and flushed beside the model folder before it is made or any of its files replaced; an export that fails or is
killed leaves no model that lacks weights. Only what an earlier export wrote is replaced.
"""

from __future__ import annotations

import errno
import filecmp
import json
import os
import shutil
from pathlib import Path
from typing import Iterator

import torch
from tqdm import tqdm

from bagel_ds.checkpoint.gather import CHUNK_BYTES
from bagel_ds.checkpoint.state import EMA as AVERAGE
from bagel_ds.checkpoint.state import WEIGHT, StateFiles, StateSource
from bagel_ds.checkpoint.step_folders import (
    MANIFEST,
    STATE,
    checkpoints_near,
    checksum_fault,
    flush_all,
    holds_state,
    manifest_fault,
    meant_checkpoint,
    state_files,
    write_json,
)
from bagel_ds.errors import UserError, disk_fault
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.model_folder.folder import CONFIG_FILES, EMA, MODEL, TOKENIZER_FILES, VAE
from bagel_ds.model_folder.tensor_files import TensorFileWriter, read_header
from bagel_ds.ranges import MASTER, TensorInfo, WeightSource
from bagel_ds.units import GIB

EXPORTED = "export.json"  # where an export names its files
_UNFINISHED = ".unfinished-export"


def export_checkpoint(checkpoint: Path, out: Path, dtype: torch.dtype, shard_bytes: int | None = None) -> list[Path]:
    """Write `out` as a model folder; the files written. With `shard_bytes`, weights are cut into files of at most that.

    Raises `UserError` where the checkpoint holds no state or is damaged, where `out` holds other weights than those of
    an earlier export, and where it can't be written; what was there is then as it was.
    """
    checkpoint = meant_checkpoint(checkpoint)  # latest, or step_final where it is a file
    _check_replaceable(out, checkpoint)
    if not holds_state(checkpoint):
        found = "holds no training state" if checkpoint.is_dir() else "does not exist"
        near = checkpoints_near(checkpoint, with_state=True)
        remedy = f"pass a checkpoint such as .../checkpoints/step_1000{near and ': ' + near}"
        raise UserError(f"{checkpoint} {found}; {remedy}.")
    with waiting_for(f"all bytes of {checkpoint}'s training state to be compared", "before any is written"):
        fault = manifest_fault(checkpoint) or checksum_fault(checkpoint, state_files(checkpoint))
    if fault is not None:
        raise UserError(f"{checkpoint} is damaged: {fault}. Export another checkpoint.")
    # In a folder that is there already, as it may be a file system of its own.
    beside = out / _UNFINISHED if out.is_dir() else out.with_name(f"{_UNFINISHED}-{out.name}")
    try:
        shutil.rmtree(beside, ignore_errors=True)  # of one that was killed
        beside.mkdir(parents=True)
        written = _write_model(checkpoint, beside, dtype, shard_bytes)
        flush_all(beside)
        _move(beside, out)
    except OSError as error:
        raise UserError(
            f"{checkpoint} could not be exported to {out}: {disk_fault(error, 'pass another --out')}"
        ) from None
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    return [out / path.name for path in written]


def _write_model(checkpoint: Path, folder: Path, dtype: torch.dtype, shard_bytes: int | None) -> list[Path]:
    """Write a model folder's files into an empty one; the files of weights."""
    header, _ = read_header(checkpoint / MODEL)
    shapes = {name: tuple(entry["shape"]) for name, entry in header.items() if name != "__metadata__"}
    state = StateFiles(checkpoint / STATE)
    kinds = [(MODEL, MASTER), (EMA, AVERAGE)]
    stored = [(stem, kind) for stem, kind in kinds if any(state.has(kind, name) for name in shapes)]
    copied = [path for name in (*CONFIG_FILES, *TOKENIZER_FILES, VAE) if (path := checkpoint / name).is_file()]
    needed = len(stored) * sum(TensorInfo(dtype, shape).nbytes for shape in shapes.values())
    _check_room(folder, needed + sum(path.stat().st_size for path in copied))
    for path in copied:
        shutil.copyfile(path, folder / path.name)
    written = []
    for stem, kind in stored:
        source = state.source(shapes, kind, WEIGHT)
        written += write_weights(folder, stem.removesuffix(".safetensors"), source, shapes, dtype, shard_bytes)
    files = sorted(path.name for path in folder.iterdir())
    said = {"checkpoint": str(checkpoint), "dtype": str(dtype).removeprefix("torch."), "files": files}
    write_json(folder / EXPORTED, said)
    return written


def _check_room(folder: Path, needed: int) -> None:
    """Raise OSError now for what would fail only after many files. Each file reserves its space besides."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed / GIB:.2f} GiB needed, {free / GIB:.2f} GiB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({sizes})")


def _check_replaceable(out: Path, checkpoint: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; pass a folder to write, or one that is not there yet.")
    if (out / MANIFEST).exists():
        raise UserError(f"--out {out} is a checkpoint, which other weights would damage; pass another folder.")
    exported = {EXPORTED, *_exported(out)} if _exported(out) else set()
    weights = {path.name for path in out.glob("*.safetensors*")} - {VAE, *exported}
    copied = [name for name in (*CONFIG_FILES, *TOKENIZER_FILES, VAE) if (checkpoint / name).is_file()]
    files = {name for name in copied if _differs(out / name, checkpoint / name)} - exported
    if (out / EXPORTED).exists() and not exported:
        files.add(EXPORTED)
    for kind, others in ("weights", sorted(weights)), ("files", sorted(files)):
        if others:
            named = ", ".join(others[:3]) + (", ..." if others[3:] else "")
            raise UserError(
                f"--out {out} holds {kind} that no export wrote ({named}); pass another folder, or remove them."
            )


def _differs(present: Path, written: Path) -> bool:
    return present.exists() and not (present.is_file() and filecmp.cmp(present, written, shallow=False))


def _exported(out: Path) -> list[str]:
    """Names of the files that the last export into `out` wrote; none where there was no export."""
    try:
        return [Path(name).name for name in json.loads((out / EXPORTED).read_text())["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def _move(beside: Path, out: Path) -> None:
    """Make the written folder `out`, or replace in `out` what an earlier export wrote.

    In between `out` may lack weights, but holds no old ones beside new ones, and no shards that an index names and that
    are not there.
    """
    if not out.exists():
        beside.rename(out)
        return
    for name in _exported(out):
        if ".safetensors" in name:
            (out / name).unlink(missing_ok=True)
    written = sorted(beside.iterdir(), key=lambda path: (path.name != EXPORTED, path.name.endswith(".index.json")))
    for path in written:
        path.replace(out / path.name)


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
