"""Adapters inside the network: which layers have one, what they compute, and what trains."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import pytest
import torch

from bagel_ds.data.plan.cost import CostModel
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.recompute import recompute_mode
from bagel_ds.model.shape.lora import LoRA, is_adapter
from bagel_ds.model.shape.parameters import adapted_layers, linear_layers, parameter_sizes, step_calls
from bagel_ds.model.shape.parts import PARTS, Freezing, part_of, trainable_parts
from bagel_ds.model.shape.quantization import base_of
from tests.model.test_bagel import TINY, loss_of, pack, tiny

TARGETS = ["gen", "und", "both", r"connector\.fc[12]", ".*"]
SEVEN = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def adapted(**changes: Any) -> Bagel:
    return tiny(lora=LoRA(**{"rank": 4, "alpha": 8.0, **changes}))


@pytest.mark.parametrize("base_precision", [None, "nf4", "int8"])
@pytest.mark.parametrize("targets", TARGETS)
def test_the_counted_parameters_are_the_networks(targets: str, base_precision: str | None) -> None:
    config = dataclasses.replace(TINY, lora=LoRA(4, 8.0, targets=targets, base_precision=base_precision))
    with torch.device("meta"):
        built = [(name, parameter.numel()) for name, parameter in Bagel(config).named_parameters()]
    sizes = parameter_sizes(config)
    assert [(found.name, found.numel) for found in sizes] == built
    assert {found.name for found in sizes if found.trains} == {name for name, _ in built if is_adapter(name)}
    used = {index for call in step_calls(config, Freezing(), True) for index in call.parameters}
    assert {index for index, found in enumerate(sizes) if found.trains} <= used, "the planner sees them in a step"


@pytest.mark.parametrize("base_precision", ["nf4", "int8"])
def test_quantized_are_the_decoders_linear_layers_and_nothing_else(base_precision: str) -> None:
    config = dataclasses.replace(TINY, lora=LoRA(4, 8.0, targets="gen", base_precision=base_precision))
    names = {parameter.name for parameter in parameter_sizes(config)}
    both = adapted_layers(dataclasses.replace(TINY, lora=LoRA(4, 8.0, targets="both")))
    assert {name.removesuffix(".weight_codes") for name in names if name.endswith(".weight_codes")} == both
    plain = {name for name, _ in Bagel(TINY).named_parameters()}
    whole = {name for name in names if not is_adapter(name) and base_of(name) is None}
    assert whole | {f"{layer}.weight" for layer in both} == plain
    assert parameter_sizes(config.unquantized()) == parameter_sizes(
        dataclasses.replace(TINY, lora=LoRA(4, 8.0, targets="gen"))
    )


def test_named_targets_are_the_seven_linear_layers_of_an_expert() -> None:
    def layers(targets: str) -> set[str]:
        return set(adapted_layers(dataclasses.replace(TINY, lora=LoRA(4, 8.0, targets=targets))))

    gen, und = layers("gen"), layers("und")
    assert len(gen) == len(und) == 7 * TINY.llm.num_hidden_layers and not gen & und
    assert {part_of(name) for name in gen} == {"gen_expert"} and {part_of(name) for name in und} == {"und_expert"}
    assert {name.rpartition(".")[2].removesuffix("_moe_gen") for name in gen} == set(SEVEN)
    assert layers("both") == gen | und
    assert layers(".*") == set(linear_layers(TINY))


def test_with_b_zero_the_network_computes_what_it_did() -> None:
    plain, model, batch = tiny(), adapted(), pack(6, labels=True, drawn=(2, 3))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(torch.zeros(()) if is_adapter(name) else plain.get_parameter(name))
    assert loss_of(model, batch) == loss_of(plain, batch)


@pytest.mark.parametrize("targets", TARGETS)
def test_an_adapted_network_computes_what_the_merged_one_does(targets: str) -> None:
    model, plain, batch = adapted(targets=targets), tiny(), pack(6, labels=True, drawn=(2, 3))
    with torch.no_grad():
        for name, parameter in plain.named_parameters():
            parameter.copy_(model.get_parameter(name))
            layer = name.removesuffix(".weight")
            if name.endswith(".weight") and layer in adapted_layers(model.config):
                parameter += 2.0 * model.get_parameter(f"{layer}.lora_B") @ model.get_parameter(f"{layer}.lora_A")
    assert loss_of(model, batch).item() == pytest.approx(loss_of(plain, batch).item(), rel=2e-6)


@pytest.mark.parametrize(
    "batch", [pack(6, labels=True), pack(2, drawn=(2, 3)), pack(0)], ids=["text", "drawing", "none"]
)
def test_every_adapter_gets_a_gradient_from_any_pack_and_nothing_else_does(batch: Any) -> None:
    model = adapted(targets=".*")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    loss_of(model, batch).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None) == is_adapter(name), name


def test_dropout_drops_in_training_only_and_is_recomputed_with_the_same_mask() -> None:
    batch = pack(6, labels=True, drawn=(2, 3))
    gradients = []
    for mode in ("none", "full"):
        model = adapted(dropout=0.5)
        model.recompute = recompute_mode(mode, draws=True)
        torch.manual_seed(3)
        loss_of(model, batch).backward()
        gradients.append([parameter.grad for name, parameter in model.named_parameters() if is_adapter(name)])
    assert all(torch.equal(*pair) for pair in zip(*gradients)), "recomputed as computed"
    torch.manual_seed(4)
    assert loss_of(model, batch) != loss_of(adapted(), batch)
    assert loss_of(model.eval(), batch) == loss_of(adapted(), batch)


SWITCHES = ("freeze_llm", "freeze_vit", "freeze_und", "no_gen", "no_und")


@pytest.mark.parametrize("on", [c for n in range(4) for c in itertools.combinations(SWITCHES, n)], ids="+".join)
def test_parts_that_are_frozen_get_no_adapter(on: tuple[str, ...]) -> None:
    freezing = Freezing("freeze_llm" in on, "freeze_vit" in on)
    config = dataclasses.replace(
        TINY, freeze_und="freeze_und" in on, visual_gen="no_gen" not in on, visual_und="no_und" not in on
    )
    trained = trainable_parts(config, freezing)
    lora = LoRA(4, 8.0, targets=".*", frozen_parts=frozenset(PARTS - trained))
    config = dataclasses.replace(config, lora=lora)
    layers = adapted_layers(config)
    assert {part_of(name) for name in layers} == {part_of(name) for name in linear_layers(TINY)} & trained
    assert sum(found.numel for found in parameter_sizes(config, freezing) if found.trains) == sum(
        math.prod(parameter.shape) for name, parameter in Bagel(config).named_parameters() if is_adapter(name)
    )


def test_packs_are_priced_without_gradients_of_the_base() -> None:
    frozen = CostModel.of(dataclasses.replace(TINY, lora=LoRA(4, 8.0)))
    assert frozen.und_token < CostModel.of(TINY).und_token and frozen.gen_token < CostModel.of(TINY).gen_token
