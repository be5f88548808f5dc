"""The attention layout against the recorded masks, and the kernels against a dense mask."""

from __future__ import annotations

from typing import Callable

import pytest
import torch
import torch.nn.functional as F

from bagel_ds.model.attention import flex, sdpa
from bagel_ds.model.attention.backends import Attend
from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.attention.varlen import varlen, varlen_reference
from tests.recordings import UNSET, cases, read_json, reference_folder, tensors


def structures() -> list:
    if reference_folder() is None:
        return [pytest.param(None, marks=pytest.mark.skip(reason=UNSET))]
    return [case["case"] for case in read_json("masks/masks")["cases"]]


def case_of(number: int) -> dict:
    return next(case for case in read_json("masks/masks")["cases"] if case["case"] == number)


def layout_of(case: dict) -> AttentionLayout:
    splits = [split for sample in case["samples"] for split in sample["split_lens"]]
    modes = [mode for sample in case["samples"] for mode in sample["attn_modes"]]
    return AttentionLayout.from_splits(case["sample_lens"], splits, modes)


def by_varlen(layout: AttentionLayout) -> Attend:
    """The decomposition of the flash kernels, which have no CPU, by a kernel in plain operations."""
    return varlen(layout, varlen_reference)


def recorded_mask(number: int, case: dict) -> torch.Tensor:
    recorded = tensors("masks/masks")
    blocks = [recorded[f"case.{number}.sample.{i}"].bool() for i in range(len(case["samples"]))]
    return torch.block_diag(*blocks).bool()


@pytest.mark.parametrize("number", structures())
def test_layout_equals_the_recorded_mask(number: int) -> None:
    case = case_of(number)
    assert torch.equal(layout_of(case).dense_mask(), recorded_mask(number, case))


@pytest.mark.parametrize("stem", cases("forward/*.safetensors") + cases("packing/expected/pack_*.safetensors"))
def test_layout_of_a_pack_equals_its_recorded_mask(stem: str) -> None:
    info, recorded = read_json(stem), tensors(stem)
    names = [name for name in recorded if "attention_mask." in name]
    assert len(names) == len(info["sample_lens"])
    blocks = [recorded[name].bool() for name in sorted(names, key=lambda name: int(name.rsplit(".", 1)[1]))]
    layout = AttentionLayout.from_splits(info["sample_lens"], info["split_lens"], info["attn_modes"])
    assert torch.equal(layout.dense_mask(), torch.block_diag(*blocks).bool())


@pytest.mark.parametrize("prepare", [sdpa.prepare, by_varlen], ids=["sdpa", "varlen"])
@pytest.mark.parametrize("number", structures())
def test_kernel_equals_attention_under_the_recorded_mask(
    number: int, prepare: Callable[[AttentionLayout], Attend]
) -> None:
    case = case_of(number)
    layout, mask = layout_of(case), recorded_mask(number, case)
    generator = torch.Generator().manual_seed(number)
    total, heads, kv_heads, dim = len(mask), 4, 2, 8
    q = torch.randn(total, heads, dim, generator=generator, requires_grad=True)
    k, v = (torch.randn(total, kv_heads, dim, generator=generator, requires_grad=True) for _ in range(2))
    found = prepare(layout)(q, k, v)
    dense = F.scaled_dot_product_attention(
        q.transpose(0, 1),
        k.repeat_interleave(heads // kv_heads, 1).transpose(0, 1),
        v.repeat_interleave(heads // kv_heads, 1).transpose(0, 1),
        attn_mask=mask,
    ).transpose(0, 1)
    torch.testing.assert_close(found, dense, rtol=1e-5, atol=1e-5)
    weight = torch.randn(found.shape, generator=generator)
    for ours, theirs in zip(
        torch.autograd.grad((found * weight).sum(), (q, k, v)), torch.autograd.grad((dense * weight).sum(), (q, k, v))
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("number", structures())
def test_flex_attentions_rule_is_the_recorded_mask(number: int) -> None:
    case = case_of(number)
    reach, segment, last = flex.bounds(layout_of(case), torch.device("cpu"))
    tokens = sum(case["sample_lens"])
    sees = (torch.arange(tokens) <= reach[:tokens, None]) & (segment[:tokens, None] <= last[:tokens])
    assert torch.equal(sees, recorded_mask(number, case))
