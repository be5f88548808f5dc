"""Where adapters come from and how they are merged: equal on any number of ranks, read in any pieces."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from bagel_ds.lora.peft_files import AdapterFolder
from bagel_ds.lora.weights import MergedWeights, NewAdapters, QuantizedBase, WithAdapters
from bagel_ds.model.quantized import quantize
from bagel_ds.model.shape.lora import LoRA, is_adapter
from bagel_ds.model.shape.quantization import ABSMAX, CODES, PIECE, QUANTIZATIONS, Quantization
from bagel_ds.ranges import TensorInfo
from tests.lora.test_peft_files import write_adapter
from tests.model.test_bagel import tiny
from tests.model.test_lora import adapted


class Held:
    """Tensors in memory as a `WeightSource`."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors = tensors

    def __contains__(self, name: str) -> bool:
        return name in self._tensors

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._tensors[name].dtype, tuple(self._tensors[name].shape))

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        flat = self._tensors[name].flatten()
        return flat[start : len(flat) if numel is None else start + numel]


SHAPES = {name: tuple(parameter.shape) for name, parameter in tiny(lora=LoRA(4, 8.0)).named_parameters()}
ADAPTERS = [name for name in SHAPES if is_adapter(name)]


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=list(QUANTIZATIONS))
@pytest.mark.parametrize("shape", [(37, 29), (64, 64), (1, 1), (1, PIECE + 65)], ids=str)
def test_a_quantized_base_is_the_same_in_whatever_pieces_it_is_read(
    shape: tuple[int, int], quantization: Quantization
) -> None:
    layer = "language_model.model.layers.0.mlp.up_proj"
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()
    source = QuantizedBase(Held({f"{layer}.weight": weight, "norm.weight": weight[0]}), quantization)
    assert f"{layer}.{CODES}" in source and f"{layer}.x" not in source and f"norm2.{CODES}" not in source
    assert torch.equal(source.read("norm.weight"), weight[0]) and source.info("norm.weight").shape == (shape[1],)
    for name, expected in zip((CODES, ABSMAX), quantize(weight.flatten(), quantization)):
        info = source.info(f"{layer}.{name}")
        assert (info.dtype, info.shape) == (expected.dtype, tuple(expected.shape))
        assert torch.equal(source.read(f"{layer}.{name}"), expected)
        for size in (1, 2, 3, 7, 64, 65) if weight.numel() < PIECE else (40961, PIECE // 2 - 1):
            starts = range(0, len(expected), size)
            pieces = [
                source.read(f"{layer}.{name}", start, min(size, len(expected) - start)) for start in reversed(starts)
            ]
            assert torch.equal(torch.cat(pieces[::-1]), expected), size


def test_new_adapters_depend_on_seed_and_name_only() -> None:
    one, other = NewAdapters(SHAPES, 5), NewAdapters(SHAPES, 5)
    expected = {name: one.read(name) for name in ADAPTERS}
    for name in reversed(ADAPTERS):
        whole = expected[name]
        pieces = [other.read(name, start, min(37, len(whole) - start)) for start in range(0, len(whole), 37)]
        assert torch.equal(torch.cat(pieces), whole)
    first, second = (name for name in ADAPTERS if name.endswith("q_proj.lora_A"))
    assert not torch.equal(expected[first], expected[second])
    assert not torch.equal(NewAdapters(SHAPES, 6).read(first), expected[first])


def test_new_adapters_change_nothing_and_are_as_large_as_a_linear_layer() -> None:
    new = NewAdapters(SHAPES, 0)
    for name in ADAPTERS:
        values, width = new.read(name), SHAPES[name][1]
        if name.endswith("lora_B"):
            assert not values.any()
        else:
            assert 0.9 * width**-0.5 < values.abs().max() <= width**-0.5


def test_base_and_adapters_each_have_their_names() -> None:
    base = Held({name: value.detach() for name, value in tiny().named_parameters()})
    both = WithAdapters(base, NewAdapters(SHAPES, 0))
    assert all(name in both and both.info(name).shape == SHAPES[name] for name in SHAPES)
    assert torch.equal(both.read("llm2vae.weight", 5, 9), base.read("llm2vae.weight", 5, 9))
    assert "llm2vae.lora_A" not in both


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_merged_weights_are_the_same_in_any_pieces(tmp_path: Path, dtype: torch.dtype) -> None:
    model, second = adapted(targets="gen"), adapted(targets="both", rank=2, alpha=1.0)
    base = {name: value.detach().to(dtype) for name, value in tiny().named_parameters()}
    folders = [
        AdapterFolder(write_adapter(tmp_path / str(number), each)) for number, each in enumerate((model, second))
    ]
    merged = MergedWeights(Held(base), folders)
    for name, value in base.items():
        expected = value.float()
        for each in (model, second):
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and f"{layer}.lora_A" in dict(each.named_parameters()):
                scale = each.config.lora.scale  # type: ignore[union-attr]
                expected = expected + scale * each.get_parameter(f"{layer}.lora_B") @ each.get_parameter(
                    f"{layer}.lora_A"
                )
        pieces = [merged.read(name, start, min(101, value.numel() - start)) for start in range(0, value.numel(), 101)]
        torch.testing.assert_close(torch.cat(pieces).float(), expected.flatten(), rtol=1e-6, atol=1e-6)
        changed = not torch.equal(expected, value.float())
        assert merged.info(name).dtype == (torch.float32 if changed else dtype)


def test_what_rounding_takes_away_is_measured(tmp_path: Path) -> None:
    """bf16 keeps 8 bits: little of a delta that is small beside the weight, nearly all of one of its size."""
    model = adapted(targets="und")
    folder = AdapterFolder(write_adapter(tmp_path, model))
    name = "language_model.model.layers.0.mlp.up_proj.weight"
    shares = []
    for size in (0.01, 1.0, 100.0):
        merged = MergedWeights(Held({name: torch.full(SHAPES[name], size)}), [folder], torch.bfloat16)
        merged.read(name)
        shares.append(merged.rounded_away())
    assert shares[0] < 0.01 < shares[1] < shares[2]
    exact = MergedWeights(Held({name: torch.ones(SHAPES[name])}), [folder], torch.float32)
    exact.read(name)
    assert exact.rounded_away() == 0
