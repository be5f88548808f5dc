"""Where a run starts from: which folder, which file in it, full training state or weights alone.

Guarantees: the order of ARGUMENTS (auto_resume, resume_from, finetune_from_hf); asked to fine-tune and nothing to load
is an error, never random weights; the choice can be logged in one line.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Mapping

from bagel_ds.arguments.options import TrainingArguments
from bagel_ds.checkpoint.state import EMA, WEIGHT, StateFiles
from bagel_ds.checkpoint.step_folders import (
    MANIFEST,
    STATE,
    checkpoints_near,
    holds_state,
    latest_remark,
    meant_checkpoint,
    newest_state,
    states,
)
from bagel_ds.errors import UserError
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.model_folder.folder import BagelWeights, ModelFolder
from bagel_ds.model_folder.pretrained import PartsWeights
from bagel_ds.ranges import MASTER, WeightSource
from bagel_ds.train.ranks.agreement import SharedFault, is_main, together
from bagel_ds.train.saves.writer import damage_of
from bagel_ds.units import GIB, MIB

logger = logging.getLogger("bagel_ds")

Parts = tuple[Path, Path]  # folders of a language model and of a ViT


@dataclass(frozen=True)
class StartPoint:
    """`folder` to start from; with `full` its optimizer, schedule and data plan go on, else only weights are taken."""

    folder: Path
    full: bool
    reason: str
    parts: Parts | None = None  # weights come from these instead of `folder`
    checked: bool = False  # `folder` is a checkpoint that must be as it was saved


def find_start(
    training: TrainingArguments,
    model_folder: Path,
    damaged: frozenset[Path] = frozenset(),
    parts: Parts | None = None,
) -> StartPoint:
    """Decide where to start, never with a checkpoint in `damaged`. Raises `UserError` where nothing sound is named.

    `parts` is given where the run may begin with a separate language model and ViT.
    """
    if training.auto_resume:
        newest = newest_state(Path(training.checkpoint_dir), damaged)
        if newest is not None:
            return StartPoint(newest, True, "auto_resume: the newest complete checkpoint", checked=True)
        if held := states(Path(training.checkpoint_dir)):  # to begin anew would bury what may be rescued
            raise UserError(
                f"--auto_resume: every checkpoint in {training.checkpoint_dir} is damaged: "
                f"{', '.join(path.name for path in held)}. Restore one, or pass --auto_resume False --start_anew True, "
                "which moves them aside and starts again; "
                "--auto_resume False --resume_from ... --resume_model_only True takes the weights of one alone."
            )
    if training.resume_from is not None:
        folder = meant_checkpoint(Path(training.resume_from))
        if not folder.is_dir():
            raise UserError(f"--resume_from {folder} does not exist; {pass_a_checkpoint(folder)}")
        is_any = (folder / MANIFEST).is_file() or holds_state(folder) or ModelFolder(folder).holds_weights
        if not is_any and checkpoints_near(folder):
            raise UserError(f"--resume_from {folder} is not a checkpoint itself; {pass_a_checkpoint(folder)}")
        return _named_start(folder, training.resume_model_only)
    if training.finetune_from_hf:
        return StartPoint(model_folder, False, "finetune_from_hf: the weights of model_path")
    if parts is not None:
        return StartPoint(model_folder, False, "llm_path and vit_path", parts)
    raise UserError(
        "nothing to start from: pass --finetune_from_hf True to fine-tune model_path, --resume_from with a checkpoint, "
        "--auto_resume True with a checkpoint_dir that holds one, or folders of a language model and a ViT as "
        "--llm_path and --vit_path with --vae_path."
    )


def pass_a_checkpoint(folder: Path) -> str:
    """What to do about a path that leads to no checkpoint."""
    near = checkpoints_near(folder)
    return f"pass a checkpoint folder such as .../step_1000{near and ': ' + near}."


def _named_start(folder: Path, model_only: bool) -> StartPoint:
    if model_only:
        return StartPoint(folder, False, "resume_from: weights alone, as resume_model_only says")
    if holds_state(folder):
        return StartPoint(folder, True, "resume_from: full training state", checked=True)
    saved = (folder / MANIFEST).is_file()
    lacks = "its training state was removed" if saved else "it holds no training state"
    return StartPoint(folder, False, f"resume_from: weights alone, {lacks}", checked=saved)


def sound_start(training: TrainingArguments, model_folder: Path, parts: Parts | None = None) -> StartPoint:
    """`find_start`, with a checkpoint's files compared with their sizes and those of its training state byte by byte
    with their checksums, on all ranks together.

    auto_resume passes over a damaged checkpoint with a warning; a damaged resume_from is an error that names the
    newest other one beside it.
    """
    damaged: frozenset[Path] = frozenset()
    while True:
        start = together(partial(find_start, training, model_folder, damaged, parts))
        with waiting_for(f"all bytes of {start.folder}'s training state to be compared", "once per resume"):
            fault = damage_of(start.folder) if start.checked else None
        if fault is None:
            _compare_with_latest(training, start)
            return start
        if not start.reason.startswith("auto_resume"):
            other = newest_state(start.folder.resolve().parent, [start.folder])
            offer = f"The newest other one beside it is {other}" if other else "There is no other one beside it"
            raise SharedFault(
                f"checkpoint --resume_from {start.folder} is damaged: {fault}. {offer}; --resume_model_only True takes "
                "its weights alone."
            )
        logger.warning("checkpoint %s is damaged and passed over: %s", start.folder, fault)
        damaged |= {start.folder}


def _compare_with_latest(training: TrainingArguments, start: StartPoint) -> None:
    """Say in one line where auto_resume, which goes by number, and the file `latest` differ."""
    resumes = start.reason.startswith("auto_resume")
    if not training.auto_resume or not is_main():
        return
    remark = latest_remark(Path(training.checkpoint_dir), start.folder if resumes else None)
    if remark is not None:
        taken = f"goes on from {start.folder.name}, the newest" if resumes else "finds no"
        logger.warning("auto_resume %s complete checkpoint: %s", taken, remark)


@dataclass(frozen=True)
class StartWeights:
    """Sources of the start weights and of the moving average (None: the average starts at the weights)."""

    weights: WeightSource
    averages: WeightSource | None
    state: StateFiles | None
    description: list[str]  # lines for the run's plan


def open_start(start: StartPoint, training: TrainingArguments, shapes: Mapping[str, tuple[int, ...]]) -> StartWeights:
    """Open what `start` names and check every tensor's shape. Raises `UserError`."""
    if start.full:
        state = StateFiles(start.folder / STATE)
        averages = state.source(shapes, EMA, WEIGHT)
        had_ema = any(state.has(EMA, name) for name in shapes)
        lines = [f"loading training state of {start.folder} ({start.reason})"]
        if training.ema > 0 and not had_ema:
            lines.append("the checkpoint holds no moving average: it starts at the weights")
        return StartWeights(state.source(shapes, MASTER, WEIGHT), averages if had_ema else None, state, lines)
    if start.parts is not None:
        made = PartsWeights(*start.parts, shapes, training.copy_init_moe, training.global_seed)
        return StartWeights(
            made, None, None, [f"starting from {' and '.join(map(str, start.parts))}", *made.description()]
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
