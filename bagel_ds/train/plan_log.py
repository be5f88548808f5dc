"""What a run logs before it starts: parameters, data, memory, settings and, if asked for, its next packs."""

from __future__ import annotations

import logging
import math
from pathlib import Path
from typing import Any, Callable

import torch.distributed as dist

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.data.inspect.packs import first_packs, pack_text
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.lora import is_adapter
from bagel_ds.model.shape.parts import part_of
from bagel_ds.train.memory_plan import plan_lines
from bagel_ds.train.prepare import Prepared, parameter_shapes, trainable

logger = logging.getLogger("bagel_ds")


def log_plan(config: RunConfig, prepared: Prepared) -> None:
    """Log the plan of the run."""
    parameters = describe_parameters(prepared.model, trainable(config, prepared.model))
    notes = [*config.notes, *prepared.notes]
    for line in [*notes, *parameters, *prepared.data.describe(), *plan_lines(prepared.memory)]:
        logger.info(line)
    if (held_out := prepared.held_out) is not None:
        every, name = config.training.val_every, config.training.val_config
        packs = len(held_out.packs)
        logger.info("held-out data: %d rows of %s in %d packs, every %d steps", held_out.rows, name, packs, every)
    if (prompts := prepared.prompts) is not None:
        every, name = config.training.sample_every, config.training.sample_prompts
        logger.info("samples: %d prompts of %s, every %d steps", len(prompts.jobs), name, every)
    ranks = dist.get_world_size()
    logger.info(
        "%d rank(s), ZeRO stage %d, %s; %d packs of up to %s tokens per step",
        ranks,
        prepared.zero.stage,
        config.training.precision,
        ranks * config.training.gradient_accumulation_steps,
        f"{config.data.max_num_tokens:,}",
    )


def log_packs(config: RunConfig, prepared: Prepared, plan_state: dict[str, Any] | None) -> None:
    """Log the next --debug_batches packs of all ranks in readable form, also to results_dir/debug_batches.txt."""
    lines: list[str] = []
    for pack in first_packs(prepared.data, config.training.debug_batches, plan_state):
        lines += [*pack_text(pack, config.training.timestep_shift), ""]
    logger.info("the next %d packs:\n\n%s", config.training.debug_batches, "\n".join(lines))
    path = Path(config.training.results_dir, "debug_batches.txt")
    path.write_text("\n".join(lines), encoding="utf-8", errors="backslashreplace")


def describe_parameters(model: BagelConfig, trains: Callable[[str], bool]) -> list[str]:
    """A table of the network's parts, their sizes and whether they train."""
    counts: dict[tuple[str, bool], int] = {}
    for name, shape in parameter_shapes(model.unquantized()).items():
        kind = f"{part_of(name)}, LoRA" if is_adapter(name) else part_of(name), trains(name)
        counts[kind] = counts.get(kind, 0) + math.prod(shape)
    total, training = sum(counts.values()), sum(count for (_, learns), count in counts.items() if learns)
    lines = [f"parameters: {total:,}, of which {training:,} train"]
    return lines + [
        f"  {part:<16} {count:>16,}  {'trains' if learns else 'frozen'}" for (part, learns), count in counts.items()
    ]
