"""`Inferencer`: prompts in, pictures and texts out.

Guarantees: a batch of requests gives each the result it gets by itself, because every request draws from a generator of
its own seed and no arithmetic crosses requests. All requests of a batch go through each stage together: reading,
thinking, drawing.

Source: the original's InterleaveInferencer, its options and the three contexts of its guidance.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image

from bagel_ds.data.batches.layout import Loaded
from bagel_ds.data.samples.image_tokens import LayoutOptions
from bagel_ds.data.samples.sample import TEXT
from bagel_ds.errors import UserError
from bagel_ds.inference import pictures
from bagel_ds.inference.adapters import Asked, asked_adapters
from bagel_ds.inference.network import Network
from bagel_ds.inference.reasoning import reason
from bagel_ds.inference.sampler import Branches, Drawing, OnStep, begin_drawing, draw
from bagel_ds.inference.settings import DEFAULTS, Settings, default_settings
from bagel_ds.inference.text import Text, generate_texts, written

# In the words of this project; the original asks for the same: first the thought in tags, then the answer or image.
THINK_TO_ANSWER = (
    "First think through the reasoning in your mind, then give the user the answer. Enclose the reasoning in "
    "<think> </think> tags, like this: <think> your reasoning here </think> the answer here"
)
THINK_TO_DRAW = (
    "First think through the planning in your mind, then generate the image. Enclose the planning in "
    "<think> </think> tags, like this: <think> your planning here </think> the image here"
)

Item = str | Image.Image
Made = TypeVar("Made")


@dataclass(frozen=True)
class Request:
    """Texts and images to read, in order, and what is wanted: an answer, or a picture."""

    inputs: tuple[Item, ...]
    answers: bool = False
    think: bool = False
    think_prompt: str | None = None  # instead of this project's
    settings: Settings = Settings()
    seed: int = 0
    lora: Asked = None

    @property
    def items(self) -> tuple[Item, ...]:
        """All that is read: the thinking prompt, then the inputs."""
        if not self.think:
            return self.inputs
        return (self.think_prompt or (THINK_TO_ANSWER if self.answers else THINK_TO_DRAW), *self.inputs)


@dataclass(frozen=True)
class Result:
    """`image`: the picture drawn; `text`: the answer, or the thought before the picture."""

    image: Image.Image | None = None
    text: str | None = None

    def __getitem__(self, name: str) -> Any:
        """As the original's dictionary: result["image"], result["text"]."""
        if name not in ("image", "text"):
            raise KeyError(name)
        return getattr(self, name)


@dataclass
class _Work:
    """One request under way: its contexts, and the picture's size."""

    request: Request
    generator: torch.Generator
    branches: Branches
    size: tuple[int, int]
    text: str | None = None


class Inferencer:
    """Batches of requests for one network. `model_path` names it in messages."""

    def __init__(self, network: Network, cannot_draw: str | None = None) -> None:
        self.network = network
        self.cannot_draw = cannot_draw  # why not, where parts are missing

    # ------------------------------------------------------------------------------------------------ for callers
    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        image: Any = None,
        mode: str | None = None,
        think: bool = False,
        seed: int | Sequence[int] = 0,
        **options: Any,
    ) -> Any:
        """A `Result`, or a list of them for a list of prompts (seeds then count up from `seed`).

        mode: t2i, edit, vqa, think or interleave; without one, edit where there is an image, else t2i. With interleave
        a result is a list of texts and images. `options` are those of `Settings`, and `lora`, the adapters to use
        (`adapters.py`). Raises `UserError`.
        """
        if prompt is None or isinstance(prompt, str):
            return self.generate([prompt or ""], [image], mode, think, [_seed(seed)], **options)[0]
        images = image if isinstance(image, (list, tuple)) else [image] * len(prompt)
        seeds = list(seed) if isinstance(seed, Sequence) else [seed + number for number in range(len(prompt))]
        if not len(prompt) == len(images) == len(seeds):
            raise UserError(f"{len(prompt)} prompts, {len(images)} images and {len(seeds)} seeds: pass one for each")
        requests = [
            self.request(text, picture, mode, think, own_seed, **options)
            for text, picture, own_seed in zip(prompt, images, seeds)
        ]
        return self.reason(requests) if mode == "interleave" else self.run(requests)

    def __call__(
        self,
        image: Any = None,
        text: str | None = None,
        think: bool = False,
        understanding_output: bool = False,
        **options: Any,
    ) -> Result:
        """The original's call: both image and text may be left out, but not both."""
        items = [item for item in (image, text) if item is not None]
        found = self.interleave_inference(items, think, understanding_output, **options)
        return Result(
            next((item for item in found if isinstance(item, Image.Image)), None),
            next((item for item in found if isinstance(item, str)), None),
        )

    def interleave_inference(
        self,
        input_lists: Sequence[Any],
        think: bool = False,
        understanding_output: bool = False,
        seed: int = 0,
        think_prompt: str | None = None,
        lora: Any = None,
        **options: Any,
    ) -> list[Item]:
        """The original's method: texts and images in, the thought and the image, or the answer, out."""
        if understanding_output and "max_think_token_n" not in options:
            options["max_think_token_n"] = DEFAULTS["vqa"].max_think_token_n
        settings = Settings().changed(options)
        inputs = tuple(item if isinstance(item, str) else pictures.opened(item) for item in input_lists)
        request = Request(inputs, understanding_output, think, think_prompt, settings, seed, asked_adapters(lora))
        return self.items(request, None)

    @staticmethod
    def request(
        prompt: str,
        image: Any = None,
        mode: str | None = None,
        think: bool = False,
        seed: int = 0,
        think_prompt: str | None = None,
        lora: Any = None,
        **options: Any,
    ) -> Request:
        """A request by mode; without one, edit where there is an image, else t2i.

        Raises `UserError` where prompt, image and mode don't go together.
        """
        mode = mode or ("t2i" if image is None else "edit")
        images = [pictures.opened(one) for one in _listed(image)]
        settings = default_settings(mode, bool(images)).changed(options)
        if not (isinstance(prompt, str) and prompt.strip()) and not (mode == "vqa" and images):
            raise UserError("the prompt is empty; say what to draw, change or answer")
        if mode == "edit" and not images:
            raise UserError("mode edit needs an image to change; pass one, or mode t2i")
        inputs: tuple[Item, ...] = (*images, *([prompt] if prompt.strip() else []))
        chosen = asked_adapters(lora)
        return Request(inputs, mode == "vqa", think or mode == "think", think_prompt, settings, seed, chosen)

    # ---------------------------------------------------------------------------------------------------- the work
    def run(self, requests: Sequence[Request], on_step: OnStep = lambda done, total: None) -> list[Result]:
        """The results of all requests, each as if run by itself. `on_step(done, total)`: steps of drawing."""
        self.check(requests)
        return self._by_adapters(requests, lambda alike: self._run(alike, on_step))

    def _run(self, requests: Sequence[Request], on_step: OnStep) -> list[Result]:
        works = self.contexts(requests)
        self._think(works)
        drawing = [work for work in works if not work.request.answers]
        drawings = [self.begin(work) for work in drawing]
        draw(self.network, drawings, on_step)
        drawn = {id(work): self.finish(one) for work, one in zip(drawing, drawings)}
        return [Result(drawn.get(id(work)), work.text) for work in works]

    def reason(self, requests: Sequence[Request], on_step: OnStep = lambda done, total: None) -> list[list[Item]]:
        """Interleaved reasoning: the texts and images that answer each request, in order."""

        def answered(alike: Sequence[Request]) -> list[list[Item]]:
            return reason(self.network, [(own.inputs, own.settings, own.seed) for own in alike], on_step)

        return self._by_adapters(requests, answered)

    def _by_adapters(
        self, requests: Sequence[Request], make: Callable[[Sequence[Request]], Sequence[Made]]
    ) -> list[Made]:
        """What is made of the requests; those with the same adapters go through the network together."""
        adapters = self.network.adapters
        groups: dict[tuple[tuple[str, float], ...], list[int]] = {}
        for number, request in enumerate(requests):
            groups.setdefault(tuple(adapters.chosen(request.lora).items()), []).append(number)
        made: dict[int, Made] = {}
        for weights, numbers in groups.items():
            with adapters.in_use(dict(weights)):
                made.update(zip(numbers, make([requests[number] for number in numbers])))
        return [made[number] for number in range(len(requests))]

    def items(self, request: Request, mode: str | None, on_step: OnStep = lambda done, total: None) -> list[Item]:
        """What a request made by `mode` gives, in order: thought and picture, an answer, or texts and images."""
        if mode == "interleave":
            return self.reason([request], on_step)[0]
        result = self.run([request], on_step)[0]
        return [item for item in (result.text, result.image) if item is not None]

    def contexts(self, requests: Sequence[Request]) -> list[_Work]:
        """Each request's contexts after all its inputs, thinking prompt included.

        `cfg_text` is what was read before the last text, `cfg_img` the texts without the images. Where there are no
        images that is all of it, so `cfg_img` is the same context as `gen`, and the sampler computes the two once.
        """
        before: list[list[Loaded]] = []
        after: list[list[Loaded]] = []
        texts: list[list[Loaded]] = []
        alike: list[bool] = []  # cfg_img has read what gen has
        works = []
        empty = self.network.empty
        for request in requests:
            generator = torch.Generator().manual_seed(request.seed)
            size = request.settings.image_shapes
            gen: list[Loaded] = []
            text: list[Loaded] = []
            snapshot = 0  # entries of gen that cfg_text has
            for item in request.items:
                if isinstance(item, str):
                    snapshot = len(gen)
                    entry = self.text_entry(item)
                    gen.append(entry)
                    text.append(entry)
                else:
                    picture = pictures.resized(self.network, item)
                    size = (picture.height, picture.width)
                    if not request.answers:
                        gen.append(pictures.to_redraw(self.network, picture, generator))
                    gen.append(pictures.to_see(self.network, picture))
                    snapshot = len(gen)
            before.append(gen[:snapshot])
            after.append(gen[snapshot:])
            alike.append(len(text) == len(gen))
            texts.append([] if request.answers or alike[-1] else text)
            works.append(_Work(request, generator, Branches(empty, empty, empty), size))
        shared = self.network.read([empty] * len(works), before)
        read = self.network.read([*shared, *[empty] * len(works)], [*after, *texts])
        for work, cfg_text, gen_context, cfg_img, same in zip(works, shared, read, read[len(works) :], alike):
            work.branches = Branches(gen_context, cfg_text, gen_context if same else cfg_img)
        return works

    def text_entry(self, text: str) -> Loaded:
        """A text as an entry of a pack."""
        return Loaded(TEXT, ids=self.network.tokenizer.encode(text))

    def begin(self, work: _Work) -> Drawing:
        """The request's picture as pure noise, drawn after whatever its inputs drew."""
        return begin_drawing(self.network, work.branches, work.request.settings, work.size, work.generator)

    def finish(self, drawing: Drawing) -> Image.Image:
        """The picture of a drawing's clean latents."""
        return pictures.decoded(self.network, drawing.latents, drawing.height, drawing.width)

    def _think(self, works: Sequence[_Work]) -> None:
        """Answers, and the thoughts before pictures, which then are read too."""
        speaking = [work for work in works if work.request.answers or work.request.think]
        texts = [Text(work.branches.gen, work.request.settings, work.generator) for work in speaking]
        generate_texts(self.network, texts)
        thinking = []
        for work, text in zip(speaking, texts):
            work.text = written(self.network, text.ids)
            if not work.request.answers:
                thinking.append(work)
        thoughts = [[self.text_entry(work.text or "")] for work in thinking]
        for work, context in zip(thinking, self.network.read([work.branches.gen for work in thinking], thoughts)):
            work.branches.gen = context

    def check(self, requests: Sequence[Request]) -> None:
        """Raises `UserError` for what this model can't do."""
        check_requests(requests, self.network.layout, self.cannot_draw)
        for request in requests:
            self.network.adapters.chosen(request.lora)


def check_requests(requests: Sequence[Request], layout: LayoutOptions, cannot_draw: str | None) -> None:
    """Raises `UserError` for what a model of this layout can't do; `cannot_draw` says why it can't draw."""
    stride, side = layout.latent_stride, layout.max_latent_size
    for request in requests:
        if not request.inputs:
            raise UserError("nothing to read: pass a prompt, an image or both")
        if request.answers:
            continue
        if cannot_draw is not None:
            raise UserError(f"this model can't draw: {cannot_draw}. It answers questions (mode vqa).")
        height, width = request.settings.image_shapes
        if height % stride or width % stride or max(height, width) > side * stride:
            raise UserError(
                f"image_shapes {height} x {width}: both must be multiples of {stride}, at most {side * stride}"
            )


def _seed(seed: int | Sequence[int]) -> int:
    return seed if isinstance(seed, int) else seed[0]


def _listed(image: Any) -> list[Image.Image | str | Path | bytes]:
    if image is None:
        return []
    return list(image) if isinstance(image, (list, tuple)) else [image]
