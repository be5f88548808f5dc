"""Memory that comes and goes within a step, by phase. The largest phase decides the peak.

Guarantees: sizes are bytes of one rank and follow the trainer's step and DeepSpeed 0.19.8's handling of gradients.
Nothing here is also counted in states.py.
"""

from __future__ import annotations

from typing import NamedTuple

from bagel_ds.memory.gathering import Gathered, gathered
from bagel_ds.memory.states import DEVICE, HOST, Sharding, State, backward_states, window_gradients
from bagel_ds.model.shape.activations import Activations, PackShape, activations, arena_bytes, vae_bytes
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model.shape.parts import Freezing
from bagel_ds.model.shape.quantization import is_codes, work_bytes
from bagel_ds.units import MIB

NORM_ELEMENTS = 250_000_000  # DeepSpeed sums squares of gradients in float64, this many elements at a time
SPLIT_CHUNK, SPLIT_BYTES = 2**22, 80  # elements of split masters that torch updates at once on a GPU, bytes for each
EXPORT_CHUNK = 64 * MIB  # checkpoint/gather.py


class Phase(NamedTuple):
    """A stage of a step and what is in memory only during it."""

    name: str
    states: list[State]


class StepShape(NamedTuple):
    """What the phases depend on, apart from the sharding."""

    config: BagelConfig
    freezing: Freezing
    vae: VAEConfig
    pack: PackShape
    image_pixels: int
    checkpointing: str  # the argument activation_checkpointing
    gpu_bytes: float | None = None  # memory of one GPU; None if unknown
    selective_layers: int = 0  # decoder layers that keep products


def phases(sharding: Sharding, shape: StepShape) -> list[Phase]:
    """Every phase that can be the peak."""
    needs = activations(shape.config, shape.pack, shape.checkpointing, sharding.weight_bytes)
    found = [
        _vae(sharding, shape),
        *_backward(sharding, shape, needs),
        _optimizer(sharding),
        Phase("export", _export_chunks(sharding)),
    ]
    found = [Phase(phase.name, [*phase.states, *arena(sharding, shape)]) for phase in found]
    load = _load(sharding, shape)
    return [*found, load] if load.states else found


def gathering(sharding: Sharding, shape: StepShape) -> Gathered | None:
    """What ZeRO-3 gathers. None in other stages, and on a single rank with its weights on the device."""
    if sharding.stage != 3 or (sharding.world == 1 and sharding.place(sharding.param) == DEVICE):
        return None
    recompute = shape.checkpointing != "none"
    return gathered(shape.config, shape.freezing, recompute, sharding.gathering, sharding.weight_bytes)


def _vae(s: Sharding, shape: StepShape) -> Phase:
    pixels = shape.image_pixels if shape.config.visual_gen else 0
    image = State("autoencoder, one image", DEVICE, vae_bytes(shape.vae, pixels, s.bf16, s.on_cpu))
    before = window_gradients(s) if s.accumulation > 1 else []  # of earlier micro-batches
    return Phase("autoencoder", [image, *before])


def _backward(s: Sharding, shape: StepShape, needs: Activations) -> list[Phase]:
    """The phases of the backward pass, which hold more than those of the forward pass."""
    live = gathering(s, shape)
    inputs = State("pack and embeddings", DEVICE, needs.inputs)
    head = shape.config.llm.vocab_size * shape.config.llm.hidden_size
    own = {
        "layer": [
            *_checkpoints(shape, needs.checkpoints + needs.vit_checkpoints, 2 * needs.layer_input),
            State(_PRODUCTS, DEVICE, needs.products * max(shape.selective_layers - 1, 0)),
            State("activations of a decoder layer", DEVICE, needs.layer),
            *dequantized(s, shape),
            *_reduction(s, 0),
        ],
        "head": [
            *_checkpoints(shape, needs.checkpoints + needs.vit_checkpoints, needs.layer_input),
            State(_PRODUCTS, DEVICE, needs.products * shape.selective_layers),
            State("logits and labels", DEVICE, needs.head),
            # The head's gradient comes first, so the bucket is empty: only a gradient larger than it is reduced now.
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
    for phase, held in own.items():
        held = [inputs, *held, *backward_states(s)]
        if live is not None and s.on_cpu:
            found += _one_after_the_other(s, live, phase, names[phase], held)
            continue
        if live is not None:
            # Copies and reductions run on separate streams, so all may be in memory at once.
            held = [*held, State("gathered parameters", DEVICE, live.with_copies[phase])]
        found.append(Phase(names[phase] + " backward", held))
    return found


def dequantized(s: Sharding, shape: StepShape) -> list[State]:
    """The one weight that is not in 4 or 8 bits while its layer multiplies."""
    quantization = shape.config.quantization
    if quantization is None:
        return []
    per_byte = quantization.per_byte
    largest = max(p.numel * per_byte for p in s.parameters if is_codes(p.name))
    return [State("a quantized layer's weight", DEVICE, work_bytes(largest, s.weight_bytes))]


def _checkpoints(shape: StepShape, kept: int, moving: int) -> list[State]:
    """Inputs of recomputed layers on the device: all (`kept`), or with offload those being copied (`moving`)."""
    if shape.checkpointing == "offload":
        return [State("layer inputs in transit", DEVICE, moving)]
    return [State("activation checkpoints", DEVICE, kept)]


def arena(s: Sharding, shape: StepShape) -> list[State]:
    """Host memory of offloaded layer inputs. It is allocated in the first forward pass and kept."""
    if shape.checkpointing != "offload":
        return []
    size = arena_bytes(shape.config, shape.pack.tokens, s.weight_bytes)
    return [State("layer inputs (one page-locked arena)", HOST, size, 0 if s.on_cpu else 1)]


def offloaded_inputs(s: Sharding, shape: StepShape) -> int:
    """Bytes of layer inputs that a micro-batch sends to the host and fetches back."""
    if shape.checkpointing != "offload":
        return 0
    needs = activations(shape.config, shape.pack, shape.checkpointing, s.weight_bytes)
    return needs.checkpoints + needs.vit_checkpoints


def _one_after_the_other(s: Sharding, live: Gathered, phase: str, name: str, held: list[State]) -> list[Phase]:
    """On CPU, copies of parameters and reductions of gradients take turns. Each reduction adds to what is held then."""
    others = [state for state in held if state.name not in _REDUCTION]

    def holding(size: int) -> State:
        return State("gathered parameters", DEVICE, size)

    found = [Phase(f"{name} backward", [*others, holding(live.with_copies[phase])])]
    reducing = [
        [*others, holding(held), *_reduction(s, waiting if waiting > s.bucket else 0, waiting)]
        for held, waiting in live.reductions[phase]
    ]
    if reducing:
        found.append(Phase(f"{name} backward, reducing", max(reducing, key=_total)))
    return found


def _trains(s: Sharding, part: str) -> bool:
    return any(p.trains and part in p.name for p in s.parameters)


_PRODUCTS = "products that layers keep"
_REDUCED, _SUMS = "gradients being reduced", "gradients in the format of their sum"
_NORM, _IN_TRANSIT = "gradient norm in float64", "a gradient in transit to the host"
_TO_NVME = "fp32 gradients in transit to NVMe"
_REDUCTION = (_REDUCED, _SUMS, _NORM, _IN_TRANSIT, _TO_NVME)


def _reduction(s: Sharding, large: int, waiting: int | None = None) -> list[State]:
    """The reduction of `waiting` gradient elements (None: a full bucket) into partitions; names are in `_REDUCTION`.

    `large`: elements of a parameter that may exceed the bucket, else 0.
    """
    trainable = s.elements(True)
    if s.stage == 0 or not trainable:
        return []
    size = s.communication_bytes
    is_beyond = large > s.bucket
    if waiting is None:
        waiting = large if is_beyond else min(s.bucket, trainable)
    # The bucket is counted as a state. A larger gradient has memory of its own. A copy, ordered by rank, is reduced.
    own = s.weight_bytes * waiting if is_beyond else 0
    whole, share = large or _largest_in_layers(s), -(-waiting // s.world)
    if s.stage == 3:
        copy = 0 if is_beyond and large % s.world == 0 and size == s.weight_bytes else size * waiting
        return [State(_REDUCED, DEVICE, own + copy), *_partitioning3(s, -(-whole // s.world), share)]
    copy, norm = size * waiting, 8 * min(whole, -(-trainable // s.world))
    if s.place(s.optimizer) == DEVICE or copy > norm:
        return [State(_REDUCED, DEVICE, own + copy)]
    return [State(_REDUCED, DEVICE, own), State(_NORM, DEVICE, norm)]  # norms follow when the copy is freed


def _partitioning3(s: Sharding, single: int, share: int) -> list[State]:
    """What ZeRO-3 needs to move a reduced bucket into partitions.

    `share` is this rank's part of the bucket in elements, `single` the largest part of one parameter.
    """
    found = []
    if s.gradient_bytes != s.communication_bytes:
        found.append(State(_SUMS, DEVICE, s.gradient_bytes * share))
    if s.place(s.optimizer) == DEVICE:
        return found
    found.append(State(_NORM, DEVICE, 8 * min(NORM_ELEMENTS, single)))
    if not s.on_cpu:
        found.append(State(_IN_TRANSIT, DEVICE, s.gradient_bytes * single))
    if s.deepspeed_swaps and not s.keeps_fp32_gradients:
        found.append(State(_TO_NVME, DEVICE, 4 * share))
    return found


def _largest_in_layers(s: Sharding) -> int:
    return max((p.numel for p in s.parameters if p.trains and ".layers." in p.name), default=0)


def _optimizer(s: Sharding) -> Phase:
    """The update. torch's AdamW needs two more vectors on a CPU; its fused version and DeepSpeed's own need none."""
    held = [state for state in backward_states(s) if state.name != "communication buckets"]
    if s.place(s.optimizer) != DEVICE:
        return Phase("optimizer step", held)
    if s.split_moments:
        largest = -(-max(p.numel for p in s.parameters if p.trains) // s.world)
        piece = State("a piece of a parameter in fp32", DEVICE, SPLIT_BYTES * min(SPLIT_CHUNK, largest))
        return Phase("optimizer step", max([piece], [State(_NORM, DEVICE, 8 * largest)], key=_total))
    own = 8 if s.on_cpu else 0
    largest = max((p.numel for p in s.parameters if p.trains), default=0)
    numel, before = largest, list[State]()
    if s.stage == 3:
        numel, largest = max(s.sub_groups()), -(-largest // s.world)
    elif s.stage:
        numel, before = -(-s.elements(True) // s.world), held  # freed once they are flat and in fp32
    flat = 0 if s.sums_on_device else s.gradient_bytes
    in_fp32 = 4 if s.gradient_bytes != 4 else 0
    found = [
        [State("optimizer step", DEVICE, (4 + own) * numel)],
        [*before, State("gradients, flat and in fp32", DEVICE, (flat + in_fp32) * numel if s.stage else 0)],
        [*before, State(_NORM, DEVICE, 8 * largest)],
    ]
    if s.stage == 0 and s.bf16:
        found[0].append(State("gradients in fp32", DEVICE, 4 * s.elements(True)))
    return Phase("optimizer step", max(found, key=_total))


def _export_chunks(s: Sharding) -> list[State]:
    """One chunk is gathered while the one before it is still held, and copied to the host unless it is there."""
    gathered = State("export chunks", DEVICE, 2 * EXPORT_CHUNK)
    return [gathered] if s.on_cpu else [gathered, State("export chunks", HOST, EXPORT_CHUNK)]


def _load(s: Sharding, shape: StepShape) -> Phase:
    """The load, in which DeepSpeed flattens weights through host memory.

    ZeRO-3 always does so, unless parameters are offloaded. Stages 1 and 2 do so only if the GPU can't hold the weights
    twice, and then the host holds them twice. With the optimizer on NVMe, DeepSpeed first allocates zeros for a group's
    gradient, then the memory of all gradients, which is copied if it is to be page-locked. (With the optimizer in host
    memory all this takes less than Adam's moments, which are allocated later.)
    """
    size = 0
    if s.stage == 3 and s.place(s.param) == DEVICE:
        size = s.weight_bytes * s.share(True)
    elif s.stage in (1, 2) and shape.gpu_bytes is not None:
        weights = s.whole_weights()
        size = 2 * weights if 2 * weights > 0.95 * shape.gpu_bytes else 0
    if s.place(s.optimizer) == HOST:
        size -= (s.master_bytes + 2 * s.moment_bytes) * s.share(True)  # counted as states, but allocated after this
    held = [State("weights in transit to the GPU", HOST, size)] if size > 0 and not s.on_cpu else []
    if s.deepspeed_swaps:
        copied = s.gradient_bytes * s.share(True) if s.pinned(s.optimizer) else 0
        zeros = s.master_bytes * max(s.sub_groups())
        held.append(State("gradients being laid out", HOST, max(copied, zeros)))
    return Phase("load", held)


def _total(held: list[State]) -> int:
    return sum(state.size for state in held)
