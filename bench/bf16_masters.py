"""What states in fewer bits cost: the same run with and without them, at several learning rates.

One command: `python bench/bf16_masters.py [--json] [--steps 100] [--lrs 2e-3 2e-5 2e-4] [--ways NAME ...]`. It trains
the demo's network for a while (`--warm` steps), so that weights and gradients are those of a trained one, and goes on
from there with `zero3_cpu.json` (fp32 masters) and with each of these ways at each learning rate, on one CPU process
and on the same packs: split masters with moments in fp32, bf16 and 8 bits, and DeepSpeed's masters and moments in bf16
(`bf16 masters`, which no preset has); at the first rate also with `zero3.json` (fp32 masters again, torch's AdamW in
place of DeepSpeed's: what the order of roundings alone does to a run).

Distance is |w - w_fp32| / |w_fp32 - w_start| over all weights, progress |w - w_start| / |w_fp32 - w_start|; kept is
the part of the fp32 run's update that is there: (w - w_start) . (w_fp32 - w_start) / |w_fp32 - w_start|^2; lost is the
share of the weights which the fp32 run moved that are still exactly at their start.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

import torch  # noqa: E402

from bagel_ds.checkpoint.state import StateFiles  # noqa: E402
from bagel_ds.checkpoint.step_folders import STATE  # noqa: E402
from bagel_ds.demo import write_demo  # noqa: E402
from bagel_ds.model_folder.tensor_files import TensorFiles  # noqa: E402
from bagel_ds.ranges import MASTER  # noqa: E402
from bagel_ds.zero.config.files import ds_configs_folder  # noqa: E402
from bench.measured_run import measured_run  # noqa: E402

FP32, BF16, AGAIN = "zero3_cpu.json", "bf16 masters", "zero3.json"
SPLIT = ("zero3_cpu_split.json", "zero3_cpu_split_bf16.json", "zero3_cpu_split_8bit.json")
WARM_LR = 2e-3  # the demo's
MEAN_OF = 20  # steps whose losses make one number, or half of a shorter run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=100, help="of each run (default 100)")
    parser.add_argument("--warm", type=int, default=100, help="steps before them, at 2e-3 (default 100)")
    parser.add_argument("--lrs", type=float, nargs="*", default=[2e-3, 2e-5, 2e-4], help="learning rates")
    parser.add_argument("--work", type=Path, help="folder for models and checkpoints (default: a temporary one)")
    ways = (*SPLIT, BF16)
    parser.add_argument("--ways", nargs="*", default=ways, choices=ways, help="beside fp32 masters (default: all)")
    options = parser.parse_args()
    if options.steps < 2 or options.warm < 1:
        parser.error(f"found --steps {options.steps} --warm {options.warm}; pass at least 2 steps and 1 before them")
    with tempfile.TemporaryDirectory(dir=options.work, prefix="bf16_masters_") as folder:
        report = compare(Path(folder), options.warm, options.steps, options.lrs, options.ways)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))


def compare(folder: Path, warm: int, steps: int, rates: list[float], ways: Sequence[str]) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        write_demo(folder / "demo")
    write_bf16_masters(folder)
    say(f"{warm} steps before")
    warmed = train(folder, "warm", folder / "demo" / "model", FP32, warm, WARM_LR)
    start = folder / "start"
    (warmed / "checkpoints" / f"step_{warm}").rename(start)
    shutil.rmtree(start / STATE)  # weights alone, as in the released model: bf16
    weights = TensorFiles([start / "model.safetensors"])
    report: dict[str, Any] = {"steps": steps, "warm_steps": warm, "rates": {}}
    for rate in rates:
        runs = {}
        for preset in (FP32, *ways, *([AGAIN] if rate == rates[0] else [])):
            say(f"lr {rate:g}: {preset}")
            runs[preset] = train(folder, f"{rate:g}_{preset.replace(' ', '_')}", start, preset, steps, rate)
        report["rates"][f"{rate:g}"] = {
            preset: {**losses(runs[preset], steps), **distances(weights, runs[FP32], runs[preset], steps)}
            for preset in runs
        }
        report["median_weight"] = median_weight(weights, training_state(runs[FP32], steps))
        for line in rate_lines(f"{rate:g}", report["rates"][f"{rate:g}"]):
            say(line)
        for results in runs.values():
            shutil.rmtree(results)
    return report


def write_bf16_masters(folder: Path) -> None:
    """`zero3_cpu.json` with what DeepSpeed offers to save memory: masters and moments in bf16, rounded to nearest."""
    content = json.loads((ds_configs_folder() / FP32).read_text())
    content["bf16"].update(bf16_master_weights_and_grads=True, bf16_optimizer_states=True)
    (folder / BF16).write_text(json.dumps(content))


def train(folder: Path, name: str, model: Path, preset: str, steps: int, rate: float) -> Path:
    """One launch on one process; its results_dir."""
    results = folder / name
    words = [
        *(
            "--ds_config",
            folder / BF16 if preset == BF16 else preset,
            "--model_path",
            model,
            "--dataset_config_file",
            folder / "demo" / "example.yaml",
        ),
        *("--results_dir", results, "--checkpoint_dir", results / "checkpoints", "--max_latent_size", 64),
        *("--finetune_from_hf", True, "--finetune_from_ema", name == "warm", "--ema", 0, "--num_workers", 0),
        *("--total_steps", steps, "--save_every", 10 * steps, "--log_every", 1, "--warmup_steps", 1, "--lr", rate),
        *("--max_num_tokens", 512, "--expected_num_tokens", 512, "--max_num_tokens_per_sample", 512),
    ]
    found = measured_run(words, ranks=1, interval=1.0)
    if found.code != 0:
        raise SystemExit(f"{name} failed:\n{found.output[-3000:]}")
    return results


def losses(results: Path, steps: int) -> dict[str, list[float]]:
    """Mean losses over the first steps, the last of the first half, and the last."""
    rows = [json.loads(line) for line in (results / "metrics.jsonl").read_text().splitlines()]
    total = [row["loss/total"] for row in rows]
    assert len(total) == steps, len(total)
    mean_of = min(MEAN_OF, steps // 2)
    return {"losses": [round(sum(total[stop - mean_of : stop]) / mean_of, 4) for stop in (mean_of, steps // 2, steps)]}


def distances(start: TensorFiles, fp32: Path, other: Path, steps: int) -> dict[str, float]:
    moved = apart = gone = along = 0.0
    moved_weights = lost = 0
    states = [training_state(results, steps) for results in (fp32, other)]
    for name in trained(start, states[0]):
        before = start.read(name).double()
        true, found = (state.read(MASTER, name, 0, before.numel()).double() for state in states)
        moved += float((true - before).square().sum())
        apart += float((found - true).square().sum())
        gone += float((found - before).square().sum())
        along += float(((found - before) * (true - before)).sum())
        moved_weights += int((true != before).sum())
        lost += int(((true != before) & (found == before)).sum())
    return {
        "distance": round((apart / moved) ** 0.5, 4),
        "progress": round((gone / moved) ** 0.5, 4),
        "kept": round(along / moved, 4),
        "lost": round(lost / moved_weights, 4),
    }


def training_state(results: Path, steps: int) -> StateFiles:
    return StateFiles(results / "checkpoints" / f"step_{steps}" / STATE)


def trained(weights: TensorFiles, state: StateFiles) -> list[str]:
    """All but the position tables."""
    return [name for name in weights.names if state.has(MASTER, name)]


def median_weight(weights: TensorFiles, state: StateFiles) -> float:
    values = torch.cat([weights.read(name) for name in trained(weights, state)])
    return round(float(values.float().abs().median()), 5)


def lines(report: dict[str, Any]) -> list[str]:
    mean_of = min(MEAN_OF, report["steps"] // 2)
    found = [
        f"{report['steps']} steps after {report['warm_steps']} at {WARM_LR:g}; the median weight is "
        f"{report['median_weight']:.4f}; loss: means of {mean_of} steps at the beginning, half-way and at the end"
    ]
    return found + [line for rate, runs in report["rates"].items() for line in rate_lines(rate, runs)]


def rate_lines(rate: str, runs: dict[str, Any]) -> list[str]:
    found = []
    for preset, values in runs.items():
        shown = ", ".join(f"{loss:.4f}" for loss in values["losses"])
        found.append(
            f"lr {rate:6} {preset:25} loss {shown}; distance {values['distance']:.3f}, progress "
            f"{values['progress']:.3f}, kept {values['kept']:.3f}, lost {100 * values['lost']:.1f} %"
        )
    return found


def say(text: str) -> None:
    print(f"[bf16_masters] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
