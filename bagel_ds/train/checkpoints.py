"""Saving a run's checkpoints and taking up its training state again, on all ranks together.

Guarantees: see `checkpoint/steps.py` for what a checkpoint folder promises. Space for every file is reserved before the
first byte is written, so a full disk is found while nothing has changed; a save that can't be done is told by one
exception on every rank. Folders are model folders that this package and the original's inference load.
"""

from __future__ import annotations

import os
import shutil
from contextlib import ExitStack
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.distributed as dist

from bagel_ds.checkpoint import state as state_files
from bagel_ds.checkpoint import steps
from bagel_ds.checkpoint.export import stream_tensors
from bagel_ds.checkpoint.folder import CONFIG_FILES, EMA, MODEL, TOKENIZER_FILES, VAE
from bagel_ds.checkpoint.state import Held, StateFiles
from bagel_ds.checkpoint.tensors import TensorFileWriter
from bagel_ds.errors import UserError
from bagel_ds.ranges import Pieces, TensorInfo
from bagel_ds.train.agreement import SharedFault, everyone, is_main, together
from bagel_ds.zero.ema import ShardedEMA
from bagel_ds.zero.engine import ZeroEngine
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ, MASTER
from bagel_ds.zero.weights import frozen_pieces


class SaveFault(SharedFault):
    """A checkpoint could not be written; what was saved before is untouched. Raised on every rank."""


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one run."""

    checkpoint_dir: Path
    model_folder: Path  # configs, tokenizer and autoencoder are taken from here
    save_dtype: torch.dtype
    delete_previous_state: bool
    keep_last: int = 0

    def save(self, step: int, engine: ZeroEngine, ema: ShardedEMA | None, trainer: dict[str, Any], last: bool) -> Path:
        """Write step_<step>; call on every rank. Returns the folder. Raises `SaveFault`."""
        final = self.checkpoint_dir / f"step_{step}"
        unfinished = steps.unfinished_folder(final)
        try:
            self._write(unfinished, engine, ema, trainer)
            together(lambda: _or_fault(lambda: steps.finish(unfinished, final, last)) if is_main() else None)
        except SharedFault as fault:
            if is_main():
                shutil.rmtree(unfinished, ignore_errors=True)
            raise SaveFault(f"{final} could not be saved: {fault}") from None
        if is_main():
            steps.thin_out(self.checkpoint_dir, self.keep_last, self.delete_previous_state, final)
        dist.barrier()
        return final

    def _write(self, folder: Path, engine: ZeroEngine, ema: ShardedEMA | None, trainer: dict[str, Any]) -> None:
        together(lambda: _or_fault(lambda: _make_empty(folder)) if is_main() else None)
        infos = {name: TensorInfo(self.save_dtype, shape) for name, shape in engine.shapes.items()}
        held = list(_held(engine, ema))
        mine = state_files.rank_file(folder / steps.STATE, dist.get_rank())
        with ExitStack() as stack:
            open_files = together(lambda: _or_fault(lambda: self._open(stack, folder, mine, held, infos, ema)))
            state_files.fill_rank(open_files[mine], held, _pieces(engine, ema))
            masters = chain(engine.partitions.pieces(MASTER), frozen_pieces(engine.module))
            stream_tensors(open_files.get(folder / MODEL), infos, masters, engine.device)
            if ema is not None:
                averages = chain(ema.pieces(), frozen_pieces(engine.module))
                stream_tensors(open_files.get(folder / EMA), infos, averages, engine.device)
        checksums = everyone({str(path.relative_to(folder)): file.checksums for path, file in open_files.items()})
        by_name = {name: sums for ranks in checksums for name, sums in ranks.items()}
        together(lambda: _or_fault(lambda: self._complete(folder, trainer, by_name)) if is_main() else None)

    def _open(
        self,
        stack: ExitStack,
        folder: Path,
        mine: Path,
        held: list[Held],
        infos: dict[str, TensorInfo],
        ema: ShardedEMA | None,
    ) -> dict[Path, TensorFileWriter]:
        """This rank's files with their space reserved; they are closed and flushed with `stack`."""
        files = {mine: stack.enter_context(state_files.open_rank(mine, held))}
        if is_main():
            for path in (folder / MODEL, folder / EMA)[: 1 if ema is None else 2]:
                files[path] = stack.enter_context(TensorFileWriter(path, infos))
        return files

    def _complete(self, folder: Path, trainer: dict[str, Any], checksums: dict[str, dict[str, int]]) -> None:
        self._copy_folder(folder)
        steps.write_json(folder / steps.TRAINER, trainer)
        steps.write_manifest(folder, checksums)

    def _copy_folder(self, folder: Path) -> None:
        for name in (*CONFIG_FILES, *TOKENIZER_FILES):
            if (self.model_folder / name).is_file():
                shutil.copyfile(self.model_folder / name, folder / name)
        try:
            os.link((self.model_folder / VAE).resolve(), folder / VAE)  # the same 335 MB in every checkpoint
        except OSError:
            shutil.copyfile(self.model_folder / VAE, folder / VAE)


def damage_of(folder: Path) -> str | None:
    """What is damaged in a checkpoint's training state; its files are read by all ranks, each its share."""
    fault = steps.manifest_fault(folder)
    if fault is None:
        share = steps.state_files(folder)[dist.get_rank() :: dist.get_world_size()]
        fault = steps.checksum_fault(folder, share)
    return next((found for found in everyone(fault) if found is not None), None)


def restore_moments(engine: ZeroEngine, state: StateFiles, steps_done: int) -> None:
    """Adam's moments of this rank's ranges from a training state; any number of ranks may have written it.

    A parameter that was frozen then has none stored: they are zero, as the original's are after steps under freeze_und.
    """

    def read() -> None:
        for group in engine.partitions.groups:
            with engine.partitions.open(group, write=True, moments=True) as flats:
                for held, offset in group.ranges:
                    for kind in (EXP_AVG, EXP_AVG_SQ):
                        target = flats[kind].narrow(0, offset, held.numel)
                        if state.has(state_files.WEIGHT, held.name):
                            target.zero_()
                        else:
                            target.copy_(state.read(kind, *held))

    together(read)
    engine.partitions.set_step(steps_done)


def _or_fault(action: Any) -> Any:
    """`action()`, with what the disk refuses as a `UserError`."""
    try:
        return action()
    except OSError as error:
        raise UserError(
            f"{error.filename or 'the disk'}: {error.strerror}. Free space there, or save elsewhere."
        ) from None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / steps.STATE).mkdir(parents=True)


def _held(engine: ZeroEngine, ema: ShardedEMA | None) -> Iterator[Held]:
    kinds = [MASTER, EXP_AVG, EXP_AVG_SQ] + ([state_files.EMA] if ema is not None else [])
    for group in engine.partitions.groups:
        if group.owned:
            for held, _ in group.ranges:
                for kind in kinds:
                    yield Held(kind, *held, torch.float32)
    for piece in frozen_pieces(engine.module):
        for held, values in piece.ranges:
            yield Held(state_files.WEIGHT, *held, values.dtype)


def _pieces(engine: ZeroEngine, ema: ShardedEMA | None) -> Iterator[tuple[str, Pieces]]:
    for kind in (MASTER, EXP_AVG, EXP_AVG_SQ):
        for piece in engine.partitions.pieces(kind):
            yield kind, piece
    if ema is not None:
        for piece in ema.pieces():
            yield state_files.EMA, piece
    for piece in frozen_pieces(engine.module):
        yield state_files.WEIGHT, piece
