"""Saving a run's checkpoints and taking up its training state again, on all ranks together.

Guarantees: see `checkpoint/step_folders.py` for what a checkpoint folder promises. Space for every file is reserved
before the first byte is written, so a full disk is found while nothing has changed; a save that can't be done is told
by one exception on every rank. Folders are model folders that this package and the original's inference load.

A save begins, and ends later. In between a thread of each rank writes the rank's states and its share of the weights,
which nothing may change, while the caller computes. Nothing is copied or gathered: all ranks write into the same files
of weights, each at its own places. Ranks on several hosts don't, because not every file system puts together what
several hosts write into one file: there rank 0 writes the weights, gathered before the caller goes on.
"""

from __future__ import annotations

import logging
import os
import shutil
import time
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Callable, Iterable, Iterator, NamedTuple

import torch
import torch.distributed as dist

from bagel_ds.checkpoint import state as state_files
from bagel_ds.checkpoint import step_folders
from bagel_ds.checkpoint.gather import stream_tensors
from bagel_ds.checkpoint.serving import checkpoint_readme
from bagel_ds.checkpoint.state import Held, StateFiles
from bagel_ds.errors import UserError, disk_fault
from bagel_ds.model_folder.folder import CONFIG_FILES, EMA, MODEL, TOKENIZER_FILES, VAE
from bagel_ds.model_folder.tensor_files import TensorFileWriter, joined_checksums
from bagel_ds.ranges import MASTER, Pieces, TensorInfo, copy_range
from bagel_ds.train.process.out_of_memory import shortage
from bagel_ds.train.ranks.agreement import SharedFault, barrier, everyone, is_main, together
from bagel_ds.train.saves.background import Background
from bagel_ds.zero.ema import ShardedEMA
from bagel_ds.zero.engine import ZeroEngine
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ
from bagel_ds.zero.weights import frozen_pieces

logger = logging.getLogger("bagel_ds")


class SaveFault(SharedFault):
    """A checkpoint could not be written; what was saved before is untouched. Raised on every rank."""


class Saved(NamedTuple):
    """What a save made and what it cost this rank, in seconds: of its own work, and of what training waited for it."""

    folder: Path
    seconds: float
    without_training: float


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one run."""

    checkpoint_dir: Path
    model_folder: Path  # configs, tokenizer and autoencoder are taken from here
    save_dtype: torch.dtype
    delete_previous_state: bool
    keep_last: int = 0
    one_host: bool = True  # of all ranks

    def save(self, step: int, engine: ZeroEngine, ema: ShardedEMA | None, trainer: dict[str, Any], last: bool) -> Path:
        """Write step_<step>; call on every rank. Returns the folder. Raises `SaveFault`."""
        return self.begin(step, engine, ema, trainer, last).finish().folder

    def begin(
        self, step: int, engine: ZeroEngine, ema: ShardedEMA | None, trainer: dict[str, Any], last: bool
    ) -> PendingSave:
        """Begin to write step_<step>; call on every rank. Raises `SaveFault`.

        Masters, moments, average and frozen weights must stay as they are until the save is finished.
        """
        pending = PendingSave(self, step, last, engine.device)
        with pending.whole_or_nothing():
            self._write(pending, engine, ema, trainer)
        pending.goes_on()
        return pending

    def _write(self, pending: PendingSave, engine: ZeroEngine, ema: ShardedEMA | None, trainer: dict[str, Any]) -> None:
        folder, background = pending.unfinished, pending.background
        together(lambda: _or_fault(lambda: _make_empty(folder)) if is_main() else None)
        infos = {name: TensorInfo(self.save_dtype, shape) for name, shape in engine.shapes.items()}
        held = list(_held(engine, ema))
        mine = state_files.rank_file(folder / step_folders.STATE, dist.get_rank())
        together(lambda: _or_fault(lambda: _open(pending, mine, held, infos, ema)))
        weights = {folder / MODEL: chain(engine.partitions.pieces(MASTER), frozen_pieces(engine.module))}
        if ema is not None:
            weights[folder / EMA] = chain(ema.pieces(), frozen_pieces(engine.module))
        if self.one_host:
            together(lambda: _or_fault(lambda: _join(pending, infos, list(weights))))
        self._fill(pending, engine, partial(state_files.fill_rank, pending.files[mine], held), _pieces(engine, ema))
        for path, pieces in weights.items():
            if self.one_host:
                write = partial(state_files.fill_whole, pending.files[path], self.save_dtype)
                self._fill(pending, engine, write, pieces)
            else:
                self._gather(pending, path, infos, pieces, engine.device)
        if is_main():
            background.add(lambda: self._write_rest(folder, trainer))
        background.add(pending.flush)

    def _fill(
        self, pending: PendingSave, engine: ZeroEngine, write: Callable[[Iterable[Any]], None], pieces: Iterable[Any]
    ) -> None:
        """`write` pieces in the background, or here where they move while the next step computes."""
        if engine.states_move is not None:
            together(lambda: _or_fault(lambda: write(pieces)))
            return
        # Listed here, so that the thread asks nothing of DeepSpeed: it only reads where they lie.
        listed = pending.background.until_given_up(list(pieces))
        pending.background.add(lambda: write(listed))

    def _gather(
        self,
        pending: PendingSave,
        path: Path,
        infos: dict[str, TensorInfo],
        pieces: Iterable[Pieces],
        device: torch.device,
    ) -> None:
        together(lambda: _or_fault(lambda: stream_tensors(pending.files.get(path), infos, pieces, device)))

    def _write_rest(self, folder: Path, trainer: dict[str, Any]) -> None:
        source = self._source_of_rest()
        for name in (*CONFIG_FILES, *TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        try:
            os.link((source / VAE).resolve(), folder / VAE)  # the same 335 MB in every checkpoint
        except OSError:
            shutil.copyfile(source / VAE, folder / VAE)
        step_folders.write_json(folder / step_folders.TRAINER, trainer)
        (folder / step_folders.README).write_text(checkpoint_readme(folder))

    def _source_of_rest(self) -> Path:
        """The model folder; once it is gone, the newest checkpoint, which has the same files.

        It may be a checkpoint of this run, which keep_last removes.
        """
        saved = [path for _, path in reversed(step_folders.step_folders(self.checkpoint_dir))]
        needed = (VAE, "llm_config.json")
        whole = (path for path in (self.model_folder, *saved) if all((path / name).is_file() for name in needed))
        return next(whole, self.model_folder)


class PendingSave:
    """A checkpoint that has begun, on every rank; ended by `finish` or, without one, by `give_up`."""

    def __init__(self, writer: CheckpointWriter, step: int, last: bool, device: torch.device):
        self._writer, self._last = writer, last
        self._final = writer.checkpoint_dir / f"step_{step}"
        self.unfinished = step_folders.unfinished_folder(self._final)
        self.files: dict[Path, TensorFileWriter] = {}  # that this rank writes
        self.shared: dict[Path, dict[str, TensorInfo]] = {}  # those of them that other ranks write, too
        self.background = Background(device)
        self._began = self._left = time.monotonic()

    def goes_on(self) -> None:
        """The caller goes on with something else."""
        self._left = time.monotonic()

    def flush(self) -> None:
        for file in self.files.values():
            file.close()

    def finish(self) -> Saved:
        """Wait for what is being written and complete the checkpoint. Raises `SaveFault`."""
        returned = time.monotonic()
        with self.whole_or_nothing():
            together(lambda: _or_fault(self.background.wait))
            checksums = self._checksums()
            together(lambda: _or_fault(lambda: self._complete(checksums)) if is_main() else None)
        if is_main():
            writer = self._writer
            try:
                step_folders.thin_out(
                    writer.checkpoint_dir, writer.keep_last, writer.delete_previous_state, self._final
                )
            except OSError as error:
                logger.warning("%s is saved, but older checkpoints could not be thinned out: %s", self._final, error)
        barrier()
        now = time.monotonic()
        idle = max(0.0, returned - max(self._left, self.background.ended))
        return Saved(self._final, now - self._began - idle, self._left - self._began + now - returned)

    def give_up(self) -> None:
        """Leave the checkpoint as it is, unfinished; this rank alone."""
        self.background.give_up()
        for file in self.files.values():
            file.discard()

    def _checksums(self) -> dict[str, dict[str, int]]:
        """Of every tensor by file, over all ranks."""
        alone = {path: file.checksums for path, file in self.files.items() if path not in self.shared}
        ranks = everyone((alone, {path: self.files[path].written for path in self.shared}))
        found = {path: sums for files, _ in ranks for path, sums in files.items()}
        for path, tensors in self.shared.items():
            found[path] = joined_checksums(tensors, [written[path] for _, written in ranks])
        return {str(path.relative_to(self.unfinished)): sums for path, sums in found.items()}

    def _complete(self, checksums: dict[str, dict[str, int]]) -> None:
        step_folders.write_manifest(self.unfinished, checksums)
        step_folders.finish(self.unfinished, self._final, self._last)

    @contextmanager
    def whole_or_nothing(self) -> Iterator[None]:
        """What every rank knows to have failed leaves nothing behind; anything else leaves an unfinished folder."""
        try:
            yield
        except BaseException as error:
            self.give_up()
            if not isinstance(error, SharedFault):
                raise
            if is_main():
                shutil.rmtree(self.unfinished, ignore_errors=True)
            raise SaveFault(f"{self._final} could not be saved: {error}") from None


def damage_of(folder: Path) -> str | None:
    """What is damaged in a checkpoint's training state; every rank reads an equal share of its bytes."""
    fault = step_folders.manifest_fault(folder)
    names: list[str] = []
    checked: list[step_folders.Checked] = []
    if fault is None:
        names = step_folders.state_files(folder)
        checked, fault = step_folders.check_share(folder, names, dist.get_rank(), dist.get_world_size())
    ranks = everyone((checked, fault))
    faults = [found for _, found in ranks if found is not None]
    return (
        faults[0] if faults else step_folders.share_fault(folder, names, [each for parts, _ in ranks for each in parts])
    )


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
                            copy_range(target, held, partial(state.read, kind))

    together(read)
    engine.partitions.set_step(steps_done)


def _or_fault(action: Any) -> Any:
    """`action()`, with what the disk refuses as a `UserError`."""
    try:
        return action()
    except OSError as error:
        if shortage(error) is not None:
            raise  # of memory: nothing that the disk says
        raise UserError(disk_fault(error, "save elsewhere")) from None


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    (folder / step_folders.STATE).mkdir(parents=True)


def _open(
    pending: PendingSave, mine: Path, held: list[Held], infos: dict[str, TensorInfo], ema: ShardedEMA | None
) -> None:
    """Open the files of this rank, with their space reserved."""
    pending.files[mine] = state_files.open_rank(mine, held)
    if is_main():
        for path in (pending.unfinished / MODEL, pending.unfinished / EMA)[: 1 if ema is None else 2]:
            pending.files[path] = TensorFileWriter(path, infos)


def _join(pending: PendingSave, infos: dict[str, TensorInfo], paths: list[Path]) -> None:
    """Open those files on every rank."""
    for path in paths:
        pending.shared[path] = infos
        if path not in pending.files:
            pending.files[path] = TensorFileWriter(path, infos, joins=True)


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
