"""States that older versions saved: a run resumes from them at exactly its place.

`saved_by_algorithm_2` holds data files, a tokenizer and a state that version 2 of the plan saved over them in the
middle of a block, with the packs that it had planned to the end of that block.
"""

from __future__ import annotations

import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any, Sequence

import pytest

from bagel_ds.data.batches.loader import LayoutOptions, PackingOptions, PlannedData
from bagel_ds.data.plan import planner as module
from bagel_ds.data.plan.packing import Pack
from bagel_ds.data.plan.planner import Planner
from bagel_ds.data.plan.rules import ALGORITHM, LARGEST_BLOCK, PackingRules, rules_of
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.streams.stream import SampleOptions
from bagel_ds.model_folder import tokenizer as tokenizer_module
from bagel_ds.model_folder.tokenizer import load_tokenizer
from tests.data.plan.accounting import Row, rows_used_before
from tests.data.plan.test_planner import Rows, packs_of, planner_of, samples_of
from tests.small_data import VIT_ARGS, group, streams_of

SAVED = Path(__file__).parent / "saved_by_algorithm_2"
RECORDED: dict[str, Any] = json.loads((SAVED / "state.json").read_text())
STATE: Any = RECORDED["state"]
USED, PLANNED = STATE["packs"], len(RECORDED["packs"])
WORLDS = (1, 2, 5)
OPTIONS = {"text_cond_dropout_prob": 0.1, "vit_cond_dropout_prob": 0.3, "vae_cond_dropout_prob": 0.3}


def opened(scratch: Path, **packing: Any) -> PlannedData:
    """The data that the state was saved over, with the options of that run."""
    vit = {"vit_image_transform_args": VIT_ARGS}
    talks = {"data_dir": str(SAVED / "talks" / "images"), "jsonl_path": str(SAVED / "talks" / "data.jsonl")}
    groups = {
        "t2i_pretrain": group({"data_dir": str(SAVED / "t2i")}, "pictures", weight=1.0, is_mandatory=True),
        "unified_edit": group({"data_dir": str(SAVED / "edit")}, "edits", weight=2.0, **vit),
        "vlm_sft": group(talks, "talks", weight=0.5),
    }
    tokenizer = load_tokenizer(SAVED / "model")
    streams = streams_of(scratch, groups, tokenizer, **OPTIONS)
    options = PackingOptions(**({"max_num_tokens": 400, "expected_num_tokens": 360} | packing))
    return PlannedData(streams, tokenizer, LayoutOptions(), options, noise_seed=42)


def recorded(packs: Sequence[Any]) -> list[list[Row]]:
    return [[(group, epoch, row) for group, epoch, row in pack] for pack in packs]


def planned(packs: Sequence[Pack]) -> list[list[Row]]:
    return [samples_of([pack]) for pack in packs]


def continued(data: PlannedData, start: Any, world: int) -> tuple[list[list[Row]], Any]:
    """The packs from a state on to the beginning of a later block, and that block's own state."""
    packs: list[Pack] = []
    for step in data.planner.steps(world, start):
        packs += step.packs
        block = step.state["block"]
        if block["first"] > start["packs"] + 2 * LARGEST_BLOCK:
            return planned(packs[: block["first"] - start["packs"]]), block
    raise AssertionError("unreachable")


@pytest.mark.parametrize("world", WORLDS)
def test_a_state_of_algorithm_2_continues_at_exactly_its_place(
    tmp_path: Path, world: int, caplog: pytest.LogCaptureFixture
) -> None:
    data = opened(tmp_path)
    assert data.place(STATE) is STATE
    after, block = continued(data, STATE, world)
    assert after[: PLANNED - USED] == recorded(RECORDED["packs"][USED:]), "the block under way is finished"
    used = Counter(sample for pack in recorded(RECORDED["packs"][:USED]) + after for sample in pack)
    assert set(used.values()) == {1}, "nothing is repeated"
    assert set(used) == rows_used_before(data.planner, block), "nothing is lost"
    logging.getLogger("bagel_ds").propagate = True
    with caplog.at_level(logging.INFO, "bagel_ds"):
        for rank in range(2):
            data.micro_batches(rank, 2, start=STATE).close()
    (line,) = [message for message in caplog.messages if "version" in message]
    assert "version 2: its block of packs is finished as it was planned" in line and f"version {ALGORITHM}" in line


def test_the_block_of_an_older_version_can_be_resumed_twice(tmp_path: Path) -> None:
    data = opened(tmp_path)
    whole = packs_of(data.planner, 100, 1, STATE)
    for count in (5, PLANNED - USED, PLANNED - USED + 5):
        steps = list(itertools.islice(data.planner.steps(1, STATE), count))
        again = json.loads(json.dumps(steps[-1].state))
        assert again["block"]["algorithm"] == (2 if count <= PLANNED - USED else ALGORITHM)
        assert packs_of(opened(tmp_path).planner, 30, 1, again) == whole[count : count + 30]


def test_names_of_classes_and_of_the_tokenizer_decide_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed class, or a library that prints a tokenizer otherwise, must not make a run repeat packs."""
    before = opened(tmp_path).fingerprint
    for renamed in (ImageTransform, LayoutOptions, SampleOptions):
        monkeypatch.setattr(renamed, "__repr__", lambda self: "Renamed()")
    assert repr(LayoutOptions()) == "Renamed()"
    assert opened(tmp_path).fingerprint == before
    monkeypatch.setattr(tokenizer_module, "_fingerprint", lambda folder: "of another version")
    data = opened(tmp_path)
    assert data.fingerprint != before
    other = {**STATE, "plan": "of another version"}
    assert data.place(STATE) is STATE and data.place(other) is other


def test_other_options_move_a_state_of_algorithm_2(tmp_path: Path) -> None:
    data = opened(tmp_path, max_num_tokens=420)
    place = data.place(STATE)
    assert place is not None and place["block"]["first"] == USED and place["block"]["algorithm"] == ALGORITHM
    after, block = continued(data, place, 1)
    used = Counter(sample for pack in recorded(RECORDED["packs"][: STATE["block"]["first"]]) + after for sample in pack)
    assert set(used.values()) == {1}, "only packs of the block under way are repeated"
    assert set(used) == rows_used_before(data.planner, block), "nothing is lost"


@pytest.mark.parametrize(("rows", "block"), [(90, 32), (700, 64), (9000, 256)])
@pytest.mark.parametrize("steps", [1, 40, 300])
def test_the_first_blocks_of_a_newer_version_lose_and_repeat_nothing(
    rows: int, block: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    streams = [Rows(rows=rows, is_mandatory=True), Rows(rows=rows // 2, weight=2.0, longest=400, bad_every=5)]
    with monkeypatch.context() as older:
        older.setattr(module, "ALGORITHM", 2)
        planner = planner_of(streams)
        assert planner.rules.block == block
        before = list(itertools.islice(planner.steps(1), steps + block))
    state = json.loads(json.dumps(before[steps - 1].state))
    assert state["block"].pop("algorithm") == 2, "as version 2 saved it"
    newer = planner_of(streams)
    assert newer.rules.block == LARGEST_BLOCK and newer.plans_again(state)
    left = state["block"]["first"] + block - steps
    after = packs_of(newer, left + 2 * LARGEST_BLOCK, 3, state)
    assert after[:left] == [step.packs[0] for step in before[steps : steps + left]]
    assert set(Counter(samples_of([step.packs[0] for step in before[:steps]] + after)).values()) == {1}


@pytest.mark.parametrize(
    ("algorithm", "samples_per_pack", "rows", "expected"),
    [
        (2, 4.0, 10**6, PackingRules(256, 256, 400, 16)),
        (2, 4.0, 2 * 4 * 256, PackingRules(256, 256, 400, 16)),
        (2, 4.0, 2 * 4 * 256 - 1, PackingRules(256, 128, 400, 16)),
        (2, 4.0, 660, PackingRules(165, 64, 400, 16)),
        (2, 4.0, 3, PackingRules(32, 32, 400, 16)),
        (2, 100.0, 10**6, PackingRules(256, 256, 400, 16)),
        (3, 4.0, 10**6, PackingRules(256, 256, 800, 32)),
        (3, 4.0, 3, PackingRules(256, 256, 800, 32)),
        (3, 64.0, 3, PackingRules(256, 256, 800, 32)),
        (3, 64.1, 3, PackingRules(256, 128, 800, 32)),
        (3, 200.0, 10**6, PackingRules(400, 64, 800, 32)),
        (3, 10_000.0, 10**6, PackingRules(20_000, 32, 800, 32)),
    ],
)
def test_rules_of_each_version(algorithm: int, samples_per_pack: float, rows: int, expected: PackingRules) -> None:
    assert rules_of(algorithm, 256, samples_per_pack, rows) == expected


def test_the_planner_asks_for_the_newest_rules_whatever_the_number_of_rows() -> None:
    sizes = {Planner([Rows(rows=rows)], PackingOptions(1000, 900)).rules for rows in (10, 10_000)}
    assert len(sizes) == 1
