"""From a training checkpoint to a model folder, in one process without GPUs.

Guarantees: tensors are read and written one at a time, in chunks of 64 MiB. Weights are the fp32 masters (or averages)
cast to the requested dtype, so a bf16 run gives fp32 weights; frozen parameters are included. Files are written and
flushed next to the model folder before the folder is created or any of its files replaced, so an export that fails or
is killed leaves no model without weights. Only files of an earlier export are replaced.
"""

from __future__ import annotations

import errno
import filecmp
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path, PurePosixPath
from typing import Iterator, Mapping, NamedTuple

import torch
from tqdm import tqdm

from bagel_ds.checkpoint.gather import CHUNK_BYTES
from bagel_ds.checkpoint.serving import NOT_SERVED, Layout, WithTables, serving_layout
from bagel_ds.checkpoint.state import EMA as AVERAGE
from bagel_ds.checkpoint.state import WEIGHT, StateFiles
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
from bagel_ds.lora.base import base_files
from bagel_ds.lora.peft_files import EMA_FOLDER, AdapterFolder, adapter_files, holds_adapter
from bagel_ds.lora.weights import MergedWeights
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.model_folder.average import averaging_of
from bagel_ds.model_folder.folder import CONFIG_FILES, EMA, MODEL, TOKENIZER_FILES, VAE
from bagel_ds.model_folder.tensor_files import TensorFiles, TensorFileWriter
from bagel_ds.ranges import MASTER, TensorInfo, WeightSource
from bagel_ds.units import GIB

EXPORTED = "export.json"  # the list of an export's files
_UNFINISHED = ".unfinished-export"
_KINDS = {"model": MASTER, "ema": AVERAGE}  # stem of a weight file -> the kind of training state it holds

logger = logging.getLogger("bagel_ds")


class _Plan(NamedTuple):
    """Everything that an export writes, known before its first byte."""

    layout: Layout
    copied: list[Path]
    sources: Mapping[str, WeightSource]  # by stem of the weight file
    stored: dict[str, tuple[int, ...]]  # shapes in the checkpoint
    dtype: torch.dtype
    metadata: dict[str, str]  # steps and decay of the average, if the checkpoint records them

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the tensors to write."""
        return self.stored | {name: tuple(table.shape) for name, table in self.layout.tables.items()}

    @property
    def nbytes(self) -> int:
        weights = sum(TensorInfo(self.dtype, shape).nbytes for shape in self.shapes.values())
        return len(self.layout.weights) * weights + sum(path.stat().st_size for path in self.copied)


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    dtype: torch.dtype,
    shard_bytes: int | None = None,
    program: str | None = None,
    serve: str = "auto",
    base: Path | None = None,
) -> list[Path]:
    """Write `out` as a model folder. Returns the weight files.

    With `shard_bytes`, weights are split into files of at most that size. With `program`, one of `serving.PROGRAMS`,
    the folder gets the layout that this program reads, and `serve`, one of `serving.SERVE`, chooses the weights.

    Raises `UserError` if the checkpoint holds no state or is damaged, if `out` holds weights that no export wrote, or
    if `out` can't be written. `out` is then unchanged.
    """
    checkpoint = meant_checkpoint(checkpoint)  # `latest`, or `step_final` if it is a text file
    _check_options(out, shard_bytes, program)
    if base is None:
        _check_checkpoint(checkpoint)
    from_peft = base is not None and not (checkpoint / MANIFEST).is_file()  # which writes no checksums
    fault = None if from_peft else manifest_fault(checkpoint)
    if fault is None:
        plan = _plan(checkpoint, base, dtype, program, serve)
        _check_replaceable(out, plan)
        if former := _exported_of(out):
            logger.info("%s holds an export of %s, which this one replaces", out, former)
        names = state_files(checkpoint) if base is None else adapter_files(checkpoint)
        with waiting_for(f"the checksums of {checkpoint}", "the export begins after that"):
            fault = None if from_peft else checksum_fault(checkpoint, names)
    if fault is not None:
        raise UserError(f"{checkpoint} is damaged: {fault}. Export another checkpoint.")
    # An existing `out` may be a mount point: only inside it are files sure to be on the same file system.
    staging = out / _UNFINISHED if out.is_dir() else out.with_name(f"{_UNFINISHED}-{out.name}")
    try:
        shutil.rmtree(staging, ignore_errors=True)  # left by a killed export
        staging.mkdir(parents=True)
        written = _write_model(plan, staging, shard_bytes)
        served = {} if program is None else {"for": program, EMA: plan.layout.reason}
        record = {"checkpoint": str(checkpoint), "dtype": str(dtype).removeprefix("torch."), "files": _files(staging)}
        write_json(staging / EXPORTED, record | served)
        flush_all(staging)
        _move(staging, out)
    except OSError as error:
        raise UserError(
            f"{checkpoint} could not be exported to {out}: {disk_fault(error, 'pass another --out')}"
        ) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    if program is not None:
        logger.info("%s %s", out / EMA, plan.layout.reason)
    for stem, source in plan.sources.items():
        if isinstance(source, MergedWeights) and (remark := source.remark()):
            logger.info("%s.safetensors: %s; --save_dtype fp32 keeps it", stem, remark)
    return [out / path.relative_to(staging) for path in written]


def _check_options(out: Path, shard_bytes: int | None, program: str | None) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; pass the name of a folder, new or existing.")
    if (out / MANIFEST).exists():
        raise UserError(f"--out {out} is a checkpoint, and an export into it would damage it; pass another folder.")
    if program is not None and shard_bytes is not None:
        raise UserError(
            f"--max_shard_size can't be combined with --for {program}: these programs read one weight file, {EMA}. "
            "Leave out --max_shard_size."
        )


def _check_checkpoint(checkpoint: Path) -> None:
    if holds_adapter(checkpoint):
        raise UserError(
            f"{checkpoint} holds an adapter: pass --merge to add it to its base model's weights (--model_path, if that "
            "is no longer where the adapter says)"
        )
    if not holds_state(checkpoint):
        found = "holds no training state" if checkpoint.is_dir() else "does not exist"
        near = checkpoints_near(checkpoint, with_state=True)
        remedy = f"pass a checkpoint such as .../checkpoints/step_1000{near and ': ' + near}"
        raise UserError(f"{checkpoint} {found}; {remedy}.")


def _plan(checkpoint: Path, base: Path | None, dtype: torch.dtype, program: str | None, serve: str) -> _Plan:
    """What is written of a checkpoint or, with `base`, of that model with the checkpoint's adapter added to it."""
    folder = checkpoint if base is None else base  # of the configuration, the tokenizer and the autoencoder
    files, sources = _stored(checkpoint) if base is None else _merged(checkpoint, base, dtype)
    if program is None:
        layout = Layout({f"{stem}.safetensors": stem for stem in sources})
    else:
        layout = serving_layout(program, serve, checkpoint, "ema" in sources, dtype, folder, files)
    copied = [path for name in (*CONFIG_FILES, *TOKENIZER_FILES, VAE) if (path := folder / name).is_file()]
    kept = [path for path in copied if path.name not in layout.texts]
    averaging = averaging_of(checkpoint) if "ema" in sources else None
    metadata = {} if averaging is None else averaging.metadata()
    return _Plan(layout, kept, sources, _shapes(files), dtype, metadata)


def _stored(checkpoint: Path) -> tuple[TensorFiles, Mapping[str, WeightSource]]:
    """A checkpoint's weight file, for its shapes, and by stem the masters and averages of its training state."""
    files, state = TensorFiles([checkpoint / MODEL]), StateFiles(checkpoint / STATE)
    shapes = _shapes(files)
    stems = [stem for stem, kind in _KINDS.items() if any(state.has(kind, name) for name in shapes)]
    return files, {stem: state.source(shapes, _KINDS[stem], WEIGHT) for stem in stems}


def _merged(checkpoint: Path, base: Path, dtype: torch.dtype) -> tuple[TensorFiles, Mapping[str, WeightSource]]:
    """The base's weight files, and by stem the base with the adapter, or its average, added to it."""
    adapters = {"model": AdapterFolder(checkpoint)}
    if (checkpoint / EMA_FOLDER).is_dir():
        adapters["ema"] = AdapterFolder(checkpoint / EMA_FOLDER)
    files = base_files(base, list(adapters.values()))
    for adapter in adapters.values():
        adapter.check_fits(_shapes(files))
    return files, {stem: MergedWeights(files, [adapter], dtype) for stem, adapter in adapters.items()}


def _shapes(files: TensorFiles) -> dict[str, tuple[int, ...]]:
    return {name: files.info(name).shape for name in files.names}


def _write_model(plan: _Plan, folder: Path, shard_bytes: int | None) -> list[Path]:
    """Write a model folder's files into an empty folder. Returns the weight files."""
    _check_room(folder, plan.nbytes)
    for path in plan.copied:
        shutil.copyfile(path, folder / path.name)
    for name, text in plan.layout.texts.items():
        (folder / name).write_text(text)
    written = []
    for name, stem in plan.layout.weights.items():
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        source = WithTables(plan.sources[stem], plan.layout.tables)
        metadata = plan.metadata if path.name == EMA else {}
        written += write_weights(
            path.parent, path.stem, source, plan.shapes, plan.dtype, shard_bytes, metadata | plan.layout.metadata(stem)
        )
    return written


def _check_room(folder: Path, needed: int) -> None:
    """Fail early on a disk that is too small. (Each file also reserves its space when it is opened.)"""
    free = shutil.disk_usage(folder).free
    if needed > free:
        sizes = f"{needed / GIB:.2f} GiB needed, {free / GIB:.2f} GiB free"
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({sizes})")


def _check_replaceable(out: Path, plan: _Plan) -> None:
    """Raise `UserError` if `out` holds weights, or files that would be replaced, that no export wrote."""
    exported = {EXPORTED, *_exported(out)} if _exported(out) else set()
    weights = {path.name for path in out.glob("*.safetensors*")} - {VAE}
    weights |= {name for name in plan.layout.weights if (out / name).exists()}
    files = {path.name for path in plan.copied if _differs(out / path.name, path)}
    files |= {name for name, text in plan.layout.texts.items() if _differs(out / name, text)}
    if (out / EXPORTED).exists():
        files.add(EXPORTED)
    for kind, others in ("weights", sorted(weights - exported)), ("files", sorted(files - exported)):
        if others:
            named = ", ".join(others[:3]) + (", ..." if others[3:] else "")
            raise UserError(
                f"--out {out} holds {kind} that no export wrote ({named}); pass another folder or remove them."
            )


def _differs(present: Path, written: Path | str) -> bool:
    """Whether `present` exists with another content than `written`, which is a file or a text."""
    if not present.is_file():
        return present.exists()
    if isinstance(written, str):
        return present.read_bytes() != written.encode()
    return not filecmp.cmp(present, written, shallow=False)


def _files(folder: Path) -> list[str]:
    """Paths of all files in `folder`, relative to it."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _exported(out: Path) -> list[str]:
    """Paths, relative to `out`, of the files that the last export into it wrote; empty if there was none."""
    try:
        paths = [PurePosixPath(name) for name in json.loads((out / EXPORTED).read_text())["files"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [path.as_posix() for path in paths if not path.is_absolute() and ".." not in path.parts]


def _exported_of(out: Path) -> str | None:
    """The checkpoint of the last export into `out`; None if there was none."""
    return str(json.loads((out / EXPORTED).read_text()).get("checkpoint", "?")) if _exported(out) else None


def _move(staging: Path, out: Path) -> None:
    """Rename the written folder to `out`, or replace the files of an earlier export in `out`.

    Until it returns, `out` may lack weights. It never mixes old and new ones, and never has an index before its shards.
    """
    if not out.exists():
        staging.rename(out)
        return
    for name in _exported(out):
        if ".safetensors" in name:
            (out / name).unlink(missing_ok=True)
    for name in sorted(_files(staging), key=lambda name: (name != EXPORTED, name.endswith(".index.json"))):
        (out / name).parent.mkdir(exist_ok=True)
        (staging / name).replace(out / name)
    with suppress(OSError):
        (out / NOT_SERVED).rmdir()  # empty if this export has another layout


def write_weights(
    out: Path,
    stem: str,
    source: WeightSource,
    shapes: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    shard_bytes: int | None,
    metadata: Mapping[str, str] | None = None,
) -> list[Path]:
    """Write <stem>.safetensors, or shards and their Hugging Face index; `metadata` goes into each header."""
    infos = {name: TensorInfo(dtype, shape) for name, shape in shapes.items()}
    shards = list(_shards(infos, shard_bytes))
    paths = [out / f"{stem}{_number(i, len(shards))}.safetensors" for i in range(len(shards))]
    total = sum(info.nbytes for info in infos.values())
    with tqdm(total=total, unit="B", unit_scale=True, desc=stem) as bar:
        for path, shard in zip(paths, shards):
            with TensorFileWriter(path, shard, metadata) as writer:
                for name, info in shard.items():
                    step = CHUNK_BYTES // 4
                    for start in range(0, info.numel, step):
                        chunk = source.read(name, start, min(step, info.numel - start)).to(dtype)
                        writer.write(name, start, chunk)
                        bar.update(chunk.nbytes)
    if len(shards) > 1:
        names = {name: path.name for path, shard in zip(paths, shards) for name in shard}
        index = out / f"{stem}.safetensors.index.json"
        index.write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": names}, indent=1) + "\n")
        return [*paths, index]
    return paths


def _number(index: int, count: int) -> str:
    return "" if count == 1 else f"-{index + 1:05d}-of-{count:05d}"


def _shards(infos: dict[str, TensorInfo], limit: int | None) -> Iterator[dict[str, TensorInfo]]:
    """Consecutive tensors, grouped into shards of at most `limit` bytes; a larger tensor has its own shard."""
    shard: dict[str, TensorInfo] = {}
    size = 0
    for name, info in infos.items():
        if shard and limit is not None and size + info.nbytes > limit:
            yield shard
            shard, size = {}, 0
        shard[name] = info
        size += info.nbytes
    yield shard
