"""Which settings would make a run fit, best first.

Guarantees: every suggestion was planned and fits, and no suggestion is dominated by another (such as the same with
fewer tokens), so the list shows different ways out. The order is by harm to the result, then to speed: offload, a
moving average in bf16, fewer tokens, adapters (LoRA), no moving average, frozen parts, bf16 masters. NVMe ranks behind
host memory.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Iterable, NamedTuple

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.errors import UserError
from bagel_ds.lora.targets import with_adapters
from bagel_ds.memory.planner import MemoryOptions, MemoryPlan, plan_memory
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parameters import parameter_sizes
from bagel_ds.model.shape.parts import trainable_parts
from bagel_ds.zero.config.resolve import fit_to_network, resolve_ds_config
from bagel_ds.zero.config.settings import ZeroSettings

# Presets with what they cost in speed and in accuracy (bench/bf16_masters.py): split masters nothing, and moments in
# fewer bits little.
PRESETS = (
    ("zero2.json", 0.0, 0.0),
    ("zero3.json", 0.5, 0.0),
    ("zero2_cpu.json", 1.5, 0.0),
    ("zero2_cpu_split.json", 1.5, 0.0),
    ("zero2_cpu_split_bf16.json", 1.5, 0.5),
    ("zero2_cpu_split_8bit.json", 1.5, 1.5),
    ("zero3_split.json", 0.75, 0.0),
    ("zero3_cpu.json", 2.0, 0.0),
    ("zero3_cpu_split.json", 2.0, 0.0),
    ("zero3_cpu_split_bf16.json", 2.0, 0.5),
    ("zero3_cpu_split_8bit.json", 2.0, 1.5),
    ("zero3_nvme_split.json", 7.0, 0.0),
    ("zero3_nvme.json", 7.5, 0.0),  # in fp32, too
    ("zero3_nvme_all.json", 8.0, 0.0),
)
TOKENS = ((0.75, 2.5), (0.5, 6.0), (0.25, 14.0))
LEAST_TOKENS = 2048
PARTS = {
    "und_expert": "the understanding expert",
    "gen_expert": "the generation expert",
    "embed_tokens": "the text embedding",
    "lm_head": "the text head",
    "vit": "the ViT",
    "connector": "the connector",
    "time_embedder": "the timestep embedding",
    "vae2llm": "the latents' projections",
    "llm2vae": "the latents' projections",
}
LORA_RANK = 64  # of published recipes (docs/lora.md)
LORA_HARM = 4.0  # before NVMe, frozen parts and bf16 masters; after what still trains everything on these cards
NF4_HARM = 1.0  # of 4 bits for the weights beside adapters; less than moving them through host memory
PLACEHOLDER = "nvme"  # stands for --nvme_path while only planning


@dataclass(frozen=True)
class Suggestion:
    settings: tuple[str, ...]  # arguments of the trainer
    plan: MemoryPlan
    trains: str = ""  # what still trains; "" if the settings freeze nothing

    def to_json(self) -> dict[str, Any]:
        keys = ("gpu_peak_gib", "host_peak_gib", "nvme_gib", "step_traffic_gib")
        found = self.plan.to_json()
        return {"settings": list(self.settings), "trains": self.trains, **{key: found[key] for key in keys}}


def resolved(
    name: str, config: RunConfig, model: BagelConfig, world_size: int, ranks_per_host: int | None = None
) -> ZeroSettings:
    """The settings of a run that is only planned, so `--nvme_path` may be missing."""
    if config.training.nvme_path is None:
        config = dataclasses.replace(config, training=dataclasses.replace(config.training, nvme_path=PLACEHOLDER))
    ds, _ = resolve_ds_config(name, config, world_size, ranks_per_host)
    return fit_to_network(ds, model, config.training, world_size)


def suggestions(
    model: BagelConfig, config: RunConfig, run: MemoryOptions, count: int = 6, adapters: bool = True
) -> list[Suggestion]:
    """Up to `count` changed runs that fit the budgets of `run`, best first; with `adapters` also those with LoRA.

    `run` is `MemoryOptions.of(config, ...)`. Its budgets and its machine are kept; the rest follows the changes.
    """
    found: list[tuple[tuple[_Change, ...], Suggestion]] = []
    as_it_is, *candidates = sorted(itertools.product(*_axes(model, config, run, adapters)), key=_harm)
    assert not _settings(as_it_is)
    for changes in candidates:
        if any(_is_no_worse(better, changes) for better, _ in found):
            continue
        if (kind := _adapters(changes)) and any(_adapters(better) == kind for better, _ in found):
            continue  # their variants would hide the other ways
        try:
            plan = _plan(model, config, run, changes)
        except UserError:
            continue  # this preset can't be combined with the run's other arguments
        if plan.fits:
            found.append((changes, Suggestion(_settings(changes), plan, _still_trains(model, run, changes))))
            if len(found) == count:
                break
    return [suggestion for _, suggestion in found]


class _Change(NamedTuple):
    """A change of one setting, or none."""

    settings: dict[str, Any]  # the trainer's options; empty: unchanged
    cost: tuple[float, ...]  # harm, for example to speed and to accuracy; compared entry by entry


_AS_IT_IS = _Change({}, (0.0,))
_NF4 = {"base_precision": "nf4"}


def _axes(model: BagelConfig, config: RunConfig, run: MemoryOptions, adapters: bool) -> list[list[_Change]]:
    """The possible changes of each setting; each list begins with no change."""
    return [
        _presets(config.training.ds_config),
        _tokens(run.max_num_tokens),
        _checkpointing(run.activation_checkpointing),
        _averages(run),
        _trained(model, run, adapters),
    ]


def _presets(present: str) -> list[_Change]:
    others = [entry for entry in PRESETS if entry[0].removesuffix(".json") != _stem(present)]
    return [_Change({}, (0.0, 0.0)), *(_Change({"ds_config": name}, (slow, loss)) for name, slow, loss in others)]


def _tokens(present: int) -> list[_Change]:
    fewer = {max(LEAST_TOKENS, int(present * share) // 256 * 256): harm for share, harm in reversed(TOKENS)}
    return [_AS_IT_IS, *(_Change({"max_num_tokens": n}, (harm,)) for n, harm in fewer.items() if n < present)]


def _checkpointing(present: str) -> list[_Change]:
    found = [("full", 1.0)] if present == "none" else []
    found += [("offload", 1.5)] if present != "offload" else []
    return [_AS_IT_IS, *(_Change({"activation_checkpointing": mode}, (harm,)) for mode, harm in found)]


def _averages(run: MemoryOptions) -> list[_Change]:
    found: list[_Change] = [_AS_IT_IS]
    if run.ema and run.ema_bytes > 2:
        found.append(_Change({"ema_dtype": "bf16"}, (2.25,)))
    if run.ema and not (run.samples is not None and run.samples.average):  # these need it
        found.append(_Change({"ema": 0}, (4.5,)))
    return found


def _trained(model: BagelConfig, run: MemoryOptions, adapters: bool) -> list[_Change]:
    """Adapters instead of the weights, or what else could be frozen such that something still trains.

    Neither of the two kinds is worse than the other in every way.
    """
    found = [_Change({}, (0.0, 0.0))]
    if model.lora is not None:
        return found if model.quantization else [*found, _Change(_NF4, (NF4_HARM, 0.0))]
    if adapters:
        found.append(_Change({"lora_rank": LORA_RANK}, (LORA_HARM, 0.0)))
        found.append(_Change({"lora_rank": LORA_RANK, **_NF4}, (LORA_HARM + NF4_HARM, 0.0)))
    if model.visual_gen and not model.freeze_und and not run.freeze_llm:
        found.append(_Change({"freeze_und": True}, (0.0, 10.0)))
    if not run.freeze_llm and (model.visual_gen or (model.visual_und and not model.freeze_und)):
        found.append(_Change({"freeze_llm": True}, (0.0, 30.0)))
    return found


def _adapters(changes: Iterable[_Change]) -> str:
    """Which kind of adapters the changes add: "full" or "nf4" for the precision of the base; "" for none."""
    return next((c.settings.get("base_precision", "full") for c in changes if "lora_rank" in c.settings), "")


def _harm(changes: Iterable[_Change]) -> float:
    return sum(sum(change.cost) for change in changes)


def _settings(changes: Iterable[_Change]) -> tuple[str, ...]:
    return tuple(f"--{name} {value}" for change in changes for name, value in change.settings.items())


def _is_no_worse(one: tuple[_Change, ...], other: tuple[_Change, ...]) -> bool:
    pairs = zip(one, other, strict=True)
    return all(a <= b for first, second in pairs for a, b in zip(first.cost, second.cost, strict=True))


def _plan(model: BagelConfig, config: RunConfig, run: MemoryOptions, changes: tuple[_Change, ...]) -> MemoryPlan:
    values = {name: value for change in changes for name, value in change.settings.items()}
    tokens = {"max_num_tokens": values.pop("max_num_tokens")} if "max_num_tokens" in values else {}
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, **tokens),
        training=dataclasses.replace(config.training, **values),
    )
    model = dataclasses.replace(model, freeze_und=model.freeze_und or config.training.freeze_und, lora=None)
    model = with_adapters(config.training, model)
    changed = MemoryOptions.of(config, run.world_size)
    run = dataclasses.replace(run, **{name: getattr(changed, name) for name in _FOLLOWING})
    settings = resolved(config.training.ds_config, config, model, run.world_size, run.ranks_per_host)
    return plan_memory(model, settings, run)


def _still_trains(model: BagelConfig, run: MemoryOptions, changes: Iterable[_Change]) -> str:
    """ "the ViT and the connector: 0.4 of 14.6 billion parameters", or "" if the changes freeze nothing."""
    changed = {name for change in changes for name in change.settings}
    frozen = {name for name in changed if name.startswith("freeze")}
    if "lora_rank" in changed:
        base = ", which are kept in 4 bits" if "base_precision" in changed else ""
        return f"adapters of rank {LORA_RANK} in the language model's layers, not the weights themselves{base}"
    if not frozen:
        return ""
    model = dataclasses.replace(model, freeze_und=model.freeze_und or "freeze_und" in frozen)
    freezing = run.freezing._replace(freeze_llm=run.freeze_llm or "freeze_llm" in frozen)
    parameters = parameter_sizes(model, freezing)
    parts = trainable_parts(model, freezing)
    names = list(dict.fromkeys(name for part, name in PARTS.items() if part in parts))
    listed = " and ".join(filter(None, [", ".join(names[:-1]), names[-1]]))
    trained, every = (sum(p.numel for p in parameters if p.trains or whole) for whole in (False, True))
    count = f"{trained / 1e9:.1f}" if trained >= 1e8 else f"{trained / 1e6:.0f} million"
    return f"{listed}: {count} of {every / 1e9:.1f} billion parameters"


_FOLLOWING = ("max_num_tokens", "activation_checkpointing", "freeze_llm", "ema", "ema_bytes")


def _stem(preset: str) -> str:
    return preset.rpartition("/")[2].removesuffix(".json")
