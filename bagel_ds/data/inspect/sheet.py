"""Draws a pack: its samples, the role of each piece, and the attention mask.

Guarantees: images are the pixels that the model gets. The mask shows the attention layout's dense mask at evenly spaced
tokens, without building that mask (it has T x T cells). A text that is too long for its card ends in "..."; `packs.txt`
holds the whole text.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from bagel_ds.data.inspect.packs import ShownPack, ShownPiece, ShownSample, detail, title
from bagel_ds.data.samples.sample import TEXT, VAE, VIT
from bagel_ds.model.attention.layout import AttentionLayout

Color = tuple[int, int, int]

# In pixels.
_CARD, _GAP, _MARGIN, _BAND = 210, 10, 24, 20  # side of a card, space between cards, page margin, title of a card
_COLUMNS = 6  # cards in a row
_PAGE = 6000  # approximate height of the cards of a page
_MASK = 560  # side of the mask
_STRIP = 14  # width of the bars along the mask that show the tokens' roles
_LINE = 15  # height of a line of small text
_KINDS = {TEXT: "text", VIT: "image (ViT)", VAE: "image (VAE)"}
_PAPER, _INK, _FAINT = (250, 250, 248), (30, 30, 34), (120, 120, 126)


class _Look(NamedTuple):
    name: str
    color: Color


_LOOKS = {
    "text given": _Look("text given (no loss)", (120, 130, 145)),
    "text to learn": _Look("text to learn (cross-entropy)", (216, 120, 30)),
    "image to read": _Look("image to read (ViT)", (52, 120, 200)),
    "image given": _Look("image given (clean VAE latents)", (30, 150, 120)),
    "image to generate": _Look("image to generate (noised VAE latents, velocity loss)", (190, 50, 110)),
    "dropped": _Look("condition dropped", (190, 190, 190)),
}


def contact_sheets(pack: ShownPack, timestep_shift: float = 1.0) -> list[Image.Image]:
    """The whole pack on one page, or on several if it has many samples."""
    pages: list[list[int]] = [[]]
    height = 0
    for number, sample in enumerate(pack.samples):
        if pages[-1] and height + _sample_height(sample) > _PAGE:
            pages.append([])
            height = 0
        pages[-1].append(number)
        height += _sample_height(sample)
    return [
        _sheet(pack, numbers, f"   (page {i} of {len(pages)})" if len(pages) > 1 else "", timestep_shift)
        for i, numbers in enumerate(pages, 1)
    ]


def _sheet(pack: ShownPack, numbers: list[int], page: str, shift: float) -> Image.Image:
    """One page: cards of these samples on the left, the pack's mask and the legend on the right."""
    cards_width = _COLUMNS * (_CARD + _GAP)
    width = 3 * _MARGIN + cards_width + _STRIP + _MASK
    cards_height = sum(_sample_height(pack.samples[number]) for number in numbers)
    mask_height = 2 * _LINE + _STRIP + _MASK + (len(_LOOKS) + 3) * 22
    sheet = Image.new("RGB", (width, 3 * _MARGIN + max(cards_height, mask_height)), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_MARGIN, _MARGIN - 6), title(pack) + page, _INK, _font(16))
    top = 2 * _MARGIN + 6
    for number in numbers:
        _draw_sample(sheet, draw, number, pack.samples[number], top, shift)
        top += _sample_height(pack.samples[number])
    _draw_mask(sheet, draw, pack, 2 * _MARGIN + cards_width, 2 * _MARGIN + 6)
    return sheet


def _sample_height(sample: ShownSample) -> int:
    lines = -(-max(len(sample.pieces), 1) // _COLUMNS) if sample.pieces else 0
    return 2 * _LINE + lines * (_CARD + _GAP) + _GAP


def _draw_sample(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, number: int, sample: ShownSample, top: int, shift: float
) -> None:
    head = f"sample {number}   {sample.name}   epoch {sample.epoch}   {sample.length:,} tokens"
    draw.line((_MARGIN, top, _MARGIN + _COLUMNS * (_CARD + _GAP) - _GAP, top), (215, 215, 210))
    draw.text((_MARGIN, top + 4), _clipped(head, _COLUMNS * (_CARD + _GAP), _font(12)), _INK, _font(12))
    if sample.reason:
        draw.text((_MARGIN, top + 4 + _LINE), f"skipped: {sample.reason}", (180, 30, 30), _font(12))
    for place, piece in enumerate(sample.pieces):
        left = _MARGIN + place % _COLUMNS * (_CARD + _GAP)
        card_top = top + 2 * _LINE - 4 + place // _COLUMNS * (_CARD + _GAP)
        _draw_card(sheet, draw, piece, left, card_top, shift)


def _draw_card(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, piece: ShownPiece, left: int, top: int, shift: float
) -> None:
    color = _LOOKS[piece.role].color
    box = (left, top, left + _CARD - 1, top + _CARD - 1)
    draw.rectangle(box, "white", color, width=1)
    draw.rectangle((left, top, left + _CARD - 1, top + _BAND - 1), color)
    name = f"{piece.role}  [{piece.mode}]" if piece.mode else f"dropped: {_KINDS[piece.kind]}"
    draw.text((left + 6, top + 3), name, "white", _font(12))
    notes = _wrapped(detail(piece, shift), _CARD - 12, 3)
    notes_top = top + _CARD - 4 - _LINE * len(notes)
    for line, text in enumerate(notes):
        draw.text((left + 6, notes_top + line * _LINE), text, _FAINT, _font(11))
    inside = (left + 6, top + _BAND + 5, left + _CARD - 7, notes_top - 5)
    if piece.image is not None:
        _place_image(sheet, Image.fromarray(piece.image.contiguous().numpy()), inside)
    elif piece.is_dropped:
        draw.line((inside[0], inside[1], inside[2], inside[3]), color)
        draw.line((inside[0], inside[3], inside[2], inside[1]), color)
    else:
        lines = _wrapped(piece.text.replace("\n", "\u23ce "), _CARD - 12, (inside[3] - inside[1]) // _LINE)
        for line, text in enumerate(lines):
            draw.text((inside[0], inside[1] + line * _LINE), text, _INK, _font(12))


def _place_image(sheet: Image.Image, image: Image.Image, box: tuple[int, int, int, int]) -> None:
    """Draw an image as large as `box` allows, centered."""
    width, height = box[2] - box[0], box[3] - box[1]
    scale = min(width / image.width, height / image.height)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    shrinks = scale < 1
    image = image.resize(size, Image.Resampling.LANCZOS if shrinks else Image.Resampling.NEAREST)
    left, top = box[0] + (width - size[0]) // 2, box[1] + (height - size[1]) // 2
    sheet.paste(image, (left, top))
    ImageDraw.Draw(sheet).rectangle((left - 1, top - 1, left + size[0], top + size[1]), outline=(205, 205, 205))


def scaled_mask(layout: AttentionLayout, side: int) -> np.ndarray:
    """bool [side, side]: `layout.dense_mask()` at `side` evenly spaced queries and keys, True = may attend."""
    tokens = _spaced(sum(layout.segment_lens), side)
    segments = np.repeat(np.arange(len(layout.segment_lens)), layout.segment_lens)[tokens]
    sees = np.zeros((len(layout.segment_lens),) * 2, dtype=bool)
    for segment, seen in enumerate(layout.visible):
        sees[segment, list(seen)] = True
    mask = sees[segments[:, None], segments[None, :]]
    causal = np.array(layout.is_causal, dtype=bool)[segments]
    same = segments[:, None] == segments[None, :]
    later = tokens[None, :] > tokens[:, None]
    return np.asarray(mask & ~(same & causal[:, None] & later))


def _spaced(tokens: int, side: int) -> np.ndarray:
    return (np.arange(side) * 2 + 1) * tokens // (2 * side)


def _draw_mask(sheet: Image.Image, draw: ImageDraw.ImageDraw, pack: ShownPack, left: int, top: int) -> None:
    batch, length = pack.batch, pack.batch.sequence_length
    draw.text((left, top), "attention mask: queries down, visible keys to the right in their color", _INK, _font(13))
    top += 2 * _LINE
    if length:
        colors = _token_colors(pack)[_spaced(length, _MASK)]
        layout = AttentionLayout.from_splits(batch.sample_lens, batch.split_lens, batch.attn_modes)
        mask = scaled_mask(layout, _MASK)
        pixels = np.where(mask[..., None], colors[None, :, :], np.array((255, 255, 255), dtype=np.uint8))
        bars = np.broadcast_to(colors[None], (_STRIP - 3, _MASK, 3))
        sheet.paste(Image.fromarray(np.ascontiguousarray(bars)), (left + _STRIP, top))
        sheet.paste(Image.fromarray(np.ascontiguousarray(bars.transpose(1, 0, 2))), (left, top + _STRIP))
        sheet.paste(Image.fromarray(pixels.astype(np.uint8)), (left + _STRIP, top + _STRIP))
        _draw_borders(draw, pack, left + _STRIP, top + _STRIP)
    draw.rectangle((left + _STRIP - 1, top + _STRIP - 1, left + _STRIP + _MASK, top + _STRIP + _MASK), outline=_INK)
    top += _STRIP + _MASK + 16
    for look in _LOOKS.values():
        draw.rectangle((left, top, left + 14, top + 14), look.color)
        draw.text((left + 22, top), look.name, _INK, _font(13))
        top += 22


def _draw_borders(draw: ImageDraw.ImageDraw, pack: ShownPack, left: int, top: int) -> None:
    """Borders and numbers of samples that are large enough for them."""
    length = pack.batch.sequence_length
    for number, sample in enumerate(pack.samples):
        start, end = (place * _MASK // length for place in (sample.start, sample.start + sample.length))
        if end - start >= _LINE:
            draw.line((left + start, top, left + start, top + _MASK - 1), (205, 205, 205))
            draw.line((left, top + start, left + _MASK - 1, top + start), (205, 205, 205))
            past_end = end + 30 > _MASK  # then to the left of the block, which is also empty
            draw.text((left + (start - 20 if past_end else end + 4), top + start), str(number), _FAINT, _font(12))


def _token_colors(pack: ShownPack) -> np.ndarray:
    """uint8 [T, 3]: the color of each token's piece."""
    colors = np.zeros((pack.batch.sequence_length, 3), dtype=np.uint8)
    for sample in pack.samples:
        for piece in sample.pieces:
            colors[piece.start : piece.start + piece.length] = _LOOKS[piece.role].color
    return colors


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """A system font, if possible with Chinese characters, else Pillow's own (Latin only)."""
    for name in ("NotoSansCJK-Regular.ttc", "NotoSansCJKsc-Regular.otf", "wqy-microhei.ttc", "DejaVuSans.ttf"):
        try:
            return ImageFont.truetype(name, size)
        except OSError:
            continue
    return ImageFont.load_default(size)


def _wrapped(text: str, width: int, lines: int) -> list[str]:
    """`text` in at most `lines` lines of `width` pixels; the last ends in "..." if the text is longer."""
    font = _font(12)
    found: list[str] = []
    for word in _words(text, width, font):
        if found and font.getlength(f"{found[-1]} {word}") <= width:
            found[-1] += f" {word}"
        elif len(found) == max(lines, 1):
            found[-1] = _clipped(f"{found[-1]} ...", width, font)
            break
        else:
            found.append(word)
    return found


def _words(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> list[str]:
    """Words of `text`; a word wider than a line is split."""
    words = []
    for word in text.split():
        while font.getlength(word) > width:
            fits = next(n for n in range(len(word) - 1, 0, -1) if n == 1 or font.getlength(word[:n]) <= width)
            words.append(word[:fits])
            word = word[fits:]
        words.append(word)
    return words


def _clipped(text: str, width: float, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(f"{text}...") > width:
        text = text[:-1]
    return f"{text}..."
