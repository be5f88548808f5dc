"""Image editing: a chain of pictures with instructions between them.

Row: `image_list` (list<binary>) and `instruction_list` (list<list<string>>: item i holds the alternative instructions
that lead from picture i to picture i+1). Sample: start picture (VAE and ViT condition), then per step an instruction
and the picture it leads to (velocity loss); pictures between also follow as conditions. The spans, the choice of
alternatives and the joined instructions follow the original's distribution.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.record import UNUSED_TEXT, Note
from bagel_ds.data.formats.source import MSE, ParsedRow, Piece, Record, Source, image_bytes, list_of, needed_columns
from bagel_ds.data.samples.draws import Draws
from bagel_ds.data.samples.images import ImageTransform
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, BadRow

# Of the combinations of two steps' alternatives, at most so many are kept, evenly spread.
_MAX_PAIRS = 64


class Edit(Source):
    name = "edit"
    kinds = ("unified_edit", "competition_level_mining", "foundational_structure_generation")
    version = 1
    losses = frozenset({MSE})
    vae_transform = ImageTransform(16, 1024, 512)
    vit_transform = ImageTransform(14, 518, 224)
    conditions_drop = True

    def columns(self, available: Sequence[str]) -> list[str]:
        return needed_columns(available, "image_list", "instruction_list")

    def parse(self, row: dict[str, Any], folder: ImageFolder) -> ParsedRow:
        cells = list_of(row.get("image_list"), "image_list")
        images = [image_bytes(value, f"image_list[{i}]") for i, value in enumerate(cells)]
        if len(images) < 2:
            raise BadRow(f"image_list holds {len(images)} images, at least 2 are needed")
        instructions = list_of(row.get("instruction_list"), "instruction_list")
        needed = len(images) - 1
        if len(instructions) < needed:
            raise BadRow(f"{len(images)} images need {needed} items in instruction_list, found {len(instructions)}")
        steps = [_alternatives(value, i) for i, value in enumerate(instructions[:needed])]
        texts = [text for step in steps for text in step] + _joined(steps)
        notes = [Note(UNUSED_TEXT, f"instruction_list[{i}] follows no image") for i in range(needed, len(instructions))]
        return ParsedRow(tuple(len(step) for step in steps), texts, list[Any](images), tuple(notes))

    def arrange(self, record: Record, draws: Draws) -> list[Piece]:
        counts = record.structure
        images = len(counts) + 1
        start = draws.choice(images - 1)
        end = start + 1 + draws.choice(min(start + 3, images) - start - 1)
        pieces = [Piece(VAE, start), Piece(VIT, start)]
        if end - start > 1 and draws.uniform() < 0.5:
            # As in the original, a joined span that reaches the last picture is one step shorter.
            end = min(end, images - 2)
            pieces += [Piece(TEXT, _joined_text(counts, start, end, draws)), Piece(VAE, end, loss=True)]
            return pieces
        for image in range(start + 1, end + 1):
            pieces.append(Piece(TEXT, sum(counts[: image - 1]) + draws.choice(counts[image - 1])))
            pieces.append(Piece(VAE, image, loss=True))
            if image != end:
                pieces += [Piece(VAE, image), Piece(VIT, image)]
        return pieces


def _alternatives(value: Any, step: int) -> list[str]:
    texts = [value] if isinstance(value, str) else list_of(value, f"instruction_list[{step}]")
    if not texts or not all(isinstance(text, str) for text in texts):
        raise BadRow(f"instruction_list[{step}] must hold at least one text and nothing else")
    return texts


def _joined(steps: list[list[str]]) -> list[str]:
    """All joined instructions: first those of the last but one step, then of each pair of steps but the last."""
    if len(steps) < 2:
        return []
    texts = [(text + ". ").rstrip() for text in steps[-2]]
    for first, second in zip(steps[:-2], steps[1:-1], strict=True):
        texts += [(first[i] + ". " + second[j] + ". ").rstrip() for i, j in _pairs(len(first), len(second))]
    return texts


def _joined_text(counts: Sequence[int], start: int, end: int, draws: Draws) -> int:
    """Number of one of the joined instructions from picture `start` to `end`, in the order of `_joined`."""
    place = sum(counts)
    if end - start == 1:
        return place + draws.choice(counts[start])
    place += counts[-2] + sum(len(_pairs(counts[i], counts[i + 1])) for i in range(start))
    return place + draws.choice(len(_pairs(counts[start], counts[start + 1])))


def _pairs(first: int, second: int) -> list[tuple[int, int]]:
    total = first * second
    kept = min(total, _MAX_PAIRS)
    return [divmod(k * total // kept, second) for k in range(kept)]
