"""A metric of the user's own: the network answers the questions of held-out rows, a function judges each answer.

Guarantees: answers are deterministic (the likeliest token of each text, seeds that follow from the row) and depend on
the weights and settings only. A row's question is what comes before the first piece that training learns; images are
resized as in training, and pictures get the size of the row's own. A row that can't be read is left out with a warning.
"""

from __future__ import annotations

import importlib.util
import inspect
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

from bagel_ds.data.batches.held_out import SEED, HeldOut
from bagel_ds.data.formats.record import ParsedRow
from bagel_ds.data.samples.images import decode_rgb
from bagel_ds.data.samples.sample import TEXT, VAE, BadRow, Entry, SamplePlan
from bagel_ds.data.samples.video import Video
from bagel_ds.data.streams.stream import GroupStream
from bagel_ds.errors import UserError
from bagel_ds.inference.generation import Inferencer, Item, Request
from bagel_ds.inference.jobs import Made, answers_of
from bagel_ds.inference.settings import default_settings
from bagel_ds.machine.liveness import going_on

logger = logging.getLogger("bagel_ds")

OPTION = "--metric"
Function = Callable[[Made, dict[str, Any]], float]
Progress = Callable[[Iterable[Any], int], Iterable[Any]]


@dataclass(frozen=True)
class TaskMetric:
    """`function(prediction, row)` judges what was made of a row; `settings` replace defaults of `Settings` by name."""

    name: str
    where: str  # FILE.py:function, for messages
    function: Function
    settings: Mapping[str, Any]
    batch_size: int = 4

    def mean(
        self, inferencer: Inferencer, held_out: HeldOut, progress: Progress = lambda rows, count: rows
    ) -> float | None:
        """Over all rows of the split; None where no row can be used. Raises `UserError` for a value that is none."""
        values: list[float] = []
        for stream, plans in _by_stream(held_out):
            network = _with_transforms(inferencer, stream)
            waiting = iter(progress(plans, len(plans)))
            while batch := list(islice(waiting, self.batch_size)):
                values += self._values(network, stream, batch)
                going_on()
        return sum(values) / len(values) if values else None

    def _values(self, inferencer: Inferencer, stream: GroupStream, plans: Sequence[SamplePlan]) -> list[float]:
        asked: list[tuple[SamplePlan, Request]] = []
        for plan in plans:
            parsed = stream.read(plan)
            try:
                if isinstance(parsed, BadRow):
                    raise parsed
                request = self._request(plan, parsed)
                inferencer.check([request])
            except (BadRow, UserError) as fault:
                logger.warning("held-out data: %s: left out of %s (%s)", stream.place(plan.row), self.name, fault)
            else:
                asked.append((plan, request))
        reasons = [_interleaves(plan) for plan, _ in asked]
        found = answers_of(inferencer, [request for _, request in asked], reasons)
        return [self._judged(stream, plan, made) for (plan, _), made in zip(asked, found)]

    def _request(self, plan: SamplePlan, row: ParsedRow) -> Request:
        """The question of a row, and what kind of answer it wants. Raises `BadRow`."""
        learned = next(number for number, entry in enumerate(plan.entries) if entry.loss)
        inputs = _items(plan.entries[:learned], row)
        if not inputs:
            raise BadRow("nothing comes before what is learned")
        has_image = any(not isinstance(item, str) for item in inputs)
        draws = plan.entries[learned].kind == VAE
        mode = ("edit" if has_image else "t2i") if draws else "interleave" if _interleaves(plan) else "vqa"
        drawn = next((entry for entry in plan.entries if entry.loss and entry.kind == VAE), None)
        size = {} if drawn is None else {"image_shapes": (drawn.height, drawn.width)}
        settings = default_settings(mode, has_image).changed({**size, **self.settings, "do_sample": False})
        return Request(tuple(inputs), answers=mode == "vqa", settings=settings, seed=SEED + plan.row)

    def _judged(self, stream: GroupStream, plan: SamplePlan, made: Made) -> float:
        place = stream.place(plan.row)
        try:
            value = self.function(made, stream.whole_row(plan.row))
        except Exception as error:
            raise UserError(f"{OPTION} {self.where} failed at {place}: {type(error).__name__}: {error}") from error
        if not isinstance(value, (bool, int, float)) or not math.isfinite(value):
            raise UserError(f"{OPTION} {self.where} gave {value!r:.60} at {place}, expected a finite number")
        return float(value)


def load_metric(word: str, settings: Mapping[str, Any], batch_size: int = 4) -> TaskMetric:
    """The function that `FILE.py:function` names. Raises `UserError`."""
    file, _, name = word.rpartition(":")
    path = Path(file)
    if not file or not name.isidentifier():
        raise UserError(f"{OPTION} {word}: expected FILE.py:function, such as demo/exact_answer.py:exact_answer")
    if not path.is_file():
        raise UserError(f"{OPTION} {word}: {path}: no such file; docs/inference.md shows how to write one")
    spec = importlib.util.spec_from_file_location(f"metric_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{OPTION} {word}: {path} is no Python file; its name must end with .py")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise UserError(f"{OPTION} {word}: {path} can't be imported: {type(error).__name__}: {error}") from error
    function = getattr(module, name, None)
    if not callable(function):
        known = [own for own, value in vars(module).items() if inspect.isfunction(value) and not own.startswith("_")]
        raise UserError(f"{OPTION} {word}: {path} has no function {name}; it has {', '.join(known) or 'none'}")
    return TaskMetric(name, word, function, settings, batch_size)


def _by_stream(held_out: HeldOut) -> list[tuple[GroupStream, list[SamplePlan]]]:
    plans = [plan for pack in held_out.packs for plan in pack]
    return [(stream, [plan for plan in plans if plan.group == stream.group]) for stream in held_out.streams]


def _with_transforms(inferencer: Inferencer, stream: GroupStream) -> Inferencer:
    """The same network, with images resized as the group's are."""
    network = inferencer.network
    vae, vit = stream.vae_transform or network.vae_transform, stream.vit_transform or network.vit_transform
    return Inferencer(replace(network, vae_transform=vae, vit_transform=vit), inferencer.cannot_draw)


def _interleaves(plan: SamplePlan) -> bool:
    """Whether an answer may hold texts and pictures: where training learns both, beginning with a text."""
    learned = [entry.kind for entry in plan.entries if entry.loss]
    return learned[0] == TEXT and VAE in learned


def _items(entries: Sequence[Entry], row: ParsedRow) -> list[Item]:
    """Texts and images in order; an image that the ViT and the autoencoder see is one. Raises `BadRow`."""
    items: list[Item] = []
    before: int | None = None
    for entry in entries:
        if entry.kind == TEXT:
            items.append(row.texts[entry.content])
            before = None
        elif entry.content != before:
            source = row.images[entry.content]
            if isinstance(source, Video):
                raise BadRow("questions about videos can't be asked here")
            items.append(decode_rgb(source))
            before = entry.content
    return items
