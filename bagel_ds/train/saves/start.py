"""Where a run starts from: which folder, and whether with its full training state or only its weights.

Guarantees: --auto_resume comes before --resume_from, that before --finetune_from_hf. A run without anything to load is
an error, never random weights. A checkpoint is compared with its checksums before it is used.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch.distributed as dist

from bagel_ds.arguments.options import TrainingArguments
from bagel_ds.checkpoint import step_folders
from bagel_ds.checkpoint.step_folders import (
    MANIFEST,
    checkpoints_near,
    holds_state,
    latest_remark,
    meant_checkpoint,
    newest_state,
    states,
)
from bagel_ds.errors import UserError
from bagel_ds.machine.waiting import waiting_for
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.train.ranks.agreement import SharedFault, everyone, is_main, together

logger = logging.getLogger("bagel_ds")

Pretrained = tuple[Path, Path]  # folders of a language model and of a ViT


@dataclass(frozen=True)
class StartPoint:
    """A folder to start from. With `full` optimizer, schedule and data plan continue; else only weights load."""

    folder: Path
    full: bool
    reason: str
    pretrained: Pretrained | None = None  # weights come from these instead of `folder`
    checked: bool = False  # `folder` is a checkpoint, to be compared with its checksums


def find_start(
    training: TrainingArguments,
    model_folder: Path,
    damaged: frozenset[Path] = frozenset(),
    pretrained: Pretrained | None = None,
) -> StartPoint:
    """Decide where to start, without checkpoints in `damaged`. Raises `UserError` if there is nothing to start from.

    Pass `pretrained` if the run may start from a separate language model and ViT.
    """
    if training.auto_resume:
        newest = newest_state(Path(training.checkpoint_dir), damaged)
        if newest is not None:
            return StartPoint(newest, True, "auto_resume: the newest complete checkpoint", checked=True)
        if held := states(Path(training.checkpoint_dir)):  # starting again would bury what may be rescued
            raise UserError(
                f"--auto_resume: every checkpoint in {training.checkpoint_dir} is damaged: "
                f"{', '.join(path.name for path in held)}. Restore one, or pass --auto_resume False --start_anew True, "
                "which moves them aside and starts again; "
                "--auto_resume False --resume_from ... --resume_model_only True loads only the weights of one."
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
    if pretrained is not None:
        return StartPoint(model_folder, False, "llm_path and vit_path", pretrained)
    raise UserError(
        "nothing to start from: pass --finetune_from_hf True to fine-tune model_path, --resume_from with a checkpoint, "
        "--auto_resume True with a checkpoint_dir that holds one, or folders of a language model and a ViT as "
        "--llm_path and --vit_path with --vae_path."
    )


def pass_a_checkpoint(folder: Path) -> str:
    """The remedy for a path that is not a checkpoint."""
    near = checkpoints_near(folder)
    return f"pass a checkpoint folder such as .../step_1000{near and ': ' + near}."


def _named_start(folder: Path, model_only: bool) -> StartPoint:
    if model_only:
        return StartPoint(folder, False, "resume_from: only the weights, as resume_model_only says")
    if holds_state(folder):
        return StartPoint(folder, True, "resume_from: full training state", checked=True)
    saved = (folder / MANIFEST).is_file()
    lacks = "its training state was removed" if saved else "it holds no training state"
    return StartPoint(folder, False, f"resume_from: only the weights, {lacks}", checked=saved)


def sound_start(training: TrainingArguments, model_folder: Path, pretrained: Pretrained | None = None) -> StartPoint:
    """`find_start`, on all ranks together, with the checkpoint's file sizes and its state's checksums verified.

    --auto_resume skips a damaged checkpoint with a warning. A damaged --resume_from is an error that names the newest
    other checkpoint next to it.
    """
    damaged: frozenset[Path] = frozenset()
    while True:
        start = together(partial(find_start, training, model_folder, damaged, pretrained))
        with waiting_for(f"the checksums of {start.folder}'s training state", "once per resume"):
            fault = damage_of(start.folder) if start.checked else None
        if fault is None:
            _compare_with_latest(training, start)
            return start
        if not start.reason.startswith("auto_resume"):
            other = newest_state(start.folder.resolve().parent, [start.folder])
            offer = f"The newest other one next to it is {other}" if other else "There is no other one next to it"
            raise SharedFault(
                f"checkpoint --resume_from {start.folder} is damaged: {fault}. {offer}; --resume_model_only True loads "
                "only its weights."
            )
        logger.warning("skipping damaged checkpoint %s: %s", start.folder, fault)
        damaged |= {start.folder}


def _compare_with_latest(training: TrainingArguments, start: StartPoint) -> None:
    """Warn if the file `latest` names another checkpoint than --auto_resume, which takes the highest number."""
    resumes = start.reason.startswith("auto_resume")
    if not training.auto_resume or not is_main():
        return
    remark = latest_remark(Path(training.checkpoint_dir), start.folder if resumes else None)
    if remark is not None:
        taken = f"resumes from {start.folder.name}, the newest" if resumes else "finds no"
        logger.warning("auto_resume %s complete checkpoint: %s", taken, remark)


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
    if faults:
        return faults[0]
    return step_folders.share_fault(folder, names, [each for parts, _ in ranks for each in parts])
