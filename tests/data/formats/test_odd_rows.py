"""Rows as people have them: each is used as in the original, or is a bad row whose reason says what was found where."""

from __future__ import annotations

import json
import math
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats import KINDS, record
from bagel_ds.data.formats.record import (
    UNUSED_IMAGE,
    UNUSED_TEXT,
    ParsedRow,
    decode_record,
    encode_record,
    reason_of,
)
from bagel_ds.data.samples.sample import BadRow
from bagel_ds.data.samples.video import Video
from bagel_ds.git_lfs import pointer_fault
from bagel_ds.model_folder.tokenizer import Tokenizer
from tests.small_data import byte_tokenizer, conversation, picture

PNG = picture(40, 30)
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"a" * 64 + b"\nsize 12345\n"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return byte_tokenizer(tmp_path_factory.mktemp("tokenizer"))


def _indexed(kind: str, row: Any, tokenizer: Tokenizer, folder: Path | str = "") -> ParsedRow | str:
    """The row as the index sees it, or why it is bad."""
    try:
        parsed = KINDS[kind].parse(row, ImageFolder(str(folder)))
        encode_record(parsed, tokenizer)
    except Exception as error:
        return reason_of(error)
    return parsed


# ------------------------------------------------------------------------------------------------------ conversations
@pytest.fixture
def images(tmp_path: Path) -> Path:
    """data_dir with a.png, a copy with a space in its name, and what can't be opened as a picture."""
    folder = tmp_path / "img"
    (folder / "sub").mkdir(parents=True)
    for name in ("a.png", "sub/b c.png"):
        (folder / name).write_bytes(PNG)
    (folder / "pointer.png").write_bytes(POINTER)
    (folder / "page.png").write_text("<!DOCTYPE html><html>404</html>")
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket may have 107 bytes
        server.bind("socket.png")
        os.chdir(here)
    return folder


@pytest.mark.parametrize("image", ["", [], None, math.nan])
def test_no_image_in_any_form_is_a_text_only_row(image: Any, tokenizer: Tokenizer) -> None:
    parsed = _indexed("vlm_sft", {"image": image, **_talk("What is two plus two?")}, tokenizer, "img")
    assert isinstance(parsed, ParsedRow) and parsed.images == [] and not parsed.notes


@pytest.mark.parametrize("name", ["a.png", "./a.png", "sub/b c.png", "{folder}/a.png", "sub/./b c.png"])
def test_names_of_files_in_the_folder_are_used(name: str, images: Path, tokenizer: Tokenizer) -> None:
    row = {"image": name.format(folder=images), **_talk("<image>\nWhat?")}
    parsed = _indexed("vlm_sft", row, tokenizer, images)
    assert isinstance(parsed, ParsedRow)
    assert [Path(str(image)).resolve().parent.name for image in parsed.images] in (["img"], ["sub"])


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("sub\\b c.png", "{folder}/sub\\b c.png: no such file; backslashes do not separate folders here, write /"),
        ("img/a.png", "{folder}/img/a.png: no such file; {folder}/a.png exists: the path repeats the end of data_dir"),
        ("x/y/a.png", "{folder}/x/y/a.png: no such file; {folder}/a.png exists"),
        ("https://example.com/a.png", "/example.com/a.png: no such file; 'https://example.com/a.png' is a URL"),
        ("A.PNG", "{folder}/A.PNG: no such file"),
        ("sub", "{folder}/sub: it is a folder, not a file"),
        ("pipe.png", "{folder}/pipe.png: it is a named pipe, not a file"),
        ("socket.png", "{folder}/socket.png: it is a socket, not a file"),
        ("dangling.png", "{folder}/dangling.png: it is a link to {folder}/nowhere.png, which does not exist"),
        ("pointer.png", "{folder}/pointer.png: " + str(pointer_fault(POINTER))),
        ("page.png", "{folder}/page.png: not a readable image (unknown format)"),
        ("../x.png", "the image path '../x.png' leaves the image folder"),
        ("/etc/passwd", "the image path '/etc/passwd' leaves the image folder"),
        ("C:\\data\\a.png", "the image path 'C:\\\\data\\\\a.png' leaves the image folder"),
        ("a\0.png", "leaves the image folder"),
        ("\ud800.png", "\\ud800"),
        ("x" * 300 + ".png", "File name too long"),
        (7, "image is 7, expected a path below the image folder"),
        ({"path": "a.png", "bytes": None}, "image is a mapping, expected a path"),
        ([None], "image is nothing, expected a path"),
    ],
)
def test_a_picture_that_cannot_be_opened_is_named_as_it_was_tried(
    name: Any, reason: str, images: Path, tokenizer: Tokenizer
) -> None:
    found = _indexed("vlm_sft", {"image": name, **_talk("<image>\nWhat?")}, tokenizer, images)
    assert isinstance(found, str) and reason.replace("{folder}", str(images)) in found
    found.encode()  # can be printed


@pytest.mark.parametrize(
    ("turns", "notes"),
    [
        ([("user", "<image>\nWhat?")], [(UNUSED_TEXT, "turn 0 has the role 'user'"), (UNUSED_IMAGE, "no turn shows")]),
        ([("Human", "<image>")], [(UNUSED_TEXT, "turn 0 has the role 'Human'"), (UNUSED_IMAGE, "no turn shows")]),
        ([("human", "What?")], [(UNUSED_IMAGE, "/img/a.png: a human turn needs a further <image>")]),
        ([("human", "<Image>What?")], [(UNUSED_IMAGE, "a.png")]),
        ([("system", "Be brief."), ("human", "<image>")], [(UNUSED_TEXT, "turn 0 has the role 'system'")]),
        ([(None, "<image>")], [(UNUSED_TEXT, "turn 0 has the role nothing"), (UNUSED_IMAGE, "a.png")]),
        ([None, ("human", "<image>")], [(UNUSED_TEXT, "turn 0 is nothing and is ignored")]),
        ([("human", "<image>")], []),
    ],
)
def test_what_a_conversation_loses_is_noted(
    turns: list[Any], notes: list[tuple[str, str]], images: Path, tokenizer: Tokenizer
) -> None:
    given_turns = [turn and {"from": turn[0], "value": turn[1]} for turn in turns]
    row = {"image": "a.png", "conversations": [*given_turns, {"from": "gpt", "value": "Red."}]}
    parsed = _indexed("vlm_sft", row, tokenizer, images)
    assert isinstance(parsed, ParsedRow), parsed
    assert [note.kind for note in parsed.notes] == [kind for kind, _ in notes]
    assert all(text in note.text for note, (_, text) in zip(parsed.notes, notes, strict=True))


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"images": ["a.png"], **conversation("<image>", "Red.")}, "the key is `image`"),
        ({"messages": []}, "the row has no conversations; its keys are 'messages'"),
        ({"conversations": "[]"}, "conversations is '[]', expected a list"),
        ({"conversations": [{"from": "human", "value": None}]}, "the value of turn 0 is nothing, expected text"),
        ({"conversations": [{"from": "gpt", "value": 3}]}, "the value of turn 0 is 3, expected text"),
        ({"conversations": [{"from": "user", "value": "x"}]}, "nothing to learn (turn 0 has the role 'user'"),
        (conversation("\ud800", "Red."), "a text is not valid Unicode"),
    ],
)
def test_conversations_that_cannot_be_used_say_why(row: Any, reason: str, tokenizer: Tokenizer) -> None:
    found = _indexed("vlm_sft", row, tokenizer, "img")
    assert isinstance(found, str) and reason in found


def _talk(question: str) -> dict[str, Any]:
    return {"conversations": conversation(question, "A red square.")["conversations"]}


# -------------------------------------------------------------------------------------------------------- parquet rows
CAPTION_TYPES = {
    "large_string": pa.array(['{"a": "one"}'], pa.large_string()),
    "dictionary": pa.array(['{"a": "one"}']).dictionary_encode(),
    "binary": pa.array([b'{"a": "one"}']),
    "fixed_list": pa.array([["one"]], pa.list_(pa.string(), 1)),
    "large_list": pa.array([["one"]], pa.large_list(pa.string())),
    "map": pa.array([[("a", "one")]], pa.map_(pa.string(), pa.string())),
    "struct": pa.array([{"a": "one", "b": None}]),
}


@pytest.mark.parametrize("name", CAPTION_TYPES)
def test_captions_of_any_arrow_type_are_used(name: str, tokenizer: Tokenizer) -> None:
    parsed = _indexed("t2i_pretrain", {"image": PNG, "captions": CAPTION_TYPES[name][0].as_py()}, tokenizer)
    assert isinstance(parsed, ParsedRow) and parsed.texts == ["one"]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"captions": None}, "the row has no caption"),
        ({"captions": "null"}, "captions holds nothing, expected a list or an object"),
        ({"captions": "3"}, "captions holds 3"),
        ({"captions": "a red cat"}, "captions is not valid JSON"),
        ({"captions": '{"a": null}'}, "none of the captions is text"),
        ({"captions": "[" * 100_000}, "nested too deeply"),
        ({"caption": 3}, "caption is 3, expected text"),
        ({"caption": b"a cat"}, "caption is 5 bytes, expected text"),
        ({"caption": "\ud800"}, "a text is not valid Unicode"),
        ({"caption": "x", "image": {"bytes": None, "path": "x.png"}}, "image has the path 'x.png' and no bytes"),
        ({"caption": "x", "image": "images/x.png"}, "image is 'images/x.png', expected the bytes of an image file"),
        ({"caption": "x", "image": [1, 2]}, "image is a list, expected the bytes"),
        ({"caption": "x", "image": None}, "image holds no image bytes"),
        ({"caption": "x", "image": POINTER}, "it is a Git LFS pointer"),
    ],
)
def test_a_picture_with_captions_that_cannot_be_used_says_why(
    row: dict[str, Any], reason: str, tokenizer: Tokenizer
) -> None:
    found = _indexed("t2i_pretrain", {"image": PNG, **row}, tokenizer)
    assert isinstance(found, str) and reason in found


def _puzzle(**changes: Any) -> dict[str, Any]:
    text, image = {"type": "text", "content": "Q", "index": None}, {"type": "image", "content": None, "index": 0}
    row = {"question_interleave": [text, image], "solution_interleave": [text, image], "answer": "12"}
    return {**row, "question_images": [PNG], "solution_images": [PNG], **changes}


@pytest.mark.parametrize("index", [0, 1, 0.0, 1.0])
def test_whole_indexes_show_their_picture(index: float, tokenizer: Tokenizer) -> None:
    other = picture(50, 50)
    row = _puzzle(question_interleave=[{"type": "image", "index": index}], question_images=[PNG, other])
    parsed = _indexed("interleave_reasoning", row, tokenizer)
    assert isinstance(parsed, ParsedRow) and parsed.images[0] == (PNG, other)[int(index)]
    assert [(note.kind, note.text) for note in parsed.notes] == [
        (UNUSED_IMAGE, f"no item shows question_images[{1 - int(index)}]")
    ]


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        (0.5, "has index 0.5, expected a whole number"),
        (-0.5, "has index -0.5, expected a whole number"),
        (-1, "has index -1, but question_images has 1 images, numbered from 0"),
        (1, "has index 1, but question_images has 1 images"),
        (True, "has index True, expected a whole number"),
        (False, "has index False, expected a whole number"),
        ("0", "has index '0', expected a whole number"),
        (math.inf, "has index inf, expected a whole number"),
        (math.nan, "is an image without an index"),
        (None, "is an image without an index"),
        (10**400, "has index a number of"),
    ],
)
def test_other_indexes_are_bad_rows(index: Any, reason: str, tokenizer: Tokenizer) -> None:
    found = _indexed(
        "interleave_reasoning", _puzzle(question_interleave=[{"type": "image", "index": index}]), tokenizer
    )
    assert isinstance(found, str) and f"question_interleave[0] {reason}" in found


@pytest.mark.parametrize(
    ("kind", "row", "reason"),
    [
        ("interleave_reasoning", _puzzle(question_images={0: PNG}), "question_images is a mapping, expected a list"),
        ("interleave_reasoning", _puzzle(question_images=PNG), "bytes, expected a list"),
        ("interleave_reasoning", _puzzle(question_images=None), "question_images has 0 images"),
        ("interleave_reasoning", _puzzle(question_interleave="[]"), "question_interleave is '[]', expected a list"),
        ("interleave_reasoning", _puzzle(solution_interleave=[]), "solution_interleave is empty"),
        ("interleave_reasoning", _puzzle(question_interleave=[{"type": "Text"}]), "[0] has type 'Text', expected"),
        ("interleave_reasoning", _puzzle(question_interleave=[7]), "[0] has type nothing, expected"),
        (
            "interleave_reasoning",
            _puzzle(question_interleave=[{"type": "text", "content": b"Q"}]),
            "the content of question_interleave[0] is 1 bytes, expected text",
        ),
        ("unified_edit", {"image_list": [PNG], "instruction_list": [["x"]]}, "holds 1 images, at least 2"),
        ("unified_edit", {"image_list": [PNG, None], "instruction_list": [["x"]]}, "image_list[1] holds no image"),
        ("unified_edit", {"image_list": [PNG, PNG], "instruction_list": "[]"}, "instruction_list is '[]', expected"),
        ("unified_edit", {"image_list": [PNG, PNG], "instruction_list": [[b"x"]]}, "instruction_list[0] must hold"),
        ("unified_edit", {"image_list": {"0": PNG}, "instruction_list": []}, "image_list is a mapping"),
    ],
)
def test_rows_of_several_pictures_that_cannot_be_used_say_why(
    kind: str, row: Any, reason: str, tokenizer: Tokenizer
) -> None:
    found = _indexed(kind, row, tokenizer)
    assert isinstance(found, str) and reason in found


def test_an_instruction_after_the_last_picture_is_noted(tokenizer: Tokenizer) -> None:
    row = {"image_list": [PNG, PNG], "instruction_list": [["a"], ["b"]]}
    parsed = _indexed("unified_edit", row, tokenizer)
    assert isinstance(parsed, ParsedRow) and [note.kind for note in parsed.notes] == [UNUSED_TEXT]


_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=8) | st.just(PNG),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["type", "index", "content"]), inner),
    max_leaves=6,
)
_KEYS = {
    "t2i_pretrain": ("image", "captions", "caption"),
    "unified_edit": ("image_list", "instruction_list"),
    "vlm_sft": ("image", "video", "conversations"),
    "interleave_reasoning": (*_puzzle(),),
}


@pytest.mark.parametrize("kind", _KEYS)
@given(data=st.data())
def test_no_value_of_a_row_is_unexpected(kind: str, data: st.DataObject, tokenizer: Tokenizer) -> None:
    """Also values nobody thought of are checked where they are read."""
    row = {key: data.draw(_values, key) for key in _KEYS[kind]}
    found = _indexed(kind, row, tokenizer, "/nowhere")
    assert isinstance(found, ParsedRow) or "unexpected content" not in found
    if isinstance(found, str):
        found.encode()
        assert len(found) < 700


# -------------------------------------------------------------------------------------------------------------- limits
def test_texts_are_used_up_to_the_limit_of_their_length(tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(record, "MAX_TEXT", 10)
    asked: list[int] = []
    encode = tokenizer.encode_batch
    monkeypatch.setattr(tokenizer, "encode_batch", lambda texts: asked.append(sum(map(len, texts))) or encode(texts))
    texts = ["x" * 10, "", "x" * 6, "x" * 5, "x"]
    assert decode_record(encode_record(ParsedRow((), texts, []), tokenizer)).text_lengths == [10, 0, 6, 5, 1]
    assert max(asked) == 10 and len(asked) == 3, "the tokenizer never gets more than the limit at once"
    with pytest.raises(BadRow, match="text 1 of the row has 11 characters, more than 10"):
        encode_record(ParsedRow((), ["x", "x" * 11], []), tokenizer)


def test_the_limit_of_a_text_is_far_above_any_sample() -> None:
    assert record.MAX_TEXT >= 1_000_000, "a sample of 131,072 tokens has about 500,000 characters"


@pytest.mark.parametrize(("frames", "fits"), [(2**31 - 1, True), (2**31, False), (2**32 - 1, False)])
def test_numbers_of_a_record_fit_into_the_index(frames: int, fits: bool, tokenizer: Tokenizer) -> None:
    parsed = ParsedRow((3, frames), [], [Video(Path("x.avi"), frames, 64, 48)])
    if fits:
        assert encode_record(parsed, tokenizer)[3] == frames
    else:
        with pytest.raises(BadRow, match=f"is {frames}, more than 2147483647"):
            encode_record(parsed, tokenizer)


def test_a_reason_is_words_whatever_was_raised() -> None:
    assert reason_of(KeyError(0)) == "unexpected content (KeyError: 0)"
    assert reason_of(RecursionError("maximum recursion depth")) == "its values are nested too deeply"
    assert reason_of(BadRow("bad \ud800\n  name")) == "bad \\ud800 name"
    assert len(reason_of(BadRow(json.dumps("x" * 10_000)))) < 700
