"""Which settings would make a run fit, best first.

Guarantees: every suggestion was planned and fits; none contains another (a setting is named only where it is needed).
"Best" is the least harm to the result and then to the speed: offload before fewer tokens, those before giving up the
moving average, that before frozen parts; NVMe costs more than host memory, bf16 masters cost accuracy.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Iterator, NamedTuple

from bagel_ds.config import RunConfig
from bagel_ds.errors import UserError
from bagel_ds.model.config import BagelConfig
from bagel_ds.zero.config import resolve_ds_config
from bagel_ds.zero.memory import MemoryOptions, MemoryPlan, plan_memory
from bagel_ds.zero.memory_parameters import parameter_sizes
from bagel_ds.zero.nvme import fit_buffers

# Presets in the order in which they are tried, with the harm of taking them.
PRESETS = (
    ("zero2.json", 0.0),
    ("zero3.json", 0.5),
    ("zero2_cpu.json", 1.5),
    ("zero3_cpu.json", 2.0),
    ("zero3_nvme.json", 7.0),
    ("zero3_nvme_all.json", 8.0),
    ("zero3_cpu_bf16.json", 9.0),
)
TOKENS = ((1.0, 0.0), (0.75, 2.5), (0.5, 6.0), (0.25, 14.0))
LEAST_TOKENS = 2048
PLACEHOLDER = "nvme"  # stands for --nvme_path while only planning


@dataclass(frozen=True)
class Suggestion:
    settings: tuple[str, ...]  # as arguments of the trainer
    plan: MemoryPlan

    def to_json(self) -> dict[str, Any]:
        keys = ("gpu_peak_gib", "host_peak_gib", "nvme_gib", "step_traffic_gib")
        found = self.plan.to_json()
        return {"settings": list(self.settings), **{key: found[key] for key in keys}}


def resolved(
    name: str, config: RunConfig, model: BagelConfig, world_size: int, ranks_per_host: int | None = None
) -> dict[str, Any]:
    """The DeepSpeed configuration of a run that is only planned: `--nvme_path` may be missing."""
    if config.training.nvme_path is None:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, nvme_path=PLACEHOLDER))
    ds, _ = resolve_ds_config(name, config, world_size, ranks_per_host)
    training = config.training
    freezes = training.freeze_llm or training.freeze_vit or model.freeze_und
    frozen = freezes or not (model.visual_gen and model.visual_und)
    largest = max(parameter.numel for parameter in parameter_sizes(model))
    fit_buffers(ds, largest, world_size, frozen and training.activation_checkpointing != "none")
    return ds


def suggestions(model: BagelConfig, config: RunConfig, run: MemoryOptions, count: int = 5) -> list[Suggestion]:
    """Up to `count` changed runs that fit the budgets of `run`, best first."""
    found: list[tuple[float, frozenset[str], Suggestion]] = []
    for harm, settings, candidate in sorted(_candidates(model, config, run), key=lambda entry: entry[0]):
        changed = frozenset(settings)
        if not changed or any(better <= changed for _, better, _ in found):
            continue
        try:
            plan = candidate.plan(run.world_size)
        except UserError:
            continue  # this preset can't be combined with the run's other arguments
        if plan.fits:
            found.append((harm, changed, Suggestion(settings, plan)))
            if len(found) == count:
                break
    return [suggestion for *_, suggestion in found]


class _Candidate(NamedTuple):
    model: BagelConfig
    config: RunConfig
    run: MemoryOptions
    preset: str

    def plan(self, world_size: int) -> MemoryPlan:
        ds_config = resolved(self.preset, self.config, self.model, world_size, self.run.ranks_per_host)
        return plan_memory(self.model, ds_config, self.run)


def _candidates(
    model: BagelConfig, config: RunConfig, run: MemoryOptions
) -> Iterator[tuple[float, tuple[str, ...], _Candidate]]:
    """Every combination with its harm and the arguments that differ from the run as it is."""
    present = config.training.ds_config
    presets = [
        (present, 0.0),
        *((name, harm) for name, harm in PRESETS if name.removesuffix(".json") != _stem(present)),
    ]
    averages = [(run.ema, 0.0)] + ([(False, 4.5)] if run.ema else [])
    frozen = _freezings(model, run)
    for (preset, a), (share, b), (ema, c), (freeze, d) in itertools.product(presets, TOKENS, averages, frozen):
        tokens = max(LEAST_TOKENS, int(run.max_num_tokens * share) // 256 * 256) if share < 1 else run.max_num_tokens
        if tokens >= run.max_num_tokens and share < 1:
            continue
        settings = [f"--ds_config {preset}"] if preset != present else []
        settings += [f"--max_num_tokens {tokens}"] if share < 1 else []
        settings += ["--ema 0"] if ema != run.ema else []
        settings += [f"--{freeze} True"] if freeze else []
        changed_run = dataclasses.replace(
            run,
            max_num_tokens=tokens,
            ema=ema,
            freeze_llm=run.freeze_llm or freeze == "freeze_llm",
        )
        changed_model = dataclasses.replace(model, freeze_und=model.freeze_und or freeze == "freeze_und")
        yield a + b + c + d, tuple(settings), _Candidate(changed_model, config, changed_run, preset)


def _freezings(model: BagelConfig, run: MemoryOptions) -> list[tuple[str, float]]:
    """What could be frozen besides what is: "" for nothing. Only what leaves something to train."""
    found = [("", 0.0)]
    if model.visual_gen and not model.freeze_und and not run.freeze_llm:
        found.append(("freeze_und", 10.0))
    if not run.freeze_llm and (model.visual_gen or (model.visual_und and not model.freeze_und)):
        found.append(("freeze_llm", 30.0))
    return found


def _stem(preset: str) -> str:
    return preset.rpartition("/")[2].removesuffix(".json")
