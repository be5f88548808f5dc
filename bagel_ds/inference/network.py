"""Calls of the network that reads and predicts: sequences with a KV cache each, many in one call.

Guarantees: the layers and the mask rule are training's; a call leaves the contexts it was given as they were, so a
snapshot of a context is the context itself. What a sequence gets depends on its own tokens only.

Shape legend: K key/value heads, D head dim, F features of a latent token, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from bagel_ds.data.batches.layout import Loaded, layout
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import TEXT
from bagel_ds.inference.adapters import Adapters
from bagel_ds.inference.cache import KeyValueCache
from bagel_ds.model.bagel import Prediction
from bagel_ds.model.batch import CAUSAL, PackedBatch
from bagel_ds.model.mot import LayerCache
from bagel_ds.model.shape.config import BagelConfig
from bagel_ds.model.vae import AutoEncoder, encode_batch
from bagel_ds.model_folder.tokenizer import Tokenizer


class Predictor(Protocol):
    """What inference needs of a network: a `Bagel`, or what stands for one (`joint_calls.py`)."""

    config: BagelConfig

    @property
    def dtype(self) -> torch.dtype: ...

    def __call__(
        self, batch: PackedBatch, latents_GF: Tensor, t_G: Tensor, caches: Sequence[LayerCache], cached: Sequence[int]
    ) -> Prediction: ...

    def velocity_of(self, last_MC: Tensor) -> Tensor: ...


@dataclass(frozen=True)
class Context:
    """What one sequence has read: keys and values [length, K, D] of each layer, and its next RoPE position."""

    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    position: int

    @property
    def length(self) -> int:
        return len(self.keys[0])


@dataclass(frozen=True)
class Network:
    """The network with all it takes to turn texts and images into its input. `vae` None: it can't see edits or draw."""

    model: Predictor
    vae: AutoEncoder | None
    tokenizer: Tokenizer
    layout: LayoutOptions
    vae_transform: ImageTransform
    vit_transform: ImageTransform
    device: torch.device
    adapters: Adapters = field(default_factory=Adapters)  # those that `model` adds

    @property
    def empty(self) -> Context:
        """The context of a sequence that has read nothing."""
        llm = self.model.config.llm
        none = torch.zeros(0, llm.num_key_value_heads, llm.head_dim, dtype=self.model.dtype, device=self.device)
        return Context((none,) * llm.num_hidden_layers, (none,) * llm.num_hidden_layers, 0)

    def read(self, contexts: Sequence[Context], entries: Sequence[Sequence[Loaded]]) -> list[Context]:
        """Each context after its texts and clean images, all in one call; a context without entries stays as it is."""
        reading = [number for number, own in enumerate(entries) if own]
        if not reading:
            return list(contexts)
        batch = self.laid_out([entries[number] for number in reading], [contexts[number] for number in reading])
        _, read = self.predict(batch, [contexts[number] for number in reading], self._latents(batch))
        after = list(contexts)
        for number, context in zip(reading, read):
            after[number] = replace(context, position=contexts[number].position + _positions(entries[number]))
        return after

    def read_tokens(self, contexts: Sequence[Context], ids: Sequence[int]) -> tuple[Tensor, list[Context]]:
        """One more token of each sequence: logits of the next, [sequences, V] fp32, and the contexts after it."""
        numbers = torch.arange(len(ids))
        batch = replace(
            layout([], self.tokenizer.special, self.layout),
            sample_lens=(1,) * len(ids),
            split_lens=(1,) * len(ids),
            attn_modes=(CAUSAL,) * len(ids),
            position_ids=torch.tensor([context.position for context in contexts], dtype=torch.int64),
            text_ids=torch.tensor(ids, dtype=torch.int64),
            text_indexes=numbers,
            ce_loss_indexes=numbers,
        ).to(self.device)
        prediction, after = self.predict(batch, contexts, self._latents(batch))
        return prediction.logits, [replace(context, position=context.position + 1) for context in after]

    def predict(
        self, batch: PackedBatch, contexts: Sequence[Context], latents_GF: Tensor, t_G: Tensor | None = None
    ) -> tuple[Prediction, list[Context]]:
        """One call: samples of `batch` continue `contexts`. Latents at flow time `t_G`, without it clean ones."""
        layers = range(self.model.config.llm.num_hidden_layers)
        caches = [
            KeyValueCache([c.keys[layer] for c in contexts], [c.values[layer] for c in contexts], batch.sample_lens)
            for layer in layers
        ]
        t_G = torch.zeros(len(latents_GF), device=self.device) if t_G is None else t_G
        with torch.no_grad():
            prediction = self.model(batch, latents_GF, t_G, caches, [context.length for context in contexts])
        keys, values = zip(*((cache.keys, cache.values) for cache in caches))
        after = [
            Context(own_keys, own_values, context.position)
            for own_keys, own_values, context in zip(zip(*keys), zip(*values), contexts)
        ]
        return prediction, after

    def laid_out(self, entries: Sequence[Sequence[Loaded]], contexts: Sequence[Context]) -> PackedBatch:
        """The batch of these samples on the device, each at the position where its context stands."""
        firsts = [context.position for context in contexts]
        return layout(entries, self.tokenizer.special, self.layout, first_positions=firsts).to(self.device)

    @property
    def in_bf16(self) -> bool:
        """Whether the network's weights are bf16; the autoencoder computes in the same precision, as in training."""
        return self.model.dtype == torch.bfloat16

    def _latents(self, batch: PackedBatch) -> Tensor:
        """Clean latent tokens of the batch's images."""
        if not batch.images:
            return batch.posterior_eps
        assert self.vae is not None, "an image to edit needs the autoencoder"
        return encode_batch(self.vae, batch, self.model.config.latent_patch_size, self.in_bf16)


def _positions(entries: Sequence[Loaded]) -> int:
    """RoPE positions that entries take: of a text its tokens and two markers, of an image one."""
    return sum(len(entry.ids) + 2 if entry.kind == TEXT else 1 for entry in entries)
