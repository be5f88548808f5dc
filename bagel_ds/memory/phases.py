"""What comes and goes within a step, by moment: the largest moment decides the peak.

Guarantees: sizes in bytes of one rank, following the trainer's own step and DeepSpeed 0.19.8's handling of gradients;
nothing here is counted in the states (memory_states.py) as well.
"""

from __future__ import annotations

from typing import NamedTuple

from bagel_ds.memory.gathering import Gathered, gathered
from bagel_ds.memory.states import DEVICE, HOST, NVME, Sharding, State, backward_states, window_gradients
from bagel_ds.model.shape.activations import Activations, PackShape, activations, arena_bytes, vae_bytes
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model.shape.parts import Freezing
from bagel_ds.units import MIB

NORM_ELEMENTS = 250_000_000  # DeepSpeed sums gradients' squares in float64, this many at a time
EXPORT_CHUNK = 64 * MIB  # checkpoint/gather.py


class Moment(NamedTuple):
    name: str
    parts: list[State]


class StepShape(NamedTuple):
    """What the moments depend on besides the sharding."""

    config: BagelConfig
    freezing: Freezing
    vae: VAEConfig
    pack: PackShape
    image_pixels: int
    checkpointing: str  # the argument activation_checkpointing
    gpu_bytes: float | None = None  # of one GPU, where it is known


def moments(sharding: Sharding, shape: StepShape) -> list[Moment]:
    """All that can be the peak."""
    needs = activations(shape.config, shape.pack, shape.checkpointing, sharding.weight_bytes)
    found = [
        _vae(sharding, shape),
        *_backward(sharding, shape, needs),
        _optimizer(sharding),
        Moment(
            "export", [State("export chunks", DEVICE, 2 * EXPORT_CHUNK), State("export chunks", HOST, EXPORT_CHUNK)]
        ),
    ]
    found = [Moment(moment.name, [*moment.parts, *arena(sharding, shape)]) for moment in found]
    load = _load(sharding, shape)
    return [*found, load] if load.parts else found


def gathering(sharding: Sharding, shape: StepShape) -> Gathered | None:
    """What ZeRO-3 gathers; None in other stages, and on a single rank that keeps its weights, which are whole."""
    if sharding.stage != 3 or (sharding.world == 1 and sharding.place(sharding.param) == DEVICE):
        return None
    recompute = shape.checkpointing != "none"
    return gathered(shape.config, shape.freezing, recompute, sharding.gathering)


def _vae(s: Sharding, shape: StepShape) -> Moment:
    pixels = shape.image_pixels if shape.config.visual_gen else 0
    image = State("autoencoder, one image", DEVICE, vae_bytes(shape.vae, pixels, s.bf16, s.on_cpu))
    before = window_gradients(s) if s.accumulation > 1 else []  # of the micro-batches before this one
    return Moment("autoencoder", [image, *before])


def _backward(s: Sharding, shape: StepShape, needs: Activations) -> list[Moment]:
    """The moments of the backward pass, which hold more than those of the forward pass."""
    live = gathering(s, shape)
    inputs = State("pack and embeddings", DEVICE, needs.inputs)
    head = shape.config.llm.vocab_size * shape.config.llm.hidden_size
    own = {
        "layer": [
            *_checkpoints(shape, needs.checkpoints + needs.vit_checkpoints, 2 * needs.layer_input),
            State("activations of a decoder layer", DEVICE, needs.layer),
            *_reduction(s, 0),
        ],
        "head": [
            *_checkpoints(shape, needs.checkpoints + needs.vit_checkpoints, needs.layer_input),
            State("logits chunk and labels", DEVICE, needs.head),
            # Its gradient is the first: what waits in the bucket is less, so only one beyond it is reduced now.
            *(_reduction(s, head) if _trains(s, "lm_head") and head > s.bucket else []),
        ],
        "embedding": _reduction(s, head) if _trains(s, "embed_tokens") else [],
        "vit": [
            *_checkpoints(shape, needs.vit_checkpoints, 2 * needs.vit_layer_input),
            State("activations of a ViT layer", DEVICE, needs.vit_layer),
            *_reduction(s, 0),
        ],
    }
    names = {"layer": "decoder layer", "head": "head", "embedding": "embedding", "vit": "ViT layer"}
    found = []
    for moment, parts in own.items():
        parts = [inputs, *parts, *backward_states(s)]
        if live is not None and s.on_cpu:
            found += _one_after_the_other(s, live, moment, names[moment], parts)
            continue
        if live is not None:
            # Copies and reductions run beside each other on their own streams: all may be there at once.
            parts = [*parts, State("gathered parameters", DEVICE, s.weight_bytes * live.with_copies[moment])]
        found.append(Moment(names[moment] + " backward", parts))
    return found


def _checkpoints(shape: StepShape, kept: int, moving: int) -> list[State]:
    """What the device holds of inputs of recomputed layers: `kept`, or where they are on the host those that move."""
    if shape.checkpointing == "offload":
        return [State("layer inputs on their way", DEVICE, moving)]
    return [State("activation checkpoints", DEVICE, kept)]


def arena(s: Sharding, shape: StepShape) -> list[State]:
    """The host memory of offloaded layer inputs; there from the first forward pass on."""
    if shape.checkpointing != "offload":
        return []
    size = arena_bytes(shape.config, shape.pack.tokens, s.weight_bytes)
    return [State("layer inputs (one page-locked arena)", HOST, size, 0 if s.on_cpu else 1)]


def offloaded_inputs(s: Sharding, shape: StepShape) -> int:
    """Bytes of layer inputs that a micro-batch sends to the host and fetches again."""
    if shape.checkpointing != "offload":
        return 0
    needs = activations(shape.config, shape.pack, shape.checkpointing, s.weight_bytes)
    return needs.checkpoints + needs.vit_checkpoints


def _one_after_the_other(s: Sharding, live: Gathered, moment: str, name: str, parts: list[State]) -> list[Moment]:
    """On CPU parameters are copied and gradients reduced in turn: each reduction meets what is held at that time."""
    others = [part for part in parts if part.name not in _REDUCTION]

    def holding(elements: int) -> State:
        return State("gathered parameters", DEVICE, s.weight_bytes * elements)

    found = [Moment(f"{name} backward", [*others, holding(live.with_copies[moment])])]
    reducing = [
        [*others, holding(held), *_reduction(s, waiting if waiting > s.bucket else 0, waiting)]
        for held, waiting in live.reductions[moment]
    ]
    if reducing:
        found.append(Moment(f"{name} backward, reducing", max(reducing, key=_total)))
    return found


def _trains(s: Sharding, part: str) -> bool:
    return any(p.trains and part in p.name for p in s.parameters)


_REDUCED, _SUMS = "gradients being reduced", "gradients in the format they are summed in"
_NORM, _ON_ITS_WAY = "gradient norm in float64", "a gradient on its way to the host"
_TO_NVME = "fp32 gradients on their way to NVMe"
_REDUCTION = (_REDUCED, _SUMS, _NORM, _ON_ITS_WAY, _TO_NVME)


def _reduction(s: Sharding, large: int, waiting: int | None = None) -> list[State]:
    """Gradients on their way to the partitions: `waiting` elements (None: a full bucket), named as in `_REDUCTION`.

    `large` is not 0 where one parameter exceeds the bucket.
    """
    trainable = s.elements(True)
    if s.stage == 0 or not trainable:
        return []
    size = s.communication_bytes
    is_beyond = large > s.bucket
    if waiting is None:
        waiting = large if is_beyond else min(s.bucket, trainable)
    # The bucket's own memory is a state; a gradient beyond it has its own. What is reduced is a copy, ordered by rank.
    own = s.weight_bytes * waiting if is_beyond else 0
    whole, share = large or _largest_in_layers(s), -(-waiting // s.world)
    if s.stage == 3:
        copy = 0 if is_beyond and large % s.world == 0 and size == s.weight_bytes else size * waiting
        return [State(_REDUCED, DEVICE, own + copy), *_partitioning3(s, -(-whole // s.world), share)]
    copy, norm = size * waiting, 8 * min(whole, -(-trainable // s.world))
    if s.place(s.optimizer) == DEVICE or copy > norm:
        return [State(_REDUCED, DEVICE, own + copy)]
    return [State(_REDUCED, DEVICE, own), State(_NORM, DEVICE, norm)]  # taken one by one, when the copy is gone


def _partitioning3(s: Sharding, single: int, share: int) -> list[State]:
    """ZeRO-3 on its way from a reduced bucket to the partitions: `share` elements of this rank, at most `single` of one
    parameter.
    """
    found = []
    if s.gradient_bytes != s.communication_bytes:
        found.append(State(_SUMS, DEVICE, s.gradient_bytes * share))
    if s.place(s.optimizer) == DEVICE:
        return found
    found.append(State(_NORM, DEVICE, 8 * min(NORM_ELEMENTS, single)))
    if not s.on_cpu:
        found.append(State(_ON_ITS_WAY, DEVICE, s.gradient_bytes * single))
    if s.place(s.optimizer) == NVME and not s.keeps_fp32_gradients:
        found.append(State(_TO_NVME, DEVICE, 4 * share))
    return found


def _largest_in_layers(s: Sharding) -> int:
    return max((p.numel for p in s.parameters if p.trains and ".layers." in p.name), default=0)


def _optimizer(s: Sharding) -> Moment:
    """The update itself. The CPU's AdamW of torch needs two more vectors; fused and DeepSpeed's own need none."""
    held = [state for state in backward_states(s) if state.name != "communication buckets"]
    if s.place(s.optimizer) != DEVICE:
        return Moment("optimizer step", held)
    own = 8 if s.on_cpu else 0
    largest = max((p.numel for p in s.parameters if p.trains), default=0)
    numel, before = largest, list[State]()
    if s.stage == 3:
        numel, largest = max(s.sub_groups()), -(-largest // s.world)
    elif s.stage:
        numel, before = -(-s.elements(True) // s.world), held  # let go once they are flat and in fp32
    flat = 0 if s.sums_on_device else s.gradient_bytes
    in_fp32 = 4 if s.gradient_bytes != 4 else 0
    found = [
        [State("optimizer step", DEVICE, (4 + own) * numel)],
        [*before, State("gradients, flat and in fp32", DEVICE, (flat + in_fp32) * numel if s.stage else 0)],
        [*before, State(_NORM, DEVICE, 8 * largest)],
    ]
    if s.stage == 0 and s.bf16:
        found[0].append(State("gradients in fp32", DEVICE, 4 * s.elements(True)))
    return Moment("optimizer step", max(found, key=_total))


def _load(s: Sharding, shape: StepShape) -> Moment:
    """How DeepSpeed lays weights side by side: through host memory.

    ZeRO-3 always does so, unless parameters are offloaded; stages 1 and 2 only where a GPU has no room for the weights
    twice, and then hold them twice on the host. With the optimizer on NVMe it first makes zeros in place of a group's
    gradient, then the gradients' own memory, which is copied where it is to be page-locked. (With an optimizer in host
    memory all this is less than the moments, which come later.)
    """
    size = 0
    if s.stage == 3 and s.place(s.param) == DEVICE:
        size = s.weight_bytes * s.share(True)
    elif s.stage in (1, 2) and shape.gpu_bytes is not None:
        weights = s.weight_bytes * s.elements(False)
        size = 2 * weights if 2 * weights > 0.95 * shape.gpu_bytes else 0
    if s.place(s.optimizer) == HOST:
        size -= (s.master_bytes + 2 * s.moment_bytes) * s.share(True)  # counted as states, but made after this
    parts = [State("weights on their way to the GPU", HOST, size)] if size > 0 and not s.on_cpu else []
    if s.place(s.optimizer) == NVME:
        copied = s.gradient_bytes * s.share(True) if s.pinned(s.optimizer) else 0
        zeros = s.master_bytes * max(s.sub_groups())
        parts.append(State("gradients being laid out", HOST, max(copied, zeros)))
    return Moment("load", parts)


def _total(parts: list[State]) -> int:
    return sum(part.size for part in parts)
