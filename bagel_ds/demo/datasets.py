"""A small `bagel_example`: text-to-image, editing and vision-language data on colored shapes.

Guarantees: folders, file names, columns and JSON keys are those of the published bagel_example, with several parquet
files of several row groups each. Captions, instructions and answers are true. Every function returns the texts that it
wrote, for the tokenizer. The caller's `random.Random` determines everything.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pyarrow as pa

from bagel_ds.demo.parquet import write_info, write_parquet
from bagel_ds.demo.scenes import (
    COLORS,
    KINDS,
    PLACES,
    Scene,
    captions,
    draw,
    encode,
    listing,
    random_edit,
    random_scene,
)

T2I_SCHEMA = pa.schema([("image", pa.binary()), ("captions", pa.string())])
EDIT_SCHEMA = pa.schema([("image_list", pa.list_(pa.binary())), ("instruction_list", pa.list_(pa.list_(pa.string())))])
FORMATS = ("PNG", "JPEG")


def write_t2i(root: Path, folder: str, rng: random.Random, rows: int = 160, files: int = 2) -> list[str]:
    """Pictures, each with a JSON object of captions."""
    written: list[dict[str, Any]] = []
    texts: list[str] = []
    for number in range(rows):
        scene = random_scene(rng)
        words = captions(scene)
        texts += words.values()
        picture = encode(draw(scene), FORMATS[number // 2 % 2])
        written.append({"image": picture, "captions": json.dumps(words)})
    _write_files(root, folder, written, T2I_SCHEMA, files)
    return texts


def write_edit(root: Path, folder: str, info: str, rng: random.Random, rows: int = 120, files: int = 2) -> list[str]:
    """Pairs of pictures with an instruction in several wordings; every fourth row is a sequence of three pictures."""
    written: list[dict[str, Any]] = []
    texts: list[str] = []
    for number in range(rows):
        scenes, instructions = [random_scene(rng)], []
        for _ in range(2 if number % 4 == 3 else 1):
            after, words = random_edit(scenes[-1], rng)
            scenes.append(after)
            instructions.append(words)
            texts += words
        pictures = [encode(draw(scene), FORMATS[number // 2 % 2]) for scene in scenes]
        written.append({"image_list": pictures, "instruction_list": instructions})
    names = _write_files(root, folder, written, EDIT_SCHEMA, files)
    write_info(root, root / info, names)
    return texts


def write_vlm(root: Path, images: str, jsonl: str, rng: random.Random, rows: int = 160) -> list[str]:
    """Conversations about zero, one or two pictures, with one to three turns each."""
    (root / images / "pairs").mkdir(parents=True, exist_ok=True)
    lines: list[str] = []
    texts: list[str] = []
    for number in range(rows):
        scenes = [random_scene(rng) for _ in range((1, 1, 2, 1, 0)[number % 5])]
        names = [_image_name(number, index, len(scenes)) for index in range(len(scenes))]
        for name, scene in zip(names, scenes, strict=True):
            (root / images / name).write_bytes(encode(draw(scene), "PNG" if name.endswith("png") else "JPEG"))
        turns = [_general, _single, _pair][len(scenes)](scenes, rng)
        texts += [text for turn in turns for text in turn]
        line: dict[str, Any] = {"id": f"shapes_{number:04d}"}
        if names:
            line["image"] = names[0] if len(names) == 1 else names
        turns[0] = ("<image>\n" * len(scenes) + turns[0][0], turns[0][1])
        line["conversations"] = [
            {"from": speaker, "value": text}
            for turn in turns
            for speaker, text in zip(("human", "gpt"), turn, strict=True)
        ]
        lines.append(json.dumps(line))
    (root / jsonl).write_text("\n".join(lines) + "\n")
    return texts


def _write_files(root: Path, folder: str, rows: list[dict[str, Any]], schema: pa.Schema, files: int) -> list[str]:
    names = [f"{folder}/{number:05d}.parquet" for number in range(files)]
    for number, name in enumerate(names):
        write_parquet(root / name, rows[number::files], schema, row_groups=3)
    return names


def _image_name(row: int, index: int, of: int) -> str:
    suffix = "jpg" if row % 3 else "png"
    return f"{row:04d}.{suffix}" if of == 1 else f"pairs/{row:04d}_{index}.{suffix}"


Turn = tuple[str, str]  # question, answer


def _single(scenes: list[Scene], rng: random.Random) -> list[Turn]:
    """One to three different questions about one picture."""
    scene = scenes[0]
    shape = rng.choice(scene.shapes)
    asked = rng.choice(KINDS)
    here = any(other.kind == asked for other in scene.shapes)
    count = len(scene.shapes)
    turns: list[Turn] = [
        ("How many shapes are in the picture?", f"There {'is' if count == 1 else 'are'} {count}."),
        (f"What colour is the {shape.kind}?", f"The {shape.kind} is {shape.color}."),
        (f"Where is the {shape.name}?", f"It is at the {shape.place}."),
        (f"Is there a {asked} in the picture?", f"Yes, there is a {asked}." if here else f"No, there is no {asked}."),
        ("What is the colour of the background?", f"The background is {scene.background}."),
        ("Describe the picture.", captions(scene)["caption_detailed"]),
        (f"Is the {shape.kind} small or large?", f"The {shape.kind} is {shape.size}."),
    ]
    return rng.sample(turns, rng.randint(1, 3))


def _pair(scenes: list[Scene], rng: random.Random) -> list[Turn]:
    """One or two questions about two pictures."""
    first, second = scenes
    few, many = len(first.shapes), len(second.shapes)
    more = "Both have the same number of shapes." if few == many else f"The {'first' if few > many else 'second'} one."
    shared = [kind for kind in KINDS if all(any(shape.kind == kind for shape in scene.shapes) for scene in scenes)]
    both = f"Both show a {listing(shared)}." if shared else "They have no shape in common."
    same = "Yes" if first.background == second.background else "No"
    turns: list[Turn] = [
        ("Which picture has more shapes?", more),
        ("Which shapes are in both pictures?", both),
        ("Do the pictures have the same background?", f"{same}: {first.background} and {second.background}."),
    ]
    return rng.sample(turns, rng.randint(1, 2))


def _general(scenes: list[Scene], rng: random.Random) -> list[Turn]:
    """Questions without a picture."""
    a, b = rng.randint(1, 9), rng.randint(1, 9)
    corners = {"circle": "no corners", "square": "four corners", "triangle": "three corners", "diamond": "four corners"}
    kind, place = rng.choice(KINDS), rng.choice(PLACES)
    opposite = {"top": "bottom", "bottom": "top", "left": "right", "right": "left"}
    turns: list[Turn] = [
        (f"What is {a} plus {b}?", f"{a} + {b} = {a + b}."),
        (f"How many corners does a {kind} have?", f"A {kind} has {corners[kind]}."),
        (f"What is opposite to the {place}?", "The " + " ".join(opposite[word] for word in place.split()) + "."),
        ("Name two colours.", f"{listing(rng.sample(list(COLORS), 2)).capitalize()}."),
    ]
    return rng.sample(turns, rng.randint(1, 3))
