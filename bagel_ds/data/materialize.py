"""A planned pack -> PackedBatch: read, decode, resize, tokenise, draw noise, lay out.

Guarantees: a sample's tensors depend on its plan and the seed alone, never on what shares its pack, on rank, worker or
pack position. A sample that cannot be read any more drops out and is reported in `PackedBatch.skipped`; the others stay
as they are. With nothing left the batch has zero tokens and no samples.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import torch
from PIL import Image
from torch import Tensor

from bagel_ds.data.draws import normals
from bagel_ds.data.images import ImageTransform, decode_rgb, resize_to_uint8
from bagel_ds.data.layout import LayoutOptions, Loaded, layout
from bagel_ds.data.records import reason_of
from bagel_ds.data.sample import TEXT, VAE, BadRow, Entry, SamplePlan
from bagel_ds.data.sources.source import ParsedRow
from bagel_ds.data.sources.stream import GroupStream
from bagel_ds.data.tokenizer import Tokenizer
from bagel_ds.data.video import Video, decode_frames
from bagel_ds.model.batch import PackedBatch

__all__ = ["LayoutOptions", "dataset_labels", "materialize"]


def dataset_labels(streams: Sequence[GroupStream]) -> dict[tuple[int, str], str]:
    """How messages and metrics call each (place of its stream, dataset): with its group where two groups share it."""
    names = Counter(dataset for stream in streams for dataset in stream.datasets)
    return {
        (number, dataset): dataset if names[dataset] == 1 else f"{stream.name}.{dataset}"
        for number, stream in enumerate(streams)
        for dataset in stream.datasets
    }


def materialize(
    plans: Sequence[SamplePlan],
    streams: Sequence[GroupStream],
    tokenizer: Tokenizer,
    options: LayoutOptions,
    noise_seed: int,
) -> PackedBatch:
    """The batch of `plans`, in their order. Pixels stay uint8; timesteps are before the sigmoid."""
    samples, names, datasets, skipped = [], [], [], []
    labels = dataset_labels(streams)
    for plan in plans:
        stream = streams[plan.dataset]
        place = stream.place(plan.row)
        label = labels[plan.dataset, place.dataset]
        try:
            sample = _Sample(plan, stream, tokenizer, options, noise_seed).load()
        except BadRow as error:
            skipped.append((label, f"{place}: {reason_of(error)}"))
            continue
        samples.append(sample)
        names.append(stream.describe(plan))
        datasets.append(label)
    return layout(samples, tokenizer.special, options, names, skipped, datasets)


class _Sample:
    """Loads one sample; an image that is used several times is decoded once, and resized once per transform."""

    def __init__(
        self, plan: SamplePlan, stream: GroupStream, tokenizer: Tokenizer, options: LayoutOptions, noise_seed: int
    ) -> None:
        self.plan = plan
        self.stream = stream
        self.tokenizer = tokenizer
        self.options = options
        self.key = (noise_seed, stream.name, plan.epoch, plan.row)
        self.decoded: dict[tuple[int, int], Image.Image] = {}  # by image and, of a video, frame
        self.resized: dict[tuple[int, int, str], Tensor] = {}

    def load(self) -> list[Loaded]:
        row = self.stream.read([self.plan])[0]
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
            transform = self.stream.vae_transform if entry.kind == VAE else self.stream.vit_transform
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
        sharing = self.stream.sharing(len(row.images), self.plan.entries)
        if transform.size(*image.size, sharing) != (entry.width, entry.height):
            raise BadRow(_changed(f"an image has {image.size[0]} x {image.size[1]} pixels now"))
        return resize_to_uint8(image, transform, sharing)


def _changed(what: str) -> str:
    return f"{what}: the file has changed since it was indexed"
