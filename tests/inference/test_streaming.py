"""Layers that visit the device: same results, one copy per layer and call, and the arithmetic of what fits.

On a CPU both places are host memory. `LateCopies` stands for a GPU's stream at its laziest: it copies nothing before
someone waits for it, and until then the target holds NaN.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bagel_ds.errors import UserError
from bagel_ds.inference.placement import WORK_BYTES, gpu_limit, place_weights
from bagel_ds.inference.streaming import StreamedLayers
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.offload import Copies, PlainCopies
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.units import GIB
from tests.memory.test_phases import network, pack

CONFIG = network(layers=5)
CPU = torch.device("cpu")


class LateCopies:
    """Copies in order, none before it is waited for."""

    def __init__(self) -> None:
        self.queue: list[tuple[Tensor, Tensor]] = []
        self.asked = 0

    def start(self, target: Tensor, source: Tensor) -> int:
        target.fill_(torch.nan)
        self.queue.append((target, source))
        self.asked += 1
        return self.asked

    def wait(self, started: int) -> None:
        while self.asked - len(self.queue) < started:
            target, source = self.queue.pop(0)
            target.copy_(source)

    def finish(self) -> None:
        self.wait(self.asked)


def built() -> Bagel:
    model = Bagel(CONFIG).requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return model


@torch.no_grad()
def output(model: Bagel) -> Tensor:
    result = model(pack(9, 6, 5), torch.ones(6, 64))
    return torch.cat([result.ce, result.mse.flatten()])


@pytest.mark.parametrize("copies", [PlainCopies, LateCopies])
@pytest.mark.parametrize("streamed", [(2,), (0, 3), (0, 1, 2, 3, 4), (1, 2, 4)])
def test_a_network_with_streamed_layers_computes_the_same_again_and_again(
    streamed: tuple[int, ...], copies: type[Copies]
) -> None:
    model, plain = built(), built()
    layers: Any = model.language_model.model.layers
    StreamedLayers([layers[number] for number in streamed], CPU, copies())
    for _ in range(3):
        assert torch.equal(output(model), output(plain))
    for (name, found), expected in zip(model.named_parameters(), plain.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_each_call_copies_each_streamed_layer_once() -> None:
    model, copies = built(), LateCopies()
    layers: Any = model.language_model.model.layers
    StreamedLayers([layers[number] for number in (0, 2, 4)], CPU, copies)
    output(model)
    assert copies.asked == 3 + 1  # and the first layer of the next call is on its way
    output(model)
    assert copies.asked == 2 * 3 + 1


@pytest.mark.parametrize("fails_in", [0, 2, 3, 4])
def test_a_call_after_one_that_failed_is_right(fails_in: int) -> None:
    model, plain = built(), built()
    layers: Any = model.language_model.model.layers
    StreamedLayers([layers[number] for number in (0, 2, 4)], CPU, LateCopies())

    def fail(module: nn.Module, args: Any) -> None:
        raise ArithmeticError

    hook = layers[fails_in].mlp.register_forward_pre_hook(fail)
    with pytest.raises(ArithmeticError):
        output(model)
    hook.remove()
    assert torch.equal(output(model), output(plain))


def test_parts_that_a_folder_lacks_are_not_streamed() -> None:
    config = dataclasses.replace(CONFIG, visual_gen=False)
    with torch.device("meta"):
        model = Bagel(config).requires_grad_(False)
    layer: Any = model.language_model.model.layers[0]
    for name, parameter in list(layer.named_parameters()):
        if "_moe_gen" not in name:
            owner, _, own = name.rpartition(".")
            setattr(layer.get_submodule(owner), own, nn.Parameter(torch.ones(parameter.shape), requires_grad=False))
    StreamedLayers([layer], CPU)
    assert all(parameter.is_meta == ("_moe_gen" in name) for name, parameter in layer.named_parameters())


# ------------------------------------------------------------------------------------------------------ what fits
SEVEN_B = BagelConfig()


def test_the_7b_fits_whole_only_where_there_is_room_for_it() -> None:
    whole = place_weights(SEVEN_B, 2)
    assert whole.streamed == () and 27 < whole.gpu_bytes / GIB < 28
    assert place_weights(SEVEN_B, 2, whole.gpu_bytes + WORK_BYTES).streamed == ()
    assert place_weights(SEVEN_B, 2, whole.gpu_bytes + WORK_BYTES - 1).streamed != ()


@pytest.mark.parametrize("gib", [8, 12, 16, 24])
def test_what_lies_on_the_gpu_stays_within_the_limit_and_uses_it(gib: int) -> None:
    placement = place_weights(SEVEN_B, 2, gib * GIB, GIB // 3)
    free = gib * GIB - WORK_BYTES - placement.gpu_bytes
    assert 0 <= free < placement.layer_bytes
    assert len(set(placement.streamed)) == len(placement.streamed) and max(placement.streamed) < 28
    resident = 28 - len(placement.streamed)
    assert (
        placement.gpu_bytes
        == place_weights(SEVEN_B, 2, None, GIB // 3).gpu_bytes + (2 + resident - 28) * placement.layer_bytes
    )


def test_streamed_layers_are_spread_over_the_network() -> None:
    streamed = place_weights(SEVEN_B, 2, 24 * GIB).streamed
    gaps = {later - earlier for earlier, later in zip(streamed, streamed[1:])}
    assert max(gaps) - min(gaps) <= 1


def test_the_least_limit_works_and_less_is_a_message_that_names_it() -> None:
    whole = place_weights(SEVEN_B, 2)
    least = whole.gpu_bytes - 26 * whole.layer_bytes + WORK_BYTES
    assert len(place_weights(SEVEN_B, 2, least).streamed) == 28
    with pytest.raises(UserError, match=f"it needs {least / GIB:.1f} GiB"):
        place_weights(SEVEN_B, 2, least - 1)


def test_sizes_as_users_write_them() -> None:
    assert gpu_limit(24) == gpu_limit("24") == gpu_limit("24GiB") == gpu_limit("24 gib") == 24 * GIB
    assert gpu_limit("24GB") == 24 * 10**9 and gpu_limit("512MiB") == GIB // 2 and gpu_limit(1.5) == 3 * GIB // 2
    for wrong in ("0", "-1", "much", "24TB", ""):
        with pytest.raises(UserError, match="expected a size"):
            gpu_limit(wrong)
