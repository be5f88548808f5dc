"""The model card of an upload, filled from the run that made it.

Guarantees: what it says comes from trainer.json and metrics.jsonl of the run; what these don't hold is left out. No
path of this machine is in it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import bagel_ds
from bagel_ds.arguments.options import all_options
from bagel_ds.checkpoint.export import EXPORTED
from bagel_ds.checkpoint.step_folders import TRAINER, read_trainer
from bagel_ds.hub.models import RELEASED
from bagel_ds.inputs.files import is_hub_id
from bagel_ds.lora.peft_files import holds_adapter, named_base

_LEFT_OUT = ("wandb_", "auto_resume", "start_anew", "debug_batches", "log_every", "save_every", "keep_last")
_INSTALL = (  # no package index has it, and another project could take the name there
    f"Install bagel_ds {bagel_ds.__version__} from a checkout of its repository (`pip install .`) or from its wheel. "
    "Then:"
)
_LOSSES = ("loss/ce", "loss/mse", "val/ce", "val/mse")


class Made(NamedTuple):
    """What is known of the run; `trainer` is its trainer.json, `losses` those of its last logged step."""

    trainer: dict[str, Any]
    losses: dict[str, float]


def run_of(folder: Path) -> Made:
    """The run that made a checkpoint or an export of one; empty if its files are gone."""
    checkpoint = folder
    if not (checkpoint / TRAINER).is_file() and (folder / EXPORTED).is_file():
        checkpoint = Path(json.loads((folder / EXPORTED).read_text()).get("checkpoint", ""))
    if not (checkpoint / TRAINER).is_file():
        return Made({}, {})
    trainer = read_trainer(checkpoint)
    return Made(trainer, _losses(Path(trainer.get("arguments", {}).get("results_dir", "")), trainer["steps_done"]))


def model_card(folder: Path, repo: str, made: Made) -> str:
    """The text of README.md for `folder` under the name `repo`."""
    adapter, arguments = holds_adapter(folder), made.trainer.get("arguments", {})
    base = (named_base(folder) if adapter else arguments.get("model_path")) or RELEASED
    base = base if is_hub_id(base) else RELEASED
    head = ["---", "license: apache-2.0", f"base_model: {base}"]
    head += [f"base_model_relation: {'adapter' if adapter else 'finetune'}", "pipeline_tag: any-to-any"]
    head += ["library_name: peft"] if adapter else []
    head += ["tags:", "- bagel", "- bagel_ds", "---", ""]
    what = "An adapter (LoRA) for" if adapter else "A fine-tuned"
    lines = [
        f"# {repo.rpartition('/')[2]}",
        "",
        f"{what} [{base}](https://huggingface.co/{base}), trained with bagel_ds.",
    ]
    lines += ["", *_training(made), "## Use", "", _INSTALL, "", "```bash", *_use(repo, base, adapter), "```", ""]
    return "\n".join(head + lines)


def _training(made: Made) -> list[str]:
    if not made.trainer:
        return []
    versions = ", ".join(f"{name} {version}" for name, version in made.trainer.get("versions", {}).items())
    lines = ["## Training", "", f"- {made.trainer['steps_done']:,} steps on {made.trainer['world_size']} rank(s)"]
    for name, value in sorted(made.trainer.get("data", {}).items()):
        if ", dataset " in name:
            lines.append(
                f"- data {name.removeprefix('data group ').replace(', dataset', ':')}: {value.partition(' (')[0]}"
            )
    if made.losses:
        shown = ", ".join(f"{name} {value:.4f}" for name, value in made.losses.items())
        lines.append(f"- at the last logged step: {shown}")
    lines += [f"- {versions}"] if versions else []
    changed = _changed(made.trainer.get("arguments", {}))
    if changed:
        lines += [
            "",
            "| argument | value |",
            "|---|---|",
            *(f"| `{name}` | {value} |" for name, value in changed.items()),
        ]
    return [*lines, ""]


def _changed(arguments: dict[str, Any]) -> dict[str, Any]:
    """Arguments that differ from their defaults and say nothing about this machine."""
    defaults = {name: field.default for name, field in all_options().items()}
    return {
        name: value
        for name, value in sorted(arguments.items())
        if name in defaults
        and value != defaults[name]
        and not name.startswith(_LEFT_OUT)
        and not name.endswith(("_dir", "_path", "_file", "_config", "_cache", "_prompts"))
        and isinstance(value, (bool, int, float, str))
        and "/" not in str(value)
    }


def _losses(results: Path, steps: int) -> dict[str, float]:
    """Of the last logged step that the checkpoint has done."""
    try:
        lines = (results / "metrics.jsonl").read_text().splitlines()
    except OSError:
        return {}
    found: dict[str, float] = {}
    for line in lines:
        try:
            entry = json.loads(line)
        except ValueError:  # cut off by a full disk
            continue
        if entry.get("step", steps) < steps:
            found |= {name: entry[name] for name in _LOSSES if isinstance(entry.get(name), float)}
    return found


def _use(repo: str, base: str, adapter: bool) -> list[str]:
    folder = f"models/{repo.rpartition('/')[2]}"
    lines = [f"bagel-ds download {repo} --out {folder}"]
    if not adapter:
        return [*lines, f'bagel-ds generate --model_path {folder} --prompt "a cat"']
    model = f"models/{base.rpartition('/')[2]}"
    lines.append(f"bagel-ds download {base} --out {model}")
    return [*lines, f'bagel-ds generate --model_path {model} --lora {folder} --prompt "a cat"']
