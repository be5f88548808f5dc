"""The commands of both guides, every argument as written there, started by `deepspeed ... launch/train.py --ds_config`.

Replaced are only paths (by the demo's model and data), numbers of steps, and token budgets, scaled from pictures of 512
pixels and more to the demo's. Arguments that a command leaves at defaults meant for a cluster follow it.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
from safetensors import safe_open

from tests.distributed.cases import Case, Outcome, losses, run_cases
from tests.guide_commands import (
    BAGEL_MULTI_GPU,
    BAGEL_MULTI_NODE,
    BAGEL_SINGLE_GPU,
    BLOCKMOVING,
    MODALITY_EXTRAS,
    arguments,
)
from tests.launch import TRAIN, deepspeed, run_ranks

pytestmark = pytest.mark.distributed

FREEZES = ("--freeze_llm=True", "--freeze_und=True --freeze_vit=True", "--visual_gen=False --freeze_vit=True")
LOG_LINE = (
    r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] \(step=0000000\) Train Loss mse: \d+\.\d{4}, Train Loss ce: \d+\.\d{4}, "
)
LOG_LINE += r"Train Steps/Sec: \d+\.\d\d, "
BUDGETS = {"expected_num_tokens": "512", "max_num_tokens": "640", "max_num_tokens_per_sample": "512"}
WEIGHTS = ("model.safetensors", "ema.safetensors", "ae.safetensors", "llm_config.json", "tokenizer.json")


def _assert_trained(output: str, demo: Path, results: Path, steps: int) -> None:
    assert f"loading {demo / 'model'} (finetune_from_hf: the weights of model_path)" in output, output[-4000:]
    assert re.search(r"ema\.safetensors: \d+ tensors, .* 0 missing; 0 unexpected", output)
    assert re.search(LOG_LINE, (results / "log.txt").read_text())
    assert f"done: {steps} steps" in output
    checkpoints = results / "checkpoints"
    assert os.readlink(checkpoints / "step_final") == f"step_{steps}"
    assert all((checkpoints / "step_final" / name).is_file() for name in WEIGHTS)
    assert max(losses(results)) == steps - 1
    assert any((results / "tensorboard").iterdir())


def _assert_readable(output: str) -> None:
    """What other packages print must not drown what the run says."""
    ours = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\] ")
    launcher = re.compile(r"\[\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d+\] \[(INFO|WARNING)\] \[(runner|launch)\.py")
    progress = re.compile(r"^\s*$|\d+%\|")
    others = [
        line for line in output.splitlines() if not (ours.match(line) or launcher.match(line) or progress.search(line))
    ]
    assert not others, "\n".join(others)


def _scaled(command: str, demo: Path, results: Path, **replaced: str) -> list[str]:
    paths = {"dataset_config_file": str(demo / "example.yaml"), "model_path": str(demo / "model")}
    if "--results_dir" in command:
        paths |= {"results_dir": str(results), "checkpoint_dir": str(results / "checkpoints")}
    return ["--ds_config", "zero3.json", *arguments(command, **{**paths, **replaced})]


def test_bagel_on_one_gpu(demo: Path, tmp_path: Path) -> None:
    words = _scaled(BAGEL_SINGLE_GPU, demo, tmp_path, total_steps="3", save_every="2", **BUDGETS)
    finished = deepspeed(TRAIN, words, ranks=1)
    assert finished.code == 0, finished.output[-4000:]
    _assert_trained(finished.output, demo, tmp_path, steps=3)
    _assert_readable(finished.output)
    assert (tmp_path / "checkpoints" / "step_2").is_dir()


def test_bagel_on_several_gpus(demo: Path, tmp_path: Path) -> None:
    words = _scaled(BAGEL_MULTI_GPU, demo, tmp_path, total_steps="2", save_every="2", **BUDGETS)
    finished = deepspeed(TRAIN, words, ranks=2)
    assert finished.code == 0, finished.output[-4000:]
    _assert_trained(finished.output, demo, tmp_path, steps=2)
    _assert_readable(finished.output)


def test_bagel_on_several_nodes(demo: Path, switched: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = switched
    found = outcomes["nodes"][0]
    assert found.code == 0, found.output[-4000:]
    _assert_trained(found.output, demo, folder / "nodes", steps=2)


# ------------------------------------------------------------------------------------------------------- BlockMoving
def _blockmoving(demo: Path, results: Path, **replaced: str) -> list[str]:
    steps = {"total_steps": "2", "save_every": "1", "log_every": "1"}
    config = str(demo / "blockmoving_sft.yaml")
    return _scaled(BLOCKMOVING, demo, results, **{**steps, **replaced, "dataset_config_file": config})


def _assert_blockmoving_trained(output: str, demo: Path, results: Path, steps: int) -> None:
    _assert_trained(output, demo, results, steps)
    assert "data group interleave_reasoning: 60 rows of blockmoving_train" in output
    assert "W&B is off (enable_wandb False)" in output
    assert "attention: " in output and "FlexAttention" in output, "use_flex True: what it gets, and why not flex"
    shown = re.findall(r"pack (\d+): [\d,]+ of [\d,]+ tokens", output)
    assert shown == ["0", "1", "2"], "debug_batches 3"


def test_blockmoving_with_half_the_budgets(demo: Path, tmp_path: Path) -> None:
    budgets = {"expected_num_tokens": "4096", "max_num_tokens": "4096", "max_num_tokens_per_sample": "4096"}
    words = _blockmoving(demo, tmp_path, **budgets, prefer_buffer_before="4096", total_steps="1")
    finished = run_ranks(TRAIN, words, ranks=1)
    assert finished.code == 0, finished.output[-4000:]
    _assert_blockmoving_trained(finished.output, demo, tmp_path, steps=1)


@pytest.mark.soak
def test_blockmoving_with_the_guides_budgets(demo: Path, tmp_path: Path) -> None:
    finished = deepspeed(TRAIN, _blockmoving(demo, tmp_path), ranks=2, timeout=1200)
    assert finished.code == 0, finished.output[-4000:]
    _assert_blockmoving_trained(finished.output, demo, tmp_path, steps=2)
    first, last = tmp_path / "checkpoints" / "step_1", tmp_path / "checkpoints" / "step_2"
    assert not (first / "state").exists() and (last / "state").is_dir(), "del_previous_state True"
    assert (first / "model.safetensors").is_file()


# ---------------------------------------------------------------------------------------------------------- switches
@pytest.fixture(scope="module")
def switched(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    """The first guide's command with each of its modality arguments, on the unmodified mixed config, and its command
    for several nodes, which leaves steps and folders to the defaults: 500,000 steps into ./results.
    """
    folder = tmp_path_factory.mktemp("switched")
    results = folder / "nodes"
    added = f"--total_steps 2 --results_dir {results} --checkpoint_dir {results}/checkpoints".split()
    without_workers = ("--num_workers", "0")  # each run would start its own
    cases = [Case("nodes", [*_scaled(BAGEL_MULTI_NODE, demo, results, **BUDGETS), *added, *without_workers])]
    for extra in (*MODALITY_EXTRAS, *FREEZES):
        name = extra.replace(" ", "").lstrip("-")
        words = _scaled(BAGEL_SINGLE_GPU, demo, folder / name, total_steps="1", save_every="1", **BUDGETS)
        cases.append(Case(name, [*words, *extra.split(), *without_workers]))
    return folder, run_cases(folder / "outcomes", cases, ranks=2)


@pytest.mark.parametrize(
    ("name", "absent", "dropped"),
    [
        ("visual_und=False", "loss/ce", {"vlm_sft"}),
        ("visual_gen=False", "loss/mse", {"t2i_pretrain", "unified_edit"}),
        ("visual_gen=True--visual_und=True", None, set()),
        ("freeze_llm=True", None, set()),
        ("freeze_und=True--freeze_vit=True", None, set()),
        ("visual_gen=False--freeze_vit=True", "loss/mse", {"t2i_pretrain", "unified_edit"}),
    ],
)
def test_modality_switches_on_the_mixed_config(
    name: str, absent: str | None, dropped: set[str], demo: Path, switched: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    folder, outcomes = switched
    main, other = outcomes[name]
    assert (main.code, other.code) == (0, 0), main.output[-4000:]
    assert "done: 1 steps" in main.output
    assert set(re.findall(r"group (\w+) is dropped", main.output)) == dropped
    lines = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        present = {kind for kind in ("loss/ce", "loss/mse") if kind in line}
        assert present == {"loss/ce", "loss/mse"} - {absent}
        by_dataset = {key.rpartition("/")[0] for key in line if key.startswith(("loss/ce/", "loss/mse/"))}
        assert by_dataset == present
    complete = {key: (shape, "BF16") for key, (shape, _) in _tensors(demo / "model" / "ema.safetensors").items()}
    for file in ("model.safetensors", "ema.safetensors"):  # whatever trained
        assert _tensors(folder / name / "checkpoints" / "step_1" / file) == complete


def _tensors(file: Path) -> dict[str, tuple[tuple[int, ...], str]]:
    """Shape and dtype by name."""
    with safe_open(file, framework="pt") as opened:
        slices = {key: opened.get_slice(key) for key in opened.keys()}  # noqa: SIM118
        return {key: (tuple(part.get_shape()), part.get_dtype()) for key, part in slices.items()}
