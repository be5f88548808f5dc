"""Host memory of load, step, export and resume, ours beside the naive way, two ranks on CPU.

One command: `python bench/host_memory.py [--json] [--parameters 1e9] [--work DIR]`. It writes models with random
weights in the real layout, trains two steps on the demo's data under each preset, saves, resumes for one step, and
removes everything. Memory is what no file backs (anonymous and shared), of the launcher and all ranks together. A model
of 1 B parameters takes about 28 GiB with the CPU preset and 12 with the optimizer on NVMe; where a preset (or the naive
way) needs more than there is, it gets a smaller model, and the report says so. Disk: about 45 bytes per parameter.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, Callable

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

from bagel_ds.arguments.run_config import make_config  # noqa: E402
from bagel_ds.demo import write_demo  # noqa: E402
from bagel_ds.memory.planner import MemoryOptions, plan_memory  # noqa: E402
from bagel_ds.memory.suggestions import resolved  # noqa: E402
from bagel_ds.model.shape.config import BagelConfig, VAEConfig  # noqa: E402
from bagel_ds.model.shape.parameters import parameter_sizes  # noqa: E402
from bagel_ds.units import GIB  # noqa: E402
from bench.measured_run import Measured, measured_run  # noqa: E402
from bench.random_model import scaled_config, write_random_model  # noqa: E402

RANKS, TOKENS, VOCABULARY = 2, 1024, 16384
PRESETS = ("zero3.json", "zero3_cpu.json", "zero3_nvme.json", "zero3_nvme_all.json")
DEMO_VAE = VAEConfig(channels=32)
# Layers by width of the networks to choose from: 64 million to 1.0 billion parameters.
SIZES = {512: (4,), 768: (4, 8), 1024: (8, 10, 12), 1280: (10, 12, 14, 16)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--parameters", type=float, default=1e9, help="about so many (default 1e9)")
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--limit", type=float, help="GiB this may take (default: 0.8 of what is available)")
    parser.add_argument("--work", type=Path, help="folder for models and checkpoints (default: a temporary one)")
    options = parser.parse_args()
    limit = options.limit or 0.8 * available_gib()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="host_memory_") as folder:
        report = measure(Path(folder), options.presets, options.parameters, limit)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))


def measure(folder: Path, presets: list[str], wanted: float, limit: float) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        write_demo(folder / "demo")
    report: dict[str, Any] = {"ranks": RANKS, "asked_parameters": wanted, "available_gib": round(limit, 1)}
    report["presets"] = {preset: measure_preset(folder, preset, wanted, limit) for preset in presets}
    config = largest_that_fits(wanted, naive_need, limit)
    say(f"the naive way, {size_of(config):,} parameters: load, export")
    words = [model_folder(folder, config), folder / "naive.safetensors"]
    report["naive"] = {"parameters": size_of(config), **naive_numbers(measured_run(words, script="naive_memory.py"))}
    return report


def measure_preset(folder: Path, preset: str, wanted: float, limit: float) -> dict[str, Any]:
    config = largest_that_fits(wanted, lambda config: planned(config, preset), limit)
    model = model_folder(folder, config)
    say(f"{preset}, {size_of(config):,} parameters: load, two steps, export")
    first = measured_run(arguments(folder, model, preset, 2))
    say(f"{preset}: resume")
    # Not saved again: a checkpoint is 20 bytes per parameter.
    second = measured_run(arguments(folder, model, preset, 3), until="export") if first.code == 0 else first
    for leftover in ("run", "nvme"):
        shutil.rmtree(folder / leftover, ignore_errors=True)
    return {"parameters": size_of(config), **numbers(first, second, planned(config, preset))}


def model_folder(folder: Path, config: BagelConfig) -> Path:
    """A model of this shape with random weights, written once."""
    model = folder / f"model_{size_of(config)}"
    if not model.exists():
        write_random_model(model, folder / "demo" / "model", config)
    return model


def naive_numbers(naive: Measured) -> dict[str, Any]:
    if naive.code != 0:
        return {"failed": naive.output[-3000:]}
    stays = naive.peaks["sharded"].last
    return {
        "after_load_gib": gib(stays),
        "load_gib": gib(naive.peak("load", "loaded")),
        "load_over_after_load": round(naive.peak("load", "loaded") / stays, 3),
        "export_gib": gib(naive.peak("export")),
        "export_over_before": round(naive.peak("export") / stays, 3),
    }


def numbers(first: Measured, second: Measured, plan: float) -> dict[str, Any]:
    for run in (first, second):
        if run.code != 0:
            return {"failed": run.output[-3000:]}
    settled = first.peaks["loaded"].last
    return {
        "states_gib": gib(sum(first.held)),
        "after_load_gib": gib(settled),
        "load_gib": gib(first.peak("load", "loaded")),
        "load_over_after_load": round(first.peak("load", "loaded") / settled, 3),
        "step_gib": gib(first.peak("step")),
        "export_gib": gib(first.peak("export")),
        "export_over_before": round(first.peak("export") / first.peaks["step"].last, 3),
        "resume_load_gib": gib(second.peak("load", "loaded")),
        "resume_over_after_load": round(second.peak("load", "loaded") / second.peaks["loaded"].last, 3),
        "resume_step_gib": gib(second.peak("step")),
        "mapped_file_pages_gib": gib(max(peak.file for peak in first.peaks.values())),
        "planned_gib": gib(plan),
        "planned_over_measured": round(plan / max(peak.host for peak in first.peaks.values()), 3),
        "seconds": round(first.seconds + second.seconds),
    }


def arguments(folder: Path, model: Path, preset: str, steps: int) -> list[object]:
    run = folder / "run"
    return [
        *("--ds_config", preset, "--nvme_path", folder / "nvme"),
        *("--dataset_config_file", folder / "demo" / "example.yaml", "--model_path", model, "--max_latent_size", 64),
        *("--results_dir", run, "--checkpoint_dir", run / "checkpoints", "--auto_resume", True),
        *("--finetune_from_hf", True, "--finetune_from_ema", True, "--total_steps", steps, "--save_every", 100),
        *("--log_every", 1, "--warmup_steps", 1, "--lr", 1e-5, "--ema", 0.95, "--num_workers", 0),
        *("--max_num_tokens", TOKENS, "--expected_num_tokens", 896, "--max_num_tokens_per_sample", 896),
    ]


def planned(config: BagelConfig, preset: str) -> float:
    """Bytes of host memory that the planner predicts for these runs."""
    run = make_config({"ds_config": preset, "max_num_tokens": TOKENS, "num_workers": 0, "ema": 0.95})
    options = MemoryOptions.of(run, RANKS, device="cpu", image_pixels=192**2, vae=DEMO_VAE)
    return plan_memory(config, resolved(preset, run, config, RANKS), options).host_peak


def naive_need(config: BagelConfig) -> float:
    """Bytes of two fp32 networks and the file's tensors on every rank."""
    return 10.5 * size_of(config) * RANKS + GIB


def largest_that_fits(wanted: float, need: Callable[[BagelConfig], float], limit: float) -> BagelConfig:
    """The network nearest to `wanted` parameters of those whose `need`, in bytes, is below `limit` GiB."""
    configs = [scaled_config(width, layers, VOCABULARY) for width in SIZES for layers in SIZES[width]]
    fitting = [config for config in configs if need(config) <= limit * GIB]
    if not fitting:
        raise SystemExit(f"{limit:.1f} GiB may be used: too little for the smallest network, {size_of(configs[0]):,}")
    return min(fitting, key=lambda config: abs(size_of(config) - wanted))


def size_of(config: BagelConfig) -> int:
    return sum(parameter.numel for parameter in parameter_sizes(config))


def available_gib() -> float:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable"):
            return int(line.split()[1]) / 2**20
    raise SystemExit("/proc/meminfo does not say MemAvailable: this benchmark needs Linux")


def lines(report: dict[str, Any]) -> list[str]:
    asked, limit = report["asked_parameters"], report["available_gib"]
    found = [
        f"{report['ranks']} ranks on CPU, {asked:,.0f} parameters asked for, as near to that as fits into {limit} GiB; "
        "GiB of all processes together"
    ]
    naive = report["naive"]
    if "failed" in naive:
        found.append(f"the naive way: failed: {naive['failed'].strip().splitlines()[-1]}")
    else:
        found += [
            f"the naive way (weights and average alone, no optimizer), {naive['parameters']:,} parameters: after load "
            f"{naive['after_load_gib']}",
            f"  load {naive['load_gib']} ({naive['load_over_after_load']}x what stays)",
            f"  export {naive['export_gib']} ({naive['export_over_before']}x of before)",
        ]
    for preset, values in report["presets"].items():
        if "failed" in values:
            found.append(f"{preset}: failed: {values['failed'].strip().splitlines()[-1]}")
            continue
        found += [
            f"{preset}, {values['parameters']:,} parameters: after load {values['after_load_gib']}, states "
            f"{values['states_gib']}",
            f"  load {values['load_gib']} ({values['load_over_after_load']}x what stays)",
            f"  step {values['step_gib']} (planned {values['planned_gib']}, {values['planned_over_measured']}x)",
            f"  export {values['export_gib']} ({values['export_over_before']}x of before)",
            f"  resume: load {values['resume_load_gib']} ({values['resume_over_after_load']}x), step "
            f"{values['resume_step_gib']}",
        ]
    return found


def gib(size: float) -> float:
    return round(size / GIB, 3)


def say(text: str) -> None:
    print(f"[host_memory] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
