"""Summarizes a run in a few lines: `python -m bagel_ds.demo.summary RESULTS_DIR [CHECKPOINT_DIR]`.

Guarantees: everything is read from disk. Losses are averages over the first and the last tenth of the logged steps (at
least five), from metrics.jsonl, in which later lines for a step replace earlier ones.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
from pathlib import Path

from bagel_ds.errors import UserError
from bagel_ds.machine.output import run_command

LOSSES = {"loss/mse": "MSE (generation)", "loss/ce": "CE (text)"}


def read_metrics(path: Path) -> list[dict[str, float | None]]:
    """One dict per logged step, in step order. Raises UserError if the file is missing or holds no step."""
    steps: dict[int, dict[str, float | None]] = {}
    if path.is_file():
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            steps[entry["step"]] = entry
    if not steps:
        raise UserError(f"{path} holds no logged step: did the run reach its first step? See log.txt next to it")
    return [steps[step] for step in sorted(steps)]


def fall(metrics: list[dict[str, float | None]], name: str) -> tuple[float, float] | None:
    """Averages of `name` over the first and last tenth (at least five) of its steps; None if there are too few."""
    values = [value for entry in metrics if (value := entry.get(name)) is not None]
    count = max(5, len(values) // 10)
    if len(values) < 2 * count:
        return None
    return sum(values[:count]) / count, sum(values[-count:]) / count


def last_checkpoint(folder: Path) -> Path | None:
    """The step_N folder with the highest N; links don't count."""
    found = [path for path in folder.glob("step_*") if path.is_dir() and not path.is_symlink()]
    numbered = [(int(match[1]), path) for path in found if (match := re.fullmatch(r"step_(\d+)", path.name))]
    return max(numbered)[1] if numbered else None


def summary(results_dir: Path, checkpoint_dir: Path) -> str:
    """The text that ends `make demo`."""
    metrics = read_metrics(results_dir / "metrics.jsonl")
    lines = [f"{len(metrics)} steps logged, the last is step {metrics[-1]['step']}"]
    for name, label in LOSSES.items():
        change = fall(metrics, name)
        if change is None:
            lines.append(f"  {label:18} logged in too few steps to compare")
        else:
            first, last = change
            lines.append(
                f"  {label:18} {first:.4f} -> {last:.4f} ({last / first - 1:+.0%}; first and last steps averaged)"
            )
    lines.append(f"  TensorBoard        tensorboard --logdir {shlex.quote(str(results_dir / 'tensorboard'))}")
    lines.append(f"  Log and numbers    {results_dir / 'log.txt'}, {results_dir / 'metrics.jsonl'}")
    checkpoint = last_checkpoint(checkpoint_dir)
    if checkpoint is None:
        lines.append(f"  Checkpoint         none in {checkpoint_dir}")
    else:
        weights = sorted(path.name for path in checkpoint.glob("*.safetensors"))
        lines.append(f"  Checkpoint         {checkpoint}")
        lines.append(f"  Exported weights   {', '.join(weights) or 'none'} in {checkpoint} (a model folder)")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the summary of a results folder. Returns 2 if there is none."""
    parser = argparse.ArgumentParser(prog="python -m bagel_ds.demo.summary", description=main.__doc__)
    parser.add_argument("results_dir", type=Path)
    parser.add_argument("checkpoint_dir", type=Path, nargs="?", help="default: RESULTS_DIR/checkpoints")
    options = parser.parse_args(arguments)
    try:
        print(summary(options.results_dir, options.checkpoint_dir or options.results_dir / "checkpoints"))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main))
