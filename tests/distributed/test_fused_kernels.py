"""Runs with fused kernels beside the same with torch's own, on two ranks: equal losses, however layers are recomputed.

fp32, so that only the order of sums differs; 1e-6 of a loss, and 1e-5 of a gradient's norm, which AdamW's first steps
(signs of gradients) leave so near.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import Case, Outcome, arguments, losses, run_cases

pytestmark = pytest.mark.distributed

STEPS = 4
KINDS: dict[str, dict[str, object]] = {
    "full": {},
    "offload": {"activation_checkpointing": "offload", "ds_config": "zero3_cpu.json"},
    "selective_nf4": {"activation_checkpointing": "selective", "lora_rank": 4, "base_precision": "nf4"},
    "none_stage_2": {"activation_checkpointing": "none", "ds_config": "zero2.json"},
}
FAULT = "its compiler is broken"


@pytest.fixture(scope="module")
def runs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    folder = tmp_path_factory.mktemp("fused")

    def words(name: str, **options: object) -> list[str]:
        run = {"precision": "fp32", "total_steps": STEPS, "save_every": 100, "ema": 0, **options}
        return arguments(demo, folder / name, **run)

    cases = [
        Case(f"{kind}_{fused}", words(f"{kind}_{fused}", fused_kernels=fused, **options))
        for kind, options in KINDS.items()
        for fused in (True, False)
    ]
    cases.append(Case("refused", words("refused", fused_kernels=True), on_rank_1={"kernels_fault": FAULT}))
    cases.append(Case("default", words("default", total_steps=1)))
    return folder, run_cases(folder / "cases", cases, ranks=2)


@pytest.mark.parametrize("kind", KINDS)
def test_losses_are_those_of_torchs_own_kernels(kind: str, runs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = runs
    for fused, said in ((True, "SwiGLU: fused kernels"), (False, "SwiGLU: torch's own kernels\n")):
        outcome = outcomes[f"{kind}_{fused}"][0]
        assert outcome.code == 0 and said in outcome.output, outcome.output[-4000:]
    found, expected = (losses(folder / f"{kind}_{fused}") for fused in (True, False))
    assert sorted(found) == sorted(expected) == list(range(STEPS))
    for step, (mse, ce, norm) in expected.items():
        assert found[step][:2] == pytest.approx((mse, ce), rel=1e-6), step
        assert found[step][2] == pytest.approx(norm, rel=1e-5), step


def test_a_rank_that_cant_use_them_makes_all_ranks_use_torchs_own(
    runs: tuple[Path, dict[str, list[Outcome]]],
) -> None:
    folder, outcomes = runs
    assert f"torch's own kernels (not fused: {FAULT} on " in outcomes["refused"][0].output
    assert losses(folder / "refused") == losses(folder / "full_False")


def test_a_cpu_takes_torchs_own_by_default(runs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    assert "SwiGLU: torch's own kernels\n" in runs[1]["default"][0].output
