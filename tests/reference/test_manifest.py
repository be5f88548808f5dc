"""Parameter names and shapes of the released 7B model and its autoencoder, on the meta device."""

from __future__ import annotations

import torch

from bagel_ds.model.bagel import Bagel
from bagel_ds.model.shape.config import BagelConfig, VAEConfig
from bagel_ds.model.shape.parts import part_of
from bagel_ds.model.vae import AutoEncoder
from tests.recordings import read_json


def shapes(module: torch.nn.Module) -> dict[str, list[int]]:
    return {name: list(parameter.shape) for name, parameter in module.named_parameters()}


def test_every_tensor_of_the_7b_has_its_name_and_shape() -> None:
    with torch.device("meta"):
        model = Bagel(BagelConfig())
    assert shapes(model) == read_json("manifest/bagel_7b")["params"]
    assert not list(model.buffers())


def test_every_tensor_of_the_autoencoder_has_its_name_and_shape() -> None:
    with torch.device("meta"):
        vae = AutoEncoder(VAEConfig())
    assert shapes(vae) == read_json("manifest/ae")["params"]


def test_parts_count_what_the_recording_counts() -> None:
    recorded = read_json("manifest/counts")["groups"]
    ours = {
        "llm_gen_expert": "gen_expert",
        "llm_und_expert": "und_expert",
        "llm_embed_tokens": "embed_tokens",
        "llm_lm_head": "lm_head",
        "pos_embed_tables": "position_tables",
    }
    with torch.device("meta"):
        model = Bagel(BagelConfig())
    counts: dict[str, int] = {}
    for name, parameter in model.named_parameters():
        counts[part_of(name)] = counts.get(part_of(name), 0) + parameter.numel()
    assert counts == {ours.get(name, name): count for name, count in recorded.items()}
