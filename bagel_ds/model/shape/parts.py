"""The network's parts by parameter name: for counting, freezing, and filling in what a checkpoint lacks.

Guarantees: every parameter belongs to exactly one part, and the run's switches determine which parts train.
"""

from __future__ import annotations

from typing import Callable, NamedTuple

from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.lora import is_adapter

GENERATION = ("gen_expert", "time_embedder", "vae2llm", "llm2vae")
UNDERSTANDING_VISION = ("vit", "connector")
LLM = ("embed_tokens", "und_expert", "gen_expert", "lm_head")
PARTS = frozenset((*LLM, *GENERATION, *UNDERSTANDING_VISION, "position_tables"))
POSITION_TABLES = ("latent_pos_embed.pos_embed", "vit_pos_embed.pos_embed")


class Freezing(NamedTuple):
    """The original's freeze_* switches. freeze_und is in `BagelConfig`, because it also cuts gradients."""

    freeze_llm: bool = False
    freeze_vit: bool = False


def part_of(name: str) -> str:
    """The part a parameter belongs to; names are those of `Bagel.named_parameters()`."""
    if name in POSITION_TABLES:
        return "position_tables"
    if name.startswith("language_model."):
        if "embed_tokens" in name:
            return "embed_tokens"
        if "lm_head" in name:
            return "lm_head"
        return "gen_expert" if "_moe_gen" in name else "und_expert"
    return "vit" if name.startswith("vit_model.") else name.split(".")[0]


def trainable_parts(config: BagelConfig, freezing: Freezing) -> set[str]:
    """Parts whose weights receive updates; none where adapters do instead.

    Under freeze_und and for modalities that are off, the original keeps requires_grad and gets gradients of exactly
    zero. Not training these parts gives the same weights without their optimizer states.
    """
    if config.lora is not None:
        return set()
    frozen = {"position_tables"}
    if freezing.freeze_llm:
        frozen.update(LLM)
    if freezing.freeze_vit:
        frozen.add("vit")
    if config.freeze_und:
        frozen.update(("embed_tokens", "und_expert", *UNDERSTANDING_VISION))
    if not config.visual_gen:
        frozen.update(GENERATION)
    if not config.visual_und:
        frozen.update(UNDERSTANDING_VISION)
    return set(PARTS - frozen)


def trains_by_name(config: BagelConfig, freezing: Freezing) -> Callable[[str], bool]:
    """Whether the parameter of a name receives updates. With adapters, only they do."""
    if config.lora is not None:
        return is_adapter
    parts = trainable_parts(config, freezing)
    return lambda name: part_of(name) in parts


def generation_twin(name: str) -> str | None:
    """The understanding parameter from which copy_init_moe fills a generation parameter; None for other names."""
    return name.replace("_moe_gen", "") if "_moe_gen" in name else None
