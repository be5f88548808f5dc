"""The one builder of `PackedBatch`: from pieces (texts and images) to the index tensors of a pack.

Guarantees: text ids, indexes, positions, splits, attention modes, labels, loss positions and weights, latent and ViT
position ids equal the original's (recordings). No file, random number or decoder is involved. A sample without tokens
is left out.

Shape legend: T tokens of the pack, N text tokens, P ViT patches, G latent tokens, F features of a latent token.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE, VIT
from bagel_ds.model.batch import CAUSAL, FULL, NOISE, PackedBatch, patchify
from bagel_ds.model_folder.tokenizer import SpecialTokens


@dataclass(frozen=True)
class Loaded:
    """A piece of a sample with its content.

    A TEXT is causal and gets bos and eos around its ids. A VIT image and a clean VAE image (`loss` False) are seen by
    all that follows; a VAE image with `loss` is noised, and only its own tokens see it. Only the size of a VAE image is
    read here, so a meta tensor will do where nothing encodes it. The frames of a video that share a split have
    `split_end` on the last one only and advance the position by `frame_delta`.
    """

    kind: str  # TEXT, VIT or VAE
    ids: Sequence[int] = ()  # text, without bos and eos
    image: Tensor | None = None  # uint8 [3, height, width], sides multiples of the patch
    loss: bool = False  # cross-entropy of a text, velocity of a VAE image
    dropped: bool = False  # no tokens; an image still advances the position by one
    special_label: int = -1  # token id that the end marker predicts; -1: none
    timestep: float = float("-inf")  # noised image: before the sigmoid; a split has that of its first frame
    noise: Tensor | None = None  # float32 [tokens, F]; None: zeros
    posterior_eps: Tensor | None = None  # float32 [tokens, F]; None: zeros
    split_end: bool = True
    frame_delta: int | None = None


def position_grid(height: int, width: int, patch: int, side: int, interpolate: bool = False) -> Tensor:
    """int64 [rows * columns]: place of every patch of an image in a side x side table, row * side + column.

    The grid lies in the table's top left corner, or, interpolated, is spread over all of it.
    """
    rows, columns = height // patch, width // patch
    row_ids, column_ids = torch.arange(rows), torch.arange(columns)
    if interpolate:
        boundaries = torch.arange(1 / side, 1.0, 1 / side)
        row_ids = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / rows), boundaries, right=True)
        column_ids = torch.bucketize(torch.arange(0, 1 - 1e-6, 1 / columns), boundaries, right=True)
    return (row_ids[:, None] * side + column_ids).flatten()


def length_weight(labels: int) -> float:
    """Weight of each of a text's labels with ce_loss_reweighting: 1 / sqrt(labels)."""
    return labels**-0.5 if labels else 0.0


def layout(
    samples: Sequence[Sequence[Loaded]],
    special: SpecialTokens,
    options: LayoutOptions = LayoutOptions(),
    names: Sequence[str] = (),
    skipped: Sequence[tuple[str, str]] = (),
    datasets: Sequence[str] = (),
    first_positions: Sequence[int] = (),
) -> PackedBatch:
    """The batch of `samples` laid end to end, on the CPU.

    `names`, `datasets` and `first_positions` (RoPE positions, behind a context; default 0) have one item per sample;
    `skipped` goes into the batch as it is.
    """
    pack = _Pack(special, options)
    firsts = first_positions or [0] * len(samples)
    kept = [i for i, (sample, first) in enumerate(zip(samples, firsts, strict=True)) if pack.add(sample, first)]
    return pack.batch(
        samples=tuple(names[number] for number in kept if names),
        datasets=tuple(datasets[number] for number in kept if datasets),
        skipped=tuple(skipped),
    )


@dataclass
class _Pack:
    """A pack being filled; `position` is the next RoPE position of the current sample."""

    special: SpecialTokens
    options: LayoutOptions
    length: int = 0
    position: int = 0
    split: int = 0
    timestep: float = float("-inf")
    sample_lens: list[int] = field(default_factory=list)
    split_lens: list[int] = field(default_factory=list)
    attn_modes: list[str] = field(default_factory=list)
    position_ids: list[int] = field(default_factory=list)
    text_ids: list[int] = field(default_factory=list)
    text_indexes: list[int] = field(default_factory=list)
    vit_patches: list[Tensor] = field(default_factory=list)
    vit_position_ids: list[Tensor] = field(default_factory=list)
    vit_indexes: list[Tensor] = field(default_factory=list)
    images: list[Tensor] = field(default_factory=list)
    latent_shapes: list[tuple[int, int]] = field(default_factory=list)
    latent_position_ids: list[Tensor] = field(default_factory=list)
    vae_indexes: list[Tensor] = field(default_factory=list)
    timesteps: list[Tensor] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    posterior_eps: list[Tensor] = field(default_factory=list)
    mse_loss_indexes: list[Tensor] = field(default_factory=list)
    ce_loss_indexes: list[int] = field(default_factory=list)
    ce_loss_weights: list[float] = field(default_factory=list)
    label_ids: list[int] = field(default_factory=list)

    def add(self, sample: Sequence[Loaded], first_position: int) -> bool:
        """Append a sample; False where it has no tokens."""
        start = self.length
        self.position, self.split = first_position, 0
        for entry in sample:
            if entry.dropped:
                # A dropped image leaves its position empty, a dropped text leaves nothing.
                self.position += entry.kind != TEXT
            elif entry.kind == TEXT:
                self._text(entry)
            elif entry.kind == VIT:
                self._vit_image(entry)
            else:
                assert entry.kind == VAE, entry.kind
                self._vae_image(entry)
            if entry.split_end and self.split:
                self.split_lens.append(self.split)
                self.split = 0
        assert not self.split, "the last entry of a sample must end its split"
        if self.length > start:
            self.sample_lens.append(self.length - start)
        return self.length > start

    def _text(self, entry: Loaded) -> None:
        ids = [self.special.bos, *entry.ids, self.special.eos]
        labelled = len(ids) - 1
        if entry.loss:
            self.ce_loss_indexes.extend(range(self.length, self.length + labelled))
            self.ce_loss_weights.extend([length_weight(labelled)] * labelled)
            self.label_ids.extend(ids[1:])
        if entry.special_label >= 0:
            self.ce_loss_indexes.append(self.length + labelled)
            self.ce_loss_weights.append(1.0)
            self.label_ids.append(entry.special_label)
        self.attn_modes.append(CAUSAL)
        self.text_ids.extend(ids)
        self.text_indexes.extend(range(self.length, self.length + len(ids)))
        self.position_ids.extend(range(self.position, self.position + len(ids)))
        self._advance(len(ids), len(ids))

    def _vit_image(self, entry: Loaded) -> None:
        assert entry.image is not None
        options = self.options
        patch, side = options.vit_patch_size, options.vit_max_num_patch_per_side
        height, width = entry.image.shape[1:]
        patches = patchify(entry.image, patch)
        self.vit_patches.append(patches)
        self.vit_position_ids.append(position_grid(height, width, patch, side, options.interpolate_pos))
        self.attn_modes.append(FULL)
        self.vit_indexes.append(self._framed(entry, len(patches)))
        self._advance(len(patches) + 2, 1)

    def _vae_image(self, entry: Loaded) -> None:
        assert entry.image is not None
        options = self.options
        height, width = entry.image.shape[1:]
        shape = (height // options.latent_stride, width // options.latent_stride)
        tokens = shape[0] * shape[1]
        self.images.append(entry.image.contiguous())
        self.latent_shapes.append(shape)
        self.latent_position_ids.append(
            position_grid(height, width, options.latent_stride, options.max_latent_size, options.interpolate_pos)
        )
        if not self.split:
            self.attn_modes.append(NOISE if entry.loss and entry.frame_delta is None else FULL)
            self.timestep = entry.timestep
        indexes = self._framed(entry, tokens)
        self.vae_indexes.append(indexes)
        if entry.loss:
            self.mse_loss_indexes.append(indexes)
        self.timesteps.append(torch.full((tokens,), self.timestep if entry.loss else float("-inf")))
        zeros = torch.zeros(tokens, options.latent_features)
        self.noise.append(zeros if entry.noise is None else entry.noise)
        self.posterior_eps.append(zeros if entry.posterior_eps is None else entry.posterior_eps)
        self._advance(tokens + 2, _image_step(entry))

    def _framed(self, entry: Loaded, tokens: int) -> Tensor:
        """Markers around `tokens` image tokens, which all share one position; returns their indexes."""
        end = self.length + tokens + 1
        self.text_ids.extend((self.special.start_of_image, self.special.end_of_image))
        self.text_indexes.extend((self.length, end))
        self.position_ids.extend([self.position] * (tokens + 2))
        if entry.special_label >= 0:
            self.ce_loss_indexes.append(end)
            self.ce_loss_weights.append(1.0)
            self.label_ids.append(entry.special_label)
        return torch.arange(self.length + 1, end)

    def _advance(self, tokens: int, positions: int) -> None:
        self.length += tokens
        self.split += tokens
        self.position += positions

    def batch(
        self, samples: tuple[str, ...], datasets: tuple[str, ...], skipped: tuple[tuple[str, str], ...]
    ) -> PackedBatch:
        options = self.options
        no_rows = torch.empty(0, dtype=torch.int64)
        no_latents = torch.empty(0, options.latent_features)
        no_patches = torch.empty(0, 3 * options.vit_patch_size**2, dtype=torch.uint8)
        return PackedBatch(
            sample_lens=tuple(self.sample_lens),
            split_lens=tuple(self.split_lens),
            attn_modes=tuple(self.attn_modes),
            position_ids=_int64(self.position_ids),
            text_ids=_int64(self.text_ids),
            text_indexes=_int64(self.text_indexes),
            vit_patches=torch.cat(self.vit_patches) if self.vit_patches else no_patches,
            vit_indexes=torch.cat([no_rows, *self.vit_indexes]),
            vit_position_ids=torch.cat([no_rows, *self.vit_position_ids]),
            vit_seqlens=tuple(len(patches) for patches in self.vit_patches),
            images=tuple(self.images),
            latent_shapes=tuple(self.latent_shapes),
            vae_indexes=torch.cat([no_rows, *self.vae_indexes]),
            latent_position_ids=torch.cat([no_rows, *self.latent_position_ids]),
            timesteps=torch.cat([torch.empty(0), *self.timesteps]),
            noise=torch.cat([no_latents, *self.noise]),
            posterior_eps=torch.cat([no_latents, *self.posterior_eps]),
            mse_loss_indexes=torch.cat([no_rows, *self.mse_loss_indexes]),
            ce_loss_indexes=_int64(self.ce_loss_indexes),
            label_ids=_int64(self.label_ids),
            ce_loss_weights=torch.tensor(self.ce_loss_weights, dtype=torch.float32),
            samples=samples,
            datasets=datasets,
            skipped=skipped,
        )


def _image_step(entry: Loaded) -> int:
    """How far a VAE image advances the position: a noised one not at all, what follows replaces it."""
    if entry.frame_delta is not None:
        return entry.frame_delta
    return 0 if entry.loss else 1


def _int64(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)
