"""What the demo says about its pictures is true of them."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from bagel_ds.demo.datasets import _general, _pair, _single
from bagel_ds.demo.scenes import BACKGROUNDS, COLORS, PLACES, Scene, Shape, captions, draw, random_edit, random_scene

SEEDS = range(60)


def centre_colors(scene: Scene) -> Mapping[str, tuple[int, ...]]:
    """Color in the middle of each quarter of the drawn picture."""
    picture = draw(scene)
    found = {}
    for index, place in enumerate(PLACES):
        row, column = divmod(index, 2)
        pixel = picture.getpixel(((2 * column + 1) * scene.width // 4, (2 * row + 1) * scene.height // 4))
        assert isinstance(pixel, tuple)
        found[place] = pixel
    return found


def expected_colors(scene: Scene) -> Mapping[str, tuple[int, ...]]:
    return dict.fromkeys(PLACES, BACKGROUNDS[scene.background]) | {
        shape.place: COLORS[shape.color] for shape in scene.shapes
    }


@pytest.mark.parametrize("seed", SEEDS)
def test_every_shape_is_drawn_where_and_in_the_color_it_is_said_to_be(seed: int) -> None:
    rng = random.Random(seed)
    scene = random_scene(rng)
    for _ in range(4):
        assert centre_colors(scene) == expected_colors(scene)
        scene, _ = random_edit(scene, rng)


@pytest.mark.parametrize("seed", SEEDS)
def test_an_edit_changes_one_thing_keeps_the_size_and_names_what_changes(seed: int) -> None:
    rng = random.Random(seed)
    before = random_scene(rng)
    after, instructions = random_edit(before, rng)
    assert (after.width, after.height) == (before.width, before.height)
    changed = set(before.shapes) ^ set(after.shapes)
    assert (after.background != before.background) != bool(changed)
    assert 0 < len(after.shapes) <= 4 and len(instructions) > 1
    words = {shape.kind for shape in changed} or {after.background}
    assert all(any(word in text for word in words) for text in instructions)


def test_no_scene_holds_two_shapes_of_one_kind_place_or_color() -> None:
    for seed in SEEDS:
        rng = random.Random(seed)
        scene = random_scene(rng)
        for _ in range(4):
            for attribute in ("kind", "place"):
                values = [getattr(shape, attribute) for shape in scene.shapes]
                assert len(values) == len(set(values))
            scene, _ = random_edit(scene, rng)


def test_captions_name_every_shape() -> None:
    scene = Scene(
        64, 64, "white", (Shape("circle", "red", "small", "top left"), Shape("square", "blue", "large", "top right"))
    )
    assert captions(scene)["caption"] == "a red circle and a blue square on a white background"
    for text in captions(scene).values():
        assert "red circle" in text and "blue square" in text


@pytest.mark.parametrize("seed", SEEDS)
def test_answers_follow_from_the_pictures(seed: int) -> None:
    rng = random.Random(seed)
    first, second = random_scene(rng), random_scene(rng)
    for question, answer in _single([first], rng):
        kinds = {shape.kind: shape for shape in first.shapes}
        if question.startswith("How many"):
            assert str(len(first.shapes)) in answer
        elif question.startswith("What colour is the"):
            assert kinds[question[:-1].split()[-1]].color in answer
        elif question.startswith("Is there"):
            assert answer.startswith("Yes") == (question.split()[3] in kinds)
    for question, answer in _pair([first, second], rng):
        if question.startswith("Do the"):
            assert answer.startswith("Yes") == (first.background == second.background)
        elif question.startswith("Which picture"):
            more = {-1: "second", 0: "Both", 1: "first"}
            sign = (len(first.shapes) > len(second.shapes)) - (len(first.shapes) < len(second.shapes))
            assert more[sign] in answer
    assert all(question and answer for question, answer in _general([], rng))
