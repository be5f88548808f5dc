"""Packs by their splits for `bench/attention.py`: random ones of BAGEL's kinds, and the recorded ones at any length.

Guarantees: the same kind, length and seed give the same pack. Sizes are those of training at 512 to 1024 pixels (an
image to draw has 1,024 to 4,096 tokens, one to read 400 to 4,900); packs shorter than 8,192 tokens have smaller ones.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

from bagel_ds.model.attention.layout import AttentionLayout
from bagel_ds.model.batch import CAUSAL, FULL, NOISE

Splits = list[tuple[int, str]]  # of a sample: length, mode


def sample_of(kind: str, draw: random.Random) -> Splits:
    def text(least: int = 20, most: int = 300) -> tuple[int, str]:
        return draw.randint(least, most), CAUSAL

    def image(mode: str) -> tuple[int, str]:
        return draw.randint(1024, 4096), mode

    def seen() -> tuple[int, str]:
        return draw.randint(400, 4900), FULL

    if kind == "mixed":
        return sample_of(draw.choice(["t2i", "edit", "vlm"]), draw)
    if kind == "t2i":
        return [text(), image(NOISE)]
    if kind == "edit":
        return [image(FULL), seen(), text(), image(NOISE)]
    if kind == "vlm":
        return [seen(), text(100, 800)]
    if kind == "interleaved":  # reasoning: each image is drawn, then read by what follows
        rounds = [[text(), image(NOISE), image(FULL), seen()] for _ in range(draw.randint(2, 4))]
        return [split for each in rounds for split in each] + [text()]
    return {"text": [text(1000, 4000)], "short": [text(30, 200)]}[kind]


KINDS = ("mixed", "t2i", "edit", "interleaved", "vlm", "text", "short")


def random_pack(kind: str, length: int, seed: int = 0) -> AttentionLayout:
    draw = random.Random(f"{kind} {length} {seed}")
    scale = min(1.0, length / 8192)

    def samples() -> Iterator[Splits]:
        while True:
            yield [(max(1, round(scale * tokens)), mode) for tokens, mode in sample_of(kind, draw)]

    return filled(samples(), length)


def recorded_packs(length: int) -> dict[str, AttentionLayout]:
    """Splits of $BAGEL_REFERENCE_DIR, 16 times as long, in as many samples as fit; empty without such a folder."""
    folder = os.environ.get("BAGEL_REFERENCE_DIR")
    masks = Path(folder or "", "masks", "masks.json")
    if folder is None or not masks.is_file():
        return {}
    samples = [sample for case in json.loads(masks.read_text())["cases"] for sample in case["samples"]]
    longer = [[(16 * n, mode) for n, mode in zip(one["split_lens"], one["attn_modes"])] for one in samples]
    return {"recorded": filled(cycle(longer), length)}


def filled(samples: Iterator[Splits], length: int) -> AttentionLayout:
    """A pack of exactly this length; the last sample is cut."""
    sample_lens: list[int] = []
    splits: Splits = []
    left = length
    while left:
        taken: Splits = []
        for tokens, mode in next(samples):
            if left:
                taken.append((min(tokens, left), mode))
                left -= taken[-1][0]
        sample_lens.append(sum(tokens for tokens, _ in taken))
        splits += taken
    return AttentionLayout.from_splits(sample_lens, [n for n, _ in splits], [mode for _, mode in splits])


def shared_prefix(prefix: int, queries: int, segment: int) -> AttentionLayout:
    """One sample: a prefix to read, then `queries` tokens in images of `segment` tokens, which all see the prefix."""
    lens = [prefix] + [segment] * (queries // segment)
    return AttentionLayout.from_splits([sum(lens)], lens, [FULL] + [NOISE] * (len(lens) - 1))
