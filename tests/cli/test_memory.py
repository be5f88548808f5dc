"""`bagel-ds memory` for people in a hurry and for scripts: sizes, exit codes, hub ids, pasted commands."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import save_file

from bagel_ds.arguments.run_config import make_config
from bagel_ds.cli.main import main
from bagel_ds.lora.peft_files import CONFIG, WEIGHTS, AdapterRecord, peft_name
from bagel_ds.memory.planner import MemoryOptions, plan_memory
from bagel_ds.memory.suggestions import resolved
from bagel_ds.model.shape.config import BagelConfig, LLMConfig
from bagel_ds.model.shape.lora import LoRA
from bagel_ds.units import GIB

SEVEN_B = "memory --model 7b --ds_config zero3_cpu.json --max_num_tokens 11520 --num_workers 1"


def said(words: str | list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    assert main([*(words.split() if isinstance(words, str) else words), "--json"]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_the_command_prints_one_json_object(capsys: pytest.CaptureFixture[str]) -> None:
    words = "memory --model 7b --ds_config zero3_cpu.json --world_size 2 --max_num_tokens 11520 --json"
    assert main([*words.split(), "--gpu_memory", "24", "--host_memory=128", "--nvme", "1000"]) == 0
    found = json.loads(capsys.readouterr().out)
    keys = {
        "gpu_peak_gib",
        "host_peak_gib",
        "nvme_gib",
        "step_traffic_gib",
        "fits",
        "items",
        "suggestions",
        "not_compared_gib",
    }
    assert keys <= set(found)
    assert found["fits"] is False and found["suggestions"]
    run = make_config({"max_num_tokens": 11520, "ds_config": "zero3_cpu.json"})
    model = BagelConfig()
    plan = plan_memory(model, resolved("zero3_cpu.json", run, model, 2), MemoryOptions.of(run, 2))
    assert found["gpu_peak_gib"] == round(plan.gpu_peak / GIB, 3)


def test_a_training_command_is_planned_as_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    """Arguments of the trainer, also hyphenated and as prefixes, change the plan or are accepted without effect."""
    words = "memory --model 7b --world_size 8 --num_worker 1 --freeze-und True --finetune_from_hf True --lr 2e-5 --json"
    assert main(words.split()) == 0
    frozen = json.loads(capsys.readouterr().out)
    assert main("memory --model 7b --world_size 8 --num_worker 1 --json".split()) == 0
    assert frozen["gpu_peak_gib"] < json.loads(capsys.readouterr().out)["gpu_peak_gib"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("memory --world_size 2", "--model_path"),
        ("memory --model 7b --max_num_tokns 5", "--max_num_tokens"),
        ("memory --model 7b --ds_config zero9", "the presets are"),
        ("memory --model 7b --ds_config zero3_cpu_spilt.json", "(did you mean zero3_cpu_split?); the presets are"),
        ("memory --model 7b --ds_config qqqq", "no preset of that name; the presets are"),
        ("memory --model 7b --lora results/step_5", "--lora is for --inference"),
        ("memory --model 7b --inference --lora no/such/step_5", "there is no folder no/such/step_5"),
        ("memory --model 7b --world_size 4 --ranks_per_host 3", "not a multiple"),
        ("memory --model_path no/such/folder", "does not exist"),
    ],
)
def test_a_mistake_is_one_message(words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words.split()) == 2
    assert message in capsys.readouterr().err


def test_a_model_folder_is_read_without_its_weights(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4}
    llm = {**dataclasses.asdict(LLMConfig()), **small}
    vit = {**small, "hidden_size": 64, "patch_size": 14}
    (tmp_path / "llm_config.json").write_text(json.dumps(llm))
    (tmp_path / "vit_config.json").write_text(json.dumps(vit))
    assert main(["memory", "--model_path", str(tmp_path), "--device", "cpu", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["gpu_peak_gib"] == 0


@pytest.mark.parametrize("option", ["--gpu_memory", "--host-memory", "--nvme"])
@pytest.mark.parametrize("value", ["-1", "nan", "inf", "-inf", "0", "24GB", "", "1e400"])
def test_sizes_that_nothing_can_have_are_refused(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    if (option, value) == ("--nvme", "0"):
        return  # there is none: the next test
    with pytest.raises(SystemExit) as ended:
        main([*SEVEN_B.split(), f"{option}={value}"])
    assert ended.value.code == 2
    assert f"expected GiB as a number above 0, such as {1000 if option == '--nvme' else 24}" in capsys.readouterr().err


def test_no_nvme_is_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert "nvme" in said(f"{SEVEN_B} --ds_config zero3_nvme --nvme 0", capsys)["shortfalls_gib"]


@pytest.mark.parametrize("option", ["--world_size", "--ranks_per_host", "--max_image_size"])
@pytest.mark.parametrize("value", ["0", "-2", "two", "1.5", ""])
def test_counts_are_whole_numbers_from_one(option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*SEVEN_B.split(), f"{option}={value}"])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert f"expected a whole number of at least 1, found {value!r}" in message and "_at_least_one" not in message


@pytest.mark.parametrize(
    ("sizes", "code"),
    [
        ("--gpu_memory 24 --host_memory 512", 0),
        ("--gpu_memory 24 --host_memory 128", 1),
        ("--gpu_memory 8 --host_memory 512", 1),
        ("--gpu_memory 24", 2),
        ("", 2),
        ("--gpu_memory 24 --host_memory 256 --ds_config zero3_nvme", 2),
        ("--gpu_memory 24 --host_memory 256 --nvme 1000 --ds_config zero3_nvme", 0),
        ("--gpu_memory 24 --host_memory 256 --nvme 100 --ds_config zero3_nvme", 1),
    ],
)
@pytest.mark.parametrize("form", ["", "--json"])
def test_scripts_can_ask_whether_it_fits(sizes: str, code: int, form: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{SEVEN_B} --world_size 2 {sizes} {form}".split()
    assert main([*words, "--check"]) == code
    assert ("--check: " in capsys.readouterr().err) == (code == 2)
    assert main(words) == 0  # a person reads the answer


@pytest.mark.parametrize(
    "name", ["7b", "7B", "BAGEL-7B-MoT", "ByteDance-Seed/BAGEL-7B-MoT", "bytedance-seed/bagel-7b-mot"]
)
@pytest.mark.parametrize("option", ["--model", "--model_path"])
def test_the_released_model_goes_by_its_names(
    name: str, option: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)  # nothing is downloaded
    expected = said(SEVEN_B, capsys)
    assert said(SEVEN_B.replace("--model 7b", f"{option} {name}"), capsys) == expected


def test_of_another_model_on_the_hub_only_the_configurations_are_fetched(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    llm = {**dataclasses.asdict(LLMConfig()), "num_hidden_layers": 14}
    vit = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 14,
    }
    asked = []

    def fetch(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        (tmp_path / "llm_config.json").write_text(json.dumps(llm))
        (tmp_path / "vit_config.json").write_text(json.dumps(vit))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    for option in ("--model", "--model_path"):
        found = said(SEVEN_B.replace("--model 7b", f"{option} someone/half-a-bagel"), capsys)
        assert 0.4 < found["host_peak_gib"] / said(SEVEN_B, capsys)["host_peak_gib"] < 0.6
    assert asked == [("someone/half-a-bagel", ["*config.json"])] * 2


def test_an_id_that_the_hub_does_not_know_is_one_message(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetch(*_: Any, **__: Any) -> str:
        raise ConnectionError("no route")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    assert main(SEVEN_B.replace("7b", "someone/nothing").split()) == 2
    assert "--model someone/nothing: " in capsys.readouterr().err
    assert main(SEVEN_B.replace("7b", "13b").split()) == 2
    assert "--model 13b: expected 7b or the id" in capsys.readouterr().err


def test_a_folder_of_the_released_models_name_that_is_not_here_is_planned_as_that(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A command of the guides, on a machine that has no model yet."""
    expected = said(SEVEN_B, capsys)
    assert main([*SEVEN_B.replace("--model 7b", "--model_path /models/BAGEL-7B-MoT").split(), "--json"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == expected and "does not exist: planning for the released" in printed.err


LAUNCH = (
    "deepspeed --num_gpus 2 launch/train.py --ds_config zero3_cpu.json --max_num_tokens 11520 --num_workers 1 "
    "--model_path ByteDance-Seed/BAGEL-7B-MoT --finetune_from_hf True --lr 2e-5 --results_dir results"
)


@pytest.mark.parametrize(
    "words",
    [
        ["memory", "--gpu_memory", "24", *LAUNCH.split()],
        ["memory", *LAUNCH.split(), "--gpu_memory", "24"],
        ["memory", "--gpu_memory=24", LAUNCH.replace(" --", " \\\n  --") + " 2>&1 | tee log"],
        ["memory", "--gpu_memory", "24", "CUDA_VISIBLE_DEVICES=2,3", *LAUNCH.replace("--num_gpus 2 ", "").split()],
        [
            "memory",
            "--gpu_memory",
            "24",
            *LAUNCH.replace("deepspeed --num_gpus 2", "torchrun --nproc_per_node=2").split(),
        ],
        ["memory", "--gpu_memory", "24", *LAUNCH.replace("launch/train.py", "--module bagel_ds.train").split()],
        ["memory", "--gpu_memory", "24", "--world_size", "2", *LAUNCH.replace("--num_gpus 2 ", "").split()],
        ["memory", "--gpu_memory", "24", "--world_size", "2", *LAUNCH.replace("--num_gpus 2", "--num_gpus 8").split()],
    ],
    ids=["sizes first", "sizes last", "quoted", "variable", "torchrun", "module", "world size", "world size wins"],
)
def test_a_pasted_training_command_is_planned_on_its_ranks(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert said(words, capsys) == said(f"{SEVEN_B} --world_size 2 --gpu_memory 24", capsys)


def test_a_pasted_command_that_leaves_the_number_of_gpus_to_the_machine_asks_for_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["memory", *LAUNCH.replace("--num_gpus 2 ", "").split()]) == 2
    assert "pass --world_size" in capsys.readouterr().err


def test_suggestions_to_freeze_say_what_then_trains(capsys: pytest.CaptureFixture[str]) -> None:
    words = f"{SEVEN_B} --world_size 2 --gpu_memory 24 --host_memory 128 --nvme 0"
    assert main(words.split()) == 0
    lines = capsys.readouterr().out.splitlines()
    behind = {line.split("  (")[0].split()[-2]: after for line, after in zip(lines, lines[1:]) if "True  (GiB" in line}
    und, llm = behind["--freeze_und"], behind["--freeze_llm"]
    assert "trains only the generation expert" in und and "7.1 of 14.6 billion parameters" in und
    assert "trains only the ViT, the connector" in llm and "0.4 of 14.6 billion" in llm
    for suggestion in said(words, capsys)["suggestions"]:
        assert bool(suggestion["trains"]) == any(
            "freeze" in setting or "lora" in setting for setting in suggestion["settings"]
        )


def test_what_trains_after_a_suggestion_counts_what_is_frozen_already(capsys: pytest.CaptureFixture[str]) -> None:
    found = said(f"{SEVEN_B} --freeze_vit True --gpu_memory 24 --host_memory 40 --nvme 0", capsys)
    (frozen,) = {each["trains"] for each in found["suggestions"] if "--freeze_llm True" in each["settings"]}
    assert frozen.startswith("the connector, ") and frozen.endswith(" million of 14.6 billion parameters")


def test_inference_says_what_is_streamed_and_what_it_costs(capsys: pytest.CaptureFixture[str]) -> None:
    def line(gib: str) -> str:
        assert main(["memory", "--model", "7b", "--inference", *gib.split()]) == 0
        return capsys.readouterr().out

    assert "no layer is streamed" in line("") and "no layer is streamed" in line("--gpu_memory 40")
    streamed = line("--gpu_memory 24")
    pattern = r"(\d+) of 28 layers are streamed from ([\d.]+) GiB .* moves (\d+) GiB over PCIe: (\d+) s"
    found = re.search(pattern, streamed)
    assert found is not None, streamed
    layers, held, moved, seconds = (float(number) for number in found.groups())
    assert held == pytest.approx(layers * 0.868, rel=0.02)  # a decoder layer of the 7B in bf16
    assert moved == pytest.approx(49 * held, rel=0.01) and seconds == pytest.approx(moved / 20, rel=0.02)
    assert main("memory --model 7b --inference --gpu_memory 4".split()) == 2
    assert "too small for this network" in capsys.readouterr().err


def test_inference_counts_adapters(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """2048 * 3584 numbers of each matrix, in bf16."""
    layer = "language_model.model.layers.0.self_attn.q_proj"
    tensors = {name: torch.zeros(2048, 3584, dtype=torch.bfloat16) for name in ("lora_A", "lora_B")}
    tensors["lora_B"] = tensors["lora_B"].t().contiguous()
    record = AdapterRecord(LoRA(2048, 4.0), frozenset([layer]), "BASE", "0")
    (tmp_path / CONFIG).write_text(record.config())
    save_file({peft_name(f"{layer}.{kind}"): value for kind, value in tensors.items()}, tmp_path / WEIGHTS)
    assert main(["memory", "--model", "7b", "--inference", "--lora", str(tmp_path)]) == 0
    assert " GiB on the GPU (3 GiB of it to work in, 28.0 MiB for adapters), no layer" in capsys.readouterr().out


def test_samples_are_planned_by_the_runs_own_prompts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["memory", "--model", "7b", "--ds_config", "zero3_cpu.json", "--sample_prompts", str(tmp_path / "p.jsonl")]
    assert main(words) == 2
    assert f"--sample_prompts {tmp_path / 'p.jsonl'}: no such file" in capsys.readouterr().err
    peaks = []
    for side in (256, 1024):
        (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a cat", "image_shapes": [side, side]}))
        assert main([*words, "--json"]) == 0
        peaks.append(json.loads(capsys.readouterr().out)["gpu_phases_gib"]["samples"])
    assert peaks[0] < peaks[1]
