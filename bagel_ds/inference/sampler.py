"""Images by flow matching: Euler steps over velocities, with classifier-free guidance; many images in one call a step.

Guarantees: the branches of all images are one call of the network per step, and branches that have read the same are
computed once (both guidances of a picture from text alone compare with `gen`); each image follows its own schedule, is
guided and renormalized by itself, and ends by itself.

Source: the original's inferencer (guidance, schedule), TaylorSeer (arXiv 2503.06923) for extrapolation.
Shape legend: M latent tokens of an image, F their features, C hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel_ds.data.batches.layout import Loaded
from bagel_ds.data.samples.sample import VAE
from bagel_ds.inference import pictures
from bagel_ds.inference.network import Context, Network
from bagel_ds.inference.settings import Settings
from bagel_ds.model.batch import PackedBatch
from bagel_ds.model.flow import sampling_times

_EPS = 1e-8
OnStep = Callable[[int, int], None]  # (steps done, steps of the longest image)


@dataclass
class Branches:
    """The contexts an image is drawn from: all that was read, without the last text, and without images."""

    gen: Context
    cfg_text: Context
    cfg_img: Context


@dataclass
class Taylor:
    """One branch's last computed output and its differences; see `Drawing`. Counts its own calls."""

    calls: int = 0
    computed_at: int = 0
    terms: list[Tensor] = field(default_factory=list)  # d_0 the output, d_(i+1) the difference of d_i per call
    FIRST, EVERY, ORDER = 5, 3, 6

    @property
    def computes(self) -> bool:
        """Whether the network is called this time: the first five times, then every third."""
        return self.calls < self.FIRST or (self.calls - self.FIRST + 1) % self.EVERY == 0

    def computed(self, output: Tensor) -> None:
        """Take up the network's output of this call."""
        new = [output]
        if self.calls >= self.FIRST - 1:
            distance = self.calls - self.computed_at
            for before in self.terms[: self.ORDER]:
                new.append((new[-1] - before) / distance)
        self.terms, self.computed_at = new, self.calls
        self.calls += 1

    def extrapolated(self) -> Tensor:
        """sum_i d_i / i! * n^i, n calls after the last computed one."""
        ahead = self.calls - self.computed_at
        self.calls += 1
        return sum((term * (ahead**i / math.factorial(i)) for i, term in enumerate(self.terms[1:], 1)), self.terms[0])


@dataclass
class Drawing:
    """One image under way: latents [M, F] fp32 on the device, from noise to clean."""

    branches: Branches
    settings: Settings
    height: int
    width: int
    latents: Tensor
    taylor: dict[str, Taylor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ends = sampling_times(self.settings.num_timesteps, self.settings.timestep_shift)
        self.times, self.lengths = ends[:-1], ends[:-1] - ends[1:]

    def wanted(self, step: int) -> list[str]:
        """The branches whose velocities step `step` needs."""
        low, high = self.settings.cfg_interval
        if self.settings.cfg_text_scale <= 1 or not low < float(self.times[step]) <= high:
            return ["gen"]
        return ["gen", "cfg_text"] + (["cfg_img"] if self.settings.cfg_img_scale > 1 else [])


def begin_drawing(
    network: Network, branches: Branches, settings: Settings, size: tuple[int, int], generator: torch.Generator
) -> Drawing:
    """A picture of `size` (height, width) in pixels, as pure noise from `generator`."""
    height, width = size
    start = pictures.noise(network, pictures.tokens_of(network, height, width), generator)
    return Drawing(branches, settings, height, width, start.to(network.device))


def guided(velocities: dict[str, Tensor], settings: Settings) -> Tensor:
    """The velocity [M, F] to follow, from those of the branches at hand."""
    v = velocities["gen"]
    if "cfg_text" not in velocities:
        return v
    text = velocities["cfg_text"]
    w = text + settings.cfg_text_scale * (v - text)
    per_token = settings.cfg_renorm_type == "text_channel"
    if per_token:
        w = _renormed(w, v, settings, per_token=True)
    if "cfg_img" in velocities:
        image = velocities["cfg_img"]
        w = image + settings.cfg_img_scale * (w - image)
    return w if per_token else _renormed(w, v, settings, settings.cfg_renorm_type == "channel")


def _renormed(w: Tensor, v: Tensor, settings: Settings, per_token: bool) -> Tensor:
    """`w` no longer than `v`: over the image, or token by token."""
    if per_token:
        scale = v.norm(dim=-1, keepdim=True) / (w.norm(dim=-1, keepdim=True) + _EPS)
    else:
        scale = v.norm() / (w.norm() + _EPS)
    return w * scale.clamp(min=settings.cfg_renorm_min, max=1.0)


def draw(network: Network, drawings: Sequence[Drawing], on_step: OnStep = lambda done, total: None) -> None:
    """Take every drawing's latents from noise to clean."""
    total = max((len(drawing.times) for drawing in drawings), default=0)
    call = _Call(network)
    for step in range(total):
        under_way = [drawing for drawing in drawings if step < len(drawing.times)]
        velocities = _velocities(network, call, under_way, step)
        for drawing, found in zip(under_way, velocities):
            velocity = guided(found, drawing.settings)
            drawing.latents = drawing.latents - velocity * float(drawing.lengths[step])
        on_step(step + 1, total)


def _velocities(network: Network, call: _Call, drawings: Sequence[Drawing], step: int) -> list[dict[str, Tensor]]:
    """By drawing, the velocity of every branch wanted: computed in one call, or extrapolated."""
    found: list[dict[str, Tensor]] = [{} for _ in drawings]
    asked: list[tuple[int, str]] = []
    for number, drawing in enumerate(drawings):
        for branch in drawing.wanted(step):
            state = drawing.taylor.setdefault(branch, Taylor()) if drawing.settings.enable_taylorseer else None
            if state is None or state.computes:
                asked.append((number, branch))
            else:
                found[number][branch] = network.model.velocity_of(state.extrapolated())
    if asked:
        outputs = call([(drawings[number], branch) for number, branch in asked], step)
        for (number, branch), (velocity, last) in zip(asked, outputs):
            found[number][branch] = velocity
            if branch in drawings[number].taylor:
                drawings[number].taylor[branch].computed(last)
    return found


class _Call:
    """Calls of the network for images; the pack is laid out again only when other branches are asked for."""

    def __init__(self, network: Network) -> None:
        self.network = network
        self._asked: list[tuple[int, int]] = []
        self._pack: PackedBatch | None = None

    def __call__(self, asked: Sequence[tuple[Drawing, str]], step: int) -> list[tuple[Tensor, Tensor]]:
        """(velocity [M, F] fp32, the last layer's output [M, C]) of each branch at its drawing's latents.

        Branches of a drawing that share a context get the same, computed once.
        """
        keys = [(id(drawing), id(getattr(drawing.branches, branch))) for drawing, branch in asked]
        once = dict(zip(keys, asked))
        contexts = [getattr(drawing.branches, branch) for drawing, branch in once.values()]
        drawings = [drawing for drawing, _ in once.values()]
        if self._pack is None or list(once) != self._asked:
            queries = [[_query(drawing)] for drawing in drawings]
            self._asked, self._pack = list(once), self.network.laid_out(queries, contexts)
        sizes = [len(drawing.latents) for drawing in drawings]
        times = torch.tensor([float(drawing.times[step]) for drawing in drawings])
        t_G = times.repeat_interleave(torch.tensor(sizes)).to(self.network.device)
        latents_GF = torch.cat([drawing.latents for drawing in drawings])
        prediction, _ = self.network.predict(self._pack, contexts, latents_GF, t_G)
        outputs = dict(zip(once, zip(prediction.velocity.split(sizes), prediction.last.split(sizes))))
        return [outputs[key] for key in keys]


def _query(drawing: Drawing) -> Loaded:
    """The image to draw as an entry of a pack: nothing but its size."""
    pixels = torch.zeros(1, dtype=torch.uint8).expand(3, drawing.height, drawing.width)
    return Loaded(VAE, image=pixels, loss=True)
