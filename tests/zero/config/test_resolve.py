"""ds_config resolution: what is filled, what is refused, what the original's FSDP options do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.arguments.run_config import RunConfig, parse_arguments
from bagel_ds.errors import UserError
from bagel_ds.zero.config.check import check_resolved
from bagel_ds.zero.config.files import ds_configs_folder, find_ds_config
from bagel_ds.zero.config.resolve import resolve_ds_config
from bagel_ds.zero.config.settings import ZeroSettings, offload_device

PRESETS = sorted(path.stem for path in ds_configs_folder().glob("*.json"))
RUNS = [(preset, "bf16") for preset in PRESETS] + [(preset, "fp32") for preset in PRESETS if "_split" not in preset]


def config(*words: str) -> RunConfig:
    return parse_arguments(["--nvme_path", "/ssd", *words])


def resolve(tmp_path: Path, content: dict[str, Any], *words: str, world: int = 4) -> tuple[dict[str, Any], list[str]]:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content))
    return resolve_ds_config(str(path), config(*words), world)


def fault(tmp_path: Path, content: dict[str, Any], *words: str, world: int = 4) -> str:
    with pytest.raises(UserError) as caught:
        resolve(tmp_path, content, *words, world=world)
    return str(caught.value)


def test_presets_cover_every_stage_and_cpu_offload() -> None:
    assert {"zero0", "zero1", "zero2", "zero3", "zero2_cpu", "zero3_cpu"} <= set(PRESETS)


@pytest.mark.parametrize("preset, precision", RUNS)
def test_every_preset_resolves_without_auto_and_deepspeed_accepts_it(preset: str, precision: str) -> None:
    run = config("--precision", precision, "--gradient_accumulation_steps", "3", "--max_grad_norm", "0.5")
    ds, notes = resolve_ds_config(preset, run, 4)
    assert '"auto"' not in json.dumps(ds)
    assert (ds["train_batch_size"], ds["train_micro_batch_size_per_gpu"], ds["gradient_accumulation_steps"]) == (
        12,
        1,
        3,
    )
    assert ds["gradient_clipping"] == 0.5
    assert ds["bf16"]["enabled"] is (precision == "bf16")
    assert ds["communication_data_type"] == precision
    assert "optimizer" not in ds and "scheduler" not in ds
    stage = int(preset[4])
    assert ZeroSettings.of(ds).stage == stage
    sums_in_fp32 = precision == "fp32" or stage >= 2
    assert ds["data_types"]["grad_accum_dtype"] == ("fp32" if sums_in_fp32 else "bf16")
    assert len(notes) == (0 if sums_in_fp32 else 1)
    check_resolved(ds)


def test_presets_offload_what_their_names_say() -> None:
    devices = {}
    for preset in PRESETS:
        ds, _ = resolve_ds_config(preset + ".json", config(), 2)
        devices[preset] = (offload_device(ds, "optimizer"), offload_device(ds, "param"))
    assert devices["zero3"] == devices["zero3_split"] == devices["zero2"] == ("none", "none")
    assert devices["zero2_cpu"] == devices["zero2_cpu_split"] == ("cpu", "none")
    assert devices["zero3_cpu"] == devices["zero3_cpu_split"] == ("cpu", "cpu")
    assert devices["zero3_nvme"] == devices["zero3_nvme_split"] == ("nvme", "cpu")
    assert devices["zero3_nvme_all"] == ("nvme", "nvme")


def test_one_micro_batch_needs_no_fp32_sum() -> None:
    assert resolve_ds_config("zero3", config(), 2)[0]["data_types"]["grad_accum_dtype"] == "bf16"


def test_unknown_name_lists_the_presets() -> None:
    with pytest.raises(UserError) as caught:
        find_ds_config("zero4.json")
    assert all(preset in str(caught.value) for preset in PRESETS)


def test_a_file_goes_before_a_preset_of_the_same_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "zero3.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    monkeypatch.chdir(tmp_path)
    ds, notes = resolve_ds_config("zero3.json", config(), 1)
    assert ZeroSettings.of(ds).stage == 2
    assert "not the preset" in notes[0]


@pytest.mark.parametrize("text", ["{", "[]", '"zero3"'])
def test_malformed_file_is_one_message(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.json"
    path.write_text(text)
    with pytest.raises(UserError, match="broken.json"):
        resolve_ds_config(str(path), config(), 1)


CONTRADICTIONS: list[tuple[dict[str, Any], str, str]] = [
    ({"optimizer": {"type": "AdamW", "params": {"lr": 2e-5}}}, "optimizer.params.lr", "--lr"),
    ({"optimizer": {"type": "Adam", "params": {"betas": [0.9, 0.999]}}}, "optimizer.params.betas", "--beta2"),
    ({"optimizer": {"params": {"eps": 1e-8}}}, "optimizer.params.eps", "--eps"),
    ({"gradient_clipping": 0.1}, "gradient_clipping", "--max_grad_norm"),
    ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps", "--gradient_accumulation_steps"),
    ({"train_batch_size": 64}, "train_batch_size", "--gradient_accumulation_steps"),
    ({"train_micro_batch_size_per_gpu": 2}, "train_micro_batch_size_per_gpu", "--max_num_tokens"),
    ({"bf16": {"enabled": False}}, "bf16.enabled", "--precision"),
    ({"fp16": {"enabled": True}}, "fp16", "--precision"),
    ({"bf16": {"check_grad_overflow": False}}, "bf16.check_grad_overflow", "remove the key"),
    ({"torch_autocast": {"enabled": True, "dtype": "bfloat16"}}, "torch_autocast", "--precision"),
]


@pytest.mark.parametrize("content, key, argument", CONTRADICTIONS)
def test_contradiction_names_both_sides(tmp_path: Path, content: dict[str, Any], key: str, argument: str) -> None:
    message = fault(tmp_path, content)
    assert key in message and argument in message and "mine.json" in message


def test_all_contradictions_are_listed_at_once(tmp_path: Path) -> None:
    content = {"gradient_clipping": 0.1, "gradient_accumulation_steps": 4, "bf16": {"enabled": False}}
    assert fault(tmp_path, content).count("\n  - ") == 3


def test_agreeing_values_are_no_contradiction(tmp_path: Path) -> None:
    content = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1,
        "optimizer": {"type": "Adam", "params": {"lr": "2e-5", "betas": [0.9, 0.95], "eps": 1e-15, "weight_decay": 0}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 1},
        "steps_per_print": 7,
    }
    ds, _ = resolve(tmp_path, content, "--lr", "2e-5", "--gradient_accumulation_steps", "2")
    assert ds["steps_per_print"] == 7
    assert ZeroSettings.of(ds).stage == 1


def test_a_file_written_for_the_hugging_face_trainer_resolves(tmp_path: Path) -> None:
    auto = "auto"
    content = {
        "bf16": {"enabled": auto},
        "fp16": {"enabled": auto, "loss_scale": 0, "initial_scale_power": 16},
        "optimizer": {"type": "AdamW", "params": {"lr": auto, "betas": auto, "eps": auto, "weight_decay": auto}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_min_lr": auto, "warmup_num_steps": auto}},
        "zero_optimization": {
            "stage": 3,
            "offload_optimizer": {"device": "none", "pin_memory": True},
            "reduce_bucket_size": auto,
            "stage3_prefetch_bucket_size": auto,
            "stage3_param_persistence_threshold": auto,
        },
        "gradient_accumulation_steps": auto,
        "gradient_clipping": auto,
        "train_batch_size": auto,
        "train_micro_batch_size_per_gpu": auto,
    }
    ds, notes = resolve(tmp_path, content)
    preset = json.loads((ds_configs_folder() / "zero3.json").read_text())["zero_optimization"]
    assert ds["zero_optimization"]["reduce_bucket_size"] == preset["reduce_bucket_size"]
    assert '"auto"' not in json.dumps(ds) and "fp16" not in ds
    assert any("scheduler" in note for note in notes)
    check_resolved(ds)


UNSUPPORTED: list[tuple[dict[str, Any], str]] = [
    ({"optimizer": {"type": "Lion"}}, "Lion"),
    ({"optimizer": {"type": "AdamW", "params": {"weight_decay": 0.1}}}, "weight_decay"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 10}}}, "--warmup_steps"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme", "nvme_path": "/x"}}}, "nvme"),
    ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param"),
    ({"zero_optimization": {"stage": 0, "offload_optimizer": {"device": "cpu"}}}, "offload_optimizer"),
    ({"zero_optimization": {"stage": 4}}, "stage"),
    ({"zero_optimization": True}, "zero_optimization"),
    ({"bf16": {"enabled": True, "bf16_master_weights_and_grads": True}}, "bf16_master_weights_and_grads"),
    ({"gradient_allreduce_op": "sum"}, "gradient_allreduce_op"),
    ({"data_types": {"grad_accum_dtype": "fp32"}, "zero_optimization": {"stage": 1}}, "grad_accum_dtype"),
]


@pytest.mark.parametrize("content, word", UNSUPPORTED)
def test_what_would_change_results_is_refused(tmp_path: Path, content: dict[str, Any], word: str) -> None:
    assert word in fault(tmp_path, content)


def test_deepspeeds_own_refusals_become_messages() -> None:
    with pytest.raises(UserError, match="stge"):
        check_resolved({"zero_optimization": {"stge": 3}})
    with pytest.raises(UserError, match="elasticity|Elastic"):
        check_resolved({"elasticity": {}})


# ---------------------------------------------------------------------------------------------------- FSDP options
def test_the_hpz_preset_keeps_a_copy_per_host() -> None:
    ds, (note,) = resolve_ds_config("zero3_hpz", config(), 16, 8)
    assert ds["zero_optimization"]["zero_hpz_partition_size"] == 8
    assert "per host of 8" in note
    check_resolved(ds)


def test_the_hpz_preset_on_hosts_that_no_group_divides_keeps_a_single_copy_and_says_so() -> None:
    ds, (note,) = resolve_ds_config("zero3_hpz", config(), 5, 1)
    assert "zero_hpz_partition_size" not in ds["zero_optimization"]
    assert "no copy of the parameters per host" in note


def test_the_hpz_preset_on_one_host_keeps_a_single_copy() -> None:
    ds, _ = resolve_ds_config("zero3_hpz", config(), 8, 8)
    assert "zero_hpz_partition_size" not in ds["zero_optimization"]


def test_fsdp_options_not_given_do_nothing() -> None:
    ds, notes = resolve_ds_config("zero3", config(), 16)  # num_shard defaults to 8, sharding_strategy to HYBRID_SHARD
    assert "zero_hpz_partition_size" not in ds["zero_optimization"]
    assert notes == []


@pytest.mark.parametrize("shard", ["4", "8"])
def test_num_shard_of_the_world_or_more_means_all(shard: str) -> None:
    ds, notes = resolve_ds_config("zero3", config("--num_shard", shard), 4)
    assert "zero_hpz_partition_size" not in ds["zero_optimization"]
    assert notes == []


@pytest.mark.parametrize("preset", ["zero3", "zero3_hpz"])
def test_num_shard_below_the_world_is_an_hpz_group(preset: str) -> None:
    ds, notes = resolve_ds_config(preset, config("--num_shard", "2"), 4)
    assert ds["zero_optimization"]["zero_hpz_partition_size"] == 2
    assert len(notes) == 1
    check_resolved(ds)


@pytest.mark.parametrize(
    "preset, words, reason",
    [
        ("zero2", ["--num_shard", "2"], "stage 2"),
        ("zero3_cpu", ["--num_shard", "2"], "offloaded"),
        ("zero3", ["--num_shard", "1"], "zero2"),
        ("zero3", ["--num_shard", "3"], "divided"),
        ("zero3", ["--num_shard", "2", "--sharding_strategy", "FULL_SHARD"], "FULL_SHARD"),
        ("zero2", ["--sharding_strategy", "FULL_SHARD"], "stage 2"),
        ("zero3", ["--backward_prefetch", "BACKWARD_POST"], "backward_prefetch"),
        ("zero3", ["--num_replicate", "2"], "num_replicate"),
        ("zero3_cpu", ["--cpu_offload", "False"], "optimizer and param"),
        ("zero0", ["--cpu_offload"], "nothing to offload"),
    ],
)
def test_an_fsdp_option_that_cannot_act_says_so_in_one_line(preset: str, words: list[str], reason: str) -> None:
    plain, _ = resolve_ds_config(preset, config(), 4)
    ds, notes = resolve_ds_config(preset, config(*words), 4)
    assert ds == plain
    assert len(notes) == 1 and reason in notes[0]


@pytest.mark.parametrize("preset, param", [("zero3", "cpu"), ("zero2", "none")])
def test_cpu_offload_acts_where_the_file_leaves_it_open(preset: str, param: str) -> None:
    ds, notes = resolve_ds_config(preset, config("--cpu_offload", "True"), 4)
    assert (offload_device(ds, "optimizer"), offload_device(ds, "param")) == ("cpu", param)
    assert len(notes) == 1


@pytest.mark.parametrize("strategy, stage", [("FULL_SHARD", 3), ("SHARD_GRAD_OP", 2), ("NO_SHARD", 0)])
def test_sharding_strategy_fills_an_open_stage(tmp_path: Path, strategy: str, stage: int) -> None:
    for content in ({}, {"zero_optimization": {"stage": "auto"}}):
        ds, notes = resolve(tmp_path, content, "--sharding_strategy", strategy)
        assert ZeroSettings.of(ds).stage == stage
        assert len(notes) == 1


def test_old_offload_spelling_is_read(tmp_path: Path) -> None:
    ds, _ = resolve(tmp_path, {"zero_optimization": {"stage": 2, "cpu_offload": True}})
    assert offload_device(ds, "optimizer") == "cpu"


@pytest.mark.parametrize(
    "text, words",
    [
        (
            '{"zero_optimization": {"stage": 3},\n"zero_optimization": {"stage": 2}}',
            "line 2: the key 'zero_optimization'",
        ),
        ('{"bf16": {\n"enabled": true,\n"enabled": true}}', "line 3: the key 'enabled' in bf16"),
    ],
)
def test_a_key_given_twice_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "ds.json").write_text(text)
    with pytest.raises(UserError, match="given twice") as caught:
        resolve_ds_config(str(tmp_path / "ds.json"), config(), 2)
    assert "--ds_config" in str(caught.value) and words in str(caught.value)


# ------------------------------------------------------------------------------------------------------ split masters
def split_config(moments: object = "bf16", stage: int = 3, param: str = "cpu", **others: Any) -> dict[str, Any]:
    offload = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": param}}
    return {"zero_optimization": {"stage": stage, **offload}, "split_masters": {"moments": moments}, **others}


@pytest.mark.parametrize("moments, size", [("fp32", 4), ("bf16", 2), ("8bit", 1), ("auto", 4)])
def test_split_masters_have_moments_of_the_named_size(tmp_path: Path, moments: str, size: int) -> None:
    ds, notes = resolve(tmp_path, split_config(moments))
    settings = ZeroSettings.of(ds)
    assert (settings.master_bytes, settings.moment_bytes) == (2, size) and not notes
    assert settings.split_moments == ("fp32" if moments == "auto" else moments)
    check_resolved(ds)


@pytest.mark.parametrize(
    "content, words, said",
    [
        (split_config("fp16"), [], "split_masters.moments must be one of fp32, bf16, 8bit, found 'fp16'"),
        ({**split_config(), "split_masters": True}, [], 'split_masters must be {"moments": ...} with one of fp32'),
        ({**split_config(), "split_masters": {"moment": "bf16"}}, [], "found {'moment': 'bf16'}"),
        (split_config(), ["--precision", "fp32"], "split_masters needs --precision bf16, found fp32"),
        (
            split_config(param="none"),
            [],
            "found offload_optimizer on cpu and offload_param on none; change these, or remove the section",
        ),
        (split_config(param="nvme"), [], "found offload_optimizer on cpu and offload_param on nvme"),
        (
            split_config(bf16={"enabled": "auto", "bf16_master_weights_and_grads": True}),
            [],
            "bf16.bf16_master_weights_and_grads and split_masters exclude each other",
        ),
        (split_config(zero_force_ds_cpu_optimizer=True), [], "zero_force_ds_cpu_optimizer is true"),
    ],
)
def test_split_masters_that_cannot_be_are_refused(
    tmp_path: Path, content: dict[str, Any], words: list[str], said: str
) -> None:
    assert said in fault(tmp_path, content, *words)


@pytest.mark.parametrize(
    "stage, offload, said",
    [
        (2, "cpu", ""),
        (2, "none", "split_masters with ZeRO stage 2 needs offload_optimizer on the CPU, found none; use preset zero2"),
        (
            1,
            "cpu",
            "split_masters needs ZeRO stage 2 or 3, found stage 1; use preset zero2_cpu_split or zero3_cpu_split",
        ),
    ],
)
def test_split_masters_need_a_stage_that_shards_gradients(tmp_path: Path, stage: int, offload: str, said: str) -> None:
    content = split_config(stage=stage)
    del content["zero_optimization"]["offload_param"]
    content["zero_optimization"]["offload_optimizer"] = {"device": offload}
    if said:
        assert said in fault(tmp_path, content)
    else:
        assert ZeroSettings.of(resolve(tmp_path, content)[0]).split_moments == "bf16"


def test_split_masters_on_nvme_are_out_of_the_weights_way(tmp_path: Path) -> None:
    words = ["--nvme_path", str(tmp_path)]
    settings = ZeroSettings.of(resolve_ds_config("zero3_nvme_split", config(*words), 2)[0])
    assert settings.split_folder(1) == settings.optimizer.folder / "split" / "rank1"
    assert ZeroSettings.of(resolve_ds_config("zero3_nvme", config(*words), 2)[0]).split_folder(1) is None
    assert ZeroSettings.of(resolve_ds_config("zero3_cpu_split", config(*words), 2)[0]).split_folder(1) is None
    content = split_config()
    content["zero_optimization"]["offload_optimizer"] = {"device": "nvme", "nvme_path": str(tmp_path)}
    content["zero_optimization"]["offload_param"] = {"device": "nvme", "nvme_path": str(tmp_path)}
    assert "found offload_optimizer on nvme and offload_param on nvme" in fault(tmp_path, content, *words)
