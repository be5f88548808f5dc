"""The original's way of making packs, for comparison only (written for this benchmark).

What it does that ours does not: row groups become columns of python objects, all rows of them (with numpy, which is
quicker than the pandas frames it stands for); pixels are normalised to float32 in the worker; the images of a pack are
padded to a common size; each sample gets a dense float mask. What it leaves to the device and ours does not: drawing
the noise and the VAE posterior's eps.
"""

from __future__ import annotations

import io
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import IterableDataset

from bagel_ds.data.batches.layout import position_grid
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.model_folder.tokenizer import Tokenizer

VAE, VIT_EDIT, VIT_VLM = (
    ImageTransform(16, 1024, 512),
    ImageTransform(14, 518, 224),
    ImageTransform(14, 980, 378, 2_007_040),
)


class Piece(NamedTuple):
    """A part of a sample: text ids, or an image of float32 [3, height, width] for the ViT or the VAE."""

    kind: str
    content: Any
    loss: bool = False


def to_tensor(image: Image.Image, transform: ImageTransform) -> Tensor:
    """What torchvision's Resize, ToTensor and Normalize(0.5, 0.5) do to a PIL image."""
    size = transform.size(*image.size)
    image = image.resize(size, Image.Resampling.BICUBIC)
    pixels = torch.from_numpy(np.array(image, copy=True)).permute(2, 0, 1).contiguous().to(torch.float32).div(255)
    return pixels.sub_(0.5).div_(0.5)


def rgb(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def t2i_sample(row: Any, tokenizer: Tokenizer) -> list[Piece]:
    captions = list(json.loads(row["captions"]).values())
    caption = tokenizer.encode(random.choice(captions))
    return [Piece("text", caption), Piece("vae", to_tensor(rgb(row["image"]), VAE), True)]


def edit_sample(row: Any, tokenizer: Tokenizer) -> list[Piece]:
    before, after = (rgb(content) for content in row["image_list"])
    instruction = tokenizer.encode(random.choice(list(row["instruction_list"][0])))
    start = [Piece("vae", to_tensor(before, VAE)), Piece("vit", to_tensor(before, VIT_EDIT))]
    return [*start, Piece("text", instruction), Piece("vae", to_tensor(after, VAE), True)]


def vlm_sample(line: str, folder: Path, tokenizer: Tokenizer) -> list[Piece]:
    row = json.loads(line)
    image = to_tensor(Image.open(folder / row["image"]).convert("RGB"), VIT_VLM)
    pieces = [Piece("vit", image)]
    for turn in row["conversations"]:
        text = tokenizer.encode(turn["value"].replace("<image>", "").strip())
        pieces.append(Piece("text", text, turn["from"] == "gpt"))
    return pieces


def parquet_samples(path: Path, wanted: set[int], make: Any, tokenizer: Tokenizer) -> Iterator[list[Piece]]:
    """Samples of the rows (numbered through the file) in `wanted`, in file order."""
    file, number = pq.ParquetFile(path), 0
    for group in range(file.num_row_groups):
        table = file.read_row_group(group)
        columns = {name: table.column(name).to_numpy(zero_copy_only=False) for name in table.column_names}
        for row in range(table.num_rows):
            if number in wanted:
                yield make({name: values[row] for name, values in columns.items()}, tokenizer)
            number += 1


class OriginalPacks(IterableDataset[dict[str, Any]]):
    """The same samples as our plan uses, greedily packed."""

    def __init__(
        self, folder: Path, wanted: dict[str, set[int]], tokenizer: Tokenizer, expected: int, most: int, masks: bool
    ) -> None:
        self._folder, self._wanted, self._tokenizer = folder, wanted, tokenizer
        self._expected, self._most, self._masks = expected, most, masks

    def __iter__(self) -> Iterator[dict[str, Any]]:
        torch.set_num_threads(1)
        waiting: list[list[Piece]] = []
        length = 0
        for sample in self._samples():
            tokens = sum(_tokens(piece) for piece in sample)
            if waiting and length + tokens > self._most:
                yield self._pack(waiting)
                waiting, length = [], 0
            waiting.append(sample)
            length += tokens
            if length >= self._expected:
                yield self._pack(waiting)
                waiting, length = [], 0
        if waiting:
            yield self._pack(waiting)

    def _samples(self) -> Iterator[list[Piece]]:
        """The groups in turns, as equal weights make them."""
        folder, tokenizer = self._folder, self._tokenizer
        lines = (folder / "vlm" / "data.jsonl").read_text().splitlines()
        groups = [
            parquet_samples(folder / "t2i" / "a.parquet", self._wanted["t2i"], t2i_sample, tokenizer),
            parquet_samples(folder / "edit" / "a.parquet", self._wanted["edit"], edit_sample, tokenizer),
            (vlm_sample(lines[i], folder / "vlm" / "images", tokenizer) for i in sorted(self._wanted["vlm"])),
        ]
        while groups:
            for group in list(groups):
                sample = next(group, None)
                if sample is None:
                    groups.remove(group)
                else:
                    yield sample

    def _pack(self, samples: list[list[Piece]]) -> dict[str, Any]:
        """Tensors of a pack; indexes as the model wants them."""
        text_ids: list[int] = []
        text_indexes: list[int] = []
        position_ids: list[int] = []
        vit, vit_positions, vae, latents, timesteps, indexes, masks, lengths = [], [], [], [], [], [], [], []
        place = 0
        for sample in samples:
            splits, modes, position = [], [], 0
            for piece in sample:
                tokens = _tokens(piece)
                splits.append(tokens)
                if piece.kind == "text":
                    text_ids += [0, *piece.content, 1]
                    text_indexes += range(place, place + tokens)
                    position_ids += range(position, position + tokens)
                    position += tokens
                    modes.append("causal")
                else:
                    text_ids += [2, 3]
                    text_indexes += [place, place + tokens - 1]
                    position_ids += [position] * tokens
                    indexes += range(place + 1, place + tokens - 1)
                    modes.append("noise" if piece.loss else "full")
                    position += 0 if piece.loss else 1
                    height, width = piece.content.shape[1:]
                    if piece.kind == "vit":
                        vit.append(_patchify(piece.content, 14))
                        vit_positions.append(position_grid(height, width, 14, 70))
                    else:
                        vae.append(piece.content)
                        latents.append(position_grid(height, width, 16, 64))
                        time = np.random.randn() if piece.loss else float("-inf")
                        timesteps += [time] * (tokens - 2)
                place += tokens
            lengths.append(sum(splits))
            if self._masks:
                masks.append(_dense_mask(splits, modes))
        padded = torch.zeros(len(vae), 3, *(max([x.shape[side] for x in vae], default=0) for side in (1, 2)))
        for i, image in enumerate(vae):
            padded[i, :, : image.shape[1], : image.shape[2]] = image
        return {
            "sample_lens": lengths,
            "text_ids": torch.tensor(text_ids),
            "text_indexes": torch.tensor(text_indexes),
            "position_ids": torch.tensor(position_ids),
            "image_indexes": torch.tensor(indexes),
            "vit_tokens": torch.cat(vit) if vit else torch.zeros(0, 588),
            "vit_position_ids": torch.cat(vit_positions) if vit else torch.zeros(0),
            "padded_images": padded,
            "latent_position_ids": torch.cat(latents) if latents else torch.zeros(0),
            "timesteps": torch.tensor(timesteps),
            "masks": masks,
        }


def _tokens(piece: Piece) -> int:
    if piece.kind == "text":
        return len(piece.content) + 2
    stride = 14 if piece.kind == "vit" else 16
    return (piece.content.shape[1] // stride) * (piece.content.shape[2] // stride) + 2


def _patchify(image: Tensor, patch: int) -> Tensor:
    channels, height, width = image.shape
    grid = image.reshape(channels, height // patch, patch, width // patch, patch)
    return torch.einsum("chpwq->hwpqc", grid).reshape(-1, patch * patch * channels)


def _dense_mask(splits: list[int], modes: list[str]) -> Tensor:
    """float32 [n, n]: 0 where a query sees a key, -inf elsewhere."""
    total = sum(splits)
    sees = torch.zeros(total, total, dtype=torch.bool)
    start = 0
    for length, mode in zip(splits, modes, strict=True):
        own = torch.ones(length, length)
        sees[start : start + length, start : start + length] = own.tril() if mode == "causal" else own
        sees[start : start + length, :start] = 1
        start += length
    start = 0
    for length, mode in zip(splits, modes, strict=True):
        if mode == "noise":
            sees[:, start : start + length] = 0
            sees[start : start + length, start : start + length] = 1
        start += length
    return torch.zeros_like(sees, dtype=torch.float).masked_fill_(~sees, float("-inf"))
