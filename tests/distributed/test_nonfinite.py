"""An update with a loss or a gradient that is not finite changes nothing, whichever way DeepSpeed takes to it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file

from tests.distributed.cases import Case, Outcome, arguments, checksums, losses, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.slow]

NAN, INF = "nan", "inf"  # in the gradients; only in the loss
CASES: dict[str, tuple[dict[str, Any], str]] = {
    "stage 0": ({"ds_config": "zero0"}, NAN),
    "stage 0, bf16": ({"ds_config": "zero0", "precision": "bf16"}, NAN),
    "stage 1": ({"ds_config": "zero1"}, NAN),
    "stage 2, bf16": ({"ds_config": "zero2", "precision": "bf16"}, NAN),
    "stage 2, CPU": ({"ds_config": "zero2_cpu"}, NAN),
    "stage 3, bf16": ({"ds_config": "zero3", "precision": "bf16"}, NAN),
    "stage 3, CPU": ({"ds_config": "zero3_cpu"}, NAN),
    "split masters": ({"ds_config": "zero3_cpu_split_8bit", "precision": "bf16"}, NAN),
    "split masters, stage 2": ({"ds_config": "zero2_cpu_split_bf16", "precision": "bf16"}, NAN),
    "split masters, NVMe": ({"ds_config": "zero3_nvme_split_8bit", "precision": "bf16"}, NAN),
    "only a loss, stage 2": ({"ds_config": "zero2"}, INF),
    "only a loss, stage 3": ({"ds_config": "zero3"}, INF),
}
RESUMED = ("stage 3, CPU", "split masters", "split masters, stage 2", "split masters, NVMe", "only a loss, stage 3")


@pytest.fixture(scope="module")
def outcomes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    """Only rank 1 meets the number, in the second of three steps."""
    folder = tmp_path_factory.mktemp("nonfinite")
    short = {"precision": "fp32", "max_num_tokens": 448, "total_steps": 3, "save_every": 1, "nvme_path": folder}
    cases = [
        Case(
            name,
            arguments(demo, folder / name, **{**short, **options}),
            faults=[{"at": "step", "rank": 1, "step": 1, "do": what}],
        )
        for name, (options, what) in CASES.items()
    ]
    for name in RESUMED:
        start = folder / name / "checkpoints" / "step_2"
        options = {**short, **CASES[name][0], "resume_from": start}
        cases.append(Case(f"{name}, resumed", arguments(demo, folder / f"{name}, resumed", **options)))
    return folder, run_cases(folder / "outcomes", cases, ranks=2)


@pytest.mark.parametrize("name", CASES)
def test_such_an_update_changes_nothing_on_any_rank(name: str, outcomes: Any) -> None:
    folder, found = outcomes
    main = found[name][0]
    assert main.code == 0, main.output[-4000:]
    assert "step 1 skipped" in main.output and "step 0 skipped" not in main.output
    one, two, three = (folder / name / "checkpoints" / f"step_{step}" / "state" for step in (1, 2, 3))
    for file in sorted(path.name for path in one.glob("rank_*.safetensors")):
        before, skipped, after = (load_file(state / file) for state in (one, two, three))
        assert all(before[key].equal(skipped[key]) for key in before), "nothing was updated"
        assert not all(skipped[key].equal(after[key]) for key in before), "and training went on"
        assert all(tensor.isfinite().all() for tensor in after.values())
    trainer = json.loads((three.parent / "trainer.json").read_text())
    assert trainer["skipped_updates"] == 1


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_with_a_skipped_update_resumes_exactly(name: str, outcomes: Any) -> None:
    """Adam's bias correction counts the updates that were made, not the steps."""
    folder, found = outcomes
    resumed = f"{name}, resumed"
    assert found[resumed][0].code == 0, found[resumed][0].output[-4000:]
    assert losses(folder / resumed) == {2: losses(folder / name)[2]}
    assert checksums(folder / resumed, 3) == checksums(folder / name, 3)
