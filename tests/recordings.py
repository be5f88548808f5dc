"""Reads the recordings of the original: finds the folder, turns what it holds into our types.

Tests that need it take `reference()`, which skips with a reason where BAGEL_REFERENCE_DIR is unset. Nothing here knows
how many cases there are or how large: everything is read from the folder.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from bagel_ds.model.bagel import Bagel
from bagel_ds.model.batch import PackedBatch, patchify
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model_folder.folder import ModelFolder
from bagel_ds.model_folder.weights import BagelWeights

UNSET = "BAGEL_REFERENCE_DIR is unset: the recordings of the original are not at hand"


def reference_folder() -> Path | None:
    name = os.environ.get("BAGEL_REFERENCE_DIR")
    return Path(name).resolve() if name else None


def cases(pattern: str, needs_json: bool = True) -> list[Any]:
    """Parameters for `parametrize`: stems of the recordings matching `pattern`, or one that skips with a reason."""
    folder = reference_folder()
    if folder is None:
        return [pytest.param("unset", marks=pytest.mark.skip(reason=UNSET))]
    stems = sorted(str(path.relative_to(folder).with_suffix("")) for path in folder.glob(pattern))
    stems = [stem for stem in stems if not needs_json or (folder / f"{stem}.json").exists()]
    assert stems, f"{folder} holds no {pattern}"
    return stems


def reference() -> Path:
    folder = reference_folder()
    if folder is None:
        pytest.skip(UNSET)
    return folder


def read_json(stem: str) -> Any:
    return json.loads((reference() / f"{stem}.json").read_text())


def tensors(stem: str) -> dict[str, Tensor]:
    return load_file(reference() / f"{stem}.safetensors")


def bagel_config(folder: Path, **changes: Any) -> BagelConfig:
    """The network of a model folder, with `changes` to BagelConfig."""
    model = ModelFolder(folder)
    files = model.open_weights(prefer_ema=True)
    side = round(files.info("latent_pos_embed.pos_embed").shape[0] ** 0.5)
    return BagelConfig(llm=model.llm_config(), vit=model.vit_config(), max_latent_size=side, **changes)


def weights_of(folder: Path, config: BagelConfig) -> BagelWeights:
    with torch.device("meta"):
        shapes = {name: tuple(p.shape) for name, p in Bagel(config).named_parameters()}
    return BagelWeights(ModelFolder(folder).open_weights(prefer_ema=True), shapes, True, str(folder))


def loaded_model(folder: Path, **changes: Any) -> Bagel:
    """The recorded network in fp32, outside DeepSpeed."""
    config = bagel_config(folder, **changes)
    model, weights = Bagel(config), weights_of(folder, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(weights.read(name).reshape(parameter.shape))
    return model


def latent_tokens(recorded: dict[str, Tensor], shapes: list[tuple[int, int]], config: BagelConfig) -> Tensor:
    """`padded_latent` as the tokens the network reads: each image's own corner, patchified."""
    patch = config.latent_patch_size
    if not shapes:
        return torch.zeros(0, config.latent_features)
    padded = recorded["in.padded_latent"]
    own = [latent[:, : rows * patch, : columns * patch] for latent, (rows, columns) in zip(padded, shapes)]
    return torch.cat([patchify(latent, patch) for latent in own])


def recorded_batch(
    recorded: dict[str, Tensor], info: dict[str, Any], config: BagelConfig, noise: Tensor | None = None
) -> tuple[PackedBatch, Tensor]:
    """A batch of forward/ or train/ and its clean latent tokens. `noise` where it is recorded apart."""

    def get(name: str, width: int | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
        empty = torch.zeros((0,) if width is None else (0, width), dtype=dtype)
        return recorded.get(f"in.{name}", empty)

    shapes = [(rows, columns) for rows, columns in info.get("patchified_vae_latent_shapes") or []]
    features = config.latent_features
    latents = latent_tokens(recorded, shapes, config)
    noise = noise if noise is not None else get("noise", features, torch.float32)
    patch_width = config.vit.num_channels * config.vit.patch_size**2
    batch = PackedBatch(
        sample_lens=tuple(info["sample_lens"]),
        split_lens=tuple(info["split_lens"]),
        attn_modes=tuple(info["attn_modes"]),
        position_ids=get("packed_position_ids"),
        text_ids=get("packed_text_ids"),
        text_indexes=get("packed_text_indexes"),
        vit_patches=get("packed_vit_tokens", patch_width, torch.float32),
        vit_indexes=get("packed_vit_token_indexes"),
        vit_position_ids=get("packed_vit_position_ids"),
        vit_seqlens=tuple(get("vit_token_seqlens").tolist()),
        images=(),
        latent_shapes=tuple(shapes),
        vae_indexes=get("packed_vae_token_indexes"),
        latent_position_ids=get("packed_latent_position_ids"),
        timesteps=get("packed_timesteps", dtype=torch.float32),
        noise=noise,
        posterior_eps=torch.zeros(len(latents), features),
        mse_loss_indexes=get("mse_loss_indexes"),
        ce_loss_indexes=get("ce_loss_indexes"),
        label_ids=get("packed_label_ids"),
        ce_loss_weights=get("ce_loss_weights", dtype=torch.float32),
    )
    return batch, latents


def relative(found: Tensor, recorded: Tensor) -> float:
    """max |found - recorded| / max |recorded|."""
    assert found.shape == recorded.shape, (found.shape, recorded.shape)
    return float((found.detach() - recorded).abs().max() / recorded.abs().max().clamp_min(1e-30))
