"""Checkpoints of a run: saved complete or not at all, found again, read back by any number of ranks.

Guarantees: a folder named step_N is complete (it is written under another name, flushed, checked against its manifest
on all ranks and then renamed); `latest` moves after that. N counts optimizer steps done. Folders are model folders that
this package and the original's inference load.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any, Iterator

import torch
import torch.distributed as dist

from bagel_ds.checkpoint import state as state_files
from bagel_ds.checkpoint.export import export_tensors
from bagel_ds.checkpoint.folder import CONFIG_FILES, EMA, MODEL, TOKENIZER_FILES, VAE
from bagel_ds.checkpoint.state import Held, StateFiles
from bagel_ds.errors import UserError
from bagel_ds.ranges import Pieces, TensorInfo
from bagel_ds.train.agreement import everyone, is_main, together
from bagel_ds.zero.ema import ShardedEMA
from bagel_ds.zero.engine import ZeroEngine
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ, MASTER
from bagel_ds.zero.weights import frozen_pieces

logger = logging.getLogger("bagel_ds")

STATE, TRAINER, MANIFEST, LATEST = "state", "trainer.json", "manifest.json", "latest"
UNFINISHED = ".unfinished-"
_STEP = re.compile(r"step_(\d+)")


def step_folders(checkpoint_dir: Path) -> list[tuple[int, Path]]:
    """Complete step_N folders by N; links and unfinished folders are none."""
    found = []
    for path in checkpoint_dir.glob("step_*"):
        match = _STEP.fullmatch(path.name)
        if match and not path.is_symlink() and (path / MANIFEST).is_file():
            found.append((int(match.group(1)), path))
    return sorted(found)


def newest_state(checkpoint_dir: Path) -> Path | None:
    """The newest checkpoint that holds training state and whose files have their manifest's sizes."""
    for _, path in reversed(step_folders(checkpoint_dir)):
        if holds_state(path):
            fault = manifest_fault(path)
            if fault is None:
                return path
            logger.warning("checkpoint %s is passed over: %s", path, fault)
    return None


def holds_state(folder: Path) -> bool:
    return (folder / TRAINER).is_file() and any((folder / STATE).glob("rank_*.safetensors"))


def manifest_fault(folder: Path) -> str | None:
    """What of a checkpoint's manifest is not there as written; None where all is."""
    try:
        sizes = dict(json.loads((folder / MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"{MANIFEST} can't be read ({type(error).__name__}: {error})"
    for name, size in sizes.items():
        path = folder / name
        if name.startswith(STATE + "/") and not (folder / STATE).is_dir():
            continue  # given up on purpose by del_previous_state; the weights are still whole
        if not path.is_file():
            return f"{name} is missing"
        if path.stat().st_size != size:
            return f"{name} has {path.stat().st_size:,} bytes, its manifest says {size:,}"
    return None


@dataclass(frozen=True)
class CheckpointWriter:
    """Writes the checkpoints of one run."""

    checkpoint_dir: Path
    model_folder: Path  # configs, tokenizer and autoencoder are taken from here
    save_dtype: torch.dtype
    delete_previous_state: bool

    def save(self, step: int, engine: ZeroEngine, ema: ShardedEMA | None, trainer: dict[str, Any], last: bool) -> Path:
        """Write step_<step>; call on every rank. Returns the folder."""
        final = self.checkpoint_dir / f"step_{step}"
        unfinished = self.checkpoint_dir / f"{UNFINISHED}{final.name}"
        if is_main():
            shutil.rmtree(unfinished, ignore_errors=True)
            (unfinished / STATE).mkdir(parents=True)
        dist.barrier()
        state = state_files.rank_file(unfinished / STATE, dist.get_rank())
        state_files.write_rank(state, list(_held(engine, ema)), _pieces(engine, ema))
        self._export(unfinished, engine, ema)
        sizes = everyone((f"{STATE}/{state.name}", state.stat().st_size))
        if is_main():
            self._copy_folder(unfinished)
            _write_json(unfinished / TRAINER, trainer)
            self._finish(unfinished, final, dict(sizes), last)
        dist.barrier()
        return final

    def _export(self, folder: Path, engine: ZeroEngine, ema: ShardedEMA | None) -> None:
        infos = {name: TensorInfo(self.save_dtype, shape) for name, shape in engine.shapes.items()}
        masters = engine.partitions.pieces(MASTER)
        export_tensors(folder / MODEL, infos, chain(masters, frozen_pieces(engine.module)), engine.device)
        if ema is not None:
            averages = chain(ema.pieces(), frozen_pieces(engine.module))
            export_tensors(folder / EMA, infos, averages, engine.device)

    def _copy_folder(self, folder: Path) -> None:
        for name in (*CONFIG_FILES, *TOKENIZER_FILES):
            if (self.model_folder / name).is_file():
                shutil.copyfile(self.model_folder / name, folder / name)
        try:
            os.link((self.model_folder / VAE).resolve(), folder / VAE)  # the same 335 MB in every checkpoint
        except OSError:
            shutil.copyfile(self.model_folder / VAE, folder / VAE)

    def _finish(self, unfinished: Path, final: Path, state_sizes: dict[str, int], last: bool) -> None:
        files = {path.name: path.stat().st_size for path in unfinished.iterdir() if path.is_file()}
        _write_json(unfinished / MANIFEST, {"files": {**files, **state_sizes}})
        fault = manifest_fault(unfinished)
        if fault is not None:
            raise RuntimeError(f"checkpoint {unfinished} is not as it was written: {fault}")
        for path in (*unfinished.rglob("*"), unfinished):
            _flush(path)
        replaced = None
        if final.exists():
            replaced = final.with_name(f"{UNFINISHED}replaced-{final.name}")
            shutil.rmtree(replaced, ignore_errors=True)
            final.rename(replaced)
        unfinished.rename(final)
        _write_atomically(self.checkpoint_dir / LATEST, final.name + "\n")
        if last:
            _link(self.checkpoint_dir / "step_final", final.name)
        _flush(self.checkpoint_dir)
        if replaced is not None:
            shutil.rmtree(replaced, ignore_errors=True)
        if self.delete_previous_state:
            for _, older in step_folders(self.checkpoint_dir):
                if older != final:
                    shutil.rmtree(older / STATE, ignore_errors=True)


def read_trainer(folder: Path) -> dict[str, Any]:
    """trainer.json of a checkpoint."""
    try:
        found = json.loads((folder / TRAINER).read_text())
        missing = [name for name in ("steps_done", "plan_state", "world_size") if name not in found]
        if missing:
            raise ValueError(f"it names no {' and no '.join(missing)}")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{folder / TRAINER} can't be read ({error}); resume from another checkpoint.") from None
    return found


def restore_moments(engine: ZeroEngine, state: StateFiles, steps_done: int) -> None:
    """Adam's moments of this rank's ranges from a training state; any number of ranks may have written it."""

    def read() -> None:
        for group in engine.partitions.groups:
            with engine.partitions.open(group, write=True, moments=True) as flats:
                for held, offset in group.ranges:
                    for kind in (EXP_AVG, EXP_AVG_SQ):
                        flats[kind].narrow(0, offset, held.numel).copy_(state.read(kind, *held))

    together(read)
    engine.partitions.set_step(steps_done)


def sweep_unfinished(checkpoint_dir: Path) -> None:
    """Remove what an interrupted save left."""
    for path in checkpoint_dir.glob(f"{UNFINISHED}*"):
        logger.info("removing %s, left by an interrupted save", path)
        shutil.rmtree(path, ignore_errors=True)


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


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")


def _write_atomically(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    _flush(beside)
    beside.replace(path)


def _link(path: Path, target: str) -> None:
    beside = path.with_name(f".{path.name}.new")
    beside.unlink(missing_ok=True)
    beside.symlink_to(target)
    beside.replace(path)


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
