"""The FLUX autoencoder of a model folder: its sizes from the tensors' shapes, its weights checked and loaded.

Guarantees: a file that is not a whole autoencoder, or holds a value that is not finite, is one message before training.
"""

from __future__ import annotations

from pathlib import Path

import torch

from bagel_ds.errors import UserError
from bagel_ds.model.shape.config import VAEConfig
from bagel_ds.model.vae import AutoEncoder
from bagel_ds.model_folder.finite import CheckedWeights
from bagel_ds.model_folder.tensor_files import TensorFiles
from bagel_ds.model_folder.weights import check_tensors


def load_vae(path: Path, decodes: bool = True) -> AutoEncoder:
    """As `ModelFolder.load_vae`. The file must hold a whole autoencoder even if only the encoder is needed."""
    files = TensorFiles([path])
    config = vae_config(files, path)
    with torch.device("meta"):
        whole = AutoEncoder(config)
    expected = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    check_tensors(files, expected, str(path))
    vae = AutoEncoder(config, decodes)
    weights = CheckedWeights(files, str(path))
    needed = {name for name, _ in vae.named_parameters()}
    state = {}
    for name, shape in expected.items():
        values = weights.read(name)  # checks the decoder too, because the file goes into every checkpoint
        if name in needed:
            state[name] = values.reshape(shape).float()
    weights.check()
    vae.load_state_dict(state)
    return vae.requires_grad_(False).eval()


def vae_config(files: TensorFiles, path: Path) -> VAEConfig:
    """Channel counts and depths of an autoencoder file (the released one: 128, (1, 2, 4, 4), 2 blocks, 16)."""

    def outputs(name: str, inputs: bool = False) -> int:
        shape = files.info(name).shape if name in files else ()
        if len(shape) != 4 or 0 in shape:
            found = f"has shape {list(shape)}, expected 4 dimensions" if name in files else "is missing"
            raise UserError(f"{path} is not the FLUX autoencoder: tensor {name} {found}.")
        return shape[1 if inputs else 0]

    channels = outputs("encoder.conv_in.weight")
    latents = outputs("decoder.conv_in.weight", inputs=True)
    multipliers: list[int] = []
    while (name := f"encoder.down.{len(multipliers)}.block.0.conv1.weight") in files:
        multipliers.append(outputs(name) // channels)
    blocks = 0
    while f"encoder.down.0.block.{blocks}.conv1.weight" in files:
        blocks += 1
    if not multipliers or 0 in multipliers:
        raise UserError(
            f"{path} is not the FLUX autoencoder: its encoder has no levels, or levels narrower than its input."
        )
    return VAEConfig(
        channels=channels,
        channel_multipliers=tuple(multipliers),
        res_blocks=blocks,
        z_channels=latents,
    )
