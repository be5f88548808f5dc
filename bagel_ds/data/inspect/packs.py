"""Packs in words: which samples they hold, what each piece is for and what has a loss.

Guarantees: everything shown is read back from the batch that the model would get (ids, pixels, positions, labels,
timesteps); the plan only adds what dropout removed. sheet.py draws the same pieces.
"""

from __future__ import annotations

import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from bagel_ds.data.batches.loader import PlannedData
from bagel_ds.data.plan.packing import Pack
from bagel_ds.data.samples.sample import TEXT, VAE, VIT, Entry
from bagel_ds.model.batch import PackedBatch, unpatchify
from bagel_ds.model.flow import flow_time
from bagel_ds.model_folder.tokenizer import Tokenizer

_WIDTH = 120


@dataclass(frozen=True)
class ShownPiece:
    """One split of a sample, or (`mode` empty) a condition that dropout removed. Offsets in tokens of the pack."""

    kind: str  # TEXT, VIT or VAE
    role: str  # its purpose, in words
    mode: str  # attention: causal, full or noise
    start: int
    length: int  # markers included
    position: int  # RoPE position of its first token
    text: str = ""  # with its special tokens
    labels: int = 0  # positions with a cross-entropy label
    end_label: str = ""  # the special token predicted at a text's end marker
    targets: int = 0  # latent tokens with a velocity target
    timestep: float = float("-inf")  # before the sigmoid; -inf: clean
    image: Tensor | None = None  # uint8 [height, width, 3], as the model sees it
    width: int = 0  # pixels
    height: int = 0

    @property
    def is_dropped(self) -> bool:
        return not self.mode


@dataclass(frozen=True)
class ShownSample:
    """A sample of the pack; one without pieces could not be read, for the `reason`."""

    name: str
    epoch: int
    start: int
    length: int
    pieces: tuple[ShownPiece, ...]
    reason: str = ""


@dataclass(frozen=True)
class ShownPack:
    """A pack, `number` in the order of the run's whole plan."""

    number: int
    limit: int  # max_num_tokens
    samples: tuple[ShownSample, ...]
    batch: PackedBatch


def first_packs(data: PlannedData, count: int, start: dict[str, Any] | None = None) -> Iterator[ShownPack]:
    """The next `count` packs of the plan, from its beginning or from a saved state."""
    first = start["packs"] if start else 0
    for number, (pack, batch) in enumerate(islice(data.packs(start), count), first):
        yield ShownPack(number, data.planner.options.max_num_tokens, tuple(_samples(data, pack, batch)), batch)


def kept_pack(batch: PackedBatch, tokenizer: Tokenizer, limit: int, number: int = 0) -> ShownPack:
    """A pack that a run kept, without its plan: what dropout removed is not known."""
    reader = _Reader(tokenizer, batch)
    samples = []
    for name, length in zip(batch.samples, batch.sample_lens, strict=True):
        start, pieces = reader.offset, []
        while reader.offset < start + length:
            pieces.append(reader.piece(reader.entry()))
        samples.append(ShownSample(name, 0, start, length, tuple(pieces)))
    return ShownPack(number, limit, tuple(samples), batch)


def _samples(data: PlannedData, pack: Pack, batch: PackedBatch) -> Iterator[ShownSample]:
    reader = _Reader(data.tokenizer, batch)
    reasons = [reason for _, reason in batch.skipped]
    kept = 0
    for plan in pack.samples:
        name = str(data.streams[plan.group].place(plan.row))
        if kept < len(batch.samples) and batch.samples[kept] == name:
            kept += 1
            start = reader.offset
            pieces = tuple(reader.piece(entry) for entry in plan.entries)
            yield ShownSample(name, plan.epoch, start, reader.offset - start, pieces)
        else:
            reason = next((reason for reason in reasons if reason.startswith(name)), "nothing of it is left")
            yield ShownSample(name, plan.epoch, reader.offset, 0, (), reason.removeprefix(f"{name}: "))
    assert reader.offset == batch.sequence_length, "the pack's plan and its batch differ"


class _Reader:
    """Walks along a batch, entry by entry."""

    def __init__(self, tokenizer: Tokenizer, batch: PackedBatch) -> None:
        self.batch, self.tokenizer = batch, tokenizer
        self.offset = self.split = self.vit = self.vae = self.patches = self.latents = 0
        length = batch.sequence_length
        self.ids = torch.full((length,), -1).index_copy(0, batch.text_indexes, batch.text_ids)
        self.labels = torch.full((length,), -1).index_copy(0, batch.ce_loss_indexes, batch.label_ids)
        self.targets = torch.zeros(length, dtype=torch.bool)
        self.targets[batch.mse_loss_indexes] = True

    def piece(self, entry: Entry) -> ShownPiece:
        if entry.dropped:
            return ShownPiece(entry.kind, "dropped", "", self.offset, 0, -1, width=entry.width, height=entry.height)
        batch, start = self.batch, self.offset
        length, mode = batch.split_lens[self.split], batch.attn_modes[self.split]
        assert length == entry.length, "the pack's plan and its batch differ"
        self.split += 1
        self.offset += length
        position = int(batch.position_ids[start])
        common = (mode, start, length, position)
        if entry.kind == TEXT:
            return self._text(common, start, start + length)
        if entry.kind == VIT:
            image = self._vit_image(entry)
            return ShownPiece(VIT, "image to read", *common, image=image, width=entry.width, height=entry.height)
        image = batch.images[self.vae].permute(1, 2, 0)
        timestep = float(batch.timesteps[self.latents])
        self.vae += 1
        self.latents += entry.tokens
        targets = int(self.targets[start : start + length].sum())
        role = "image to generate" if targets else "image given"
        height, width = image.shape[:2]
        return ShownPiece(
            entry.kind, role, *common, targets=targets, timestep=timestep, image=image, width=width, height=height
        )

    def entry(self) -> Entry:
        """The plan of the next split, read from the batch."""
        batch, tokens = self.batch, self.batch.split_lens[self.split] - 2
        if self.offset + 1 in batch.vae_indexes:
            return Entry(VAE, self.vae, tokens, loss=self.offset + 1 in batch.mse_loss_indexes)
        if self.offset + 1 not in batch.vit_indexes:
            return Entry(TEXT, self.split, tokens)
        ids = batch.vit_position_ids[self.patches : self.patches + tokens]
        columns = int((ids == ids.min() + torch.arange(tokens)).cumprod(0).sum())
        side = round((batch.vit_patches.shape[1] / 3) ** 0.5)
        return Entry(VIT, self.vit, tokens, height=tokens // columns * side, width=columns * side)

    def _text(self, common: tuple[str, int, int, int], start: int, end: int) -> ShownPiece:
        text = self.tokenizer.decode(self.ids[start:end].tolist())
        labels = self.labels[start:end]
        last = int(labels[-1])
        return ShownPiece(
            TEXT,
            "text to learn" if bool((labels[:-1] >= 0).any()) else "text given",
            *common,
            text=text,
            labels=int((labels >= 0).sum()),
            end_label=self.tokenizer.decode([last]) if last >= 0 else "",
        )

    def _vit_image(self, entry: Entry) -> Tensor:
        count = self.batch.vit_seqlens[self.vit]
        patches = self.batch.vit_patches[self.patches : self.patches + count]
        self.vit += 1
        self.patches += count
        side = round((patches.shape[1] / 3) ** 0.5)
        return unpatchify(patches, entry.height // side, entry.width // side, side).permute(1, 2, 0)


def pack_text(pack: ShownPack, timestep_shift: float = 1.0) -> list[str]:
    """Lines that describe a pack."""
    lines = [title(pack)]
    for number, sample in enumerate(pack.samples):
        lines += ["", f"  sample {number}: {sample.name} (epoch {sample.epoch}), {sample.length:,} tokens"]
        if sample.reason:
            lines.append(f"    skipped: {sample.reason}")
        for piece in sample.pieces:
            lines += _piece_lines(piece, timestep_shift)
    return lines


def title(pack: ShownPack) -> str:
    """Size and losses of a pack in one line."""
    batch, length = pack.batch, pack.batch.sequence_length
    kept = sum(not sample.reason for sample in pack.samples)
    return (
        f"pack {pack.number}: {length:,} of {pack.limit:,} tokens ({length / pack.limit:.1%}) in {kept} samples: "
        f"{len(batch.text_indexes):,} text, {len(batch.vit_indexes):,} ViT, {len(batch.vae_indexes):,} VAE; "
        f"loss on {len(batch.ce_loss_indexes):,} text tokens and {len(batch.mse_loss_indexes):,} latents"
    )


def detail(piece: ShownPiece, timestep_shift: float) -> str:
    """Size, position and loss of a piece, in words."""
    words = []
    if piece.kind != TEXT:
        words.append(f"{piece.width} x {piece.height} px")
    if piece.is_dropped:
        return ", ".join(words)
    words.append(f"{piece.length} tokens")
    if piece.labels:
        words.append(
            f"cross-entropy on {piece.labels}" + (f", its end predicts {piece.end_label}" * bool(piece.end_label))
        )
    if piece.targets:
        t = float(flow_time(torch.tensor(piece.timestep), timestep_shift))
        words.append(f"velocity loss on {piece.targets}, t = {t:.3f}")
    return ", ".join(words)


def _piece_lines(piece: ShownPiece, timestep_shift: float) -> list[str]:
    name = {TEXT: "text", VIT: "ViT"}.get(piece.kind, "VAE")
    if piece.is_dropped:
        return [f"    {'-':>13}  {'dropped':<8}{name:<5} {detail(piece, timestep_shift)}".rstrip()]
    place = f"{piece.start}..{piece.start + piece.length - 1}"
    head = f"    {place:>13}  {piece.mode:<8}{name:<5} {piece.role}, from position {piece.position}: "
    lines = [head + detail(piece, timestep_shift)]
    shown = piece.text.replace("\n", "\\n")
    return lines + textwrap.wrap(
        shown, _WIDTH, initial_indent=" " * 19, subsequent_indent=" " * 19, drop_whitespace=False
    )
