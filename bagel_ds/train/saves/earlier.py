"""An earlier run in this run's folders: it is resumed or moved aside, or this run is refused.

Guarantees: a run saves into a checkpoint_dir that already holds steps only if it resumes from the newest, so no step is
replaced, removed or mixed with another run's. `--start_anew True` moves an earlier run into folders earlier_N in the
same places and deletes nothing. A run that starts at step 0 also moves earlier metrics aside.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from bagel_ds.arguments.options import TrainingArguments
from bagel_ds.checkpoint.step_folders import REPLACED, holds_state, run_entries, states, step_number, taken_names
from bagel_ds.errors import UserError

logger = logging.getLogger("bagel_ds")

_ASIDE = "earlier_"
_RECORDS = ("metrics.jsonl", "log.txt", "tensorboard", "nonfinite", "debug_batches.txt", "samples")
_CONFIG = re.compile(r"config(_\d+)?\.yaml")


def check_unoccupied(training: TrainingArguments, inputs: Iterable[Path]) -> None:
    """Raise `UserError` if this run would replace an earlier run's checkpoints, or move its own inputs aside.

    `inputs` are the files and folders that it starts from. Changes nothing.
    """
    folder = Path(training.checkpoint_dir)
    taken = taken_names(folder)
    if training.start_anew:
        _check_not_inside(inputs, folder)
    elif taken and not _goes_on(training, folder, max(taken)):
        raise UserError(_refusal(training, folder, taken))


def _goes_on(training: TrainingArguments, folder: Path, newest: int) -> bool:
    """Whether the run resumes from the newest step in `folder`, or `find_start` reports why it can't."""
    if training.auto_resume:
        to_restore = [path for path in run_entries(folder) if path.name.startswith(REPLACED)]
        return bool(states(folder)) or any(map(holds_state, to_restore))
    if training.resume_from is None or training.resume_model_only:
        return False
    named = Path(training.resume_from).resolve()
    return named.parent == folder.resolve() and step_number(named) == newest and holds_state(named)


def _refusal(training: TrainingArguments, folder: Path, taken: dict[int, str]) -> str:
    names = list(taken.values())
    listed = ", ".join(names if len(names) <= 6 else [*names[:3], "...", *names[-2:]])
    if training.auto_resume:
        why = "none of them holds a training state to resume from, and a run from step 0 would replace them"
        go_on = f"--resume_from {folder / names[-1]} with another --checkpoint_dir to start from its weights"
    else:
        before = "step 0" if training.resume_from is None else f"--resume_from {training.resume_from}"
        why = f"this run starts from {before} and would replace them"
        go_on = "--auto_resume True to resume from the newest"
    return (
        f"--checkpoint_dir {folder} holds checkpoints of an earlier run ({listed}); {why}. Pass {go_on}; or another "
        f"--checkpoint_dir (and --results_dir); or {'--auto_resume False ' if training.auto_resume else ''}"
        f"--start_anew True to move the earlier run to {folder / _ASIDE}N and start again."
    )


def _check_not_inside(inputs: Iterable[Path], folder: Path) -> None:
    moved = {path.resolve() for path in run_entries(folder)}
    for path in inputs:
        if moved & {path.resolve(), *path.resolve().parents}:
            raise UserError(
                f"--start_anew True would move {path}, from which this run starts; pass another --checkpoint_dir "
                "instead, or move that checkpoint elsewhere first"
            )


def set_aside(training: TrainingArguments, saved: dict[str, Any] | None, started_in: Path) -> list[Path]:
    """Move an earlier run's files aside unless this run continues them; returns the folders they moved to.

    `saved` is the trainer.json of the training state in `started_in` from which this run resumes, or None if it starts
    at step 0. Call it once nothing can refuse the run any more. Raises `UserError`.
    """
    checkpoints, results = Path(training.checkpoint_dir), Path(training.results_dir)
    moving = {results: _records(results)} if _has_metrics(results) and not _owns(training, saved, started_in) else {}
    if training.start_anew:
        moving = {results: _records(results)}
        moving[checkpoints] = [*moving.get(checkpoints, []), *run_entries(checkpoints)]
        if not (moving[checkpoints] or _has_metrics(results)):
            return []  # only this run's log.txt
    used = [_number(path) for folder in (checkpoints, results) for path in folder.glob(f"{_ASIDE}*")]
    number = 1 + max(used, default=0)
    made = []
    for folder, entries in moving.items():
        if entries:
            made.append(folder / f"{_ASIDE}{number}")
            _move(entries, made[-1])
    return made


def _owns(training: TrainingArguments, saved: dict[str, Any] | None, started_in: Path) -> bool:
    """Whether the metrics in results_dir belong to the training state from which the run resumes."""
    if saved is None:
        return False
    in_place = started_in.resolve().parent == Path(training.checkpoint_dir).resolve()
    before = saved.get("arguments", {}).get("results_dir")
    return in_place or (before is not None and Path(before).resolve() == Path(training.results_dir).resolve())


def _has_metrics(results: Path) -> bool:
    file = results / "metrics.jsonl"
    return file.is_file() and file.stat().st_size > 0


def _records(results: Path) -> list[Path]:
    if not results.is_dir():
        return []
    return sorted(path for path in results.iterdir() if path.name in _RECORDS or _CONFIG.fullmatch(path.name))


def _number(path: Path) -> int:
    digits = path.name.removeprefix(_ASIDE)
    return int(digits) if digits.isdecimal() else 0


def _move(entries: list[Path], folder: Path) -> None:
    try:
        folder.mkdir(exist_ok=True)
        for path in entries:
            path.rename(folder / path.name)
    except OSError as error:
        raise UserError(
            f"the earlier run can't be moved to {folder}: {error.strerror or error}; pass another --checkpoint_dir and "
            "--results_dir"
        ) from None
