"""From a model folder to an `Inferencer`.

Guarantees: every tensor of the network comes from the folder, one at a time, straight to its device and precision. A
missing, misshapen, unknown or non-finite one is an error. A folder without the generating parts still answers
questions, and says why it can't draw. The log says which of the two weight files was taken, and why.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from bagel_ds.checkpoint.step_folders import meant_checkpoint
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.errors import UserError
from bagel_ds.inference.adapters import Adapters
from bagel_ds.inference.generation import Inferencer
from bagel_ds.inference.network import Network
from bagel_ds.inference.placement import gpu_limit, place_weights
from bagel_ds.inference.streaming import StreamedLayers
from bagel_ds.inputs.network import open_tokenizer
from bagel_ds.lora.base import base_files
from bagel_ds.lora.peft_files import holds_adapter
from bagel_ds.machine.device import device_type
from bagel_ds.model.attention.backends import CHOICES
from bagel_ds.model.attention.choice import Place, choose_attention
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.shape.parts import GENERATION, part_of
from bagel_ds.model.vae import AutoEncoder
from bagel_ds.model_folder.average import average_or_weights
from bagel_ds.model_folder.finite import CheckedWeights
from bagel_ds.model_folder.folder import VAE, ModelFolder
from bagel_ds.model_folder.tensor_files import TensorFiles
from bagel_ds.model_folder.weights import BagelWeights, latent_side
from bagel_ds.ranges import WeightSource
from bagel_ds.units import GIB

logger = logging.getLogger("bagel_ds")

# The original app's, for folders that don't say theirs; smaller position tables get what these allow.
VAE_SIZES, VIT_SIZES = (1024, 512), (980, 224)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class ImageTransforms(NamedTuple):
    """Of an image to read: for the autoencoder, whose picture the ViT then gets in its own size."""

    vae: ImageTransform
    vit: ImageTransform


def open_inferencer(
    path: str | Path,
    device: str | None = None,
    precision: str | None = None,
    weights: str | None = None,
    max_gpu_memory: float | str | None = None,
    lora: Sequence[str | Path] = (),
    attn: str = "auto",
) -> Inferencer:
    """The model of a folder, ready.

    `device`: cpu, cuda or cuda:N. `precision`: bf16 or fp32 (default: bf16 on a GPU, fp32 on a CPU). `weights`: ema or
    model; by default the EMA, unless the folder's record says that it is too young. `max_gpu_memory`: GiB, or text
    such as 24GiB; layers that don't fit are streamed from host memory. `lora`: adapters as [NAME=]FOLDER[:WEIGHT],
    added beside the weights; a request's own `lora` chooses among them by name. `attn`: auto, flash, flex or sdpa, as
    `--attn` of a run. Raises `UserError` for a folder that is
    missing, incomplete or not a BAGEL model, and for a limit that is too small.
    """
    folder = ModelFolder(meant_checkpoint(Path(path)))
    place = torch_device(device)
    if precision not in (None, *DTYPES):
        raise UserError(f"precision {precision!r}: expected bf16 or fp32")
    if attn not in CHOICES:
        raise UserError(f"attn {attn!r}: expected one of {', '.join(CHOICES)}")
    dtype = DTYPES[precision or ("bf16" if place.type == "cuda" else "fp32")]
    limit = None if max_gpu_memory is None else gpu_limit(max_gpu_memory)
    if limit is not None and place.type != "cuda":
        logger.info("max_gpu_memory has no effect on %s", place)
    adapters = Adapters(lora)
    if holds_adapter(folder.path):
        raise UserError(f"{path} is an adapter: pass it as lora (--lora), and its base model as model_path")
    files = _base_files(folder, adapters, weights) if lora else _weight_files(folder, weights)
    vae = folder.load_vae().to(place) if (folder.path / VAE).exists() else None
    generates = any(part_of(name) in GENERATION for name in files.names)
    config = BagelConfig(
        llm=folder.llm_config(),
        vit=folder.vit_config(),
        max_latent_size=latent_side(files) or BagelConfig().max_latent_size,
        z_channels=vae.config.z_channels if vae is not None else BagelConfig().z_channels,
        visual_gen=generates,
    )
    config, line = choose_attention(config, attn, Place(place, dtype, trains=False))
    logger.info(line)
    vae_bytes = sum(parameter.nbytes for parameter in vae.parameters()) if vae is not None else 0
    beside = vae_bytes + adapters.nbytes(dtype)
    placement = place_weights(config, dtype.itemsize, limit if place.type == "cuda" else None, beside)
    model = load_bagel(config, files, str(folder.path), place, dtype, placement.streamed, adapters)
    if placement.streamed:
        logger.info(
            "%d of %d layers are streamed from host memory: %.1f GiB of weights on the GPU, %.1f GiB over PCIe in each "
            "call of the network",
            len(placement.streamed),
            config.llm.num_hidden_layers,
            placement.gpu_bytes / GIB,
            placement.bytes_per_pass / GIB,
        )
    tokenizer = open_tokenizer(folder.path, config)
    options = LayoutOptions(
        vit_patch_size=config.vit.patch_size,
        latent_patch_size=config.latent_patch_size,
        vae_downsample=vae.config.downsample if vae is not None else LayoutOptions.vae_downsample,
        max_latent_size=config.max_latent_size,
        vit_max_num_patch_per_side=config.vit.max_patches_per_side,
        latent_channels=config.z_channels,
    )
    transforms = image_transforms(options, folder)
    network = Network(model, vae, tokenizer, options, transforms.vae, transforms.vit, place, adapters)
    return Inferencer(network, _lacks(folder, generates, vae))


def image_transforms(options: LayoutOptions, folder: ModelFolder | None) -> ImageTransforms:
    """The rules by which images to read are resized: to the sizes that the folder names, else the original's."""
    vae_named, vit_named = (folder and folder.image_sizes(kind) for kind in ("vae", "vit"))
    vae_most = options.max_latent_size * options.latent_stride
    vit_most = options.vit_max_num_patch_per_side * options.vit_patch_size
    vae_sizes = [min(size, vae_most) for size in vae_named or VAE_SIZES]
    vit_sizes = [min(size, vit_most) for size in vit_named or VIT_SIZES]
    return ImageTransforms(
        ImageTransform(options.latent_stride, *vae_sizes), ImageTransform(options.vit_patch_size, *vit_sizes)
    )


def parameter_shapes(config: BagelConfig) -> dict[str, tuple[int, ...]]:
    """By name, of the parameters that a network of this config uses for inference."""
    with torch.device("meta"):
        shapes = {name: tuple(parameter.shape) for name, parameter in Bagel(config).named_parameters()}
    return {name: shape for name, shape in shapes.items() if config.visual_gen or part_of(name) not in GENERATION}


def load_bagel(
    config: BagelConfig,
    files: TensorFiles,
    where: str,
    device: torch.device,
    dtype: torch.dtype,
    streamed: Sequence[int] = (),
    adapters: Adapters | None = None,
) -> Bagel:
    """The network with the weights of `files`; decoder layers in `streamed` stay in host memory and visit `device`.

    Without `visual_gen` the generating parts of `files` are not used and get no memory. `adapters` are attached.
    """
    shapes = parameter_shapes(config)
    weights = BagelWeights(files, shapes, False, where)
    unexpected = [name for name in weights.unexpected if config.visual_gen or part_of(name) not in GENERATION]
    if unexpected:
        named = ", ".join(unexpected[:5]) + (", ..." if unexpected[5:] else "")
        raise UserError(
            f"{where} holds {len(unexpected)} tensors that this network does not have ({named}); they would be "
            "left out. Merge adapters first."
        )
    if adapters is not None:
        adapters.check_fits(config, shapes)  # before what takes minutes
    checked = CheckedWeights(weights, where)
    model = place_bagel(config, shapes, checked, device, dtype, streamed)
    checked.check()
    if adapters is not None:
        adapters.attach(model, device, dtype)
    return model


def place_bagel(
    config: BagelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    weights: WeightSource,
    device: torch.device,
    dtype: torch.dtype,
    streamed: Sequence[int] = (),
) -> Bagel:
    """The network with the parameters named in `shapes`, read one at a time; `streamed` as in `load_bagel`."""
    with torch.device("meta"):
        model = Bagel(config)
    on_host = tuple(f"language_model.model.layers.{number}." for number in streamed)
    for name, shape in shapes.items():
        goes_to = torch.device("cpu") if name.startswith(on_host) else device
        value = weights.read(name).reshape(shape).to(goes_to, dtype)
        owner, _, own = name.rpartition(".")
        setattr(model.get_submodule(owner), own, torch.nn.Parameter(value, requires_grad=False))
    if streamed:
        StreamedLayers([model.language_model.model.layers[number] for number in streamed], device)
    return model.eval()


def _base_files(folder: ModelFolder, adapters: Adapters, weights: str | None) -> TensorFiles:
    """The weights that the adapters were trained on."""
    if weights is not None:
        raise UserError("weights: the adapter says which of the base model's files it belongs to; leave it out")
    return base_files(folder.path, list(adapters.folders.values()))


def _weight_files(folder: ModelFolder, weights: str | None) -> TensorFiles:
    """The files of the average or of the weights, as asked for or as the folder's record suggests."""
    if weights is None:
        choice = average_or_weights(folder.path)
        logger.info("%s: loading %s.safetensors (%s)", folder.path, choice.stem, choice.why)
        return TensorFiles(folder.weight_files(choice.stem))
    if weights not in ("ema", "model"):
        raise UserError(f"weights {weights!r}: expected ema or model")
    found = folder.weight_files(weights)
    if not found:
        raise UserError(f"{folder.path} holds no {weights}.safetensors; leave out weights to take what is there.")
    return TensorFiles(found)


def _lacks(folder: ModelFolder, generates: bool, vae: AutoEncoder | None) -> str | None:
    """Why the folder's model can't draw; None where it can."""
    if not generates:
        return f"{folder.path} holds no weights that generate images (*_moe_gen, vae2llm, llm2vae, time_embedder)"
    if vae is None:
        return f"{folder.path / VAE} does not exist"
    return None


def torch_device(name: str | None) -> torch.device:
    """The device of that name, or the default one. Raises `UserError`."""
    kind = device_type() if name is None else name
    try:
        device = torch.device(kind)
    except RuntimeError:
        raise UserError(f"device {name!r}: expected cpu, cuda or cuda:N") from None
    if device.type == "cuda" and device_type() != "cuda":
        raise UserError(f"device {name}: this machine has no GPU that torch can use; pass cpu")
    return device
