"""Training of 7B layers on one GPU capped at 24 GB: memory, speed and bytes moved, planner beside measurement.

One command, on a machine with a GPU: `python bench/gpu_depths.py [--json] [--preset zero3_cpu.json] [--cap 24]`. The
released model's layers, embedding and ViT with random weights, at the two largest depths whose states fit into this
host's memory and disk; the process may take no more of the GPU than the cap. What a layer adds is the difference of the
two depths, and 28 layers are extrapolated from it. All weights train, or with `--lora_rank` adapters beside them, which
`--base_precision` keeps in 4 or 8 bits. `--layers 1 2 --width 512` tries the command on a CPU, where no
device memory is seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

import torch  # noqa: E402

from bagel_ds.arguments.run_config import make_config  # noqa: E402
from bagel_ds.demo import write_demo  # noqa: E402
from bagel_ds.lora.targets import with_adapters  # noqa: E402
from bagel_ds.machine.device import device_type  # noqa: E402
from bagel_ds.memory.planner import MemoryOptions, MemoryPlan, plan_memory  # noqa: E402
from bagel_ds.memory.suggestions import resolved  # noqa: E402
from bagel_ds.model.shape.config import BagelConfig, VAEConfig  # noqa: E402
from bagel_ds.model.shape.parameters import parameter_sizes  # noqa: E402
from bagel_ds.units import GIB  # noqa: E402
from bench.host_memory import available_gib, gib  # noqa: E402
from bench.measured_run import measured_run  # noqa: E402
from bench.random_model import scaled_config, write_random_model  # noqa: E402

STEPS = 5  # the first two are not counted: kernels are chosen, memory is taken
DEMO_VAE, LARGEST_IMAGE = VAEConfig(channels=32), 192**2
WHOLE = BagelConfig().llm.num_hidden_layers


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--preset", default="zero3_cpu.json")
    parser.add_argument("--cap", type=float, default=24.0, help="GiB of the GPU that may be used (default 24)")
    parser.add_argument("--tokens", type=int, default=11520, help="of a pack (default 11520)")
    parser.add_argument("--lora_rank", type=int, default=0, help="train adapters of this rank (default: the weights)")
    parser.add_argument("--base_precision", default="full", help="nf4 or int8, with --lora_rank")
    parser.add_argument("--layers", type=int, nargs=2, help="the two depths (default: the largest that fit)")
    parser.add_argument("--width", type=int, help="hidden size (default: the released model's)")
    parser.add_argument("--work", type=Path, help="folder for models and swap files (default: a temporary one)")
    options = parser.parse_args()
    device = device_type()
    if device == "cpu" and options.width is None:
        raise SystemExit("no GPU was found; --layers 1 2 --width 512 --tokens 1024 tries the command on a CPU")
    with tempfile.TemporaryDirectory(dir=options.work, prefix="gpu_depths_") as folder:
        write_demo(Path(folder) / "demo")
        depths = options.layers or deepest_that_fit(Path(folder), options, device)
        runs = [measure(Path(folder), depth, options, device) for depth in depths]
    report = {"device": device_name(device), "preset": options.preset, "tokens": options.tokens, "runs": runs}
    report |= adapters(options)
    report["extrapolated"] = extrapolated(*runs) if len(runs) == 2 else None
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))
    if any("failed" in run for run in runs):
        sys.exit(1)


def network(depth: int, width: int | None) -> BagelConfig:
    """So many layers of the released model, or of a narrower one."""
    if width is not None:
        return scaled_config(width, depth, 16384)
    whole = BagelConfig()
    return dataclasses.replace(whole, llm=dataclasses.replace(whole.llm, num_hidden_layers=depth))


def deepest_that_fit(folder: Path, options: Any, device: str) -> list[int]:
    """The two largest depths that the planner lets into the cap, 85 % of the free memory and of the free disk."""
    host, disk = 0.85 * available_gib() * GIB, 0.85 * shutil.disk_usage(folder).free
    fitting = []
    for depth in range(1, WHOLE + 1):
        config = network(depth, options.width)
        plan = planned(config, options, device)
        weights = 2 * sum(parameter.numel for parameter in parameter_sizes(config))
        if plan.gpu_peak <= options.cap * GIB and plan.host_peak <= host and plan.nvme + weights <= disk:
            fitting.append(depth)
    if len(fitting) < 2:
        raise SystemExit(f"{options.preset}: fewer than two depths fit into {host / GIB:.0f} GiB of host memory")
    return fitting[-2:]


def planned(config: BagelConfig, options: Any, device: str) -> MemoryPlan:
    chosen = {"ds_config": options.preset, "max_num_tokens": options.tokens, "num_workers": 1, "ema": 0.95}
    run = make_config({**chosen, **adapters(options)})
    memory = MemoryOptions.of(run, 1, device=device, image_pixels=LARGEST_IMAGE, vae=DEMO_VAE)
    config = with_adapters(run.training, config)
    return plan_memory(config, resolved(options.preset, run, config, 1), memory)


def adapters(options: Any) -> dict[str, Any]:
    """The trainer's options for what `--lora_rank` and `--base_precision` ask for."""
    return {"lora_rank": options.lora_rank, "base_precision": options.base_precision} if options.lora_rank else {}


def measure(folder: Path, depth: int, options: Any, device: str) -> dict[str, Any]:
    """Train at this depth, and stop before anything is saved: a checkpoint is 20 bytes per parameter."""
    config, run = network(depth, options.width), folder / f"run_{depth}"
    parameters = write_random_model(folder / "model", folder / "demo" / "model", config)
    print(f"{depth} layers, {parameters:,} parameters: {STEPS} steps under {options.preset}", file=sys.stderr)
    words = [
        *("--ds_config", options.preset, "--nvme_path", folder / "nvme", "--model_path", folder / "model"),
        *("--dataset_config_file", folder / "demo" / "example.yaml", "--max_latent_size", 64),
        *("--results_dir", run, "--checkpoint_dir", run / "checkpoints", "--ignore_memory_plan", True),
        *("--finetune_from_hf", True, "--finetune_from_ema", True, "--total_steps", STEPS, "--save_every", 100),
        *("--log_every", 1, "--warmup_steps", 1, "--lr", 1e-5, "--ema", 0.95, "--num_workers", 1),
        *("--max_num_tokens", options.tokens, "--expected_num_tokens", options.tokens),
        *("--max_num_tokens_per_sample", options.tokens),
        *(word for name, value in adapters(options).items() for word in (f"--{name}", value)),
    ]
    cap = {"BAGEL_BENCH_DEVICE_GIB": str(options.cap)}
    found = measured_run(words, ranks=1, until="export", device=device, environment=cap)
    steps = metrics(run / "metrics.jsonl")
    shutil.rmtree(folder / "model")
    shutil.rmtree(folder / "nvme", ignore_errors=True)
    if found.code != 0 or len(steps) < STEPS:
        return {"layers": depth, "parameters": parameters, "failed": found.output[-3000:]}
    plan = planned(config, options, device)
    moved = {name: gib(value) for name, value in plan.traffic._asdict().items()}
    return {
        "layers": depth,
        "parameters": parameters,
        "device_gib": max((step.get("memory/device_reserved_gib", 0.0) for step in steps), default=0.0),
        "planned_device_gib": gib(plan.gpu_peak),
        "host_gib": gib(max(peak.host for peak in found.peaks.values())),
        "planned_host_gib": gib(plan.host_peak),
        "planned_moved_gib": moved,
        "step_seconds": statistics.median(step["perf/step_seconds"] for step in steps[2:]),
        "tokens_per_second": statistics.median(step["perf/tokens_per_sec"] for step in steps[2:]),
    }


def metrics(file: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def extrapolated(one: dict[str, Any], two: dict[str, Any]) -> dict[str, Any] | None:
    """What 28 layers would take if each added what the last of these did."""
    if "failed" in one or "failed" in two:
        return None
    layers = two["layers"] - one["layers"]
    names = ("device_gib", "planned_device_gib", "host_gib", "planned_host_gib", "step_seconds")
    added = {name: (two[name] - one[name]) / layers for name in names}
    whole = {name: round(two[name] + added[name] * (WHOLE - two["layers"]), 2) for name in names}
    return {"layers": WHOLE, "per_layer": {name: round(value, 3) for name, value in added.items()}, **whole}


def device_name(device: str) -> str:
    return torch.cuda.get_device_name() if device == "cuda" else "CPU"


def lines(report: dict[str, Any]) -> list[str]:
    found = [f"{report['device']}, {report['preset']}, packs of {report['tokens']:,} tokens; GiB, measured (planned)"]
    for run in report["runs"]:
        if "failed" in run:
            found.append(f"  {run['layers']} layers: failed: {run['failed'].strip().splitlines()[-1]}")
            continue
        found.append(
            f"  {run['layers']} layers: device {run['device_gib']:.2f} ({run['planned_device_gib']}), host "
            f"{run['host_gib']} ({run['planned_host_gib']}), {run['step_seconds']:.1f} s and "
            f"{run['tokens_per_second']:.0f} tokens/s, planned to move {run['planned_moved_gib']} per step"
        )
    whole = report["extrapolated"]
    if whole is not None:
        found.append(
            f"  {whole['layers']} layers, extrapolated: device {whole['device_gib']} ({whole['planned_device_gib']}), "
            f"host {whole['host_gib']} ({whole['planned_host_gib']}), {whole['step_seconds']} s"
        )
    return found


if __name__ == "__main__":
    main()
