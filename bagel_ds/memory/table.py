"""The table of docs/low_memory.md: which settings train BAGEL-7B-MoT on which machine.

Guarantees: every row is the planner's answer for one host. The first rows train adapters (LoRA). In the others settings
are full fine-tuning with the moving average if that fits with the guides' packs, else the best suggestion. Tokens are
the longest packs that fit with these settings, and the other numbers are for such packs. `bagel-ds memory --table`
prints the table; a test compares the page with it.
"""

from __future__ import annotations

import dataclasses

from bagel_ds.arguments.run_config import RunConfig, parse_arguments
from bagel_ds.lora.targets import with_adapters
from bagel_ds.memory.planner import MemoryOptions, MemoryPlan, plan_memory
from bagel_ds.memory.suggestions import PRESETS, resolved, suggestions
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.units import GIB

LORA, QLORA = ("--lora_rank 64",), ("--lora_rank 16", "--base_precision nf4")
MACHINES = ((1, 24), (2, 24), (4, 24), (2, 40), (4, 80), (8, 80))  # GPUs and GiB of each
HOST_GIB = (128, 256, 512)
NVME_GIB = (0, 1000)
TOKENS = 11520  # the guides' budget; settings are chosen for it
# With the GiB of RAM, and the tokens for which the preset is chosen: a card of 16 GB takes shorter packs.
LORA_MACHINES = (
    (1, 24, 64, LORA, TOKENS),
    (2, 24, 64, LORA, TOKENS),
    (1, 24, 32, QLORA, TOKENS),
    (1, 16, 32, QLORA, 4096),
)
MOST_TOKENS, TOKEN_STEP = 36864, 2304  # the default of --max_num_tokens; a divisor of both
WORKERS = 4

# Assumed transfer rates in GiB/s: one GPU's PCIe 4.0 x16, one good NVMe drive (reads and writes together).
PCIE, DRIVE = 20, 5

_HEADER = """\
| GPUs | RAM | NVMe | settings | tokens | GPU | host | NVMe used | moved per step | at least |
|---|---|---|---|---|---|---|---|---|---|"""


def table() -> str:
    """The table in Markdown; memory in GiB per GPU and per host. Machines with equal GPUs and answers share a row."""
    lines = [_HEADER]
    for count, gpu, host, adapters, wanted in LORA_MACHINES:
        lines.append(f"| {count} x {gpu} | {host} | none | {_with_adapters(count, gpu, host, adapters, wanted)} |")
    for count, gpu in MACHINES:
        found = {(host, nvme): _answer(count, gpu, host, nvme) for host in HOST_GIB for nvme in NVME_GIB}
        for answer in dict.fromkeys(found.values()):
            same = [machine for machine, other in found.items() if other == answer]
            lines += [f"| {count} x {gpu} | {hosts} | {nvme} | {answer} |" for hosts, nvme in _places(same)]
    return "\n".join(lines)


def _answer(count: int, gpu: float, host: float, nvme: float) -> str:
    """The cells of a row from the settings on."""
    words = best_settings(count, gpu, host, nvme)
    if words is None:
        return "does not fit | | | | | "
    tokens, plan = longest_packs(count, gpu, host, nvme, words)
    return f"{_markdown(words)} | {tokens:,} | {_numbers(plan, count)}"


def _with_adapters(count: int, gpu: float, host: float, adapters: tuple[str, ...], wanted: int) -> str:
    """The cells of a row for adapters, with the fastest preset that fits packs of `wanted` tokens."""
    for preset, *_ in PRESETS:
        words = (f"--ds_config {preset}", *adapters)
        if _plan(*_run(count, gpu, host, 0, words, wanted)).fits:
            tokens, plan = longest_packs(count, gpu, host, 0, words)
            return f"{_markdown(words)} | {tokens:,} | {_numbers(plan, count)}"
    return "does not fit | | | | | "


def _places(machines: list[tuple[int, int]]) -> list[tuple[str, str]]:
    """The RAM and NVMe columns of machines with the same answer: sizes of RAM with equal NVMe sizes share a row."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for host in dict.fromkeys(host for host, _ in machines):
        rows.setdefault(tuple(nvme for other, nvme in machines if other == host), []).append(host)
    return [(", ".join(map(str, hosts)), " or ".join(str(n or "none") for n in nvmes)) for nvmes, hosts in rows.items()]


def best_settings(count: int, gpu: float, host: float, nvme: float) -> tuple[str, ...] | None:
    """Arguments that train the 7B with `TOKENS` tokens per pack on `count` GPUs of one host; None if none fit."""
    for start in ("zero2.json", "zero3.json"):
        words = (f"--ds_config {start}",)
        config, run = _run(count, gpu, host, nvme, words, TOKENS)
        if _plan(config, run).fits:
            return words
    found = suggestions(BagelConfig(), config, run, count=1, adapters=False)
    if not found:
        return None
    settings = found[0].settings
    return settings if settings[0].startswith("--ds_config") else (*words, *settings)


def longest_packs(
    count: int, gpu: float, host: float, nvme: float, settings: tuple[str, ...]
) -> tuple[int, MemoryPlan]:
    """The longest packs that fit with these settings, in tokens, and their plan."""
    settings = tuple(setting for setting in settings if "max_num_tokens" not in setting)
    for tokens in range(MOST_TOKENS, 0, -TOKEN_STEP):
        plan = _plan(*_run(count, gpu, host, nvme, settings, tokens))
        if plan.fits:
            return tokens, plan
    raise AssertionError(f"{settings} fitted {TOKENS} tokens")


def _run(
    count: int, gpu: float, host: float, nvme: float, settings: tuple[str, ...], tokens: int
) -> tuple[RunConfig, MemoryOptions]:
    words = [word for setting in settings for word in setting.split()]
    config = parse_arguments(["--max_num_tokens", str(tokens), "--num_workers", str(WORKERS), *words])
    return config, MemoryOptions.of(config, count, gpu_memory=gpu, host_memory=host, nvme=nvme)


def _plan(config: RunConfig, run: MemoryOptions) -> MemoryPlan:
    model = dataclasses.replace(BagelConfig(), freeze_und=config.training.freeze_und)
    model = with_adapters(config.training, model)
    return plan_memory(model, resolved(config.training.ds_config, config, model, run.world_size), run)


def _markdown(settings: tuple[str, ...]) -> str:
    shown = [setting.removeprefix("--ds_config ") for setting in settings if "max_num_tokens" not in setting]
    return " ".join(f"`{setting}`" for setting in shown)


def _numbers(plan: MemoryPlan, gpus: int) -> str:
    nvme = f"{plan.nvme / GIB:.0f}" if plan.nvme else ""
    traffic = plan.traffic
    moved = ", ".join(f"{name} {size / GIB:.0f}" for name, size in traffic._asdict().items() if size)
    seconds = traffic.pcie / GIB / (PCIE * gpus) + traffic.nvme / GIB / DRIVE
    least = f"{seconds:.0f} s" if seconds >= 0.5 else ""
    return f"{plan.gpu_peak / GIB:.0f} | {plan.host_peak / GIB:.0f} | {nvme} | {moved} | {least}"
