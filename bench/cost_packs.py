"""Packs of very different composition for `cost_model.py`, and the networks they are for.

Guarantees: every pack is full to the token; equal arguments give equal packs. Content is random, only sizes count.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from bagel_ds.data.batches.layout import Loaded, layout
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, Entry, SamplePlan
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.shape.config import BagelConfig, LLMConfig, VAEConfig, ViTConfig
from bagel_ds.model_folder.tokenizer import SpecialTokens


class Size(NamedTuple):
    """A network, the tokens of its packs, and the sides in pixels of their images (multiples of 16 and 14)."""

    config: BagelConfig
    vae: VAEConfig
    tokens: int
    sides: tuple[int, ...]


SIZES = {
    "small": Size(
        # The vocabulary: so that a label is about as small a part of a token's work as at 7B.
        BagelConfig(llm=LLMConfig(512, 2688, 2, 4, 2, 2048), vit=ViTConfig(288, 1076, 4, 4)),
        VAEConfig(channels=32),
        1152,
        (112, 224, 336),
    ),
    "7b": Size(BagelConfig(llm=LLMConfig(num_hidden_layers=4)), VAEConfig(), 32768, (224, 448, 672, 896)),
}


def text(draw: random.Random, size: Size, long: bool) -> list[Entry]:
    return [Entry(TEXT, 0, draw.randint(size.tokens // 3, size.tokens) if long else draw.randint(16, 64), loss=True)]


def t2i(draw: random.Random, size: Size, long: bool) -> list[Entry]:
    return [Entry(TEXT, 0, draw.randint(10, 60)), image(VAE, side(draw, size, long), loss=True)]


def edit(draw: random.Random, size: Size, long: bool) -> list[Entry]:
    pixels = side(draw, size, long)
    return [image(VAE, pixels), image(VIT, pixels), Entry(TEXT, 0, draw.randint(10, 40)), image(VAE, pixels, loss=True)]


def understanding(draw: random.Random, size: Size, long: bool) -> list[Entry]:
    turns = [Entry(TEXT, 0, draw.randint(16, size.tokens // 8), loss=turn % 2 == 1) for turn in range(4 if long else 2)]
    return [image(VIT, side(draw, size, long)), *turns]


Kind = Callable[[random.Random, Size, bool], list[Entry]]
KINDS: tuple[Kind, ...] = (text, t2i, edit, understanding)


def side(draw: random.Random, size: Size, long: bool) -> int:
    """One of the larger or of the smaller sides."""
    return draw.choice(size.sides[len(size.sides) // 2 :] if long else size.sides[: (len(size.sides) + 1) // 2])


def image(kind: str, pixels: int, loss: bool = False) -> Entry:
    stride = 14 if kind == VIT else 16
    return Entry(kind, 0, (pixels // stride) ** 2, loss, height=pixels, width=pixels)


def themes(count: int, draw: random.Random) -> Iterator[tuple[str, tuple[Kind, ...], float]]:
    """(name, kinds, share of long samples): each kind alone, long and short, then random mixtures."""
    alone = [(kind, share) for kind in KINDS for share in (1.0, 0.0)]
    for kind, share in alone[:count]:
        yield f"{kind.__name__}, {'long' if share else 'short'}", (kind,), share
    for _ in range(count - len(alone)):
        yield "mixed", tuple(draw.sample(KINDS, draw.randint(2, 4))), draw.random()


def filled(kinds: Sequence[Kind], share: float, size: Size, draw: random.Random) -> list[SamplePlan]:
    """Samples of exactly `size.tokens` together; text takes what the others leave."""
    plans, room = [], size.tokens
    for _ in range(1000):
        plan = SamplePlan(0, 0, 0, tuple(draw.choice(kinds)(draw, size, draw.random() < share)))
        if plan.length <= room - 3 or plan.length == room:
            plans.append(plan)
            room -= plan.length
    if room:
        plans.append(SamplePlan(0, 0, 0, (Entry(TEXT, 0, room - 2, loss=True),)))
    assert sum(plan.length for plan in plans) == size.tokens
    return plans


def loaded(entry: Entry, vocabulary: int) -> Loaded:
    """An entry with random content."""
    if entry.kind == TEXT:
        return Loaded(TEXT, ids=torch.randint(vocabulary, (entry.tokens,)).tolist(), loss=entry.loss)
    pixels = torch.randint(256, (3, entry.height, entry.width), dtype=torch.uint8)
    noise = torch.randn(entry.tokens, 64) if entry.loss else None
    return Loaded(entry.kind, image=pixels, loss=entry.loss, timestep=0.0 if entry.loss else -math.inf, noise=noise)


def make_packs(count: int, size: Size, seed: int) -> Iterator[tuple[str, list[SamplePlan], PackedBatch]]:
    """(theme, samples, batch) of `count` packs."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    for theme, kinds, share in themes(count, draw):
        plans = filled(kinds, share, size, draw)
        samples = [[loaded(entry, size.config.llm.vocab_size) for entry in plan.entries] for plan in plans]
        yield theme, plans, layout(samples, SpecialTokens(0, 1, 2, 3, 4), LayoutOptions())
