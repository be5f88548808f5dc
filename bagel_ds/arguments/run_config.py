"""The configuration of a run: read once, validated once, all faults listed at once.

Guarantees: a `RunConfig` from `parse_arguments` is consistent; its `notes` say, one line each, what was changed and
which options have no effect. Only the YAML file of options is read. `inputs/files.py` looks for the files that options
name, and `zero/config/resolve.py` checks the DeepSpeed configuration.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from bagel_ds.arguments.options import SECTIONS, DataArguments, ModelArguments, TrainingArguments
from bagel_ds.arguments.parse import Words, duration_seconds, help_text, read_option_file, read_words
from bagel_ds.errors import all_faults, shown
from bagel_ds.machine.user_folders import expanded

_PATHS = """model_path llm_path vit_path vae_path dataset_config_file dataset_info index_cache results_dir
    checkpoint_dir resume_from val_config sample_prompts ds_config nvme_path""".split()


@dataclass(frozen=True)
class RunConfig:
    """All options of a run. `explicit` names those that the user gave; `notes` is for the log.

    `places` gives the line of options that come from a file ("run.yaml, line 3").
    """

    model: ModelArguments = ModelArguments()
    data: DataArguments = DataArguments()
    training: TrainingArguments = TrainingArguments()
    explicit: frozenset[str] = frozenset()
    notes: tuple[str, ...] = ()
    data_notes: tuple[str, ...] = ()  # the notes that also matter to commands for data
    places: Mapping[str, str] = field(default_factory=dict, compare=False)

    def to_yaml(self) -> str:
        """The effective configuration; `--config` with it repeats the run."""
        content: dict[str, Any] = {name: dataclasses.asdict(getattr(self, name)) for name in SECTIONS}
        content["explicit"] = sorted(self.explicit)
        return yaml.safe_dump(content, sort_keys=False)

    def values(self) -> dict[str, Any]:
        """Every option by name."""
        return {key: value for name in SECTIONS for key, value in dataclasses.asdict(getattr(self, name)).items()}

    def placed(self, faults: list[str]) -> list[str]:
        """The faults, each prefixed with the file and line of the options that it names, if they come from a file."""
        return [self._places_in(fault) + fault for fault in faults]

    def _places_in(self, fault: str) -> str:
        named = re.findall(r"--(\w+)", fault)
        places = dict.fromkeys(self.places[name] for name in named if name in self.places)
        return " and ".join(places) + ": " if places else ""

    @property
    def attention(self) -> str:
        """The attention kernels that this run may use: a key of NAMES in model/attention/backends.py."""
        return "use_flex" if self.training.use_flex and "attn" not in self.explicit else self.training.attn

    @property
    def exported_dtype(self) -> str:
        """The dtype of exported weights: "bf16" or "fp32"."""
        return self.training.precision if self.training.save_dtype == "auto" else self.training.save_dtype


def parse_arguments(argv: list[str], own: Sequence[str] = ()) -> RunConfig:
    """The configuration of a command line (without the program's name).

    `own` are the options of a command that also takes the trainer's, for suggestions. Raises UserError with every
    fault; `--help` prints all options and exits with 0.
    """
    words = read_words(argv, own)
    if words.help:
        print(help_text())
        raise SystemExit(0)
    in_file = Words() if words.config_file is None else read_option_file(words.config_file)
    places = {name: place for name, place in in_file.places.items() if name not in words.values}
    values = in_file.values | words.values
    if faults := in_file.faults + words.faults:
        # Also those of the options that were understood, so that nobody corrects one only to meet the next.
        faults += RunConfig(places=places).placed(_value_faults(values))
    all_faults(faults, "These options can't be understood:")
    return make_config(values, frozenset(in_file.explicit | words.explicit), places)


def make_config(
    values: dict[str, Any], explicit: frozenset[str] | None = None, places: Mapping[str, str] | None = None
) -> RunConfig:
    """A validated configuration from typed values by option name. `explicit` (default: all): given by the user."""
    values = {key: expanded(value) if key in _PATHS and value else value for key, value in values.items()}
    sections: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        known = {field.name for field in dataclasses.fields(section)}
        sections[name] = section(**{key: value for key, value in values.items() if key in known})
    config = RunConfig(**sections, explicit=frozenset(values) if explicit is None else explicit, places=places or {})
    all_faults(config.placed(_faults(config)), "These options can't be used together or as given:")
    config, notes = _lower_budgets(config)
    return dataclasses.replace(config, notes=tuple(notes + _notes(config)), data_notes=tuple(notes))


def wandb_wanted(config: RunConfig) -> bool:
    """Whether this run logs to Weights & Biases: enable_wandb, or by default if a project or run name is given."""
    if config.training.enable_wandb is not None:
        return config.training.enable_wandb
    return bool({"wandb_project", "wandb_name"} & config.explicit)


# ------------------------------------------------------------------------------------------------ what is refused
_AT_LEAST_ONE = """max_num_tokens_per_sample expected_num_tokens max_num_tokens prefetch_factor total_steps log_every
    save_every gradient_accumulation_steps latent_patch_size vit_patch_size vit_max_num_patch_per_side max_latent_size
    num_replicate num_shard ema_every val_every sample_every""".split()
_NOT_NEGATIVE = """num_workers prefer_buffer_before max_buffer_size data_seed global_seed debug_batches warmup_steps lr
    min_lr eps max_grad_norm mse_weight ce_weight peak_device_tflops keep_last stall_timeout max_nonfinite
    val_max_batches weight_decay lora_rank profile""".split()
_PROBABILITIES = ["text_cond_dropout_prob", "vae_cond_dropout_prob", "vit_cond_dropout_prob"]
_DECAYS = ["beta1", "beta2", "ema", "lora_dropout"]

_RANGES: list[tuple[list[str], Callable[[Any], bool], str]] = [
    (_AT_LEAST_ONE, lambda value: value >= 1, "at least 1"),
    (_NOT_NEGATIVE, lambda value: value >= 0, "0 or more"),
    (_PROBABILITIES, lambda value: 0 <= value <= 1, "a probability between 0 and 1"),
    (_DECAYS, lambda value: 0 <= value < 1, "0 or more and below 1"),
    (["timestep_shift", "lora_alpha"], lambda value: value > 0, "above 0"),
    (["vit_select_layer"], lambda value: value < 0, "below 0 (counted from the last layer)"),
]

_LARGEST, _LARGEST_SEED = 2**31 - 1, 2**63 - 1  # absolute values of whole numbers

# Options of the original of which this version supports one value: (option, value, reason).
_ONLY: list[tuple[str, Any, str]] = [
    ("layer_module", "Qwen2MoTDecoderLayer", "only the mixture of transformers of BAGEL-7B-MoT is built"),
    ("connector_act", "gelu_pytorch_tanh", "BAGEL's connector was trained with it"),
    ("vit_rope", False, "BAGEL's ViT has a learned position table instead"),
    ("tie_word_embeddings", False, "BAGEL has two matrices, and its checkpoint holds both"),
    ("freeze_vae", True, "the VAE is never trained, here or in the original"),
]


def _value_faults(values: Mapping[str, Any]) -> list[str]:
    """What is wrong with single values, whatever the other options are."""
    faults = []
    for names, is_good, expected in _RANGES:
        for name in names:
            if values.get(name) is not None and not is_good(values[name]):
                faults.append(f"--{name} {shown(values[name])}: expected {expected}")
    for name, value in values.items():
        largest = _LARGEST_SEED if name.endswith("_seed") else _LARGEST
        if isinstance(value, int) and abs(value) > largest:
            faults.append(f"--{name} {shown(value)}: expected at most {largest}")
    for name, accepted, reason in _ONLY:
        if values.get(name, accepted) != accepted:
            faults.append(f"--{name} {values[name]} is not supported: {reason}; leave it out or pass {accepted}")
    return faults


def _faults(config: RunConfig) -> list[str]:
    values = config.values()
    faults = _value_faults(values)
    if not values["visual_gen"] and not values["visual_und"]:
        faults.append(
            "--visual_gen False and --visual_und False leave nothing to train; leave out at least one of the two"
        )
    if values["auto_resume"] and values["start_anew"]:
        faults.append(
            "--auto_resume True continues the run in checkpoint_dir, --start_anew True moves it aside; leave out one "
            "of the two"
        )
    if values["sample_prompts"] is not None and values["sample_weights"] != "model" and not values["ema"]:
        faults.append(
            f"--sample_weights {values['sample_weights']} needs the EMA, and --ema 0 turns it off; leave "
            "out one of the two"
        )
    if values["stop_after"] is not None and duration_seconds(values["stop_after"]) is None:
        faults.append(f"--stop_after {values['stop_after']}: expected a duration such as 3h50m, 90m, 45s or seconds")
    if values["lr_scheduler"] == "cosine" and values["lr"] == 0:
        faults.append("--lr_scheduler cosine needs an --lr above 0, found 0")
    try:
        re.compile(values["lora_targets"])
    except re.error as error:
        faults.append(
            f"--lora_targets {shown(values['lora_targets'])}: expected gen, und, both or a regular expression over "
            f"names of layers ({error})"
        )
    if values["base_precision"] != "full" and not values["lora_rank"]:
        faults.append(
            f"--base_precision {values['base_precision']}: weights of 4 or 8 bits can't be trained, only adapters "
            "beside them; pass --lora_rank 64, or leave out base_precision"
        )
    if values["lora_rank"] and values["lora_dropout"] and values["activation_checkpointing"] == "offload":
        faults.append(
            "--lora_dropout with --activation_checkpointing offload: the masks would not be the same when a layer is "
            "recomputed; pass --activation_checkpointing full, or leave out lora_dropout"
        )
    if values["ce_weight"] == 0 and values["mse_weight"] == 0:
        faults.append("--ce_weight 0 and --mse_weight 0 leave no loss; raise at least one of the two")
    return faults


# ----------------------------------------------------------------------------------------------- what is explained
def _lower_budgets(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """Limit the other token budgets to max_num_tokens: the guides, to save memory, lower only some of the three."""
    limit = config.data.max_num_tokens
    lowered: dict[str, Any] = {}
    notes = []
    for name in ("expected_num_tokens", "max_num_tokens_per_sample"):
        value = getattr(config.data, name)
        if value > limit:
            lowered[name] = limit
            notes.append(f"{name} lowered from {value} to {limit}, because max_num_tokens is {limit}")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, **lowered)), notes


def _notes(config: RunConfig) -> list[str]:
    return _attention_notes(config) + _effectless_notes(config) + _schedule_notes(config)


def _attention_notes(config: RunConfig) -> list[str]:
    if config.training.use_flex and "attn" in config.explicit and config.training.attn != "flex":
        return [f"use_flex True has no effect: attn {config.training.attn} takes precedence"]
    return []


def _effectless_notes(config: RunConfig) -> list[str]:
    given = config.explicit
    notes = [
        f"{name} has no effect: packs are planned ahead, so there is no overflow buffer"
        for name in ("prefer_buffer_before", "max_buffer_size")
        if name in given
    ]
    wandb = sorted(name for name in given if name.startswith("wandb_"))
    if wandb and not wandb_wanted(config):
        reason = "enable_wandb False" if "enable_wandb" in given else "neither wandb_project nor wandb_name is given"
        notes.append(f"no effect: {', '.join(wandb)}, because W&B is off ({reason})")
    pretrained = sorted({"llm_path", "vit_path", "vae_path"} & given)
    if pretrained and config.training.finetune_from_hf:
        notes.append(f"no effect: {', '.join(pretrained)}, because finetune_from_hf True loads model_path")
    if "resume_model_only" in given and config.training.resume_model_only and config.training.resume_from is None:
        notes.append("resume_model_only has no effect: resume_from is not given")
    if "min_lr" in given and config.training.lr_scheduler == "constant":
        notes.append("min_lr has no effect: lr_scheduler is constant")
    if "prefetch_factor" in given and config.data.num_workers == 0:
        notes.append("prefetch_factor has no effect: num_workers is 0")
    lora = sorted({"lora_alpha", "lora_dropout", "lora_targets"} & given)
    if lora and not config.training.lora_rank:
        notes.append(f"no effect: {', '.join(lora)}, because lora_rank is 0")
    validation = sorted({"val_every", "val_max_batches"} & given)
    if validation and config.training.val_config is None:
        notes.append(f"no effect: {', '.join(validation)}, because val_config is not given")
    samples = sorted({"sample_every", "sample_weights"} & given)
    if samples and config.training.sample_prompts is None:
        notes.append(f"no effect: {', '.join(samples)}, because sample_prompts is not given")
    return notes


def _schedule_notes(config: RunConfig) -> list[str]:
    training, notes = config.training, []
    if training.ema > 0:
        half_life = math.log(0.5) / math.log(training.ema)
        if half_life > training.total_steps:
            notes.append(
                f"ema {training.ema} has a half-life of {half_life:.0f} steps, but the run has only "
                f"{training.total_steps}: ema.safetensors will stay close to the start weights"
            )
    if training.warmup_steps >= training.total_steps:
        notes.append(
            f"warmup_steps {training.warmup_steps} is not below total_steps {training.total_steps}: "
            f"the learning rate never reaches lr {training.lr}"
        )
    return notes
