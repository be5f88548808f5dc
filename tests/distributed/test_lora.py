"""Adapters in real launches: what is saved, taken up on other ranks and stages, merged, and refused.

That the base stays as it was needs no test of its own: a resumed run reads it from its files, so a base that had moved
would give other losses than the run that never stopped.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from bagel_ds.cli.main import main
from bagel_ds.lora.peft_files import AdapterFolder
from bagel_ds.model.quantized import dequantize, quantize
from bagel_ds.model.shape.lora import is_decoder_linear
from bagel_ds.model.shape.parts import part_of
from bagel_ds.model.shape.quantization import QUANTIZATIONS, Quantization
from tests.distributed.cases import Case, Outcome, arguments, linked_model, losses, own, run_cases

pytestmark = pytest.mark.distributed

STEPS, STOPPED_AT = 6, 3
RANK = 4
SMALL = {"time_embedder", "vae2llm", "llm2vae"}
UNDERSTANDING = {"und_expert", "vit", "connector"}
QUANTIZED = {"nf4": "zero3_cpu.json", "int8": "zero2.json"}  # with the stage that the run begins with
# By switch: the stage, what else is asked for, and the parts whose layers get an adapter.
SWITCHES: dict[str, tuple[str, dict[str, object], set[str]]] = {
    "freeze_und": ("zero3_cpu.json", {"base_precision": "nf4"}, {"gen_expert"}),
    "freeze_vit": ("zero3.json", {"lora_targets": ".*"}, {"und_expert", "gen_expert", "connector", *SMALL}),
    "freeze_llm": ("zero1.json", {"lora_targets": ".*"}, {"vit", "connector", *SMALL}),
    "visual_gen": ("zero2_cpu.json", {"lora_targets": ".*", "base_precision": "int8"}, UNDERSTANDING),
    "visual_und": ("zero2.json", {"lora_targets": ".*"}, {"und_expert", "gen_expert", *SMALL}),
}
ON_NVME = {"ds_config": "zero3_nvme_all.json", "nvme_path": "swap"}


def words_of(demo: Path, results: Path, ranks: int, until: int, **changed: object) -> list[str]:
    options: dict[str, object] = {
        "precision": "fp32",
        "max_num_tokens": 448,
        "gradient_accumulation_steps": 2 // ranks,
        "total_steps": until,
        "lr": 1e-2,
        "weight_decay": 1e-2,
        "lr_scheduler": "constant",
        "save_every": 100,
        "auto_resume": True,
        "lora_rank": RANK,
        "global_seed": 5,
        **changed,
    }
    return arguments(demo, results, **options)


@pytest.fixture(scope="module")
def runs(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[Outcome]]]:
    """A run that never stops beside one that changes its ranks and stages; then what must be refused."""
    folder = tmp_path_factory.mktemp("lora")
    other = linked_model(demo / "model", folder / "other")
    file = own(other / "ema.safetensors")
    save_file({name: 2 * value for name, value in load_file(file).items()}, file)
    stopped = folder / "stopped"
    cases = [
        Case("whole", words_of(demo, folder / "whole", 2, STEPS)),
        Case("first", words_of(demo, stopped, 2, STOPPED_AT)),
        Case("second", words_of(demo, stopped, 2, STOPPED_AT + 1, ds_config="zero2_cpu.json")),
    ]
    on_nvme = {**ON_NVME, "nvme_path": folder / "swap"}
    cases.append(Case("nvme", words_of(demo, folder / "nvme", 2, STOPPED_AT, **on_nvme)))
    for switch, (preset, options, _) in SWITCHES.items():
        on = {switch: switch.startswith("freeze"), "ds_config": preset, **options}
        cases.append(Case(switch, words_of(demo, folder / switch, 2, 2, **on)))
    for name, preset in QUANTIZED.items():
        twin = dequantized_model(demo / "model", folder / f"{name}_base", QUANTIZATIONS[name])
        cases += [
            Case(f"{name}_twin", words_of(demo, folder / f"{name}_twin", 2, STOPPED_AT, model_path=twin)),
            Case(name, words_of(demo, folder / name, 2, STOPPED_AT - 1, ds_config=preset, base_precision=name)),
        ]
    outcomes = run_cases(folder / "two_ranks", cases, ranks=2)
    cases = [
        Case("another_base", words_of(demo, stopped, 1, STEPS, model_path=other)),
        Case("another_rank", words_of(demo, stopped, 1, STEPS, lora_rank=8)),
        Case("another_alpha", words_of(demo, stopped, 1, STEPS, lora_alpha=3)),
        Case("other_layers", words_of(demo, stopped, 1, STEPS, lora_targets="gen")),
        Case("none", words_of(demo, stopped, 1, STEPS, lora_rank=0)),
        Case("nothing", words_of(demo, folder / "nothing", 1, STEPS, lora_targets="gen", visual_gen=False)),
        Case("unknown", words_of(demo, folder / "nothing", 1, STEPS, lora_targets="q_proj")),
        Case("third", words_of(demo, stopped, 1, STEPS, ds_config="zero3_cpu.json")),
        Case("another_precision", words_of(demo, stopped, 1, STEPS, base_precision="nf4")),
        Case("codes_on_nvme", words_of(demo, folder / "nothing", 1, STEPS, base_precision="nf4", **ON_NVME)),
        Case("nf4_on", words_of(demo, folder / "nf4", 1, STOPPED_AT, ds_config="zero0.json", base_precision="nf4")),
        Case("int8_on", words_of(demo, folder / "int8", 1, STOPPED_AT, ds_config="zero3.json", base_precision="int8")),
    ]
    return folder, outcomes | run_cases(folder / "one_rank", cases)


def test_a_run_goes_on_exactly_on_other_ranks_and_stages(runs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = runs
    for name in ("whole", "first", "second", "third"):
        assert outcomes[name][0].code == 0, outcomes[name][0].output[-4000:]
    whole, found = losses(folder / "whole"), losses(folder / "stopped")
    assert sorted(found) == sorted(whole) == list(range(STEPS))
    for step, expected in whole.items():
        assert found[step] == pytest.approx(expected, rel=1e-5), step
    for part in ".", "ema":
        last = f"checkpoints/step_{STEPS}/{part}/adapter_model.safetensors"
        one, other = load_file(folder / "whole" / last), load_file(folder / "stopped" / last)
        assert one.keys() == other.keys()
        moved = sum(float(one[name].square().sum()) for name in one if "lora_B" in name) ** 0.5
        apart = sum(float((one[name] - other[name]).square().sum()) for name in one) ** 0.5
        assert moved > 0.01 and apart < 1e-3 * moved


@pytest.mark.parametrize("name", QUANTIZED)
def test_with_a_quantized_base_a_run_learns_what_it_does_with_the_dequantized_one(
    name: str, runs: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    """Also after it went on with another number of ranks and another stage."""
    folder, outcomes = runs
    for case in (name, f"{name}_on", f"{name}_twin"):
        assert outcomes[case][0].code == 0, outcomes[case][0].output[-4000:]
    assert f"linear layers are kept in {name}" in outcomes[name][0].output
    expected, found = losses(folder / f"{name}_twin"), losses(folder / name)
    assert sorted(found) == sorted(expected) == list(range(STOPPED_AT))
    for step, values in expected.items():
        assert found[step] == pytest.approx(values, rel=1e-5), step
    apart = [losses(folder / "whole")[step] != pytest.approx(found[step], rel=1e-5) for step in found]
    assert all(apart), "the base itself would give other losses"


@pytest.mark.parametrize("switch", SWITCHES)
def test_only_what_a_switch_leaves_trains_and_all_of_it_does(
    switch: str, runs: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    """Every adapter of those parts has moved, and no other part has one."""
    folder, outcomes = runs
    outcome = outcomes[switch][0]
    assert outcome.code == 0, outcome.output[-4000:]
    _, _, parts = SWITCHES[switch]
    adapter = AdapterFolder(folder / switch / "checkpoints" / "step_2")
    assert {part_of(layer) for layer in adapter.layers} == parts
    trained = {line.split(",")[0].split()[-1] for line in outcome.output.splitlines() if line.endswith("  trains")}
    assert trained == parts
    still = {
        layer
        for layer in adapter.layers
        if not adapter.rows_of_b(layer, 0, adapter.info(f"{layer}.lora_B").shape[0]).any()
    }
    if switch == "visual_und":  # without answers, nothing reads what the last layer makes of the text
        assert {part_of(layer) for layer in still} == {"und_expert"} and all(".layers.2." in layer for layer in still)
    else:
        assert not still


def dequantized_model(model: Path, folder: Path, quantization: Quantization) -> Path:
    """The model folder with the values that a quantized base has, in fp32."""
    file = own(linked_model(model, folder) / "ema.safetensors")
    weights = {name: value.float() for name, value in load_file(file).items()}
    for name, value in weights.items():
        if is_decoder_linear(name.removesuffix(".weight")) and name.endswith(".weight"):
            codes, absmax = quantize(value.flatten(), quantization)
            weights[name] = dequantize(codes, absmax, quantization, (len(value), value.shape[1]), torch.float32)
    save_file(weights, file)
    return folder


def test_a_checkpoint_holds_adapters_their_optimizer_and_the_plan_only(
    runs: tuple[Path, dict[str, list[Outcome]]], demo: Path
) -> None:
    checkpoint = runs[0] / "whole" / "checkpoints" / f"step_{STEPS}"
    files = {str(path.relative_to(checkpoint)) for path in checkpoint.rglob("*") if path.is_file()}
    states = {f"state/rank_{rank:05d}.safetensors" for rank in range(2)}
    adapters = {f"{part}adapter_{kind}" for part in ("", "ema/") for kind in ("config.json", "model.safetensors")}
    assert files == states | adapters | {"trainer.json", "manifest.json", "README.md"}
    for state in states:
        assert all("lora_" in name for name in load_file(checkpoint / state))
    held = AdapterFolder(checkpoint)
    assert held.rank == RANK and held.base == str(demo / "model")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("another_base", "is not the model that the adapters of"),
        ("another_rank", f"pass --lora_rank {RANK} and the --model_path"),
        ("another_alpha", f"were trained with {2 * RANK}; pass --lora_alpha {2 * RANK}"),
        ("other_layers", "--lora_targets gen asks for"),
        ("none", "holds an adapter, not a model: pass --lora_rank"),
        ("nothing", "keep from training"),
        ("unknown", "--lora_targets q_proj matches no linear layer"),
        ("another_precision", "were trained beside weights in full; pass --base_precision full"),
        ("codes_on_nvme", "--base_precision nf4 with parameters on NVMe"),
    ],
)
def test_what_does_not_belong_together_is_refused(
    name: str, said: str, runs: tuple[Path, dict[str, list[Outcome]]]
) -> None:
    outcome = runs[1][name][0]
    assert outcome.code == 2 and said in outcome.output and "Traceback" not in outcome.output


def test_the_merged_export_is_the_base_with_the_adapter_and_draws_what_the_adapter_draws(
    runs: tuple[Path, dict[str, list[Outcome]]], demo: Path, tmp_path: Path
) -> None:
    checkpoint = runs[0] / "whole" / "checkpoints" / f"step_{STEPS}"
    merged, base = tmp_path / "merged", load_file(demo / "model" / "ema.safetensors")
    assert main(["export", str(checkpoint), "--out", str(merged)]) == 2
    assert not merged.exists(), "an adapter is not exported as if it were a model"
    assert main(["export", str(checkpoint), "--out", str(merged), "--merge", "--save_dtype", "fp32"]) == 0
    for stem, part in ("model", checkpoint), ("ema", checkpoint / "ema"):
        found, adapter = load_file(merged / f"{stem}.safetensors"), AdapterFolder(part)
        assert found.keys() == base.keys() and adapter.layers
        for name, value in found.items():
            layer, expected = name.removesuffix(".weight"), base[name].float()
            if layer in adapter.layers and name.endswith(".weight"):
                outputs = len(expected)
                expected = expected + 2.0 * adapter.rows_of_b(layer, 0, outputs) @ adapter.a(layer)
            torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-6)
    common = ["--prompt", "a red ball", "--image_shapes", "32", "32", "--num_timesteps", "3", "--seed", "1"]
    pictures = []
    for name, words in {
        "merged": ["--model_path", merged, "--weights", "model"],
        "adapter": ["--model_path", demo / "model", "--lora", checkpoint],
        "base": ["--model_path", demo / "model"],
    }.items():
        assert main(["generate", *map(str, words), *common, "--out", str(tmp_path / f"{name}.png")]) == 0
        pictures.append(np.array(Image.open(tmp_path / f"{name}.png")).astype(int))
    merged_to, base_to = (np.abs(pictures[1] - picture).max() for picture in (pictures[0], pictures[2]))
    assert merged_to <= 1 < base_to, "sums in another order round differently"


def test_evaluation_of_the_adapter_gives_what_that_of_the_merged_model_does(
    runs: tuple[Path, dict[str, list[Outcome]]], demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    checkpoint, merged = runs[0] / "whole" / "checkpoints" / f"step_{STEPS}", tmp_path / "merged"
    main(["export", str(checkpoint), "--out", str(merged), "--merge", "--save_dtype", "fp32"])
    capsys.readouterr()
    words = ["evaluate", str(checkpoint), str(merged), "--val_config", str(demo / "example.yaml"), "--json"]
    assert main([*words, "--val_max_batches", "2", "--precision", "fp32"]) == 0
    results = json.loads(capsys.readouterr().out)["results"]
    scores = {(Path(row["checkpoint"]).name, row["weights"]): row["scores"] for row in results}
    assert len(scores) == 4 and scores["merged", "model"] != scores["merged", "ema"]
    for kind in "model", "ema":
        assert scores[checkpoint.name, kind] == pytest.approx(scores["merged", kind], rel=1e-5)


def test_adapters_train_alike_with_everything_on_nvme(runs: tuple[Path, dict[str, list[Outcome]]]) -> None:
    folder, outcomes = runs
    assert outcomes["nvme"][0].code == 0, outcomes["nvme"][0].output[-4000:]
    whole, found = losses(folder / "whole"), losses(folder / "nvme")
    assert sorted(found) == list(range(STOPPED_AT))
    for step, values in found.items():
        assert values == pytest.approx(whole[step], rel=1e-5), step
