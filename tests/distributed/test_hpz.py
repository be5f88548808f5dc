"""hpZ of ZeRO++: a second copy of the parameters per host, here on four ranks as if they were two hosts of two."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.distributed.cases import Case, arguments, losses, run_cases

pytestmark = [pytest.mark.distributed, pytest.mark.slow]


def test_a_second_copy_of_the_parameters_changes_no_step(demo: Path, tmp_path: Path) -> None:
    """Not the first, which the copy made before loading would spoil, nor later ones; frozen parameters included."""

    def case(preset: str, **changed: object) -> Case:
        options = {"precision": "fp32", "max_num_tokens": 448, "total_steps": 3, "freeze_vit": True, **changed}
        return Case(preset, arguments(demo, tmp_path / preset, ds_config=preset, **options))

    outcomes = run_cases(tmp_path / "launch", [case("zero3"), case("zero3_hpz", num_shard=2)], ranks=4)
    for name, ranks in outcomes.items():
        assert ranks[0].code == 0, f"{name}: {ranks[0].output[-4000:]}"
    assert "zero_hpz_partition_size 2" in outcomes["zero3_hpz"][0].output
    expected = losses(tmp_path / "zero3")
    assert sorted(expected) == [0, 1, 2]
    for step, found in losses(tmp_path / "zero3_hpz").items():
        assert found == pytest.approx(expected[step], rel=1e-6), step
