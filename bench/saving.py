"""Seconds that training stands still for a save: overlapped beside in the foreground, in one run.

One command: `python bench/saving.py [--json] [--presets ...] [--saves N] [--several_hosts] [--work DIR]`, on two ranks:
of the CPU, or of the GPUs where there are some (one rank where there is one). It writes a model with random
weights in the real layout, trains it on the demo's data with a save after every second step, of which every second
overlaps the step after it and every other is finished before training goes on, and removes everything. The launch is
the trainer's (bench/saving_train.py); the seconds are those of its own log lines. On CPU, a thread that writes takes
processor time from the step beside it, which a GPU would not notice: steps are timed too.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import re
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed

import torch  # noqa: E402

from bagel_ds.demo import write_demo  # noqa: E402
from bagel_ds.machine.device import device_type  # noqa: E402
from bagel_ds.units import GIB  # noqa: E402
from bench.measured_run import measured_run  # noqa: E402
from bench.random_model import scaled_config, write_random_model  # noqa: E402

PRESETS = ("zero3.json", "zero3_cpu.json", "zero2.json")
EVERY, TOKENS, VOCABULARY = 2, 512, 16384
SAVED = re.compile(r"saved \S*/step_(\d+) in ([\d.]+) s; training waited ([\d.]+) s")
STEP = re.compile(r"^STEP (\d+) ([\d.]+)", re.MULTILINE)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--presets", nargs="*", default=list(PRESETS))
    parser.add_argument("--saves", type=int, default=5, help="of each kind (default 5)")
    parser.add_argument("--width", type=int, default=512, help="of the language model (default 512)")
    parser.add_argument("--several_hosts", action="store_true", help="gather the weights, as ranks of several hosts do")
    parser.add_argument("--work", type=Path, help="folder for model and checkpoints (default: a temporary one)")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.work, prefix="saving_") as folder:
        report = measure(Path(folder), options.presets, options.saves, options.width, options.several_hosts)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))


def measure(folder: Path, presets: list[str], saves: int, width: int, several_hosts: bool) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        write_demo(folder / "demo")
    parameters = write_random_model(folder / "model", folder / "demo" / "model", scaled_config(width, 8, VOCABULARY))
    device = device_type()
    ranks = 2 if device == "cpu" else min(2, torch.cuda.device_count())
    report: dict[str, Any] = {"device": device, "parameters": parameters, "ranks": ranks, "saves": saves}
    report |= {"several_hosts": several_hosts, "presets": {}}
    for preset in presets:
        print(f"[saving] {preset}", file=sys.stderr, flush=True)
        # One step more than the last save: it overlaps that step, and is no save that ends the run.
        words = arguments(folder, preset, 2 * saves * EVERY + 1)
        environment = {"BAGEL_BENCH_HOSTS": "several" if several_hosts else "one"}
        run = measured_run(words, ranks=ranks, script="saving_train.py", device=device, environment=environment)
        if run.code != 0:
            raise SystemExit(f"{preset} failed:\n{run.output[-3000:]}")
        state = sum(path.stat().st_size for path in (folder / "run" / "checkpoints" / "step_final").rglob("*.safe*"))
        report["presets"][preset] = {"checkpoint_gib": round(state / GIB, 2), **numbers(run.output)}
        shutil.rmtree(folder / "run")
    return report


def numbers(output: str) -> dict[str, Any]:
    """Medians over the saves of each kind. The last save, which ends the run, is none of them."""
    saved = {int(step): (float(all_of_it), float(held)) for step, all_of_it, held in SAVED.findall(output)}
    saved.pop(max(saved))
    steps = {int(step): float(seconds) for step, seconds in STEP.findall(output)}
    overlapped = [step for step in saved if step // EVERY % 2 == 0]
    foreground = [step for step in saved if step // EVERY % 2]
    still = {
        "overlapped": statistics.median(saved[step][1] for step in overlapped),
        "foreground": statistics.median(saved[step][1] for step in foreground),
    }
    beside = statistics.median(steps[step] for step in overlapped)  # step_N is written while step N computes
    alone = statistics.median(steps[step] for step in foreground)
    return {
        "overlapped_still_seconds": round(still["overlapped"], 2),
        "foreground_still_seconds": round(still["foreground"], 2),
        "still_ratio": round(still["overlapped"] / still["foreground"], 3),
        "step_seconds_beside_a_save": round(beside, 2),
        "step_seconds_alone": round(alone, 2),
        "cost_ratio": round((still["overlapped"] + beside - alone) / still["foreground"], 3),
    }


def arguments(folder: Path, preset: str, steps: int) -> list[object]:
    run = folder / "run"
    return [
        *("--ds_config", preset, "--precision", "bf16", "--ema", 0.95, "--keep_last", 1),
        *("--dataset_config_file", folder / "demo" / "example.yaml", "--model_path", folder / "model"),
        *("--results_dir", run, "--checkpoint_dir", run / "checkpoints", "--max_latent_size", 64),
        *("--finetune_from_hf", True, "--finetune_from_ema", True, "--total_steps", steps, "--save_every", EVERY),
        *("--log_every", 1, "--warmup_steps", 1, "--lr", 1e-5, "--num_workers", 0),
        *("--max_num_tokens", TOKENS, "--expected_num_tokens", TOKENS, "--max_num_tokens_per_sample", TOKENS),
    ]


def lines(report: dict[str, Any]) -> list[str]:
    found = [
        f"{report['parameters']:,} parameters, {report['ranks']} rank(s) on {report['device']}"
        f"{', as on several hosts' if report['several_hosts'] else ''}; "
        f"seconds per save, medians of {report['saves']}"
    ]
    for preset, values in report["presets"].items():
        found += [
            f"{preset}: {values['checkpoint_gib']} GiB per checkpoint",
            f"  training stands still: {values['overlapped_still_seconds']} s where the save overlaps it, "
            f"{values['foreground_still_seconds']} s in the foreground: {values['still_ratio']}x",
            f"  a step takes {values['step_seconds_beside_a_save']} s beside a save, {values['step_seconds_alone']} s "
            f"alone; all a save costs: {values['cost_ratio']}x",
        ]
    return found


if __name__ == "__main__":
    main()
