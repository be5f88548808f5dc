"""The baseline of bench/data_plan.py is the original's packing loop: it repeats the recorded batches."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any, Iterator, NamedTuple

import pytest

from bench.data_plan import Greedy

FOLDER = os.environ.get("BAGEL_REFERENCE_DIR")
RECORDING = Path(FOLDER or "") / "packing" / "expected" / "packer_iter.json"
CASES: list[Any] = json.loads(RECORDING.read_text())["cases"] if FOLDER and RECORDING.exists() else []


class Recorded(NamedTuple):
    """Sample `number` of a group, in the packer's order."""

    group: str
    number: int
    length: int


def samples(group: dict[str, Any]) -> Iterator[Recorded]:
    lengths = group["lens"]
    return (Recorded(group["name"], i, lengths[i % len(lengths)] + 2) for i in itertools.count())


@pytest.mark.skipif(not CASES, reason="BAGEL_REFERENCE_DIR is not set, or holds no packer_iter.json")
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed{case['python_random_seed']}")
def test_the_baseline_repeats_the_recorded_batches(case: dict[str, Any]) -> None:
    groups, args = case["groups"], case["args"]
    greedy = Greedy(
        [samples(group) for group in groups],
        [group["weight"] for group in groups],
        [group["mandatory"] for group in groups],
        (args["expected_num_tokens"], args["max_num_tokens"], args["max_num_tokens_per_sample"]),
        case["python_random_seed"],
        args["max_buffer_size"],
        args["prefer_buffer_before"],
    )
    for batch, recorded in zip(greedy.packs(), case["batches"]):
        assert [[sample.group, sample.number] for sample in batch] == recorded["samples"]
