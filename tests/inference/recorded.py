"""The recordings of the original's inference: its network, its transforms, and the numbers that it drew."""

from __future__ import annotations

import json
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.inference import pictures
from bagel_ds.inference.generation import Inferencer
from bagel_ds.inference.loading import open_inferencer
from bagel_ds.inference.network import Context, Network
from bagel_ds.inference.settings import Settings
from bagel_ds.model.batch import patchify
from tests.recordings import reference

NAMES = {field: field for field in Settings.__dataclass_fields__}


@cache
def recorded_inferencer(folder: Path) -> Inferencer:
    """The recorded network in fp32 with the transforms that the recordings used."""
    found = open_inferencer(folder / "model", "cpu", "fp32")
    sizes = json.loads((folder / "packing" / "transform_args.json").read_text())
    transforms = {f"{kind}_transform": ImageTransform(**sizes[kind]) for kind in ("vae", "vit")}
    network = found.network
    return Inferencer(
        Network(network.model, network.vae, network.tokenizer, network.layout, **transforms, device=network.device)
    )


def inferencer() -> Inferencer:
    return recorded_inferencer(reference())


def settings(info: dict[str, Any]) -> Settings:
    """The settings of a recording."""
    return Settings().changed({name: value for name, value in info["args"].items() if name in NAMES})


def feed(draws: Iterator[Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    """Have every draw of latents come from `draws`, in order: posterior draws [1, 16, h, w], noise [M, F]."""

    def recorded(network: Network, tokens: int, generator: torch.Generator) -> Tensor:
        drawn = next(draws)
        if drawn.dim() == 4:
            drawn = patchify(drawn[0], network.layout.latent_patch_size)
        assert drawn.shape == (tokens, network.layout.latent_features)
        return drawn

    monkeypatch.setattr(pictures, "noise", recorded)


def assert_context(context: Context, recorded: dict[str, Tensor], prefix: str) -> None:
    """Keys and values of every layer equal the recording's, 1e-5 of the largest."""
    compared = 0
    for kind, found in ("key", context.keys), ("value", context.values):
        for layer, tensor in enumerate(found):
            wanted = recorded.get(f"{prefix}.{kind}.{layer}")
            if wanted is not None:
                assert_close(tensor, wanted, f"{prefix}.{kind}.{layer}")
                compared += 1
    assert compared


def assert_close(found: Tensor, wanted: Tensor, name: str, limit: float = 1e-5) -> None:
    assert found.shape == wanted.shape, name
    error = float((found - wanted).abs().max() / wanted.abs().max().clamp_min(1e-30))
    assert error <= limit, f"{name}: {error:.1e}"
