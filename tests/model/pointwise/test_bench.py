"""`bench/pointwise.py` measures every part both ways, and the table of GPU results shows it."""

from __future__ import annotations

import math

import pytest
import torch

from bagel_ds.model.attention.choice import Place
from bagel_ds.model.shape.config import LLMConfig
from bench.on_gpu_table import NUMBERS
from bench.pointwise import lines, measured, parts


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # in modules that torch's compiler imports
def test_every_part_of_a_layer_is_measured_both_ways() -> None:
    llm = LLMConfig(64, 96, num_attention_heads=4, num_key_value_heads=2)
    found = list(parts(llm, 33, Place(torch.device("cpu"), torch.float32, True)))
    report = measured(found, rounds=2)
    total = sum(part.times * both["ms"]["fused"] for part in found for both in report["parts"][part.name].values())
    assert len(report["parts"]) == 6 and math.isclose(total, report["layer"]["ms"]["fused"])
    report |= {"device": "CPU", "precision": "fp32", "tokens": 33, "compiled_and_tried_seconds": 1.0}
    shown = NUMBERS["pointwise"](report)
    assert all(name in shown for name in report["parts"]) and len(list(lines(report))) == 2 + 2 * 6
