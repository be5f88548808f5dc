"""ZeRO stage, offload and sharding groups of a configuration, from the file and the original's FSDP options.

Guarantees: sharding_strategy, num_shard, num_replicate, cpu_offload and backward_prefetch act only if they are given
and the file leaves the choice open ("auto" or absent). An option without effect is one line in the log. After
`settle_sharding` the draft has a ZeRO stage, and every offload section has a device.
"""

from __future__ import annotations

from bagel_ds.zero.config.draft import AUTO, Draft, same
from bagel_ds.zero.config.settings import offload_device

_STAGE_OF_STRATEGY = {
    "FULL_SHARD": 3,
    "HYBRID_SHARD": 3,
    "_HYBRID_SHARD_ZERO2": 2,
    "SHARD_GRAD_OP": 2,
    "NO_SHARD": 0,
}
_MISSING = object()


def settle_sharding(draft: Draft) -> None:
    """Settle stage, offload and sharding groups in this order, as each depends on the ones before."""
    _convert_old_keys(draft)
    _settle_stage(draft)
    _settle_offload(draft)
    _settle_sharding_group(draft)


def _convert_old_keys(draft: Draft) -> None:
    """Give keys their present names: DeepSpeed still reads `cpu_offload: true` and `bfloat16`."""
    zero = draft.section("zero_optimization")
    for old, new in (("cpu_offload", "offload_optimizer"), ("cpu_offload_param", "offload_param")):
        if old in zero:
            if zero.get(new, AUTO) not in (AUTO, None):
                draft.fault(f"{old} and {new} are the same; keep {new}")
            wanted = zero.pop(old) is True
            if wanted and zero.get(new) is None:
                zero[new] = {"device": "cpu"}
    if "bfloat16" in draft.ds:
        if "bf16" in draft.ds:
            draft.fault("bf16 and bfloat16 are the same section; keep one of the two")
        draft.ds.setdefault("bf16", draft.ds.pop("bfloat16"))


def _settle_stage(draft: Draft) -> None:
    zero, given = draft.section("zero_optimization"), draft.config.explicit
    strategy = draft.config.training.sharding_strategy
    found = zero.get("stage", _MISSING)
    if found in (AUTO, _MISSING):
        if "sharding_strategy" in given:
            zero["stage"] = _STAGE_OF_STRATEGY[strategy]
            draft.notes.append(f"sharding_strategy {strategy}: ZeRO stage {zero['stage']}")
        else:
            zero["stage"] = 3 if found == AUTO else 0  # DeepSpeed's default is 0
    elif found not in (0, 1, 2, 3) or isinstance(found, bool):
        draft.fault(f"zero_optimization.stage must be 0, 1, 2 or 3, found {found!r}")
        zero["stage"] = 3
    elif "sharding_strategy" in given and _STAGE_OF_STRATEGY[strategy] != found:
        draft.notes.append(
            f"sharding_strategy {strategy} has no effect: ds_config {draft.file} says ZeRO stage {found}"
        )
    if "backward_prefetch" in given:
        draft.notes.append("backward_prefetch has no effect: ZeRO-3 prefetches by stage3_prefetch_bucket_size")


def _settle_offload(draft: Draft) -> None:
    zero, config = draft.section("zero_optimization"), draft.config
    asked = config.training.cpu_offload and "cpu_offload" in config.explicit
    moved = []
    for what, least_stage in (("optimizer", 1), ("param", 3)):
        key = f"offload_{what}"
        section = draft.section("zero_optimization", key)
        device = section.get("device", AUTO)
        if device != AUTO:
            _check_offload(draft, key, device, least_stage)
        elif asked and zero["stage"] >= least_stage:
            zero[key] = {"pin_memory": True, **section, "device": "cpu"}
            moved.append(what)
        else:
            del zero[key]
    if "cpu_offload" in config.explicit:
        _explain_offload(draft, moved)


def _check_offload(draft: Draft, key: str, device: str, least_stage: int) -> None:
    stage = draft.section("zero_optimization")["stage"]
    if device == "nvme" and stage != 3:
        draft.fault(f"{key}.device nvme needs ZeRO stage 3, found stage {stage}; use cpu, or raise the stage")
    elif device not in ("none", "cpu", "nvme"):
        draft.fault(f"{key}.device must be none, cpu or nvme, found {device!r}")
    elif device == "cpu" and stage < least_stage:
        draft.fault(
            f"{key} needs ZeRO stage {least_stage} or more, found stage {stage}; raise zero_optimization.stage or "
            "remove the section"
        )


def _explain_offload(draft: Draft, moved: list[str]) -> None:
    on_cpu = [what for what in ("optimizer", "param") if offload_device(draft.ds, what) == "cpu"]
    if moved:
        draft.notes.append(f"cpu_offload True: offload to CPU memory of {' and '.join(moved)} (ZeRO)")
    elif draft.config.training.cpu_offload and not on_cpu:
        draft.notes.append(f"cpu_offload True has no effect: ds_config {draft.file} leaves nothing to offload")
    elif not draft.config.training.cpu_offload and on_cpu:
        draft.notes.append(f"cpu_offload False has no effect: ds_config {draft.file} offloads {' and '.join(on_cpu)}")


def _settle_sharding_group(draft: Draft) -> None:
    """num_shard below the world size is hpZ of ZeRO++, which keeps a second copy of the parameters in each group."""
    zero, training, given = draft.section("zero_optimization"), draft.config.training, draft.config.explicit
    group, world = min(training.num_shard, draft.world_size), draft.world_size
    if "num_replicate" in given:
        draft.notes.append("num_replicate has no effect: num_shard and the number of GPUs decide the groups")
    is_hybrid = training.sharding_strategy == "HYBRID_SHARD"
    present = zero.get("zero_hpz_partition_size")
    asked = "num_shard" in given or ("sharding_strategy" in given and is_hybrid)
    source = f"num_shard {group}"
    if not asked and present == AUTO:
        group = draft.ranks_per_host or world
        source = f"one copy of the parameters per host of {group}"
        asked = 1 < group < world
        if group == 1 < world:
            draft.notes.append(
                "no copy of the parameters per host: hosts have one rank each, or no group size fits all of them"
            )
    if not asked or group == world or (present != AUTO and same(present, group)):
        return
    reason = _why_no_group(draft, group) if is_hybrid else f"sharding_strategy is {training.sharding_strategy}"
    if reason:
        draft.notes.append(f"{source} has no effect: {reason}")
    else:
        zero["zero_hpz_partition_size"] = group
        draft.notes.append(f"{source} of {world} GPUs: zero_hpz_partition_size {group} (ZeRO++)")


def _why_no_group(draft: Draft, group: int) -> str:
    """Why there can't be sharding groups of `group` ranks; "" if there can."""
    zero = draft.section("zero_optimization")
    present = zero.get("zero_hpz_partition_size", AUTO)
    if zero["stage"] != 3:
        return f"ds_config {draft.file} says ZeRO stage {zero['stage']}"
    if present != AUTO:
        return f"ds_config {draft.file} says zero_hpz_partition_size {present}"
    if offload_device(draft.ds, "param") != "none":
        return "the parameters are offloaded"
    if group == 1:
        return "a group of one would hold all parameters on every GPU, as the preset zero2 does"
    if draft.world_size % group:
        return f"{draft.world_size} GPUs can't be divided into groups of {group}"
    return ""
