"""Opening what a run starts from: weights, moving average and Adam's moments.

Guarantees: every tensor of the network is found with its shape before any is read; a training state is read in ranges,
so any number of ranks may have written it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Mapping

from bagel_ds.arguments.options import TrainingArguments
from bagel_ds.checkpoint.state import EMA, WEIGHT, StateFiles
from bagel_ds.checkpoint.step_folders import STATE
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.model_folder.pretrained import PretrainedWeights
from bagel_ds.model_folder.weights import BagelWeights
from bagel_ds.ranges import MASTER, WeightSource, copy_range
from bagel_ds.train.ranks.agreement import together
from bagel_ds.train.saves.start import StartPoint
from bagel_ds.units import GIB, MIB
from bagel_ds.zero.engine import ZeroEngine
from bagel_ds.zero.partitions import EXP_AVG, EXP_AVG_SQ


@dataclass(frozen=True)
class StartWeights:
    """Sources of the weights, of the moving average (None: it starts at the weights) and of the training state."""

    weights: WeightSource
    averages: WeightSource | None
    state: StateFiles | None
    description: list[str]  # lines for the run's plan


def open_start(start: StartPoint, training: TrainingArguments, shapes: Mapping[str, tuple[int, ...]]) -> StartWeights:
    """Open what `start` names and check the shape of every tensor. Raises `UserError`."""
    if start.full:
        state = StateFiles(start.folder / STATE)
        averages = state.source(shapes, EMA, WEIGHT)
        had_ema = any(state.has(EMA, name) for name in shapes)
        lines = [f"loading training state of {start.folder} ({start.reason})"]
        if training.ema > 0 and not had_ema:
            lines.append("the checkpoint holds no moving average: it starts at the weights")
        return StartWeights(state.source(shapes, MASTER, WEIGHT), averages if had_ema else None, state, lines)
    if start.pretrained is not None:
        made = PretrainedWeights(*start.pretrained, shapes, training.copy_init_moe, training.global_seed)
        return StartWeights(
            made, None, None, [f"starting from {' and '.join(map(str, start.pretrained))}", *made.description()]
        )
    folder = ModelFolder(start.folder)
    files = folder.open_weights(training.finetune_from_ema)
    weights = BagelWeights(files, shapes, training.copy_init_moe, str(files.paths[0]))
    ema_files = folder.weight_files("ema")
    averages_source = None
    if ema_files and [path.resolve() for path in ema_files] != [path.resolve() for path in files.paths]:
        averages_source = BagelWeights(
            folder.open_weights(prefer_ema=True), shapes, training.copy_init_moe, str(ema_files[0])
        )
    return StartWeights(weights, averages_source, None, [f"loading {start.folder} ({start.reason})", *_loaded(weights)])


def _loaded(weights: BagelWeights) -> list[str]:
    files = ", ".join(path.name for path in weights.files.paths)
    size = sum(weights.files.info(name).nbytes for name in weights.loaded)
    shown = f"{size / GIB:.2f} GiB" if size >= GIB else f"{size / MIB:.2f} MiB"
    lines = [
        f"  {files}: {len(weights.loaded)} tensors, {shown}; 0 missing; "
        f"{len(weights.unexpected)} unexpected{_few(weights.unexpected)}; position tables are computed"
    ]
    if weights.copied:
        lines.append(
            f"  {len(weights.copied)} generation-expert tensors are not in the file: copied from understanding"
        )
    return lines


def _few(names: list[str]) -> str:
    return f" ({', '.join(names[:3])}{', ...' if len(names) > 3 else ''})" if names else ""


def restore_moments(engine: ZeroEngine, state: StateFiles, updates_done: int) -> None:
    """Read Adam's moments of this rank's ranges from a training state.

    A parameter that was frozen has none stored: they are zero, as the original's are after steps under freeze_und.
    """

    def read() -> None:
        for group in engine.partitions.groups:
            with engine.partitions.open(group, write=True, moments=True) as flats:
                for held, offset in group.ranges:
                    for kind in (EXP_AVG, EXP_AVG_SQ):
                        target = flats[kind].narrow(0, offset, held.numel)
                        if state.has(WEIGHT, held.name):
                            target.zero_()
                        else:
                            copy_range(target, held, partial(state.read, kind))

    together(read)
    engine.partitions.set_step(updates_done)
