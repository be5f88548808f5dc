"""From the --lora_* arguments to a network with adapters."""

from __future__ import annotations

from dataclasses import replace

from bagel_ds.arguments.options import TrainingArguments
from bagel_ds.errors import UserError
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.lora import LoRA
from bagel_ds.model.shape.parameters import adapted_layers, linear_layers
from bagel_ds.model.shape.parts import PARTS, Freezing, trainable_parts


def with_adapters(training: TrainingArguments, network: BagelConfig) -> BagelConfig:
    """The network that a run trains: with adapters where --lora_rank asks for them.

    Parts that the run's switches freeze get none. Raises `UserError` if no layer gets one.
    """
    if not training.lora_rank:
        return network
    trained = trainable_parts(network, Freezing(training.freeze_llm, training.freeze_vit))
    lora = LoRA(
        rank=training.lora_rank,
        alpha=2.0 * training.lora_rank if training.lora_alpha is None else training.lora_alpha,
        dropout=training.lora_dropout,
        targets=training.lora_targets,
        frozen_parts=frozenset(PARTS - trained),
        base_precision=None if training.base_precision == "full" else training.base_precision,
    )
    adapted = replace(network, lora=lora)
    if adapted_layers(adapted):
        return adapted
    if named := adapted_layers(replace(network, lora=replace(lora, frozen_parts=frozenset()))):
        raise UserError(
            f"--lora_targets {lora.targets} names only layers that the freeze_* arguments, visual_und or visual_gen "
            f"keep from training ({min(named)}, ...); turn one of those off, or name other layers"
        )
    names = linear_layers(network)
    raise UserError(
        f"--lora_targets {lora.targets} matches no linear layer; pass gen, und, both, or a regular expression that "
        f"matches whole names, such as those of {names[0]} or {names[-1]}"
    )
