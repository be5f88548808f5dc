"""A tiny BAGEL in a folder laid out exactly like BAGEL-7B-MoT.

Guarantees: the folder has every file, configuration key and tensor name of the released model that training or
inference reads, in its dtypes (bf16 network, fp32 autoencoder). Weights are random, determined by the seed, and scaled
so that training starts well: unit norms, generation expert = understanding expert plus noise, nearly zero velocity.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from tokenizers import Tokenizer
from torch import Tensor

from bagel_ds.demo.autoencoder import haar_autoencoder
from bagel_ds.demo.tokenizer import write_tokenizer
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.config import BagelConfig, LLMConfig, ViTConfig

VIT = ViTConfig(hidden_size=64, intermediate_size=128, num_layers=2, num_attention_heads=4)
VIT_LAYERS_IN_FILE = VIT.num_layers + 1  # one more than is built, as in the released vit_config.json
IMAGE_SIZES = {"vae": [96, 64], "vit": [98, 56]}  # longest and shortest side in pixels, as in example.yaml
TWIN_NOISE = 0.2  # of the generation expert, relative to the standard deviation of the weights


def network_config(vocabulary: int) -> BagelConfig:
    """The demo's network. Like the released one, its vocabulary is padded by at least one row to a multiple of 64."""
    llm = LLMConfig(
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64 * (vocabulary // 64 + 1),
    )
    return BagelConfig(llm=llm, vit=VIT)


def write_model(folder: Path, tokenizer: Tokenizer, seed: int) -> None:
    """Write tokenizer, configurations, `ema.safetensors` and `ae.safetensors` into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    config = network_config(tokenizer.get_vocab_size())
    write_tokenizer(tokenizer, folder)
    _write_configs(folder, config, tokenizer)
    generator = torch.Generator().manual_seed(seed)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in network_weights(config, generator).items()}
    _write_tensors(folder / "ema.safetensors", weights)
    _write_tensors(folder / "ae.safetensors", haar_autoencoder(generator).state_dict())


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Replace `path` by a new file: checkpoints may hard-link the old one, running processes may have mapped it."""
    written = path.with_suffix(".new")
    # Not save_file: its files are readable by their owner only, whatever the umask.
    written.write_bytes(save(tensors, {"format": "pt"}))
    written.replace(path)


def network_weights(config: BagelConfig, generator: torch.Generator) -> dict[str, Tensor]:
    """A value for every parameter of `Bagel(config)`, fp32."""
    with torch.device("meta"):
        shapes = {name: parameter.shape for name, parameter in Bagel(config).named_parameters()}
    tables = {
        "latent_pos_embed.pos_embed": position_table(config.llm.hidden_size, config.max_latent_size),
        "vit_pos_embed.pos_embed": position_table(config.llm.hidden_size, config.vit.max_patches_per_side),
    }
    weights: dict[str, Tensor] = {}
    for name, shape in sorted(shapes.items()):  # sorted: x before x_moe_gen, and mlp.* before mlp_moe_gen.*
        twin = name.replace("_moe_gen", "")
        if name in tables:
            weights[name] = tables[name]
        elif twin != name:
            noise = torch.randn(shape, generator=generator) * _spread(name, shape)
            weights[name] = weights[twin] + TWIN_NOISE * noise
        elif _is_norm(name):
            weights[name] = torch.full(shape, 1.0 if name.endswith("weight") else 0.0)
        else:
            weights[name] = torch.randn(shape, generator=generator) * _spread(name, shape)
    return weights


def _is_norm(name: str) -> bool:
    return "norm" in name.split(".")[-2]


def _spread(name: str, shape: torch.Size) -> float:
    """Initial standard deviation: keeps activations near one at this width, or small where that is safer."""
    if len(shape) == 1 or name.startswith(("llm2vae", "language_model.lm_head")):
        return 0.02
    if "position_embedding" in name:
        return 0.2
    return 1.0 if "embed_tokens" in name else shape[-1] ** -0.5


def _write_configs(folder: Path, config: BagelConfig, tokenizer: Tokenizer) -> None:
    llm, vit = _llm_json(config.llm, tokenizer), _vit_json(config.vit)
    whole = {
        "connector_act": config.connector_act,
        "image_sizes": IMAGE_SIZES,  # only here: inference reads images at the sizes of example.yaml
        "interpolate_pos": False,
        "latent_patch_size": config.latent_patch_size,
        "llm_config": llm,
        "max_latent_size": config.max_latent_size,
        "model_type": "bagel",
        "timestep_shift": config.timestep_shift,
        "vae_config": {"downsample": 8, "z_channels": config.z_channels},
        "visual_gen": True,
        "visual_und": True,
        "vit_config": vit,
        "vit_max_num_patch_per_side": config.vit.max_patches_per_side,
    }
    generation = {
        "bos_token_id": llm["bos_token_id"],
        "eos_token_id": llm["eos_token_id"],
        "pad_token_id": tokenizer.token_to_id("<|endoftext|>"),
    }
    files = {"llm_config": llm, "vit_config": vit, "config": whole, "generation_config": generation}
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


def _llm_json(llm: LLMConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "hidden_act": "silu",
        "hidden_size": llm.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": llm.intermediate_size,
        "is_causal": True,
        "layer_module": "Qwen2MoTDecoderLayer",
        "max_position_embeddings": 32768,
        "max_window_layers": llm.num_hidden_layers,
        "model_type": "qwen2",
        "num_attention_heads": llm.num_attention_heads,
        "num_hidden_layers": llm.num_hidden_layers,
        "num_key_value_heads": llm.num_key_value_heads,
        "qk_norm": llm.qk_norm,
        "rms_norm_eps": llm.rms_norm_eps,
        "rope_scaling": None,
        "rope_theta": llm.rope_theta,
        "sliding_window": 32768,
        "tie_word_embeddings": llm.tie_word_embeddings,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vocab_size": llm.vocab_size,
    }


def _vit_json(vit: ViTConfig) -> dict[str, Any]:
    return {
        "hidden_size": vit.hidden_size,
        "image_size": vit.patch_size * vit.max_patches_per_side,
        "intermediate_size": vit.intermediate_size,
        "model_type": "siglip_vision_model",
        "num_attention_heads": vit.num_attention_heads,
        "num_hidden_layers": VIT_LAYERS_IN_FILE,
        "patch_size": vit.patch_size,
    }
