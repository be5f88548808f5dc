"""Which operations each mode of activation checkpointing repeats, and in which layers."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bagel_ds.model.bagel import Bagel
from bagel_ds.model.recompute import ATTENTION, PRODUCTS, recompute_mode
from bagel_ds.model.shape.lora import LoRA
from tests.memory.test_phases import network, pack, selective_peaks

LAYERS = 3


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.name().split(".")[0]] += 1
        return function(*args, **(kwargs or {}))


def counted(mode: str, **options: Any) -> tuple[int, int, int]:
    """(products, attentions, norms) of a forward and backward pass."""
    torch.manual_seed(0)
    config = network(width=64, inner=96, layers=LAYERS)
    model = Bagel(config, recompute_mode(mode, **options))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, 0, 0.02)
    with Operators() as operators:
        output = model(pack(16, 8, 4), torch.zeros(8, 64))
        (output.ce.sum() + output.mse.sum()).backward()
    products = sum(operators.counts[name] for name in PRODUCTS)
    attentions = sum(
        count for name, count in operators.counts.items() if name.startswith(ATTENTION) and "backward" not in name
    )
    return products, attentions, operators.counts["aten::rsqrt_"]


def test_selective_repeats_norms_but_no_product_of_a_decoder_layer() -> None:
    none, full, selective = counted("none"), counted("full"), counted("selective")
    per_layer = [(full[which] - none[which]) / LAYERS for which in (0, 1, 2)]
    assert all(repeated > 0 for repeated in per_layer), "full repeats all kinds"
    in_vit = counted("selective", layers=LAYERS)
    assert in_vit == selective, "all layers unless told"
    without = counted("selective", layers=0)
    assert without == full, "none keeps products: as full"
    kept_by_one = [with_one - with_none for with_one, with_none in zip(counted("selective", layers=1), without)]
    assert kept_by_one[0] < 0 and kept_by_one[1] < 0 and kept_by_one[2] == 0
    assert [a - b for a, b in zip(selective, without)] == [LAYERS * saved for saved in kept_by_one]
    # What is left to repeat are the ViT's layers, which keep nothing.
    vit_products = 2 * 6 - 2  # both layers; the last product of a layer is not needed again
    assert selective[0] - none[0] <= 2 * 6 and selective[0] - none[0] >= vit_products


@pytest.mark.parametrize("mode", ["full", "selective"])
def test_adapters_with_dropout_see_the_same_masks_again(mode: str) -> None:
    grads = []
    for name in ("none", mode):
        torch.manual_seed(0)
        model = Bagel(network(width=64, inner=96, layers=1, lora=LoRA(4, 8, 0.5)), recompute_mode(name, draws=True))
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, 0, 0.1)
        torch.manual_seed(1)
        output = model(pack(16, 8, 4), torch.zeros(8, 64))
        (output.ce.sum() + output.mse.sum()).backward()
        grads.append({key: value.grad for key, value in model.named_parameters() if value.grad is not None})
    assert any("lora_A" in key for key in grads[0])
    for key, value in grads[0].items():
        torch.testing.assert_close(grads[1][key], value, rtol=1e-5, atol=1e-7)


def test_the_planner_counts_what_selective_keeps() -> None:
    for layers in (0, 2, 4):
        measured, planned = selective_peaks(kept=layers)
        assert 0.97 * measured < planned < 1.15 * measured, layers
