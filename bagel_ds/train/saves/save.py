"""One checkpoint, written by all ranks together while training goes on.

Guarantees: space for every file is reserved before the first byte is written, so a full disk fails early and changes
nothing. A save that can't be completed raises the same exception on every rank. `checkpoint/step_folders.py` says what
a checkpoint folder promises; it is also a model folder that this package and the original's inference load.

Between `begin` and `finish` a thread of each rank writes its states and its share of the weights. On one host nothing
is copied or gathered: all ranks write into the same weight files, each at its own offsets. Ranks on several hosts
can't, because some file systems don't merge what several hosts write into one file: there the threads gather the
weights on rank 0, which writes them.
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
from bagel_ds.checkpoint.gather import Gathering
from bagel_ds.checkpoint.serving import checkpoint_readme
from bagel_ds.checkpoint.state import Held
from bagel_ds.lora.peft_files import CONFIG as ADAPTER_CONFIG
from bagel_ds.lora.peft_files import EMA_FOLDER, AdapterRecord, adapter_readme, peft_name
from bagel_ds.lora.peft_files import WEIGHTS as ADAPTER
from bagel_ds.machine.liveness import going_on
from bagel_ds.model.shape.lora import is_adapter
from bagel_ds.model_folder.folder import CONFIG_FILES, EMA, MODEL, TOKENIZER_FILES, VAE
from bagel_ds.model_folder.tensor_files import TensorFileWriter, joined_checksums
from bagel_ds.ranges import MASTER, Pieces, TensorInfo
from bagel_ds.train.ranks.agreement import SharedFault, barrier, everyone, is_main, write_together
from bagel_ds.train.saves.background import Background
from bagel_ds.zero.ema import ShardedEMA
from bagel_ds.zero.engine import ZeroEngine
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ
from bagel_ds.zero.weights import frozen_pieces

logger = logging.getLogger("bagel_ds")

_POLL_SECONDS = 1.0  # between exchanges of ranks that wait for a save


class SaveFault(SharedFault):
    """A checkpoint could not be written. Raised on every rank; earlier checkpoints are untouched."""


class Saved(NamedTuple):
    """What a save wrote and what it cost this rank, in seconds: in all, and while training waited."""

    folder: Path
    seconds: float
    training_waited: float


@dataclass(frozen=True)
class SaveOptions:
    """What all saves of a run have in common."""

    checkpoint_dir: Path
    model_folder: Path  # source of the configs, tokenizer and autoencoder
    dtype: torch.dtype  # of the weight files
    delete_previous_state: bool
    keep_last: int = 0
    gathering: Gathering | None = None  # of the weights; None if all ranks run on one host
    adapter: AdapterRecord | None = None  # then only adapters are saved


class Save:
    """The checkpoint step_<step>: `begin` it, then `finish` or `give_up`. Call each on every rank.

    Masters, moments, average and frozen weights must not change between `begin` and `finish`.
    """

    def __init__(self, options: SaveOptions, engine: ZeroEngine, ema: ShardedEMA | None, step: int, last: bool):
        self._options, self._engine, self._ema, self._last = options, engine, ema, last
        self._folder = options.checkpoint_dir / f"step_{step}"
        self._unfinished = step_folders.unfinished_folder(self._folder)
        self._adapts = options.adapter is not None
        self._metadata = {} if options.adapter is None else options.adapter.metadata()
        self._infos = {
            self._stored_name(name): TensorInfo(options.dtype, shape)
            for name, shape in engine.shapes.items()
            if not self._adapts or is_adapter(name)
        }
        self._files: dict[Path, TensorFileWriter] = {}  # that this rank writes
        self._shared: list[Path] = []  # files that other ranks also write
        interrupt = options.gathering.close if options.gathering is not None else None
        self._background = Background(engine.device, interrupt)
        self._began = self._resumed = time.monotonic()

    def begin(self, trainer: dict[str, Any]) -> None:
        """Start writing, with `trainer` as trainer.json; returns when training may go on. Raises `SaveFault`."""
        with self._whole_or_nothing():
            self._write_states()
            for path, pieces in self._open_weights().items():
                self._write_weights(path, pieces)
            if is_main():
                self._background.add(lambda: self._write_rest(trainer))
            self._background.add(self._flush)
        self._resumed = time.monotonic()

    def finish(self) -> Saved:
        """Wait until everything is written and complete the checkpoint. Raises `SaveFault`."""
        returned = time.monotonic()
        with self._whole_or_nothing():
            self._wait_for_all()
            write_together(self._background.wait)
            checksums = self._checksums()
            write_together(lambda: self._complete(checksums) if is_main() else None)
        if is_main():
            self._thin_out()
        barrier()
        now = time.monotonic()
        idle = max(0.0, returned - max(self._resumed, self._background.ended))
        return Saved(self._folder, now - self._began - idle, self._resumed - self._began + now - returned)

    def give_up(self) -> None:
        """Stop writing and leave the folder unfinished. Needs no other rank."""
        self._background.give_up()
        for file in self._files.values():
            file.discard()

    def _wait_for_all(self) -> None:
        """Return once no rank writes any more. However long it takes, it isn't a stall while some rank goes on."""
        before: list[tuple[bool, int]] = []
        while True:
            ended = self._background.ended_within(_POLL_SECONDS)
            states = everyone((ended, sum(file.written_bytes for file in self._files.values())))
            if all(ended for ended, _ in states):
                return
            if states != before:
                going_on()
            before = states

    # ------------------------------------------------------------------------------------------------- states
    def _write_states(self) -> None:
        write_together(lambda: self._make_empty() if is_main() else None)
        path = state_files.rank_file(self._unfinished / step_folders.STATE, dist.get_rank())
        held = list(self._held())
        write_together(lambda: self._open(path, held))
        self._fill(partial(state_files.fill_rank, self._files[path], held), self._state_pieces())

    def _make_empty(self) -> None:
        shutil.rmtree(self._unfinished, ignore_errors=True)
        for folder in {self._unfinished / step_folders.STATE, *(path.parent for path in self._weight_files())}:
            folder.mkdir(parents=True, exist_ok=True)

    def _held(self) -> Iterator[Held]:
        kinds = [MASTER, EXP_AVG, EXP_AVG_SQ] + ([state_files.EMA] if self._ema is not None else [])
        for group in self._engine.partitions.groups:
            if group.owned:
                for held, _ in group.ranges:
                    for kind in kinds:
                        yield Held(kind, *held, torch.float32)
        for piece in self._frozen():
            for held, values in piece.ranges:
                yield Held(state_files.WEIGHT, *held, values.dtype)

    def _state_pieces(self) -> Iterator[tuple[str, Pieces]]:
        for kind in (MASTER, EXP_AVG, EXP_AVG_SQ):
            for piece in self._engine.partitions.pieces(kind):
                yield kind, piece
        if self._ema is not None:
            for piece in self._ema.pieces():
                yield state_files.EMA, piece
        for piece in self._frozen():
            yield state_files.WEIGHT, piece

    def _open(self, path: Path, held: list[Held]) -> None:
        """Reserve the space of every file that this rank creates: its states and, on rank 0, the weights."""
        self._files[path] = state_files.open_rank(path, held)
        if is_main():
            for weights in self._weight_files():
                self._files[weights] = TensorFileWriter(weights, self._infos, self._metadata)

    # ------------------------------------------------------------------------------------------------ weights
    def _weight_files(self) -> list[Path]:
        both = [ADAPTER, f"{EMA_FOLDER}/{ADAPTER}"] if self._adapts else [MODEL, EMA]
        return [self._unfinished / name for name in (both[:1] if self._ema is None else both)]

    def _open_weights(self) -> dict[Path, Iterable[Pieces]]:
        """The weight files, opened on every rank of a single host, with this rank's pieces of each."""
        paths = self._weight_files()
        if self._options.gathering is None:
            self._shared = paths
            write_together(self._join_weights)
        sources = [self._engine.partitions.pieces(MASTER)] + ([] if self._ema is None else [self._ema.pieces()])
        return {path: self._renamed(chain(pieces, self._frozen())) for path, pieces in zip(paths, sources)}

    def _renamed(self, pieces: Iterable[Pieces]) -> Iterator[Pieces]:
        return (Pieces(self._stored_name(name), ranges) for name, ranges in pieces)

    def _stored_name(self, name: str) -> str:
        return peft_name(name) if self._adapts else name

    def _frozen(self) -> Iterator[Pieces]:
        """This rank's share of frozen weights; none of a base model, which adapters leave as it is."""
        return iter(()) if self._adapts else frozen_pieces(self._engine.module)

    def _join_weights(self) -> None:
        for path in self._shared:
            if path not in self._files:
                self._files[path] = TensorFileWriter(path, self._infos, self._metadata, joins=True)

    def _write_weights(self, path: Path, pieces: Iterable[Pieces]) -> None:
        gathering = self._options.gathering
        if gathering is None:
            self._fill(partial(state_files.fill_whole, self._files[path], self._options.dtype), pieces)
        else:
            self._fill(partial(gathering.collect, self._files.get(path), self._infos), pieces)

    def _fill(self, write: Callable[[Iterable[Any]], None], pieces: Iterable[Any]) -> None:
        """`write` pieces in the background, or now where they move during the next step."""
        if self._engine.states_move is not None:
            write_together(lambda: write(pieces))
            return
        # List them here: the thread must not call DeepSpeed, it only reads memory.
        listed = self._background.until_given_up(list(pieces))
        self._background.add(lambda: write(listed))

    # --------------------------------------------------------------------------------------------------- rest
    def _write_rest(self, trainer: dict[str, Any]) -> None:
        step_folders.write_json(self._unfinished / step_folders.TRAINER, trainer)
        if self._options.adapter is not None:
            for path in self._weight_files():
                (path.parent / ADAPTER_CONFIG).write_text(self._options.adapter.config())
            (self._unfinished / step_folders.README).write_text(adapter_readme(self._ema is not None))
            return
        source = self._source_of_rest()
        for name in (*CONFIG_FILES, *TOKENIZER_FILES):
            if (source / name).is_file():
                shutil.copyfile(source / name, self._unfinished / name)
        try:
            os.link((source / VAE).resolve(), self._unfinished / VAE)  # the same 335 MB in every checkpoint
        except OSError:
            shutil.copyfile(source / VAE, self._unfinished / VAE)
        (self._unfinished / step_folders.README).write_text(checkpoint_readme(self._unfinished))

    def _source_of_rest(self) -> Path:
        """The model folder or, if it is gone, the newest checkpoint, which has the same files.

        The model folder may be a checkpoint of this run that --keep_last has removed.
        """
        saved = [path for _, path in reversed(step_folders.step_folders(self._options.checkpoint_dir))]
        needed = (VAE, "llm_config.json")
        folders = (self._options.model_folder, *saved)
        return next((path for path in folders if all((path / name).is_file() for name in needed)), folders[0])

    def _flush(self) -> None:
        for file in self._files.values():
            file.close()

    # ----------------------------------------------------------------------------------------------- complete
    def _checksums(self) -> dict[str, dict[str, int]]:
        """Checksums of every tensor by file, from all ranks."""
        own = {path: file.checksums for path, file in self._files.items() if path not in self._shared}
        ranks = everyone((own, {path: self._files[path].written for path in self._shared}))
        found = {path: sums for files, _ in ranks for path, sums in files.items()}
        for path in self._shared:
            found[path] = joined_checksums(self._infos, [written[path] for _, written in ranks])
        return {str(path.relative_to(self._unfinished)): sums for path, sums in found.items()}

    def _complete(self, checksums: dict[str, dict[str, int]]) -> None:
        step_folders.write_manifest(self._unfinished, checksums)
        step_folders.finish(self._unfinished, self._folder, self._last)

    def _thin_out(self) -> None:
        options = self._options
        try:
            step_folders.thin_out(
                options.checkpoint_dir, options.keep_last, options.delete_previous_state, self._folder
            )
        except OSError as error:
            logger.warning("%s is saved, but older checkpoints could not be removed: %s", self._folder, error)

    @contextmanager
    def _whole_or_nothing(self) -> Iterator[None]:
        """A failure that all ranks share leaves nothing behind; any other leaves an unfinished folder."""
        try:
            yield
        except BaseException as error:
            self.give_up()
            if not isinstance(error, SharedFault):
                raise
            if is_main():
                shutil.rmtree(self._unfinished, ignore_errors=True)
            raise SaveFault(f"{self._folder} could not be saved: {error}") from None
