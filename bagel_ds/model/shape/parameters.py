"""Every parameter of a BAGEL network, and the order in which a step uses them.

Guarantees: names, sizes and order are those of `Bagel(config).named_parameters()` (a test compares). Everything is
arithmetic: listing 14.6 B parameters takes milliseconds and no memory.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import groupby
from typing import Iterator, NamedTuple

from bagel_ds.model.shape.config import FREQUENCIES, BagelConfig, LLMConfig, VAEConfig, ViTConfig
from bagel_ds.model.shape.lora import LORA_A, LORA_B, is_decoder_linear
from bagel_ds.model.shape.parts import Freezing, part_of, trains_by_name
from bagel_ds.model.shape.quantization import ABSMAX, CODES, is_codes

_GEN = "_moe_gen"


class ParameterSize(NamedTuple):
    name: str
    numel: int
    trains: bool

    def element_bytes(self, weight_bytes: int) -> int:
        """Bytes of an element, in a network whose weights have `weight_bytes`."""
        return 1 if is_codes(self.name) else weight_bytes


@lru_cache(maxsize=16)
def parameter_sizes(config: BagelConfig, freezing: Freezing = Freezing()) -> tuple[ParameterSize, ...]:
    """All parameters in the network's own order."""
    trains = trains_by_name(config, freezing)
    return tuple(ParameterSize(name, shape.numel, trains(name)) for name, shape in _with_adapters(config))


@lru_cache(maxsize=16)
def adapted_layers(config: BagelConfig) -> frozenset[str]:
    """Names of the linear layers that get an adapter."""
    lora = config.lora
    if lora is None:
        return frozenset()
    found = (name for name in linear_layers(config) if lora.names(name))
    return frozenset(name for name in found if part_of(name) not in lora.frozen_parts)


@lru_cache(maxsize=16)
def linear_layers(config: BagelConfig) -> tuple[str, ...]:
    """Names of all layers that can have an adapter."""
    return tuple(module_of(name) for name, shape in _named(config) if shape.inputs)


def module_of(parameter: str) -> str:
    """The module that reads a parameter; ZeRO-3 gathers all parameters of a module together."""
    return parameter.rpartition(".")[0]


class _Shape(NamedTuple):
    """Elements of a parameter; `inputs` and `outputs` are those of the layer whose weight it is, if that is linear."""

    numel: int
    inputs: int = 0
    outputs: int = 0


def _with_adapters(config: BagelConfig) -> Iterator[tuple[str, _Shape]]:
    """`_named`, with the parameters of each adapter behind the others of its layer, and codes for quantized weights."""
    adapted, quantization = adapted_layers(config), config.quantization
    for layer, group in groupby(_named(config), key=lambda parameter: module_of(parameter[0])):
        (name, weight), *others = group
        if quantization is not None and is_decoder_linear(layer):
            yield f"{layer}.{CODES}", _Shape(quantization.codes(weight.numel))
            yield f"{layer}.{ABSMAX}", _Shape(quantization.blocks(weight.numel))
        else:
            yield name, weight
        yield from others
        if config.lora is not None and layer in adapted:
            yield f"{layer}.{LORA_A}", _Shape(config.lora.rank * weight.inputs)
            yield f"{layer}.{LORA_B}", _Shape(weight.outputs * config.lora.rank)


def _named(config: BagelConfig) -> Iterator[tuple[str, _Shape]]:
    width, features = config.llm.hidden_size, config.latent_features
    yield from _language_model(config.llm)
    yield from _linear("time_embedder.mlp.0", FREQUENCIES, width)
    yield from _linear("time_embedder.mlp.2", width, width)
    yield from _linear("vae2llm", features, width)
    yield from _linear("llm2vae", width, features)
    yield "latent_pos_embed.pos_embed", _Shape(config.max_latent_size**2 * width)
    yield from _vit(config.vit)
    yield from _linear("connector.fc1", config.vit.hidden_size, width)
    yield from _linear("connector.fc2", width, width)
    yield "vit_pos_embed.pos_embed", _Shape(config.vit.max_patches_per_side**2 * width)


def _language_model(llm: LLMConfig) -> Iterator[tuple[str, _Shape]]:
    model, width = "language_model.model", llm.hidden_size
    yield f"{model}.embed_tokens.weight", _Shape(llm.vocab_size * width)
    for layer in range(llm.num_hidden_layers):
        yield from _mot_layer(f"{model}.layers.{layer}", llm)
    for suffix in ("", _GEN):
        yield f"{model}.norm{suffix}.weight", _Shape(width)
    yield "language_model.lm_head.weight", _Shape(llm.vocab_size * width)


def _mot_layer(name: str, llm: LLMConfig) -> Iterator[tuple[str, _Shape]]:
    width, inner = llm.hidden_size, llm.intermediate_size
    queries, keys = llm.num_attention_heads * llm.head_dim, llm.num_key_value_heads * llm.head_dim
    for suffix in ("", _GEN):
        yield from _linear(f"{name}.self_attn.q_proj{suffix}", width, queries)
        yield from _linear(f"{name}.self_attn.k_proj{suffix}", width, keys)
        yield from _linear(f"{name}.self_attn.v_proj{suffix}", width, keys)
        yield from _linear(f"{name}.self_attn.o_proj{suffix}", queries, width, bias=False)
        if llm.qk_norm:
            yield f"{name}.self_attn.q_norm{suffix}.weight", _Shape(llm.head_dim)
            yield f"{name}.self_attn.k_norm{suffix}.weight", _Shape(llm.head_dim)
    for suffix in ("", _GEN):
        for projection in ("gate_proj", "up_proj"):
            yield from _linear(f"{name}.mlp{suffix}.{projection}", width, inner, bias=False)
        yield from _linear(f"{name}.mlp{suffix}.down_proj", inner, width, bias=False)
        yield f"{name}.input_layernorm{suffix}.weight", _Shape(width)
        yield f"{name}.post_attention_layernorm{suffix}.weight", _Shape(width)


def _vit(vit: ViTConfig) -> Iterator[tuple[str, _Shape]]:
    model, width = "vit_model.vision_model", vit.hidden_size
    yield from _linear(f"{model}.embeddings.patch_embedding", vit.num_channels * vit.patch_size**2, width)
    yield f"{model}.embeddings.position_embedding.weight", _Shape(vit.max_patches_per_side**2 * width)
    for layer in range(vit.num_layers):
        name = f"{model}.encoder.layers.{layer}"
        for projection in ("k_proj", "v_proj", "q_proj", "out_proj"):
            yield from _linear(f"{name}.self_attn.{projection}", width, width)
        yield from _norm(f"{name}.layer_norm1", width)
        yield from _linear(f"{name}.mlp.fc1", width, vit.intermediate_size)
        yield from _linear(f"{name}.mlp.fc2", vit.intermediate_size, width)
        yield from _norm(f"{name}.layer_norm2", width)
    yield from _norm(f"{model}.post_layernorm", width)


def _linear(name: str, inputs: int, outputs: int, bias: bool = True) -> Iterator[tuple[str, _Shape]]:
    yield f"{name}.weight", _Shape(inputs * outputs, inputs, outputs)
    if bias:
        yield f"{name}.bias", _Shape(outputs)


def _norm(name: str, width: int) -> Iterator[tuple[str, _Shape]]:
    yield f"{name}.weight", _Shape(width)
    yield f"{name}.bias", _Shape(width)


def vae_encoder_parameters(vae: VAEConfig) -> int:
    """Parameters of the autoencoder's encoder, the part that training needs: 34,274,208 in the released one."""
    widths = [vae.channels * multiplier for multiplier in vae.channel_multipliers]
    total = _conv(3, widths[0]) + _conv(widths[-1], 2 * vae.z_channels) + 2 * widths[-1]
    previous = widths[0]
    for level, width in enumerate(widths):
        total += _res_block(previous, width) + (vae.res_blocks - 1) * _res_block(width, width)
        total += _conv(width, width) if level != len(widths) - 1 else 0
        previous = width
    return total + _middle(widths[-1])


def vae_decoder_parameters(vae: VAEConfig) -> int:
    """Parameters of the autoencoder's decoder: 49,545,475 in the released one."""
    widths = [vae.channels * multiplier for multiplier in vae.channel_multipliers]
    previous = widths[-1]
    total = _conv(vae.z_channels, previous) + _conv(widths[0], 3) + 2 * widths[0] + _middle(previous)
    for level in reversed(range(len(widths))):
        width = widths[level]
        total += _res_block(previous, width) + vae.res_blocks * _res_block(width, width)
        total += _conv(width, width) if level else 0
        previous = width
    return total


def _middle(width: int) -> int:
    """Two blocks around an attention of one head."""
    return 2 * _res_block(width, width) + 2 * width + 4 * _conv(width, width, 1)


def _conv(inputs: int, outputs: int, kernel: int = 3) -> int:
    return inputs * outputs * kernel**2 + outputs


def _res_block(inputs: int, outputs: int) -> int:
    shortcut = _conv(inputs, outputs, 1) if inputs != outputs else 0
    return 2 * inputs + _conv(inputs, outputs) + 2 * outputs + _conv(outputs, outputs) + shortcut


class Call(NamedTuple):
    """One module using its parameters: indexes into `parameter_sizes`."""

    phase: str  # of the step: "vit", "embedding", "layer" or "head"
    parameters: tuple[int, ...]
    backward: bool = False


@lru_cache(maxsize=16)
def step_calls(config: BagelConfig, freezing: Freezing, recompute: bool) -> tuple[Call, ...]:
    """Modules in the order in which one micro-batch's forward and backward pass use them.

    With `recompute` every decoder and ViT layer runs forward again before its backward pass.
    """
    forward = list(_forward_calls(config, freezing))
    calls = [call for block in forward for call in block]
    for block in reversed(forward):
        if recompute and len(block) > 2:  # a layer
            calls += block
        calls += [call._replace(backward=True) for call in reversed(block)]
    return tuple(calls)


def _forward_calls(config: BagelConfig, freezing: Freezing) -> Iterator[list[Call]]:
    """Modules in forward order, grouped into the blocks (layers) that are recomputed together."""
    modules: dict[str, list[int]] = {}
    for index, parameter in enumerate(parameter_sizes(config, freezing)):
        modules.setdefault(module_of(parameter.name), []).append(index)

    def calls(prefix: str, phase: str) -> list[Call]:
        return [Call(phase, tuple(held)) for name, held in modules.items() if name.startswith(prefix)]

    yield calls("language_model.model.embed_tokens", "embedding")
    if config.visual_und:
        yield from ([call] for call in calls("vit_model.vision_model.embeddings", "vit"))
        for layer in range(config.vit.num_layers):
            prefix = f"vit_model.vision_model.encoder.layers.{layer}."
            yield [Call("vit", tuple(modules[prefix + name])) for name in _VIT_ORDER]
        for name in ("vit_model.vision_model.post_layernorm", "connector.fc1", "connector.fc2", "vit_pos_embed"):
            yield calls(name, "vit")
    if config.visual_gen:
        for name in ("vae2llm", "time_embedder.mlp.0", "time_embedder.mlp.2", "latent_pos_embed"):
            yield calls(name, "embedding")
    for layer in range(config.llm.num_hidden_layers):
        yield _in_layer_order(modules, f"language_model.model.layers.{layer}.", config.visual_gen)
    suffixes = ("", _GEN) if config.visual_gen else ("",)
    yield from ([Call("layer", tuple(modules[f"language_model.model.norm{suffix}"]))] for suffix in suffixes)
    yield calls("language_model.lm_head", "head")
    if config.visual_gen:
        yield calls("llm2vae", "head")


_VIT_ORDER = (
    "layer_norm1",
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    "layer_norm2",
    "mlp.fc1",
    "mlp.fc2",
)


def _in_layer_order(modules: dict[str, list[int]], prefix: str, use_gen: bool) -> list[Call]:
    names = ["input_layernorm"]
    names += [f"self_attn.{name}" for name in ("q_proj", "q_norm", "k_proj", "k_norm", "v_proj", "o_proj")]
    names += ["post_attention_layernorm"]
    ordered = [name + suffix for name in names for suffix in (("", _GEN) if use_gen else ("",))]
    for mlp in ("mlp", "mlp" + _GEN) if use_gen else ("mlp",):
        ordered += [f"{mlp}.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
    return [Call("layer", tuple(modules[prefix + name])) for name in ordered if prefix + name in modules]
