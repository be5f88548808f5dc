"""A model folder of any size in BAGEL's real layout, with random weights, written a tensor at a time.

Guarantees: tokenizer, autoencoder and configuration files of the demo's model, every tensor name of the released one,
bf16; never more than one tensor in memory. The weights train (norms are 1, the rest small), they know nothing.
"""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path

import torch

from bagel_ds.model.bagel import Bagel
from bagel_ds.model.shape.config import BagelConfig, LLMConfig, ViTConfig
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.model_folder.tensor_files import TensorFileWriter
from bagel_ds.ranges import TensorInfo

HEAD_DIM = 64


def scaled_config(width: int, layers: int, vocabulary: int, vit_width: int = 192, vit_layers: int = 4) -> BagelConfig:
    """The released model's proportions at another width; both widths are multiples of 64 and 4."""
    heads = width // HEAD_DIM
    llm = LLMConfig(
        hidden_size=width,
        intermediate_size=(width * 16 // 3) // 64 * 64,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=max(k for k in (1, 2, 4) if heads % k == 0),
        vocab_size=vocabulary,
    )
    vit = ViTConfig(
        hidden_size=vit_width, intermediate_size=4 * vit_width, num_layers=vit_layers, num_attention_heads=4
    )
    return BagelConfig(llm=llm, vit=vit)


def folder_config(folder: Path) -> BagelConfig:
    """The network that a folder written by `write_random_model` describes."""
    written = ModelFolder(folder)
    return BagelConfig(llm=written.llm_config(), vit=written.vit_config())


def parameter_shapes(config: BagelConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(parameter.shape) for name, parameter in Bagel(config).named_parameters()}


def write_without_weights(folder: Path, demo: Path, config: BagelConfig) -> None:
    """Write `folder` as `write_random_model` does, but without the network's weights."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in demo.iterdir():
        if path.name not in ("ema.safetensors", "model.safetensors"):
            shutil.copyfile(path, folder / path.name)
    _write_configs(folder, config)


def write_random_model(folder: Path, demo: Path, config: BagelConfig, seed: int = 0) -> int:
    """Write `folder` beside the demo model `demo` (made by `bagel-ds demo`); the number of parameters.

    `config` must hold the demo's vocabulary, `vocab_size` may be larger.
    """
    write_without_weights(folder, demo, config)
    shapes = parameter_shapes(config)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: TensorInfo(torch.bfloat16, shape) for name, shape in shapes.items()}
    with TensorFileWriter(folder / "ema.safetensors", tensors) as writer:
        for name, shape in shapes.items():
            if "norm" in name.split(".")[-2]:
                values = torch.full(shape, 1.0 if name.endswith("weight") else 0.0, dtype=torch.bfloat16)
            else:
                values = torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
            writer.write(name, 0, values.flatten())
    return sum(tensor.numel for tensor in tensors.values())


def _write_configs(folder: Path, config: BagelConfig) -> None:
    llm = json.loads((folder / "llm_config.json").read_text()) | dataclasses.asdict(config.llm)
    vit = json.loads((folder / "vit_config.json").read_text()) | {
        "hidden_size": config.vit.hidden_size,
        "intermediate_size": config.vit.intermediate_size,
        "num_attention_heads": config.vit.num_attention_heads,
        "num_hidden_layers": config.vit.num_layers + 1,
    }
    whole = json.loads((folder / "config.json").read_text()) | {"llm_config": llm, "vit_config": vit}
    for name, content in (("llm_config", llm), ("vit_config", vit), ("config", whole)):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")
    assert ModelFolder(folder).llm_config() == config.llm and ModelFolder(folder).vit_config() == config.vit
