"""The configuration of a BAGEL network.

Guarantees: a field means what the key of the same name means in llm_config.json or vit_config.json, or the original's
argument. `model_folder/folder.py` reads the files.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from bagel_ds.model.attention.backends import DEFAULT_BACKEND
from bagel_ds.model.shape.lora import LoRA
from bagel_ds.model.shape.quantization import Quantization

FREQUENCIES = 256  # width of the timestep embedding's sinusoid


@dataclass(frozen=True)
class LLMConfig:
    """Qwen2 with a mixture of transformers. Defaults are the released BAGEL-7B-MoT."""

    hidden_size: int = 3584
    intermediate_size: int = 18944
    num_hidden_layers: int = 28
    num_attention_heads: int = 28
    num_key_value_heads: int = 4
    vocab_size: int = 152064
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1e6
    qk_norm: bool = True
    tie_word_embeddings: bool = False

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads


@dataclass(frozen=True)
class ViTConfig:
    """SigLIP NaViT. `num_layers` counts the layers built: the file's num_hidden_layers + 1 + vit_select_layer."""

    hidden_size: int = 1152
    intermediate_size: int = 4304
    num_layers: int = 26
    num_attention_heads: int = 16
    patch_size: int = 14
    num_channels: int = 3
    max_patches_per_side: int = 70
    layer_norm_eps: float = 1e-6


@dataclass(frozen=True)
class VAEConfig:
    """FLUX autoencoder. `downsample` is pixels per latent cell and side."""

    channels: int = 128
    channel_multipliers: tuple[int, ...] = (1, 2, 4, 4)
    res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float = 0.3611
    shift_factor: float = 0.1159

    @property
    def downsample(self) -> int:
        return 2 ** (len(self.channel_multipliers) - 1)


@dataclass(frozen=True)
class BagelConfig:
    """The whole network; those from `visual_gen` to `fused_kernels` change the computation,
    not the tensors."""

    llm: LLMConfig = LLMConfig()
    vit: ViTConfig = ViTConfig()
    z_channels: int = 16
    latent_patch_size: int = 2
    max_latent_size: int = 64
    connector_act: str = "gelu_pytorch_tanh"
    visual_gen: bool = True
    visual_und: bool = True
    timestep_shift: float = 1.0
    freeze_und: bool = False
    attention: str = DEFAULT_BACKEND  # a name of BACKENDS in model/attention/backends.py; the result is the same
    vit_attention: str = DEFAULT_BACKEND  # likewise
    fused_kernels: bool = False  # of norms, rotations and SwiGLU (model/pointwise); the result is the same
    lora: LoRA | None = None

    def unquantized(self) -> BagelConfig:
        """This network with whole weights where it has codes of 4 or 8 bits: as model files hold it."""
        return self if self.lora is None else replace(self, lora=replace(self.lora, base_precision=None))

    @property
    def quantization(self) -> Quantization | None:
        """How the decoder's linear layers keep their weights, if not whole."""
        return None if self.lora is None else self.lora.quantization

    @property
    def latent_features(self) -> int:
        """Features of one latent token: 64."""
        return self.z_channels * self.latent_patch_size**2
