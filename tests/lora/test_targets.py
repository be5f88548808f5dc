"""From arguments to adapters: what is adapted, what the defaults are, and what is refused before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.arguments.run_config import make_config, parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.lora.targets import with_adapters
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parameters import adapted_layers, parameter_sizes
from bagel_ds.zero.config.files import ds_configs_folder
from bagel_ds.zero.config.resolve import resolve_ds_config


def adapted(**options: Any) -> BagelConfig:
    training = make_config(options).training
    network = BagelConfig(
        visual_gen=training.visual_gen, visual_und=training.visual_und, freeze_und=training.freeze_und
    )
    return with_adapters(training, network)


def test_without_a_rank_the_network_stays_as_it_is() -> None:
    assert adapted() == BagelConfig() and adapted(lora_targets="gen") == BagelConfig()
    notes = make_config({"lora_targets": "gen", "lora_alpha": 3.0}).notes
    assert "no effect: lora_alpha, lora_targets, because lora_rank is 0" in notes


def test_defaults_are_both_experts_and_twice_the_rank() -> None:
    lora = adapted(lora_rank=64).lora
    assert lora is not None and (lora.alpha, lora.dropout, lora.scale) == (128, 0, 2)
    sizes = parameter_sizes(adapted(lora_rank=64))
    assert len(adapted_layers(adapted(lora_rank=64))) == 2 * 7 * 28
    assert sum(found.numel for found in sizes if found.trains) == 322_961_408, "docs/lora.md says 323 million"


@pytest.mark.parametrize(
    ("options", "layers"),
    [
        ({"lora_targets": "both", "freeze_und": True}, 7 * 28),
        ({"lora_targets": "both", "visual_gen": False}, 7 * 28),
        ({"lora_targets": "both", "visual_und": False}, 2 * 7 * 28),
        ({"lora_targets": ".*", "freeze_llm": True, "freeze_vit": True}, 6),  # connector, time, latents' projections
        ({"lora_targets": r"vit_model\..*"}, 1 + 26 * 6),
    ],
)
def test_frozen_parts_have_none(options: dict[str, Any], layers: int) -> None:
    assert len(adapted_layers(adapted(lora_rank=8, **options))) == layers


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_targets": "gen", "visual_gen": False}, "keep from training"),
        ({"lora_targets": "both", "freeze_llm": True}, "keep from training"),
        ({"lora_targets": "q_proj"}, "--lora_targets q_proj matches no linear layer; pass gen, und, both"),
        ({"lora_targets": "language_model.lm_head"}, "matches no linear layer"),
    ],
)
def test_targets_without_a_layer_are_refused(options: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        adapted(lora_rank=8, **options)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--lora_rank -1", "--lora_rank -1: expected 0 or more"),
        ("--lora_rank 8 --lora_dropout 1", "--lora_dropout 1.0: expected 0 or more and below 1"),
        ("--lora_rank 8 --lora_alpha 0", "--lora_alpha 0.0: expected above 0"),
        ("--lora_rank 8 --lora_targets (", "--lora_targets '(': expected gen, und, both or a regular expression"),
        ("--weight_decay -1", "--weight_decay -1.0: expected 0 or more"),
        (
            "--lora_rank 8 --lora_dropout 0.1 --activation_checkpointing offload",
            "--lora_dropout with --activation_checkpointing offload",
        ),
    ],
)
def test_values_out_of_range_are_named(words: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        parse_arguments(words.split())
    assert said in str(error.value)


def test_bf16_masters_are_refused_with_adapters_only(tmp_path: Path) -> None:
    content = json.loads((ds_configs_folder() / "zero3_cpu.json").read_text())
    content["bf16"]["bf16_master_weights_and_grads"] = True
    path = tmp_path / "rounded.json"
    path.write_text(json.dumps(content))
    resolve_ds_config(str(path), make_config({}), 1)
    with pytest.raises(UserError, match="loses half of what adapters learn"):
        resolve_ds_config(str(path), make_config({"lora_rank": 8}), 1)
