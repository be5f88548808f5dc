"""The table of docs/low_memory.md: which settings train BAGEL-7B-MoT on which machine.

Guarantees: every line is the planner's own answer for one host: full fine-tuning with the moving average where that
fits, else the best that does. `bagel-ds memory --table` prints it; a test compares the page with it.
"""

from __future__ import annotations

from bagel_ds.config import RunConfig, make_config
from bagel_ds.model.config import BagelConfig
from bagel_ds.units import GIB
from bagel_ds.zero.memory import MemoryOptions, MemoryPlan, plan_memory
from bagel_ds.zero.memory_suggest import resolved, suggestions

MACHINES = ((1, 24), (2, 24), (4, 24), (2, 40), (4, 80), (8, 80))  # GPUs and GiB of each
HOST_GIB = (128, 256, 512)
NVME_GIB = (0, 1000)
TOKENS = 11520  # the guides' budget
WORKERS = 4

# What moving is taken to run at, GiB/s: one GPU's PCIe 4.0 x16, one good NVMe drive (reads and writes together).
PCIE, DRIVE = 20, 5

_HEADER = """\
| GPUs | RAM | NVMe | settings | GPU | host | NVMe used | moved per step | at least |
|---|---|---|---|---|---|---|---|---|"""


def table() -> str:
    """Markdown; memory in GiB, per GPU and per host."""
    lines = [_HEADER]
    for count, gpu in MACHINES:
        for host in HOST_GIB:
            for nvme in NVME_GIB:
                settings, plan = best_settings(count, gpu, host, nvme)
                machine = f"| {count} x {gpu} | {host} | {nvme or 'none'} |"
                lines.append(
                    f"{machine} {settings} | {_numbers(plan, count)} |" if plan else f"{machine} {settings} | | | | |"
                )
    return "\n".join(lines)


def best_settings(count: int, gpu: float, host: float, nvme: float) -> tuple[str, MemoryPlan | None]:
    """The arguments, as Markdown, to train the 7B with `TOKENS` tokens per pack on `count` GPUs of one host."""
    model = BagelConfig()
    for start in ("zero2.json", "zero3.json"):
        config = _config(start)
        run = MemoryOptions.of(config, count, gpu_memory=gpu, host_memory=host, nvme=nvme)
        plan = plan_memory(model, resolved(start, config, model, count), run)
        if plan.fits:
            return f"`{start}`", plan
    found = suggestions(model, config, run, count=1)
    if not found:
        return "does not fit", None
    words = [word.removeprefix("--ds_config ") for word in found[0].settings]
    if not found[0].settings[0].startswith("--ds_config"):
        words.insert(0, start)
    return " ".join(f"`{word}`" for word in words), found[0].plan


def _config(preset: str) -> RunConfig:
    return make_config({"ds_config": preset, "max_num_tokens": TOKENS, "num_workers": WORKERS})


def _numbers(plan: MemoryPlan, gpus: int) -> str:
    nvme = f"{plan.nvme / GIB:.0f}" if plan.nvme else ""
    traffic = plan.traffic
    moved = ", ".join(f"{name} {size / GIB:.0f}" for name, size in traffic._asdict().items() if size)
    seconds = traffic.pcie / GIB / (PCIE * gpus) + traffic.nvme / GIB / DRIVE
    least = f"{seconds:.0f} s" if seconds >= 0.5 else ""
    return f"{plan.gpu_peak / GIB:.0f} | {plan.host_peak / GIB:.0f} | {nvme} | {moved} | {least}"
