"""Interleaved reasoning: a text, then an image or another text, until the model says that it is done.

Guarantees: requests advance together, texts in one batch and images in one batch, and each ends by itself.

Source: BAGEL-Canvas' reasoner. Its contexts differ from the plain inferencer's: `cfg_text` holds images only, `cfg_img`
texts only, and every image is encoded once for each context that gets it, with a posterior draw of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image

from bagel_ds.data.batches.layout import Loaded
from bagel_ds.data.samples.sample import TEXT
from bagel_ds.inference import pictures
from bagel_ds.inference.network import Network
from bagel_ds.inference.sampler import Branches, OnStep, begin_drawing, draw
from bagel_ds.inference.settings import Settings
from bagel_ds.inference.text import Text, generate_texts, written

Item = str | Image.Image


@dataclass
class Reasoning:
    """One request under way; `items` is what it has said and drawn."""

    settings: Settings
    generator: torch.Generator
    branches: Branches
    size: tuple[int, int]  # (height, width) of the next image
    items: list[Item] = field(default_factory=list)
    draws_next: bool = False
    done: bool = False


def reason(
    network: Network,
    inputs: Sequence[tuple[Sequence[Item], Settings, int]],
    on_step: OnStep = lambda done, total: None,
) -> list[list[Item]]:
    """The texts and images that answer each (inputs, settings, seed), in order."""
    empty = network.empty
    works = []
    for items, settings, seed in inputs:
        generator = torch.Generator().manual_seed(seed)
        works.append(Reasoning(settings, generator, Branches(empty, empty, empty), settings.image_shapes))
        for item in items:
            hear(network, works[-1:], [item])
    while any(not work.done for work in works):
        advance(network, [work for work in works if not work.done], on_step)
    return [work.items for work in works]


def advance(network: Network, works: Sequence[Reasoning], on_step: OnStep = lambda done, total: None) -> None:
    """One more text or image of each."""
    drawing = [work for work in works if work.draws_next]
    saying = [work for work in works if not work.draws_next]
    said = _say(network, saying) if saying else []
    drawn = _draw(network, drawing, on_step) if drawing else []
    for work, item in [*zip(saying, said), *zip(drawing, drawn)]:
        work.items.append(item)
        work.done = work.done or len(work.items) == work.settings.max_iterations
    going_on = [work for work in works if not work.done]
    hear(network, going_on, [work.items[-1] for work in going_on])


def hear(network: Network, works: Sequence[Reasoning], items: Sequence[Item]) -> None:
    """Each reads its item: a text into `gen` and `cfg_img`, an image into `gen` and `cfg_text`."""
    into_gen: list[list[Loaded]] = []
    into_text: list[list[Loaded]] = []
    into_image: list[list[Loaded]] = []
    for work, item in zip(works, items):
        if isinstance(item, str):
            entry = [Loaded(TEXT, ids=network.tokenizer.encode(item))]
            seen, unseen = entry, []
        else:
            picture = pictures.resized(network, item)
            work.size = (picture.height, picture.width)
            entry, unseen = (
                [pictures.to_redraw(network, picture, work.generator), pictures.to_see(network, picture)]
                for _ in range(2)
            )
            seen = []
        into_gen.append(entry)
        into_text.append(unseen)
        into_image.append(seen)
    branches = [work.branches for work in works]
    contexts = [
        *(branch.gen for branch in branches),
        *(branch.cfg_text for branch in branches),
        *(branch.cfg_img for branch in branches),
    ]
    read = network.read(contexts, [*into_gen, *into_text, *into_image])
    count = len(works)
    for number, work in enumerate(works):
        work.branches = Branches(read[number], read[count + number], read[2 * count + number])


def _say(network: Network, works: Sequence[Reasoning]) -> list[Item]:
    """A text of each; the token that the model puts after it decides what comes next."""
    special = network.tokenizer.special
    texts = [Text(work.branches.gen, work.settings, work.generator) for work in works]
    generate_texts(network, texts, wants_next=True)
    for work, text in zip(works, texts):
        work.draws_next = text.next_id == special.start_of_image
        work.done = text.next_id == special.end_of_text
    return [written(network, text.ids).strip() for text in texts]


def _draw(network: Network, works: Sequence[Reasoning], on_step: OnStep) -> list[Item]:
    drawings = [begin_drawing(network, work.branches, work.settings, work.size, work.generator) for work in works]
    for work in works:
        work.draws_next = False
    draw(network, drawings, on_step)
    return [pictures.decoded(network, one.latents, one.height, one.width) for one in drawings]
