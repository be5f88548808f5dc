"""Many runs of the trainer in one launch, and small model folders to run them on.

A launch costs far more than what most tests look at; `run_cases` shares one between many, and starts the ranks without
the launcher. What only a launch of its own can show (exit codes of the launcher, ranks that end) is tested with
tests/launch.py directly.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Mapping, Sequence

import pytest

from bagel_ds.checkpoint.step_folders import MANIFEST, TRAINER
from tests.launch import REPOSITORY, run_ranks

# Of sets of cases (`of_launches`): their folder, and outcomes by set and case.
Launches = Callable[[Any], tuple[Path, "dict[str, dict[str, list[Outcome]]]"]]
MANY_RUNS = Path(__file__).with_name("many_runs.py")


def soak(*values: object) -> Any:
    """A set of a test's parameters that is only tried by `make soak`."""
    return pytest.param(*values, marks=pytest.mark.soak)


def of_launches(now: tuple[tuple[Any, ...], ...], later: tuple[tuple[Any, ...], ...]) -> list[Any]:
    """Parameters of a test, each behind those that share its launch; `later` is another, only tried by `make soak`."""
    return [
        pytest.param(shared, *values, id="-".join(map(str, values)), marks=marks)
        for shared, marks in ((now, ()), (later, pytest.mark.soak))
        for values in shared
    ]


@dataclass(frozen=True)
class Case:
    """One run: `arguments` of launch/train.py, what rank 1 sees differently, and faults as in faulty_train.py."""

    name: str
    arguments: list[str]
    directory: str = str(REPOSITORY)
    on_rank_1: dict[str, Any] = field(default_factory=dict)
    faults: list[dict[str, Any]] = field(default_factory=list)


@dataclass(frozen=True)
class Outcome:
    """What one rank of one case returned and printed."""

    code: int
    output: str


def run_cases(
    folder: Path, cases: Sequence[Case], ranks: int = 1, timeout: float = 900, env: Mapping[str, str] | None = None
) -> dict[str, list[Outcome]]:
    """Outcomes by case and rank."""
    folder.mkdir(parents=True, exist_ok=True)
    cases_file = folder / "cases.json"
    cases_file.write_text(json.dumps([asdict(case) for case in cases]))
    log = run_ranks(MANY_RUNS, [cases_file, folder], ranks, timeout, env).output
    outcomes: dict[str, list[Outcome]] = {}
    for case in cases:
        files = [folder / f"{case.name}.rank{rank}.json" for rank in range(ranks)]
        missing = [file.name for file in files if not file.exists()]
        assert not missing, f"{missing}: not reached; the end of the output:\n{log[-6000:]}"
        outcomes[case.name] = [Outcome(**json.loads(file.read_text())) for file in files]
    return outcomes


def run_sets(
    folder: Path, sets: Mapping[str, Sequence[Case]], ranks: int = 1, timeout: float = 900
) -> dict[str, dict[str, list[Outcome]]]:
    """`run_cases` of several sets with cases of equal names, in one launch; outcomes by set and case."""
    every = [replace(case, name=f"{name}-{case.name}") for name, cases in sets.items() for case in cases]
    found = run_cases(folder, every, ranks, timeout)
    return {name: {case.name: found[f"{name}-{case.name}"] for case in cases} for name, cases in sets.items()}


def arguments(demo: Path, results: Path, **changed: object) -> list[str]:
    """A short run on the demo's mixed data; `changed` replaces or adds options, None leaves one out."""
    options: dict[str, object] = {
        "ds_config": "zero3.json",
        "dataset_config_file": demo / "example.yaml",
        "model_path": demo / "model",
        "finetune_from_hf": True,
        "max_num_tokens": 640,
        "expected_num_tokens": 512,
        "max_num_tokens_per_sample": 640,
        "num_workers": 0,
        "log_every": 1,
        "total_steps": 1,
        "warmup_steps": 0,
        "lr": 1e-3,
        "ema": 0.9,
        "results_dir": results,
        "checkpoint_dir": results / "checkpoints",
        **changed,
    }
    return [word for name, value in options.items() if value is not None for word in (f"--{name}", str(value))]


def linked_model(model: Path, folder: Path, without: Sequence[str] = ()) -> Path:
    """A model folder of links to another's files, some left out; a file to be changed is first `own`ed."""
    folder.mkdir(parents=True)
    for file in model.iterdir():
        if file.name not in without:
            (folder / file.name).symlink_to(file)
    return folder


def own(path: Path) -> Path:
    """Turn a link into a copy that can be changed."""
    target = path.resolve()
    path.unlink()
    shutil.copyfile(target, path)
    return path


def losses(results: Path) -> dict[int, tuple[float, float, float]]:
    """(mse, ce, gradient norm) by step from metrics.jsonl; later lines supersede earlier ones."""
    return {line["step"]: (line["loss/mse"], line["loss/ce"], line["optim/grad_norm"]) for line in _metrics(results)}


def checksums(results: Path, step: int) -> dict[str, dict[str, int]]:
    """Of every tensor of a checkpoint of two ranks, by file; trainer.json, which holds the run's own arguments, left
    out."""
    found = json.loads((results / "checkpoints" / f"step_{step}" / MANIFEST).read_text())["checksums"]
    assert found.pop(TRAINER) and len(found) == 4, "states of two ranks, weights and average"
    return found


def learning_rates(results: Path) -> dict[int, float]:
    """The learning rate that each step's update used, as it was logged."""
    return {line["step"]: line["optim/lr"] for line in _metrics(results)}


def _metrics(results: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
