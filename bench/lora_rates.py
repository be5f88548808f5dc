"""At which learning rate adapters learn best, beside full fine-tuning: held-out losses of a task new to the model.

One command: `python bench/lora_rates.py [--json] [--steps 30] [--seeds 2] [--lora ...] [--full ...]`. It trains the
demo's network on pictures, edits and answers (`--warm` steps), and from there on BlockMoving: with adapters of rank 16
on both experts and with all weights, at several learning rates and seeds, on one CPU process. Losses are those of the
test split after the last step; every number is the mean over the seeds.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import multiprocessing
import os
import shutil
import socket
import sys
import tempfile
from pathlib import Path
from statistics import mean
from typing import Any, Sequence

REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPOSITORY))  # also where the package is not installed
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: E402, F401
import yaml  # noqa: E402

from bagel_ds.demo import EXAMPLE, write_demo  # noqa: E402
from bagel_ds.train.main import main as main_of_trainer  # noqa: E402

WARM_LR = 2e-3  # the demo's
TASK, TRAIN, TEST = "interleave_reasoning", "blockmoving_train", "blockmoving_test"
LORA, FULL = "LoRA", "all weights"
WAYS: dict[str, list[object]] = {LORA: ["--lora_rank", 16], FULL: []}
LOSSES = ("val/ce", "val/mse")
SOME: list[object] = ["--val_max_batches", 16]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--steps", type=int, default=30, help="of each run (default 30)")
    parser.add_argument("--warm", type=int, default=100, help="steps before them, at 2e-3 (default 100)")
    parser.add_argument("--seeds", type=int, default=2, help="runs at each rate (default 2)")
    parser.add_argument("--lora", type=float, nargs="*", default=[1e-4, 3e-4, 1e-3, 3e-3, 1e-2], help="rates of LoRA")
    parser.add_argument("--full", type=float, nargs="*", default=[1e-4, 3e-4, 1e-3, 3e-3], help="of all weights")
    parser.add_argument("--work", type=Path, help="folder for models and checkpoints (default: a temporary one)")
    options = parser.parse_args()
    if min(options.steps, options.warm, options.seeds) < 1:
        parser.error("pass at least one step, one warm step and one seed")
    with tempfile.TemporaryDirectory(dir=options.work, prefix="lora_rates_") as folder:
        report = compare(Path(folder), options)
    print(json.dumps(report, indent=1) if options.json else "\n".join(lines(report)))


def compare(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    with contextlib.redirect_stdout(io.StringIO()):
        write_demo(folder / "demo")
    known, task, test = (folder / "demo" / f"{name}.yaml" for name in ("known", "task", "test"))
    groups = yaml.safe_load(EXAMPLE)
    own = groups.pop(TASK)
    known.write_text(yaml.safe_dump(groups))
    task.write_text(yaml.safe_dump({TASK: own}))
    test.write_text(yaml.safe_dump({TASK: {**own, "dataset_names": [TEST]}}))
    warm = ["--dataset_config_file", known, "--lr", WARM_LR, "--finetune_from_ema", True]
    start = folder / "start"
    trained = train(folder / "warm", folder / "demo" / "model", options.warm, warm) / f"step_{options.warm}"
    trained.rename(start)
    shutil.rmtree(start / "state")
    report: dict[str, Any] = {"steps": options.steps, "warm_steps": options.warm, "seeds": options.seeds}
    report["losses"] = {"before": {"0": evaluated(folder / "before", start, test)}}
    for seed in range(options.seeds):
        for way, rates in ((LORA, options.lora), (FULL, options.full)):
            for rate in rates:
                words = ["--dataset_config_file", task, "--val_config", test, "--val_every", 10 * options.steps, *SOME]
                words += ["--lr", rate, "--global_seed", 4396 + seed, *WAYS[way]]
                results = folder / "run"
                train(results, start, options.steps, words)
                losses = report["losses"].setdefault(way, {}).setdefault(f"{rate:g}", {name: [] for name in LOSSES})
                for name, value in held_out(results).items():
                    losses[name].append(value)
                shutil.rmtree(results)
                say(line(way, f"{rate:g}", losses))
    return report


def train(results: Path, model: Path, steps: int, words: Sequence[object]) -> Path:
    """One launch on one process; its folder of checkpoints."""
    checkpoints = results / "checkpoints"
    common = [
        *("--ds_config", "zero2.json", "--model_path", model, "--results_dir", results, "--precision", "fp32"),
        *("--checkpoint_dir", checkpoints, "--max_latent_size", 64, "--finetune_from_hf", True, "--ema", 0),
        *("--total_steps", steps, "--save_every", 10 * steps, "--warmup_steps", max(1, steps // 10)),
        *("--max_num_tokens", 896, "--expected_num_tokens", 896, "--max_num_tokens_per_sample", 896),
        *("--num_workers", 0, "--log_every", 1),
    ]
    results.mkdir(parents=True)
    # Forked, because what a run imports takes longer than its steps.
    run = multiprocessing.get_context("fork").Process(target=run_trainer, args=(results / "output", common, words))
    run.start()
    run.join()
    if run.exitcode != 0:
        raise SystemExit(f"{results.name} failed:\n{(results / 'output').read_text()[-3000:]}")
    return checkpoints


def run_trainer(output: Path, *words: Sequence[object]) -> None:
    """The trainer as the only rank of a launch."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    rank = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_SIZE": "1"}
    os.environ |= {**rank, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "BAGEL_DS_DETACH": "0"}
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.exit(main_of_trainer([str(word) for part in words for word in part]))


def evaluated(results: Path, model: Path, test: Path) -> dict[str, list[float]]:
    """The losses of a model: after a step at a learning rate of nearly zero."""
    words = ["--dataset_config_file", test, "--val_config", test, "--val_every", 10, "--lr", 1e-12, *SOME]
    train(results, model, 1, words)
    return {name: [value] for name, value in held_out(results).items()}


def held_out(results: Path) -> dict[str, float]:
    rows = [json.loads(text) for text in (results / "metrics.jsonl").read_text().splitlines()]
    last = next(row for row in reversed(rows) if LOSSES[0] in row)
    return {name: round(last[name], 4) for name in LOSSES}


def lines(report: dict[str, Any]) -> list[str]:
    found = [
        f"{report['steps']} steps on BlockMoving after {report['warm_steps']} steps on the other data at {WARM_LR:g}; "
        f"losses of the test split, means over {report['seeds']} seeds (largest difference)"
    ]
    return found + [line(way, *each) for way, rates in report["losses"].items() for each in rates.items()]


def line(way: str, rate: str, losses: dict[str, list[float]]) -> str:
    shown = (f"{name} {mean(found):.4f} ({max(found) - min(found):.4f})" for name, found in losses.items())
    return f"{way:12} lr {rate:6} {', '.join(shown)}"


def say(text: str) -> None:
    print(f"[lora_rates] {text}", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
