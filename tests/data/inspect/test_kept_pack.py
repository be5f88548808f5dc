"""A pack that a run has kept is shown like a planned pack, from its tensors only."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.cli import main
from bagel_ds.data.batches.batch_file import load_batch, save_batch
from bagel_ds.data.inspect.packs import ShownPack, first_packs, kept_pack, pack_text
from bagel_ds.demo import write_demo
from bagel_ds.inputs.data import open_inputs


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    demo = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(demo)
    budgets = [f"--{name}=640" for name in ("max_num_tokens", "max_num_tokens_per_sample", "expected_num_tokens")]
    return [f"--model_path={demo / 'model'}", f"--dataset_config_file={demo / 'example.yaml'}", *budgets]


def lines(pack: ShownPack) -> list[str]:
    """All but what only a plan knows: epochs, and conditions that dropout took out."""
    return [line.split(" (epoch")[0] for line in pack_text(pack) if "dropped" not in line]


def test_kept_packs_are_shown_as_planned_ones(words: list[str], tmp_path: Path) -> None:
    inputs = open_inputs(parse_arguments(words))
    for pack in first_packs(inputs.plan(progress=False), 12):
        save_batch(tmp_path / "pack", pack.batch)
        kept = kept_pack(load_batch(tmp_path / "pack"), inputs.tokenizer, pack.limit, pack.number)
        assert lines(kept) == lines(pack)


def test_the_command_shows_one_and_names_one_that_is_not_there(
    words: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inputs = open_inputs(parse_arguments(words))
    pack = next(first_packs(inputs.plan(progress=False), 1))
    save_batch(tmp_path / "step_7_rank_0_pack_0", pack.batch)
    assert main.main(["inspect", f"--pack={tmp_path / 'step_7_rank_0_pack_0.json'}", *words]) == 0
    shown = capsys.readouterr().out
    assert all(name in shown for name in pack.batch.samples) and "of 640 tokens" in shown
    assert main.main(["inspect", f"--pack={tmp_path / 'step_8_rank_0_pack_0'}", *words]) == 2
    assert "step_8_rank_0_pack_0.json does not exist" in capsys.readouterr().err
