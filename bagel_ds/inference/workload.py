"""What requests take: calls of the network, tokens and pixels. Bounds from above, as plain numbers.

Guarantees: nothing is tokenized or computed. Texts count by their bytes, of which a token has at least one; texts that
the model writes count in full length.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.inference.generation import Request
from bagel_ds.inference.loading import ImageTransforms

MARKERS = 2  # around a text or image


class Workload(NamedTuple):
    """Of one request, or of several that are done together. Calls are of the network, by stage."""

    reads: int
    words: int
    steps: int
    reasoning: int  # of interleaved reasoning, all stages
    tokens: int  # of the largest call
    context: int  # tokens whose keys and values are kept, over all branches
    pixels: int  # of the largest picture that is decoded; 0 without one
    seen: int  # pixels of the largest image that the autoencoder encodes

    @property
    def calls(self) -> int:
        return self.reads + self.words + self.steps + self.reasoning


def workload(
    request: Request, layout: LayoutOptions, transforms: ImageTransforms, interleaves: bool = False
) -> Workload:
    """Of one request by itself; `transforms` resize the images that it reads."""
    settings = request.settings
    height, width = settings.image_shapes
    texts = images = seen = 0
    for item in request.items:
        if isinstance(item, str):
            texts += len(item.encode()) + MARKERS
            continue
        width, height = transforms.vae.size(*item.size)
        images += _tokens(transforms.vit.size(width, height), layout.vit_patch_size)
        if not request.answers:
            images += _tokens((width, height), layout.latent_stride)
            seen = max(seen, width * height)
    read = texts + images
    words = settings.max_think_token_n if request.answers or request.think or interleaves else 0
    if request.answers:
        return Workload(2, words, 0, 0, read, 2 * read + words, 0, 0)  # and what was read before the last text
    branches = 1 if settings.cfg_text_scale <= 1 else 2 if settings.cfg_img_scale <= 1 else 3
    drawn = _tokens((width, height), layout.latent_stride)
    steps, pixels = settings.num_timesteps - 1, width * height
    if not interleaves:
        # A text is in up to three branches, an image in two; without an image two branches are one until a thought
        # makes them differ (`Inferencer.contexts`). A thought is read once more.
        copies = 3 if images else 2 if words else 1
        branches = min(branches, 3 if images or words else 2)
        alone = 2 * texts if images else texts
        tokens = max(read, alone, words + MARKERS, branches * drawn)
        context = copies * texts + 2 * images + 2 * words
        return Workload(3 if words else 2, words, steps, 0, tokens, context, pixels, seen)
    heard = 2 * (drawn + _tokens(transforms.vit.size(width, height), layout.vit_patch_size))  # into two contexts
    turns = settings.max_iterations
    calls = len(request.inputs) + turns * (1 + words + 1 + steps)
    tokens, context = max(2 * read, branches * drawn, heard), 2 * read + turns * max(2 * (words + MARKERS), heard)
    return Workload(0, 0, 0, calls, tokens, context, pixels, max(seen, pixels))


def together(works: Sequence[Workload]) -> Workload:
    """Of requests that go through every stage in one batch."""
    if not works:
        return Workload(*[0] * len(Workload._fields))
    columns = dict(zip(Workload._fields, zip(*works)))
    return Workload(**{name: (sum if name in ("tokens", "context") else max)(found) for name, found in columns.items()})


def batched(works: Sequence[Workload], most_tokens: int) -> list[range]:
    """Neighbors that fit one call of `most_tokens`; a larger one by itself."""
    batches: list[range] = []
    for number, work in enumerate(works):
        begun = batches[-1] if batches else None
        if begun and sum(works[other].tokens for other in begun) + work.tokens <= most_tokens:
            batches[-1] = range(begun.start, number + 1)
        else:
            batches.append(range(number, number + 1))
    return batches


def _tokens(size: tuple[int, int], patch: int) -> int:
    """Of an image of (width, height) pixels, with its markers."""
    return (size[0] // patch) * (size[1] // patch) + MARKERS
