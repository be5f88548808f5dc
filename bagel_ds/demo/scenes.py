"""Pictures of colored shapes, descriptions of them, and instructions that change them.

Guarantees: descriptions are true, and a picture after an instruction differs from the one before only by that change.
All choices come from the caller's `random.Random`, so equal seeds give equal pictures and texts.
"""

from __future__ import annotations

import dataclasses
import io
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

COLORS = {
    "red": (214, 40, 40),
    "green": (42, 157, 80),
    "blue": (38, 84, 200),
    "yellow": (245, 200, 30),
    "purple": (128, 60, 170),
    "orange": (243, 124, 32),
    "black": (30, 30, 36),
    "pink": (240, 130, 180),
}
BACKGROUNDS = {
    "white": (255, 255, 255),
    "grey": (205, 208, 212),
    "light blue": (205, 228, 246),
    "cream": (250, 240, 214),
}
KINDS = ("circle", "square", "triangle", "diamond")
SIZES = {"small": 0.5, "large": 0.9}
PLACES = ("top left", "top right", "bottom left", "bottom right")  # cells of a 2x2 layout, row by row


@dataclass(frozen=True)
class Shape:
    kind: str
    color: str
    size: str
    place: str

    @property
    def name(self) -> str:
        """Unique in its scene: no scene holds two shapes of one kind."""
        return f"{self.color} {self.kind}"


@dataclass(frozen=True)
class Scene:
    """Up to four shapes of different kinds, each in its own quarter of the picture."""

    width: int  # pixels
    height: int
    background: str
    shapes: tuple[Shape, ...]

    def free(self, of: str) -> list[str]:
        """Kinds, colors or places ("kind", "color", "place") that no shape of the scene has."""
        used = {getattr(shape, of) for shape in self.shapes}
        everything = {"kind": KINDS, "color": tuple(COLORS), "place": PLACES}[of]
        return [value for value in everything if value not in used]


def random_scene(rng: random.Random, count: int | None = None) -> Scene:
    """A scene with `count` shapes (None: 1 to 3), 64 to 96 pixels wide and high."""
    count = rng.randint(1, 3) if count is None else count
    kinds, colors = rng.sample(KINDS, count), rng.sample(list(COLORS), count)
    places = rng.sample(PLACES, count)
    shapes = tuple(
        Shape(kind, color, rng.choice(list(SIZES)), place)
        for kind, color, place in zip(kinds, colors, places, strict=True)
    )
    return Scene(rng.choice((64, 80, 96)), rng.choice((64, 80, 96)), rng.choice(list(BACKGROUNDS)), shapes)


def draw(scene: Scene) -> Image.Image:
    """The scene as an RGB picture."""
    picture = Image.new("RGB", (scene.width, scene.height), BACKGROUNDS[scene.background])
    pen = ImageDraw.Draw(picture)
    for shape in scene.shapes:
        row, column = divmod(PLACES.index(shape.place), 2)
        x, y = (column + 0.5) * scene.width / 2, (row + 0.5) * scene.height / 2
        radius = SIZES[shape.size] * min(scene.width, scene.height) / 4
        box = (x - radius, y - radius, x + radius, y + radius)
        color = COLORS[shape.color]
        if shape.kind == "circle":
            pen.ellipse(box, fill=color)
        elif shape.kind == "square":
            pen.rectangle(box, fill=color)
        elif shape.kind == "triangle":
            pen.polygon([(x, y - radius), (x + radius, y + radius), (x - radius, y + radius)], fill=color)
        else:
            pen.polygon([(x, y - radius), (x + radius, y), (x, y + radius), (x - radius, y)], fill=color)
    return picture


def encode(picture: Image.Image, form: str = "PNG") -> bytes:
    """The picture as the bytes of an image file."""
    buffer = io.BytesIO()
    picture.save(buffer, form, **({"quality": 92} if form == "JPEG" else {}))
    return buffer.getvalue()


def listing(names: list[str]) -> str:
    """ "a", "a and b", "a, b and c"."""
    return names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]


def captions(scene: Scene) -> dict[str, str]:
    """Several descriptions of one picture, by key."""
    names = [f"a {shape.name}" for shape in scene.shapes]
    placed = [f"a {shape.size} {shape.name} at the {shape.place}" for shape in scene.shapes]
    noun = "shape" if len(scene.shapes) == 1 else "shapes"
    return {
        "caption": f"{listing(names)} on a {scene.background} background",
        "caption_detailed": f"The picture shows {listing(placed)}. The background is {scene.background}.",
        "caption_count": f"A simple drawing of {len(scene.shapes)} {noun}: {', '.join(names)}.",
        "tags": ", ".join([shape.name for shape in scene.shapes] + [scene.background + " background"]),
    }


def random_edit(scene: Scene, rng: random.Random) -> tuple[Scene, list[str]]:
    """A changed scene and several ways to ask for the change."""
    changes: list[Callable[[Scene, random.Random], tuple[Scene, list[str]]]] = [_recolor, _background, _resize]
    if len(scene.shapes) > 1:
        changes.append(_remove)
    if scene.free("place"):
        changes.append(_move)
        if scene.free("kind"):
            changes.append(_add)
    return rng.choice(changes)(scene, rng)


def _with(scene: Scene, old: Shape, **changed: str) -> Scene:
    new = dataclasses.replace(old, **changed)
    return dataclasses.replace(scene, shapes=tuple(new if shape is old else shape for shape in scene.shapes))


def _recolor(scene: Scene, rng: random.Random) -> tuple[Scene, list[str]]:
    shape, color = rng.choice(scene.shapes), rng.choice(scene.free("color"))
    words = [f"Make the {shape.kind} {color}.", f"Change the colour of the {shape.name} to {color}."]
    return _with(scene, shape, color=color), words


def _background(scene: Scene, rng: random.Random) -> tuple[Scene, list[str]]:
    color = rng.choice([name for name in BACKGROUNDS if name != scene.background])
    words = [f"Make the background {color}.", f"Replace the {scene.background} background with a {color} one."]
    return dataclasses.replace(scene, background=color), words


def _resize(scene: Scene, rng: random.Random) -> tuple[Scene, list[str]]:
    shape = rng.choice(scene.shapes)
    size = "large" if shape.size == "small" else "small"
    verb = "Enlarge" if size == "large" else "Shrink"
    return _with(scene, shape, size=size), [f"Make the {shape.kind} {size}.", f"{verb} the {shape.name}."]


def _remove(scene: Scene, rng: random.Random) -> tuple[Scene, list[str]]:
    shape = rng.choice(scene.shapes)
    left = tuple(other for other in scene.shapes if other is not shape)
    words = [f"Remove the {shape.kind}.", f"Take the {shape.name} at the {shape.place} away."]
    return dataclasses.replace(scene, shapes=left), words


def _move(scene: Scene, rng: random.Random) -> tuple[Scene, list[str]]:
    shape, place = rng.choice(scene.shapes), rng.choice(scene.free("place"))
    return _with(scene, shape, place=place), [
        f"Move the {shape.kind} to the {place}.",
        f"Put the {shape.name} at the {place}.",
    ]


def _add(scene: Scene, rng: random.Random) -> tuple[Scene, list[str]]:
    new = Shape(
        rng.choice(scene.free("kind")),
        rng.choice(scene.free("color")),
        rng.choice(list(SIZES)),
        rng.choice(scene.free("place")),
    )
    words = [
        f"Add a {new.size} {new.name} at the {new.place}.",
        f"Draw a {new.size} {new.name} in the {new.place} corner.",
    ]
    return dataclasses.replace(scene, shapes=(*scene.shapes, new)), words
