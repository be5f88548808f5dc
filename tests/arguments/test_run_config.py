"""Arguments: what is accepted, what is refused, what is said, and that the list of options is a decision."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagel_ds.arguments.options import all_options, is_optional, type_name
from bagel_ds.arguments.parse import LAUNCHER_LETTERS, LAUNCHER_OPTIONS, SYNONYMS, duration_seconds, duration_text
from bagel_ds.arguments.run_config import RunConfig, parse_arguments, wandb_wanted
from bagel_ds.errors import UserError
from bagel_ds.model.attention.backends import CHOICES, NAMES
from tests.guide_commands import BLOCKMOVING, GUIDE_COMMANDS, MODALITY_EXTRAS, WANDB_EXTRA, arguments

OPTIONS = """
model_path llm_path vit_path vae_path llm_qk_norm tie_word_embeddings layer_module max_latent_size latent_patch_size
vit_patch_size vit_max_num_patch_per_side connector_act interpolate_pos vit_select_layer vit_rope
text_cond_dropout_prob vae_cond_dropout_prob vit_cond_dropout_prob dataset_config_file dataset_info index_cache
prefetch_factor num_workers max_num_tokens_per_sample expected_num_tokens max_num_tokens prefer_buffer_before
max_buffer_size data_seed visual_gen visual_und results_dir checkpoint_dir enable_wandb wandb_project wandb_name
wandb_runid wandb_resume wandb_offline global_seed auto_resume start_anew resume_from resume_model_only
finetune_from_ema finetune_from_hf log_every profile save_every total_steps del_previous_state keep_last debug_batches
val_config val_every val_max_batches sample_prompts sample_every sample_weights
stop_after stall_timeout max_nonfinite warmup_steps lr_scheduler lr min_lr beta1
beta2 eps weight_decay ema max_grad_norm timestep_shift mse_weight ce_weight ce_loss_reweighting
gradient_accumulation_steps
peak_device_tflops freeze_llm freeze_vit freeze_vae freeze_und copy_init_moe use_flex lora_rank lora_alpha lora_dropout
lora_targets base_precision num_replicate num_shard
sharding_strategy backward_prefetch cpu_offload ds_config nvme_path ignore_memory_plan ema_every ema_dtype attn
fused_kernels precision activation_checkpointing save_dtype
""".split()


def parse(line: str = "") -> RunConfig:
    return parse_arguments(line.split())


def fault(line: str) -> str:
    with pytest.raises(UserError) as caught:
        parse(line)
    return str(caught.value)


def test_the_options_are_these() -> None:
    """Adding one is a decision: it belongs into this list and into docs/arguments.md."""
    assert list(all_options()) == OPTIONS


def test_going_on_and_starting_anew_contradict_each_other() -> None:
    text = fault("--auto_resume True --start_anew True")
    assert "--auto_resume True" in text and "--start_anew True" in text and "leave out one" in text
    assert parse("--start_anew").training.start_anew and not parse("--auto_resume True").training.start_anew


def test_every_option_has_a_help_line_and_a_default_of_its_type() -> None:
    kinds = {"str": str, "int": int, "float": float, "bool": bool}
    for field in all_options().values():
        assert field.metadata["help"] and "\n" not in field.metadata["help"]
        if field.default is None:
            assert is_optional(field)
        else:
            assert type(field.default) is kinds[type_name(field)], field.name


@pytest.mark.parametrize(
    "name, default",
    [("max_num_tokens", 36864), ("expected_num_tokens", 32768), ("lr", 1e-4), ("eps", 1e-15), ("ema", 0.9999)]
    + [("warmup_steps", 2000), ("total_steps", 500_000), ("global_seed", 4396), ("data_seed", 42), ("num_shard", 8)]
    + [("vit_select_layer", -2), ("beta2", 0.95), ("freeze_vae", True), ("max_latent_size", None)],
)
def test_defaults_are_the_originals(name: str, default: object) -> None:
    assert parse().values()[name] == default


# ----------------------------------------------------------------------------------------------------- the spelling
def test_underscore_hyphen_equals_and_prefix_are_the_same() -> None:
    lines = ["--num_workers 3", "--num-workers 3", "--num_workers=3", "--num-worker=3", "--num_w 3"]
    assert len({parse(line) for line in lines}) == 1
    assert parse(lines[0]).data.num_workers == 3


@pytest.mark.parametrize("word, value", [("True", True), ("true", True), ("1", True), ("False", False), ("0", False)])
def test_booleans_take_words(word: str, value: bool) -> None:
    assert parse(f"--visual_und {word}").training.visual_und is value
    assert parse(f"--visual-und={word}").training.visual_und is value


def test_bare_booleans_are_true() -> None:
    training = parse("--auto_resume --freeze_und --lr 1e-5 --use-flex").training
    assert (training.auto_resume, training.freeze_und, training.use_flex, training.lr) == (True, True, True, 1e-5)


def test_negative_numbers_are_values() -> None:
    assert parse("--vit_select_layer -3").model.vit_select_layer == -3


def test_the_last_of_repeated_options_wins() -> None:
    assert parse("--lr 1 --lr 2").training.lr == 2.0


def test_the_launchers_local_rank_is_accepted() -> None:
    assert parse("--local_rank=3 --lr 1e-5") == parse("--lr 1e-5")
    assert parse("--local_rank 3 --lr 1e-5") == parse("--lr 1e-5")


@pytest.mark.parametrize("word", ["None", "none", "null"])
def test_none_stands_for_not_given(word: str) -> None:
    config = parse(f"--max_latent_size {word} --resume_from {word} --enable_wandb {word}")
    assert (config.model.max_latent_size, config.training.resume_from, config.training.enable_wandb) == (None,) * 3
    assert "--lr" in fault(f"--lr {word}")


@pytest.mark.parametrize("word", ["none", "None"])
def test_none_is_a_value_where_it_is_one_of_the_choices(word: str) -> None:
    assert parse_arguments(["--activation_checkpointing", word]).training.activation_checkpointing == "none"


def test_an_empty_value_stands_for_not_given_where_that_is_possible() -> None:
    """As a script writes it: RESUME=""; deepspeed ... --resume_from "$RESUME"."""
    assert parse_arguments(["--resume_from", "", "--lr", "1e-5"]).training.resume_from is None
    assert parse("--resume_from=").training.resume_from is None
    assert "--lr" in fault("--lr=")


@given(st.sampled_from(sorted(set(OPTIONS))), st.integers(1, 40))
def test_a_beginning_of_a_name_is_that_option_or_a_message(name: str, length: int) -> None:
    beginning = name[:length]
    fitting = [option for option in [*OPTIONS, "config", "local_rank", "help"] if option.startswith(beginning)]
    if beginning in fitting or len(fitting) == 1:
        return  # takes the option's value; covered by the tests of values
    message = fault(f"--{beginning} 1")
    assert "ambiguous" in message and all(f"--{option}" in message for option in fitting)


def test_an_unknown_argument_names_the_nearest() -> None:
    message = fault("--num_wrokers 2")
    assert "--num_wrokers" in message and "--num_workers" in message


def test_all_faults_are_listed_at_once() -> None:
    message = fault("--lrr 1 --total_steps many --visual_gen perhaps --precision fp16 stray --save_every")
    assert message.count("\n  - ") == 6
    for word in ("--lrr", "'many'", "'perhaps'", "bf16, fp32", "'stray'", "--save_every"):
        assert word in message


def test_values_out_of_range_are_listed_beside_those_that_are_no_values(tmp_path: Path) -> None:
    message = fault("--lr abc --warmup_steps -3 --ema 1.5 --freeze_vae False")
    assert message.count("\n  - ") == 4
    for word in ("'abc'", "--warmup_steps -3: expected 0 or more", "--ema 1.5: expected", "--freeze_vae False is not"):
        assert word in message
    file = tmp_path / "run.yaml"
    file.write_text("total_steps: 0\n")
    assert f"{file}, line 1: --total_steps 0: expected at least 1" in fault(f"--config {file} --lr abc")


def test_help_lists_every_option_in_groups(capsys: pytest.CaptureFixture[str]) -> None:
    for word in ("--help", "-h"):
        with pytest.raises(SystemExit) as caught:
            parse(word)
        assert caught.value.code == 0
        printed = capsys.readouterr().out
        assert all(f"--{name}" in printed for name in OPTIONS)
        assert printed.index("model - ") < printed.index("data - ") < printed.index("training - ")


# ------------------------------------------------------------------------------------------------------- the guides
@pytest.mark.parametrize("extra", ["", WANDB_EXTRA, *MODALITY_EXTRAS])
@pytest.mark.parametrize("command", GUIDE_COMMANDS)
def test_guide_commands_parse_verbatim(command: str, extra: str) -> None:
    config = parse_arguments([*arguments(GUIDE_COMMANDS[command]), *extra.split(), "--ds_config", "zero3.json"])
    assert config.model.max_latent_size == 64
    assert config.training.finetune_from_hf and config.training.auto_resume
    assert config.data.num_workers in (1, 4, 8)
    assert config.data.expected_num_tokens <= config.data.max_num_tokens


def test_a_guide_command_takes_other_values() -> None:
    config = parse_arguments(arguments(BLOCKMOVING, model_path="demo/model", total_steps="3"))
    assert (config.model.model_path, config.training.total_steps) == ("demo/model", 3)
    assert config.training.resume_model_only is False and not wandb_wanted(config)


# -------------------------------------------------------------------------------------------------------- the YAML
def test_the_command_line_wins_over_the_file(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("lr: 1e-5\nnum-workers: 2\nfreeze_und: yes\nresume_from: null\ntraining:\n  ema: 0.5\n")
    config = parse(f"--config {path} --lr 3e-5")
    assert (config.training.lr, config.data.num_workers, config.training.ema) == (3e-5, 2, 0.5)
    assert config.training.freeze_und is True
    assert config.explicit == {"lr", "num_workers", "freeze_und", "resume_from", "ema"}


@pytest.mark.parametrize("command", [*GUIDE_COMMANDS.values(), "--enable_wandb False --wandb_name x --num_shard 2", ""])
def test_the_effective_configuration_reads_back_equal(tmp_path: Path, command: str) -> None:
    config = parse_arguments(arguments(command))
    path = tmp_path / "effective.yaml"
    path.write_text(config.to_yaml())
    again = parse(f"--config {path}")
    assert dataclasses.replace(again, notes=()) == dataclasses.replace(config, notes=())


def test_faults_of_a_file_name_it(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 1\nlr: [1, 2]\nconfig: other.yaml\n")
    message = fault(f"--config {path}")
    assert "run.yaml" in message and "learning_rate" in message and "--lr" in message and "'config'" in message
    for text in ("[1, 2]", "a: b: c", "just words"):
        path.write_text(text)
        assert "run.yaml" in fault(f"--config {path}")
    assert "absent.yaml" in fault(f"--config {tmp_path}/absent.yaml")


# ------------------------------------------------------------------------------------------------------ what is refused
@pytest.mark.parametrize(
    "line, word",
    [
        ("--visual_gen False --visual_und False", "--visual_und"),
        ("--layer_module Qwen2DecoderLayer", "--layer_module"),
        ("--vit_rope True", "--vit_rope"),
        ("--tie_word_embeddings True", "--tie_word_embeddings"),
        ("--connector_act relu", "--connector_act"),
        ("--freeze_vae False", "--freeze_vae"),
        ("--lr -1", "--lr"),
        ("--lr nan", "--lr"),
        ("--ema 1", "--ema"),
        ("--beta2 1.0", "--beta2"),
        ("--vit_cond_dropout_prob 1.5", "--vit_cond_dropout_prob"),
        ("--timestep_shift 0", "--timestep_shift"),
        ("--total_steps 0", "--total_steps"),
        ("--num_workers -1", "--num_workers"),
        ("--max_latent_size 0", "--max_latent_size"),
        ("--lr_scheduler linear", "cosine"),
        ("--lr_scheduler cosine --lr 0", "cosine"),
        ("--ce_weight 0 --mse_weight 0", "--ce_weight"),
    ],
)
def test_what_cannot_be_honoured_is_refused(line: str, word: str) -> None:
    assert word in fault(line)


@pytest.mark.parametrize("name", ["max_num_tokens", "expected_num_tokens", "max_num_tokens_per_sample"])
@pytest.mark.parametrize("value", [0, -5])
def test_only_budgets_of_zero_or_less_are_errors(name: str, value: int) -> None:
    assert f"--{name}" in fault(f"--{name} {value}")


def test_faults_of_values_are_listed_at_once() -> None:
    assert fault("--lr -1 --total_steps 0 --freeze_vae False --visual_gen 0 --visual_und 0").count("\n  - ") == 4


# ------------------------------------------------------------------------------------------------------ what is said
@given(st.integers(1, 50_000), st.integers(1, 50_000), st.integers(1, 50_000))
def test_budgets_above_the_limit_are_lowered_to_it_with_one_line_each(limit: int, least: int, sample: int) -> None:
    line = f"--max_num_tokens {limit} --expected_num_tokens {least} --max_num_tokens_per_sample {sample}"
    config = parse(line)
    assert config.data.max_num_tokens == limit
    assert config.data.expected_num_tokens == min(least, limit)
    assert config.data.max_num_tokens_per_sample == min(sample, limit)
    assert sum("lowered" in note for note in config.notes) == (least > limit) + (sample > limit)


@pytest.mark.parametrize(
    "line, word",
    [
        ("--prefer_buffer_before 8192", "prefer_buffer_before"),
        ("--enable_wandb False --wandb_name x", "wandb_name"),
        ("--wandb_runid 7", "wandb_runid"),
        ("--finetune_from_hf --llm_path there", "llm_path"),
        ("--resume_model_only True", "resume_model_only"),
        ("--min_lr 1e-6", "min_lr"),
        ("--num_workers 0 --prefetch_factor 4", "prefetch_factor"),
        ("--total_steps 3000", "ema 0.9999"),
        ("--warmup_steps 500000", "warmup_steps"),
    ],
)
def test_an_option_without_effect_is_one_line(line: str, word: str) -> None:
    notes = parse(line).notes
    assert len(notes) == 1 and word in notes[0]


def test_a_plain_run_has_no_remarks() -> None:
    assert parse("--lr 2e-5 --finetune_from_hf").notes == ()


@pytest.mark.parametrize(
    ("line", "wanted"),
    [("--use_flex True", "use_flex"), ("", "auto"), ("--use_flex True --attn flex", "flex")]
    + [(f"--attn {name}", name) for name in CHOICES],
)
def test_the_attention_that_is_wanted_is_chosen_later_on_the_device(line: str, wanted: str) -> None:
    config = parse(line)
    assert config.attention == wanted and config.attention in NAMES and config.notes == ()


def test_attn_decides_over_use_flex() -> None:
    config = parse("--use_flex True --attn sdpa")
    assert config.attention == "sdpa"
    assert len(config.notes) == 1 and "use_flex" in config.notes[0]


@pytest.mark.parametrize(
    "line, wanted",
    [
        ("", False),
        ("--wandb_project p", True),
        ("--wandb_name n", True),
        ("--wandb_runid 3 --wandb_offline True", False),
        ("--enable_wandb True", True),
        ("--enable_wandb", True),
        ("--enable_wandb False --wandb_name n --wandb_project p", False),
        ("--wandb_name run", True),
    ],
)
def test_wandb_is_on_when_said_or_named(line: str, wanted: bool) -> None:
    assert wandb_wanted(parse(line)) is wanted


@pytest.mark.parametrize(
    "line, dtype", [("", "bf16"), ("--precision fp32", "fp32"), ("--precision fp32 --save_dtype bf16", "bf16")]
)
def test_exports_follow_the_runs_precision_unless_told(line: str, dtype: str) -> None:
    assert parse(line).exported_dtype == dtype


def test_a_path_below_the_home_folder_is_one_wherever_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "run.yaml").write_text("results_dir: ~/results\nwandb_name: ~/not_a_path\n")
    config = parse(f"--config {tmp_path}/run.yaml --checkpoint_dir=~/ck --resume_from ~/ck/step_1")
    assert config.training.checkpoint_dir == f"{tmp_path}/ck" and config.training.resume_from == f"{tmp_path}/ck/step_1"
    assert config.training.results_dir == f"{tmp_path}/results" and config.training.wandb_name == "~/not_a_path"


@pytest.mark.parametrize(
    "word, meant",
    [("lerning_rate", "lr"), ("batch-size", "max_num_tokens"), ("deepspeed", "ds_config"), ("max_step", "total_steps")],
)
def test_the_nearest_name_knows_what_others_call_it(word: str, meant: str) -> None:
    assert f"the nearest known one is --{meant} " in fault(f"--{word} 1")


def test_synonyms_lead_to_options_and_are_none_themselves() -> None:
    assert set(SYNONYMS.values()) <= set(OPTIONS) and not set(SYNONYMS) & set(OPTIONS)


@pytest.mark.parametrize(
    "text, words",
    [
        ("lr: 1.0e-5\nlr: 2.0e-3\n", "line 2: the key 'lr' is given twice (first in line 1)"),
        ("training:\n  lr: 1e-5\n  lr: 2e-3\n", "line 3: the key 'lr' in training is given twice (first in line 2)"),
        ("lr: 1e-5\ntraining:\n  lr: 2e-3\n", "line 3: lr is given twice"),
        ("total_steps: 3\ntotal-steps: 4\n", "line 2: total_steps is given twice"),
    ],
)
def test_an_option_given_twice_in_a_file_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "run.yaml").write_text(text)
    message = fault(f"--config {tmp_path}/run.yaml")
    assert words in message and "run.yaml" in message


@pytest.mark.parametrize(
    "text, line",
    [
        ("lr: 1e-5\ntotal_steps: many\n", 2),  # not of its type
        ("lr: 1e-5\ntotal_steps: 0\n", 2),  # out of range
        ("training:\n  lr: 1e-5\n  lr_shceduler: cosine\n", 3),  # unknown
        ("lr: 1e-5\n\nmse_weight: 0\nce_weight: 0\n", 4),  # bad together
        ("config: x\n", 1),
    ],
)
def test_a_bad_value_in_a_file_names_file_and_line(tmp_path: Path, text: str, line: int) -> None:
    (tmp_path / "run.yaml").write_text(text)
    assert f"{tmp_path}/run.yaml, line {line}" in fault(f"--config {tmp_path}/run.yaml")


def test_a_bad_value_on_the_command_line_names_no_file(tmp_path: Path) -> None:
    (tmp_path / "run.yaml").write_text("total_steps: 5\n")
    assert "run.yaml" not in fault(f"--config {tmp_path}/run.yaml --total_steps 0")


def test_the_launchers_options_are_those_of_deepspeed(monkeypatch: pytest.MonkeyPatch) -> None:
    import argparse

    from deepspeed.launcher import runner

    parsers: list[argparse.ArgumentParser] = []
    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", lambda self, args=None: parsers.append(self))
    runner.parse_args(["train.py"])
    names = {name for action in parsers[0]._actions for name in action.option_strings} - {"-h", "--help"}
    assert names == {*LAUNCHER_LETTERS, *(f"--{name}" for name in LAUNCHER_OPTIONS)}
    assert not {*LAUNCHER_OPTIONS} & {*OPTIONS}


@pytest.mark.parametrize("name", LAUNCHER_OPTIONS)
def test_an_option_of_the_launcher_behind_the_script_is_told_so(name: str) -> None:
    for word in (f"--{name} 4", f"--{name.replace('_', '-')}=4"):
        message = fault(word)
        assert "goes before launch/train.py" in message and "nearest" not in message
        assert "\n" not in message, "its value is not a second fault"


@pytest.mark.parametrize("line", ["-H hosts", "-i a@b", "-e a", "-q"])
def test_a_letter_of_the_launcher_behind_the_script_is_told_so(line: str) -> None:
    message = fault(line)
    assert f"{line[:2]} is an option of the deepspeed launcher" in message and "\n" not in message


@pytest.mark.parametrize(
    "word, meant",
    [("num_gpu", "num_gpus"), ("nproc_per_node", "num_gpus"), ("nproc-per-node", "num_gpus"), ("hostfle", "hostfile")],
)
def test_a_misspelled_option_of_the_launcher_is_told_so(word: str, meant: str) -> None:
    message = fault(f"--{word} 4")
    assert f"--{meant}, an option of the deepspeed launcher" in message and "before launch/train.py" in message


@pytest.mark.parametrize("word", ["use_dora", "quant_bits", "xyz", "tensor_parallel"])
def test_what_is_like_no_option_gets_no_suggestion(word: str) -> None:
    message = fault(f"--{word} 8")
    assert f"unknown argument --{word}" in message and "nearest" not in message and "local_rank" not in message


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0s"),
        (59, "59s"),
        (59.6, "1m"),
        (90, "2m"),
        (3600, "1h0m"),
        (13_799, "3h50m"),
        (86_399, "1d0h"),
        (200_000, "2d7h"),
    ],
)
def test_a_duration_is_written_as_it_is_read(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
    read = duration_seconds(text)
    assert read is not None and abs(read - seconds) <= (30 if seconds < 86_000 else 3600)


def test_samples_of_an_average_that_is_off_are_refused_and_options_without_prompts_explained() -> None:
    with pytest.raises(UserError, match="--sample_weights both needs the EMA, and --ema 0 turns it off"):
        parse_arguments(["--sample_prompts", "p.jsonl", "--sample_weights", "both", "--ema", "0"])
    with pytest.raises(UserError, match="--sample_every 0: expected at least 1"):
        parse_arguments(["--sample_prompts", "p.jsonl", "--sample_every", "0"])
    notes = parse_arguments(["--sample_every", "5", "--sample_weights", "both"]).notes
    assert any("no effect: sample_every, sample_weights, because sample_prompts is not given" in note for note in notes)
