"""Keys of a ds_config: what DeepSpeed would ignore is refused by name and line, what it reads passes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bagel_ds.arguments.run_config import parse_arguments
from bagel_ds.cli import main
from bagel_ds.errors import UserError
from bagel_ds.zero.config import check
from bagel_ds.zero.config.files import ds_configs_folder
from bagel_ds.zero.config.resolve import resolve_ds_config

AUTO = "auto"
# As the documentation of Hugging Face's Trainer and Accelerate shows them.
HF_ZERO2 = {
    "fp16": {
        "enabled": AUTO,
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "bf16": {"enabled": AUTO},
    "optimizer": {"type": "AdamW", "params": {"lr": AUTO, "betas": AUTO, "eps": AUTO, "weight_decay": AUTO}},
    "scheduler": {
        "type": "WarmupLR",
        "params": {"warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO},
    },
    "zero_optimization": {
        "stage": 2,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "allgather_partitions": True,
        "allgather_bucket_size": 2e8,
        "overlap_comm": True,
        "reduce_scatter": True,
        "reduce_bucket_size": 2e8,
        "contiguous_gradients": True,
        "round_robin_gradients": True,
    },
    "gradient_accumulation_steps": AUTO,
    "gradient_clipping": AUTO,
    "steps_per_print": 2000,
    "train_batch_size": AUTO,
    "train_micro_batch_size_per_gpu": AUTO,
    "wall_clock_breakdown": False,
}
HF_ZERO3 = {
    **HF_ZERO2,
    "scheduler": {
        "type": "WarmupDecayLR",
        "params": {"total_num_steps": AUTO, "warmup_min_lr": AUTO, "warmup_max_lr": AUTO, "warmup_num_steps": AUTO},
    },
    "zero_optimization": {
        "stage": 3,
        "offload_optimizer": {"device": "cpu", "pin_memory": True},
        "offload_param": {"device": "cpu", "pin_memory": True},
        "overlap_comm": True,
        "contiguous_gradients": True,
        "sub_group_size": 1e9,
        "reduce_bucket_size": AUTO,
        "stage3_prefetch_bucket_size": AUTO,
        "stage3_param_persistence_threshold": AUTO,
        "stage3_max_live_parameters": 1e9,
        "stage3_max_reuse_distance": 1e9,
        "stage3_gather_16bit_weights_on_model_save": True,
    },
}
ACCELERATE = {**HF_ZERO3, "steps_per_print": float("inf"), "bf16": AUTO, "fp16": {"enabled": False}}
# As https://www.deepspeed.ai/docs/config-json documents its sections.
DOCUMENTED: list[dict[str, Any]] = [
    {"tensorboard": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train_internlm"}},
    {"wandb": {"enabled": True, "group": "my_group", "team": "my_team", "project": "my_project"}},
    {"comet": {"enabled": True, "workspace": "w", "project": "p", "samples_log_interval": 50, "experiment_name": "e"}},
    {"csv_monitor": {"enabled": True, "output_path": "output/ds_logs/", "job_name": "train_internlm"}},
    {"comms_logger": {"enabled": True, "verbose": False, "prof_all": True, "debug": False, "prof_ops": ["all_reduce"]}},
    {
        "flops_profiler": {
            "enabled": False,
            "profile_step": 1,
            "module_depth": -1,
            "top_modules": 1,
            "detailed": True,
            "output_file": None,
        }
    },
    {
        "activation_checkpointing": {
            "partition_activations": False,
            "cpu_checkpointing": False,
            "contiguous_memory_optimization": False,
            "number_checkpoints": None,
            "synchronize_checkpoint_boundary": False,
            "profile": False,
        }
    },
    {
        "aio": {
            "block_size": 1048576,
            "queue_depth": 8,
            "intra_op_parallelism": 1,
            "single_submit": False,
            "overlap_events": True,
            "use_gds": False,
        }
    },
    {"checkpoint": {"tag_validation": "Warn", "load_universal": False, "parallel_write": {"pipeline_stage": False}}},
    {"data_types": {"grad_accum_dtype": "fp32"}},
    {"timers": {"throughput": {"enabled": True, "synchronized": True}}},
    {"autotuning": {"enabled": False, "results_dir": "r", "fast": False, "arg_mappings": {"a": "--b"}}},
    {"data_efficiency": {"enabled": False, "seed": 1234, "data_sampling": {"enabled": False, "num_workers": 0}}},
    {"compile": {"deepcompile": False}},
    {"datastates_ckpt": {"host_cache_size": 16}},
    {"bfloat16": {"enabled": True}},
    {"zero_optimization": {"stage": 2, "cpu_offload": True, "leaf_module": {"classes": ["A"]}}},
    {"zero_optimization": {"stage": 3, "prefetch_bucket_size": 5, "stage3_gather_fp16_weights_on_model_save": True}},
    {"torch_autocast": {"enabled": False, "dtype": "bfloat16", "lower_precision_safe_modules": ["torch.nn.Linear"]}},
    {
        "steps_per_print": 10,
        "wall_clock_breakdown": False,
        "memory_breakdown": True,
        "dump_state": False,
        "disable_allgather": False,
        "prescale_gradients": False,
        "gradient_predivide_factor": 1,
        "communication_data_type": "bf16",
        "seq_parallel_communication_data_type": "fp32",
        "dataloader_drop_last": False,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "vocabulary_size": 152064,
    },
    {"optimizer": {"type": "Adam", "params": {"lr": 1e-5, "torch_adam": True, "adam_w_mode": True, "amsgrad": False}}},
    {"scheduler": {"type": "CosineAnnealingLR", "params": {"T_max": 5}}},
    {},
]


def _written(tmp_path: Path, content: Any) -> str:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(content, indent=1))
    return str(path)


def _faults(tmp_path: Path, content: Any) -> str:
    with pytest.raises(UserError) as caught:
        check.check_file(_written(tmp_path, content))
    return str(caught.value)


@pytest.mark.parametrize("preset", sorted(path.stem for path in ds_configs_folder().glob("*.json")))
def test_every_preset_passes(preset: str) -> None:
    check.check_file(preset)


@pytest.mark.parametrize("content", [HF_ZERO2, HF_ZERO3, ACCELERATE])
def test_files_of_hugging_face_pass_and_resolve(tmp_path: Path, content: dict[str, Any]) -> None:
    path = _written(tmp_path, content)
    check.check_file(path)
    ds, _ = resolve_ds_config(path, parse_arguments([]), 4)
    check.check_resolved(ds)


@pytest.mark.parametrize("content", DOCUMENTED, ids=lambda content: "-".join(content) or "empty")
def test_documented_sections_pass_also_with_auto_in_them(tmp_path: Path, content: dict[str, Any]) -> None:
    check.check_file(_written(tmp_path, content))
    opened = {
        key: dict.fromkeys(value, AUTO) if isinstance(value, dict) and key not in ("optimizer", "scheduler") else AUTO
        for key, value in content.items()
    }
    check.check_file(_written(tmp_path, opened))


UNKNOWN: list[tuple[dict[str, Any], str, str]] = [
    ({"zero_optimisation": {"stage": 3}}, "'zero_optimisation'", "'zero_optimization'"),
    ({"zero_optimization": {"stge": 3}}, "'stge' in zero_optimization", "'stage'"),
    ({"zero_optimization": {"stge": AUTO}}, "'stge' in zero_optimization", "'stage'"),  # which DeepSpeed drops unread
    ({"zero_optimization": {"offload_optimizer": {"devise": "cpu"}}}, "'devise' in zero_optimization.off", "'device'"),
    ({"zero_optimization": {"offload_optimizer": {"devise": AUTO}}}, "'devise' in zero_optimization.off", "'device'"),
    ({"zero_optimization": {"offload_parm": {"device": "cpu"}}}, "'offload_parm'", "'offload_param'"),
    ({"zero_optimization": {"leaf_module": {"clases": []}}}, "'clases' in zero_optimization.leaf", "'classes'"),
    ({"bf16": {"enable": True}}, "'enable' in bf16", "'enabled'"),
    ({"fp16": {"enabled": False, "los_scale": 0}}, "'los_scale' in fp16", "'loss_scale'"),
    ({"aio": {"blocksize": 1048576}}, "'blocksize' in aio", "'block_size'"),
    ({"optimizer": {"typ": "AdamW"}}, "'typ' in optimizer", "'type'"),
    ({"optimizer": {"type": "AdamW", "params": {"wieght_decay": AUTO}}}, "'wieght_decay' in opt", "'weight_decay'"),
    ({"optimizer": {"params": {"learning": 1}}}, "'learning' in optimizer.params", "nearest known ones"),
    ({"scheduler": {"type": "WarmupLR", "params": {"warmup_steps": AUTO}}}, "'warmup_steps'", "'warmup_num_steps'"),
    ({"scheduler": {"type": "WarmupLRR"}}, "unknown scheduler 'WarmupLRR'", "'WarmupLR'"),
    ({"flops_profiler": {"enabled": True, "depth": 1}}, "'depth' in flops_profiler", "module_depth"),
    ({"activation_checkpointing": {"cpu_checkpoint": True}}, "'cpu_checkpoint'", "'cpu_checkpointing'"),
    ({"comms_logger": {"enabled": True, "prof": 1}}, "'prof' in comms_logger", "'prof_ops'|'prof_all'"),
    ({"tensorboard": {"output_pth": "x"}}, "'output_pth' in tensorboard", "'output_path'"),
    ({"timers": {"throughputs": {}}}, "'throughputs' in timers", "'throughput'"),
    ({"timers": {"throughput": {"sync": True}}}, "'sync' in timers.throughput", "known: enabled, synchronized"),
    ({"checkpoint": {"parallel_write": {"pipeline": True}}}, "'pipeline' in checkpoint.par", "'pipeline_stage'"),
    ({"data_types": {"grad_acum_dtype": "fp32"}}, "'grad_acum_dtype' in data_types", "'grad_accum_dtype'"),
    ({"gradient_cliping": 1.0}, "'gradient_cliping'", "'gradient_clipping'"),
    ({"train_batchsize": AUTO}, "'train_batchsize'", "'train_batch_size'"),
    ({"torch_autocast": {"enabled": False, "dtyp": "bf16"}}, "'dtyp' in torch_autocast", "'dtype'"),
]


@pytest.mark.parametrize("content, found, meant", UNKNOWN, ids=[found for _, found, _ in UNKNOWN])
def test_an_unknown_key_names_its_line_and_the_nearest_one(
    tmp_path: Path, content: dict[str, Any], found: str, meant: str
) -> None:
    message = _faults(tmp_path, content)
    assert f"--ds_config {tmp_path / 'mine.json'}, line " in message
    assert found in message and any(each in message for each in meant.split("|"))


WRONG: list[tuple[dict[str, Any], str]] = [
    (
        {"zero_optimization": {"stage": 3, "reduce_bucket_size": "many"}},
        "zero_optimization.reduce_bucket_size is 'many'",
    ),
    ({"zero_optimization": {"offload_optimizer": {"device": "gpu"}}}, "zero_optimization.offload_optimizer.device"),
    ({"zero_optimization": {"offload_optimizer": "cpu"}}, "zero_optimization.offload_optimizer is 'cpu'"),
    ({"zero_optimization": True}, "zero_optimization must be a mapping, found True"),
    ({"bf16": {"enabled": "perhaps"}}, "bf16.enabled is 'perhaps'"),
    ({"bf16": True}, "bf16 must be a mapping, found True"),
    ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale is -1"),
    ({"aio": {"block_size": "big"}}, "aio.block_size must be a whole number, found 'big'"),
    ({"aio": {"block_size": 1.5}}, "aio.block_size must be a whole number, found 1.5"),
    ({"aio": {"single_submit": 1}}, "aio.single_submit must be true or false, found 1"),
    ({"aio": 5}, "aio must be a mapping, found 5"),
    ({"flops_profiler": True}, "flops_profiler must be a mapping, found True"),
    ({"optimizer": "AdamW"}, "optimizer must be a mapping, found 'AdamW'"),
    ({"optimizer": {"params": 3}}, "optimizer.params must be a mapping, found 3"),
    ({"gradient_clipping": "1.0"}, "gradient_clipping must be a number, found '1.0'"),
    ({"wall_clock_breakdown": "no"}, "wall_clock_breakdown must be true or false, found 'no'"),
    ({"steps_per_print": "often"}, "steps_per_print must be a number, found 'often'"),
    ({"train_batch_size": [8]}, "train_batch_size must be a whole number, found [8]"),
    ({"communication_data_type": "fp23"}, "communication_data_type is 'fp23'"),
    ({"data_types": {"grad_accum_dtype": "fp23"}}, "data_types.grad_accum_dtype is 'fp23'"),
    ({"checkpoint": {"tag_validation": "Maybe"}}, "invalid tag_validation value of MAYBE"),
    ({"tensorboard": {"enabled": True, "job_name": 5}}, "tensorboard.job_name is 5"),
    ({"zero_optimization": {"prefetch_bucket_size": 1, "stage3_prefetch_bucket_size": 2}}, "mean the same"),
    ({"amp": {"enabled": AUTO}}, "Remove the key 'amp'"),
    ({"zero_optimization": {"mics_shard_size": 2}}, "Remove the key 'mics_shard_size'"),
]


@pytest.mark.parametrize("content, found", WRONG, ids=[found for _, found in WRONG])
def test_a_value_that_deepspeed_cannot_read_names_its_line(tmp_path: Path, content: dict[str, Any], found: str) -> None:
    message = _faults(tmp_path, content)
    assert f"{tmp_path / 'mine.json'}, line " in message and found in message


def test_all_faults_of_a_file_are_listed_at_once_with_their_lines(tmp_path: Path) -> None:
    content = {"bf16": {"enable": True}, "aio": 5, "zero_optimisation": {}, "optimizer": {"params": {"lrr": 1}}}
    message = _faults(tmp_path, content)
    assert message.count("\n  - ") == 4
    assert all(f"line {line}: " in message for line in (3, 5, 6, 9))


@pytest.mark.parametrize(
    "content, words",
    [
        ({"bf16": {"enabled": True}, "bfloat16": {"enabled": True}}, "bf16 and bfloat16 are the same section"),
        (
            {"zero_optimization": {"stage": 2, "cpu_offload": True, "offload_optimizer": {"device": "none"}}},
            "cpu_offload and offload_optimizer are the same",
        ),
    ],
)
def test_two_spellings_of_one_section_are_refused(tmp_path: Path, content: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        resolve_ds_config(_written(tmp_path, content), parse_arguments([]), 4)


def test_the_planner_refuses_a_misspelled_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = {"zero_optimization": {"stage": 3, "offload_optimizer": {"devise": "cpu"}}}
    words = ["memory", "--model", "7b", "--world_size", "4", "--json", "--ds_config"]
    assert main.main([*words, _written(tmp_path, content)]) == 2
    captured = capsys.readouterr()
    assert "did you mean 'device'?" in captured.err and not captured.out
    content["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}  # type: ignore[index]
    assert main.main([*words, _written(tmp_path, content)]) == 0
    json.loads(capsys.readouterr().out)


def test_without_deepspeed_the_planner_says_what_it_did_not_check(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(check.importlib.util, "find_spec", lambda name: None)
    remark = check.check_file_if_possible(_written(tmp_path, {"zero_optimisation": {}}))
    assert remark is not None and "not checked" in remark and "mine.json" in remark
    assert check.check_file_if_possible("zero3") is None
