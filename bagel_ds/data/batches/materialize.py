"""A planned pack -> PackedBatch: read, decode, resize, tokenize, draw noise, lay out.

Guarantees: a sample's tensors depend on its plan and the seed alone, never on what shares its pack, on rank, worker or
pack position. A sample that can no longer be read is left out and reported in `PackedBatch.skipped`; the others stay as
they are. A batch of which nothing is left has zero tokens and no samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from PIL import Image
from torch import Tensor

from bagel_ds.data.batches.layout import Loaded, layout
from bagel_ds.data.formats.record import reason_of
from bagel_ds.data.formats.source import ParsedRow
from bagel_ds.data.samples.draws import normals
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.images import ImageTransform, decode_rgb, resize_to_uint8
from bagel_ds.data.samples.sample import TEXT, VAE, BadRow, Entry, SamplePlan
from bagel_ds.data.samples.video import Video, decode_frames
from bagel_ds.data.streams.reader import RowAddress, StreamReader
from bagel_ds.data.streams.stream import GroupStream
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model_folder.tokenizer import Tokenizer

__all__ = ["BatchMaker", "LayoutOptions", "PackTask", "dataset_labels", "materialize"]


def dataset_labels(streams: Sequence[GroupStream]) -> dict[tuple[int, str], str]:
    """The name of each (group, dataset) in messages and metrics: with its group's where two groups have the dataset."""
    names = Counter(dataset for stream in streams for dataset in stream.datasets)
    return {
        (number, dataset): dataset if names[dataset] == 1 else f"{stream.name}.{dataset}"
        for number, stream in enumerate(streams)
        for dataset in stream.datasets
    }


class PackTask(NamedTuple):
    """A pack's plan, where its rows lie, and (group, address) of rows that the same process reads later, in order."""

    plans: tuple[SamplePlan, ...]
    addresses: tuple[RowAddress, ...]
    coming: tuple[tuple[int, RowAddress], ...] = ()


@dataclass(frozen=True)
class BatchMaker:
    """A function from tasks to batches, the same in every process. It holds no index, so it is small to send."""

    readers: tuple[StreamReader, ...]
    labels: dict[tuple[int, str], str]  # see `dataset_labels`
    tokenizer: Tokenizer
    options: LayoutOptions
    noise_seed: int

    @classmethod
    def of(
        cls, streams: Sequence[GroupStream], tokenizer: Tokenizer, options: LayoutOptions, noise_seed: int
    ) -> BatchMaker:
        readers = tuple(stream.reader for stream in streams)
        return cls(readers, dataset_labels(streams), tokenizer, options, noise_seed)

    def __call__(self, task: PackTask) -> PackedBatch:
        """The batch of the task's plans, in their order. Pixels stay uint8; timesteps are before the sigmoid."""
        for group, address in task.coming:
            self.readers[group].expect(address)
        samples, names, datasets, skipped = [], [], [], []
        for plan, address in zip(task.plans, task.addresses, strict=True):
            label = self.labels[plan.group, address.place.dataset]
            try:
                sample = _Sample(plan, address, self).load()
            except BadRow as error:
                skipped.append((label, f"{address.place}: {reason_of(error)}"))
                continue
            samples.append(sample)
            names.append(str(address.place))
            datasets.append(label)
        return layout(samples, self.tokenizer.special, self.options, names, skipped, datasets)


def materialize(
    plans: Sequence[SamplePlan],
    streams: Sequence[GroupStream],
    tokenizer: Tokenizer,
    options: LayoutOptions,
    noise_seed: int,
) -> PackedBatch:
    """The batch of `plans`, made in this process."""
    addresses = tuple(streams[plan.group].address(plan.row) for plan in plans)
    return BatchMaker.of(streams, tokenizer, options, noise_seed)(PackTask(tuple(plans), addresses))


class _Sample:
    """Loads one sample; an image that is used several times is decoded once, and resized once per transform."""

    def __init__(self, plan: SamplePlan, address: RowAddress, maker: BatchMaker) -> None:
        self.plan = plan
        self.address = address
        self.reader = maker.readers[plan.group]
        self.tokenizer = maker.tokenizer
        self.options = maker.options
        self.key = (maker.noise_seed, self.reader.name, plan.epoch, plan.row)
        self.decoded: dict[tuple[int, int], Image.Image] = {}  # by image and, of a video, frame
        self.resized: dict[tuple[int, int, str], Tensor] = {}

    def load(self) -> list[Loaded]:
        row = self.reader.read(self.address)
        if isinstance(row, BadRow):
            raise row
        return [self._load(place, entry, row) for place, entry in enumerate(self.plan.entries)]

    def _load(self, place: int, entry: Entry, row: ParsedRow) -> Loaded:
        if entry.dropped:
            return Loaded(entry.kind, dropped=True)
        if entry.kind == TEXT:
            return Loaded(TEXT, self._ids(entry, row), loss=entry.loss, special_label=entry.special_label)
        image = self._image(entry, row)
        if entry.kind != VAE:
            return Loaded(entry.kind, image=image)
        shape = (entry.tokens, self.options.latent_features)
        eps = torch.from_numpy(normals(shape, "posterior", *self.key, place))
        if not entry.loss:
            return Loaded(VAE, image=image, posterior_eps=eps)
        timestep = float(normals((1,), "timestep", *self.key, place)[0])
        noise = torch.from_numpy(normals(shape, "noise", *self.key, place))
        return Loaded(VAE, image=image, loss=True, timestep=timestep, noise=noise, posterior_eps=eps)

    def _ids(self, entry: Entry, row: ParsedRow) -> list[int]:
        if entry.content >= len(row.texts):
            raise BadRow(_changed(f"text {entry.content} is gone"))
        ids = self.tokenizer.encode(row.texts[entry.content])
        if len(ids) != entry.tokens:
            raise BadRow(_changed(f"a text has {len(ids)} tokens, planned were {entry.tokens}"))
        return ids

    def _image(self, entry: Entry, row: ParsedRow) -> Tensor:
        place = (entry.content, entry.frame)
        key = (*place, entry.kind)
        if key not in self.resized:
            if place not in self.decoded:
                self._decode(*place, row)
            transform = self.reader.vae_transform if entry.kind == VAE else self.reader.vit_transform
            self.resized[key] = self._resize(self.decoded[place], transform, entry, row)
        return self.resized[key]

    def _decode(self, content: int, frame: int, row: ParsedRow) -> None:
        """An image, or all frames of a video that the sample shows."""
        if content >= len(row.images):
            raise BadRow(_changed(f"image {content} is gone"))
        source = row.images[content]
        if isinstance(source, Video) != (frame >= 0):
            raise BadRow(_changed(f"image {content} is {'a' if frame < 0 else 'no'} video now"))
        if not isinstance(source, Video):
            self.decoded[content, -1] = decode_rgb(source)
            return
        wanted = [entry.frame for entry in self.plan.entries if entry.kind != TEXT and entry.content == content]
        self.decoded |= {(content, frame): image for frame, image in decode_frames(source, wanted).items()}

    def _resize(self, image: Image.Image, transform: ImageTransform | None, entry: Entry, row: ParsedRow) -> Tensor:
        assert transform is not None, "a plan holds only what its stream has a transform for"
        sharing = self.reader.sharing(len(row.images), self.plan.entries)
        if transform.size(*image.size, sharing) != (entry.width, entry.height):
            raise BadRow(_changed(f"an image has {image.size[0]} x {image.size[1]} pixels now"))
        return resize_to_uint8(image, transform, sharing)


def _changed(what: str) -> str:
    return f"{what}: the file has changed since it was indexed; `bagel-ds check` repairs the index"
