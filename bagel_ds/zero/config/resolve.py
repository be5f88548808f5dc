"""The DeepSpeed configuration of a run: "auto" is filled in from the arguments, contradictions are refused.

Guarantees: the result holds no "auto" and spells out what DeepSpeed's defaults would decide silently (clipping, batch
sizes, precision). A file that contradicts an argument (learning rate, betas, eps, clipping, accumulation, batch size or
precision), or asks for what this trainer doesn't do, is refused with all faults at once. Everything else in the file
holds as written. Needs no deepspeed.
"""

from __future__ import annotations

from typing import Any

from bagel_ds.arguments.options import TrainingArguments
from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.errors import UserError, all_faults
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parameters import parameter_sizes
from bagel_ds.model.shape.parts import Freezing, trainable_parts
from bagel_ds.zero.config.draft import AUTO, Draft
from bagel_ds.zero.config.files import ds_configs_folder, find_ds_config, read_ds_config
from bagel_ds.zero.config.nvme import fit_buffers, settle_nvme
from bagel_ds.zero.config.settings import SPLIT_MASTERS, SPLIT_MOMENTS, ZeroSettings, offload_device
from bagel_ds.zero.config.sharding import settle_sharding


def resolve_ds_config(
    name_or_path: str, config: RunConfig, world_size: int, ranks_per_host: int | None = None
) -> tuple[dict[str, Any], list[str]]:
    """The configuration for `deepspeed.initialize` on `world_size` ranks, and one-line remarks for the log.

    `ranks_per_host` None means that all are on one host. The file's optimizer and scheduler sections are checked
    against the arguments and removed, because the trainer has its own AdamW and schedule. Raises UserError with every
    fault.
    """
    path = find_ds_config(name_or_path)
    draft = Draft(read_ds_config(path).content, path.name, config, world_size, ranks_per_host)
    presets = ds_configs_folder()
    if path.parent.resolve() != presets.resolve() and (presets / path.name).is_file():
        draft.notes.append(f"ds_config is the file {path}, not the preset of the same name")
    settle_sharding(draft)
    if draft.ds["zero_optimization"]["stage"] == 3:
        settle_nvme(draft)
    _settle_batch(draft)
    _settle_precision(draft)
    _check_optimizer(draft)
    _check_scheduler(draft)
    _refuse_unsupported(draft)
    all_faults(draft.faults, f"ds_config {path} can't be used with these arguments:")
    _settle_leftovers(draft)
    return draft.ds, draft.notes


def fit_to_network(
    ds: dict[str, Any], model: BagelConfig, training: TrainingArguments, world_size: int
) -> ZeroSettings:
    """Settle in a resolved configuration what depends on the network, and return its values. Raises UserError."""
    trains = trainable_parts(model, Freezing(training.freeze_llm, training.freeze_vit))
    has_frozen = not {"und_expert", "gen_expert", "vit"} <= trains
    largest = max(parameter.numel for parameter in parameter_sizes(model))
    fit_buffers(ds, largest, world_size, has_frozen and training.activation_checkpointing != "none")
    settings = ZeroSettings.of(ds)
    if training.base_precision != "full" and settings.param.device == "nvme":
        raise UserError(
            f"--base_precision {training.base_precision} with parameters on NVMe (offload_param.device): DeepSpeed's "
            "buffers there hold numbers of one size, and this network has codes of 1 byte beside its other weights; "
            "take zero3.json or zero3_cpu.json, which the smaller base model makes room for"
        )
    return settings


def same_on_all_hosts(ds: dict[str, Any]) -> dict[str, Any]:
    """A resolved configuration without what differs between hosts: the folders of swap files."""
    kept = {key: value for key, value in ds.items() if key != "nvme_path"}
    return {key: same_on_all_hosts(value) if isinstance(value, dict) else value for key, value in kept.items()}


# ------------------------------------------------------------------------------------- batch, clipping and precision
def _settle_batch(draft: Draft) -> None:
    training, world = draft.config.training, draft.world_size
    steps = training.gradient_accumulation_steps
    draft.settle(
        "train_micro_batch_size_per_gpu", 1, "a micro-batch is one pack", "size packs with --max_num_tokens instead"
    )
    draft.settle(
        "gradient_accumulation_steps", steps, f"--gradient_accumulation_steps is {steps}", "make the two equal"
    )
    draft.settle(
        "train_batch_size",
        steps * world,
        f"--gradient_accumulation_steps {steps} on {world} ranks makes {steps * world}",
        "change --gradient_accumulation_steps",
    )
    # Always written: DeepSpeed's default is to clip at 1.0 (DeepSpeed #8068).
    norm = training.max_grad_norm
    draft.settle("gradient_clipping", norm, f"--max_grad_norm is {norm}", "make the two equal")


def _settle_precision(draft: Draft) -> None:
    precision = draft.config.training.precision
    is_bf16 = precision == "bf16"
    other = "--precision fp32" if is_bf16 else "--precision bf16"
    draft.settle("bf16.enabled", is_bf16, f"--precision is {precision}", f"pass {other}")
    if draft.config.training.lora_rank and draft.section("bf16").get("bf16_master_weights_and_grads", AUTO) is True:
        draft.fault(
            "bf16.bf16_master_weights_and_grads loses half of what adapters learn (--lora_rank); remove the key, or "
            "take zero3_cpu.json, whose fp32 masters of adapters are small"
        )
    if draft.section("bf16").get("check_grad_overflow", AUTO) not in (AUTO, True):
        draft.fault("bf16.check_grad_overflow is off, so gradients that are not finite would be used; remove the key")
    for key in ("fp16", "torch_autocast"):
        if key in draft.ds and draft.section(key).get("enabled", AUTO) not in (AUTO, False):
            draft.fault(f"{key} is enabled, but --precision is {precision}; remove the section")
        draft.ds.pop(key, None)
    _check_bf16_masters(draft)
    _settle_split_masters(draft)
    _settle_gradient_types(draft)


def _check_bf16_masters(draft: Draft) -> None:
    """Only the CPU optimizer can have masters and moments in bf16 (12 instead of 20 bytes per parameter)."""
    on_cpu = offload_device(draft.ds, "optimizer") == "cpu"
    keys = ("bf16_master_weights_and_grads", "bf16_optimizer_states")
    wanted = [key for key in keys if draft.section("bf16").get(key, AUTO) not in (AUTO, False)]
    for key in wanted:
        if draft.config.training.precision != "bf16":
            draft.fault(f"bf16.{key} needs --precision bf16, found {draft.config.training.precision}; remove the key")
        elif not on_cpu:
            draft.fault(f"bf16.{key} needs offload_optimizer on the CPU; remove the key")
    if wanted:
        draft.notes.append(
            "bf16 masters: updates much smaller than a weight are lost to rounding; preset zero3_cpu_split_bf16 takes "
            "less memory and loses none (docs/low_memory.md)"
        )


def _settle_split_masters(draft: Draft) -> None:
    """Masters as a 16-bit weight and 16 more bits: in bf16, with ZeRO-3, or ZeRO-2 and the optimizer in host memory."""
    section = draft.ds.get(SPLIT_MASTERS)
    if section is None:
        return
    kinds = ", ".join(SPLIT_MOMENTS)
    moments = section.get("moments", AUTO) if isinstance(section, dict) else section
    if not isinstance(section, dict) or set(section) - {"moments"}:
        draft.fault(f'{SPLIT_MASTERS} must be {{"moments": ...}} with one of {kinds}, found {section!r:.60}')
        return
    if moments not in (*SPLIT_MOMENTS, AUTO):
        draft.fault(f"{SPLIT_MASTERS}.moments must be one of {kinds}, found {moments!r:.60}")
    draft.ds[SPLIT_MASTERS] = {"moments": "fp32" if moments == AUTO else moments}
    stage = draft.section("zero_optimization")["stage"]
    places = [offload_device(draft.ds, what) for what in ("optimizer", "param")]
    remove = f"remove the section {SPLIT_MASTERS}"
    if draft.config.training.precision != "bf16":
        found = draft.config.training.precision
        draft.fault(f"{SPLIT_MASTERS} needs --precision bf16, found {found}; {remove}, or pass --precision bf16")
    if stage == 2:
        if places[0] != "cpu":
            draft.fault(
                f"{SPLIT_MASTERS} with ZeRO stage 2 needs offload_optimizer on the CPU, found {places[0]}; use preset "
                f"zero2_cpu_split or zero3_split, or {remove}"
            )
    elif stage != 3:
        draft.fault(
            f"{SPLIT_MASTERS} needs ZeRO stage 2 or 3, found stage {stage}; use preset zero2_cpu_split or "
            f"zero3_cpu_split, or {remove}"
        )
    elif places not in (["none", "none"], ["cpu", "cpu"], ["nvme", "cpu"]):
        draft.fault(
            f"{SPLIT_MASTERS} with ZeRO stage 3 needs the optimizer where the weights are, on the GPU or in host "
            "memory, or the optimizer on NVMe and the weights in host memory; found offload_optimizer on "
            f"{places[0]} and offload_param on {places[1]}; change these, or {remove}"
        )
    for key in ("bf16_master_weights_and_grads", "bf16_optimizer_states"):
        if draft.section("bf16").get(key, AUTO) not in (AUTO, False):
            draft.fault(f"bf16.{key} and {SPLIT_MASTERS} exclude each other; remove bf16.{key}")
    # DeepSpeed insists on its own CPU Adam otherwise.
    draft.settle("zero_force_ds_cpu_optimizer", False, f"{SPLIT_MASTERS} has an optimizer of its own", "remove the key")


def _settle_gradient_types(draft: Draft) -> None:
    """Number formats of gradients, where the file leaves them open.

    Ranks exchange gradients in the run's precision, as in the original. They are summed over micro-batches in fp32 if
    DeepSpeed supports it (ZeRO 2 and 3, for 2 more bytes per parameter); with one micro-batch there is nothing to sum.
    """
    training, types = draft.config.training, draft.section("data_types")
    stage = draft.section("zero_optimization")["stage"]
    is_bf16, sums = training.precision == "bf16", training.gradient_accumulation_steps > 1
    chosen = types.get("grad_accum_dtype", AUTO)
    if chosen in (AUTO, None):
        types["grad_accum_dtype"] = "fp32" if not is_bf16 or (sums and stage >= 2) else "bf16"
        if sums and is_bf16 and stage < 2:
            draft.notes.append(f"ZeRO stage {stage} sums gradients of micro-batches in bf16; stages 2 and 3 in fp32")
    elif is_bf16 and stage < 2 and chosen != "bf16":
        draft.fault(
            f"data_types.grad_accum_dtype {chosen} with --precision bf16 needs ZeRO stage 2 or 3, found stage {stage}; "
            'write "auto" in the file or use another stage'
        )
    if draft.ds.get("communication_data_type", AUTO) in (AUTO, None):
        draft.ds["communication_data_type"] = training.precision


# ------------------------------------------------------------------------------------------ optimizer and scheduler
def _check_optimizer(draft: Draft) -> None:
    if "optimizer" not in draft.ds:
        return
    training = draft.config.training
    kind = draft.section("optimizer").get("type", "AdamW")
    if str(kind).lower() not in ("adam", "adamw"):
        draft.fault(f"optimizer.type is {kind}, but BAGEL trains with AdamW; remove the section")
    betas = [training.beta1, training.beta2]
    equal = "make the two equal"
    draft.settle("optimizer.params.lr", training.lr, f"--lr is {training.lr}", equal)
    draft.settle("optimizer.params.betas", betas, f"--beta1 and --beta2 are {betas}", equal)
    draft.settle("optimizer.params.eps", training.eps, f"--eps is {training.eps}", equal)
    for key, value in (("weight_decay", 0.0), ("amsgrad", False), ("bias_correction", True)):
        draft.settle(f"optimizer.params.{key}", value, f"the trainer's AdamW has {value}", "remove the key")
    del draft.ds["optimizer"]


def _check_scheduler(draft: Draft) -> None:
    section = draft.ds.pop("scheduler", None)
    if section is None:
        return
    params = section.get("params", {}) if isinstance(section, dict) else {}
    written = sorted(key for key, value in params.items() if value != AUTO) if isinstance(params, dict) else []
    if written:
        draft.fault(
            f"scheduler sets {', '.join(written)}, but the schedule is --lr_scheduler, --lr, "
            "--warmup_steps and --min_lr; remove the section and pass these"
        )
    else:
        draft.notes.append(
            "ds_config's scheduler has no effect: --lr_scheduler, --lr, --warmup_steps and --min_lr apply"
        )


# ------------------------------------------------------------------------------------------------------ all the rest
_UNSUPPORTED = {
    "gradient_allreduce_op": ("avg", "the loss is normalized for averaged gradients"),
    "managed_gradient_accumulation": (True, "the trainer counts micro-batches itself"),
    "prescale_gradients": (False, "the loss is normalized for averaged gradients"),
    "data_efficiency": (None, "packs come from the trainer's own plan"),
    "tensor_parallel": (None, "the model is sharded only by ZeRO"),
    "sequence_parallel_size": (1, "the model is sharded only by ZeRO"),
    "pipeline": (None, "the model is sharded only by ZeRO"),
    "expert_parallel": (None, "the model is sharded only by ZeRO"),
    "hybrid_engine": (None, "it is for reinforcement learning"),
    "weight_quantization": (None, "weights are trained in full"),
    "zero_optimization.zenflow": (None, "its updates are not exact: some gradients are applied steps later"),
    "zero_optimization.offload_optimizer.super_offload": (
        False,
        "it does not overlap where gradients are clipped, as they are here",
    ),
}


def _refuse_unsupported(draft: Draft) -> None:
    for path, (accepted, reason) in _UNSUPPORTED.items():
        value: Any = draft.ds
        for key in path.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        is_off = isinstance(value, dict) and value.get("enabled") in (False, AUTO)
        if value is not None and value != accepted and value != AUTO and not is_off:
            draft.fault(f"{path} is not supported: {reason}; remove it")
    if "activation_checkpointing" in draft.ds:
        del draft.ds["activation_checkpointing"]
        draft.notes.append("ds_config's activation_checkpointing has no effect: --activation_checkpointing applies")


def _settle_leftovers(draft: Draft) -> None:
    """Any other "auto": the value of our preset for the stage in the ZeRO section, DeepSpeed's default elsewhere."""
    zero = draft.ds["zero_optimization"]
    preset = read_ds_config(ds_configs_folder() / f"zero{zero['stage']}.json").content["zero_optimization"]
    for key, value in list(zero.items()):
        if value == AUTO and preset.get(key, AUTO) != AUTO:
            zero[key] = preset[key]
    _drop_auto(draft.ds)


def _drop_auto(section: dict[str, Any]) -> None:
    for key, value in list(section.items()):
        if value == AUTO:
            del section[key]
        elif isinstance(value, dict):
            _drop_auto(value)
