"""What a model folder may hold, and what is refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
from tokenizers import Tokenizer as FastTokenizer
from tokenizers import decoders, pre_tokenizers

from bagel_ds.errors import UserError
from bagel_ds.model_folder import tokenizer as module
from bagel_ds.model_folder.tokenizer import complete_tokenizer, load_tokenizer
from tests.small_data import SPECIAL, byte_tokenizer


def _vocab_and_merges(folder: Path) -> None:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    (folder / "vocab.json").write_text(json.dumps({letter: i for i, letter in enumerate(alphabet)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")


def _listed(ids: dict[int, str]) -> str:
    return json.dumps({"added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in ids.items()}})


def test_encode_batch_equals_encode_and_decode_gives_the_text_back(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    texts = ["", " ", "héllo <|im_start|>", "画一只猫"]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == texts
    assert tokenizer.special.bos in tokenizer.encode(texts[2])
    assert tokenizer.size == 256 + len(SPECIAL)


def test_a_pickled_tokenizer_is_the_same(tmp_path: Path) -> None:
    tokenizer = byte_tokenizer(tmp_path)
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode("some text") == tokenizer.encode("some text")
    assert (copy.special, copy.fingerprint, copy.size) == (tokenizer.special, tokenizer.fingerprint, tokenizer.size)


def test_the_fingerprint_changes_with_the_vocabulary(tmp_path: Path) -> None:
    plain = byte_tokenizer(tmp_path / "a")
    assert plain.fingerprint == byte_tokenizer(tmp_path / "b").fingerprint
    assert plain.fingerprint != byte_tokenizer(tmp_path / "c", (*SPECIAL, "<|more|>")).fingerprint
    (tmp_path / "b" / "tokenizer_config.json").write_text(_listed({261: "<|more|>"}))
    assert plain.fingerprint != load_tokenizer(tmp_path / "b").fingerprint


def test_the_fingerprint_is_that_of_the_files_not_of_how_a_library_prints_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, read = byte_tokenizer(tmp_path), module._open

    def printed_otherwise(folder: Path) -> FastTokenizer:
        fast = read(folder)
        fast.decoder = decoders.Fuse()
        return fast

    monkeypatch.setattr(module, "_open", printed_otherwise)
    assert load_tokenizer(tmp_path).fingerprint == plain.fingerprint


@pytest.mark.parametrize("missing", SPECIAL)
def test_a_missing_special_token_is_named(tmp_path: Path, missing: str) -> None:
    with pytest.raises(UserError, match="lacks") as caught:
        byte_tokenizer(tmp_path, tuple(text for text in SPECIAL if text != missing))
    assert f"lacks {missing};" in str(caught.value)


def test_special_tokens_may_come_from_tokenizer_config_alone(tmp_path: Path) -> None:
    _vocab_and_merges(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(
        _listed({256 + i: text for i, text in enumerate(reversed(SPECIAL))})
    )
    special = load_tokenizer(tmp_path).special
    assert (special.end_of_image, special.end_of_text) == (256, 260)


def test_ids_that_contradict_the_vocabulary_are_refused(tmp_path: Path) -> None:
    _vocab_and_merges(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(_listed({300 + i: text for i, text in enumerate(SPECIAL)}))
    with pytest.raises(UserError, match="has id 256 .* but 300"):
        load_tokenizer(tmp_path)


def test_a_list_that_lacks_one_is_not_completed_by_guessing(tmp_path: Path) -> None:
    _vocab_and_merges(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(_listed({256 + i: text for i, text in enumerate(SPECIAL[:-1])}))
    with pytest.raises(UserError, match="lacks <.vision_end.>"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, "found: nothing"),
        ({"vocab.json": "{}"}, "found: vocab.json"),
        ({"tokenizer.json": "{"}, "can't be read as a tokenizer"),
        ({"vocab.json": "[", "merges.txt": ""}, "vocab.json is not valid JSON"),
    ],
)
def test_missing_or_broken_files_are_named(tmp_path: Path, files: dict[str, str], expected: str) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=expected) as caught:
        load_tokenizer(tmp_path)
    assert str(tmp_path) in str(caught.value)


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(tmp_path / "absent")


DEEP = "[" * 100_000 + "]" * 100_000
LISTED = "tokenizer_config.json"


def _entry(entry: str, number: str = "261") -> str:
    return f'{{"added_tokens_decoder": {{"{number}": {entry}}}}}'


# Kinds of nonsense that any of the files may hold instead of its content.
WHOLE = {
    "empty": "",
    "a list": '["a"]',
    "a number": "3",
    "null": "null",
    "text": '"nonsense"',
    "truncated": '{"model": {"vocab": {"a": 0',
    "deep": DEEP,
    "deep inside": f'{{"added_tokens_decoder": {DEEP}, "model": {DEEP}}}',
    "binary": b"\x00\xff\xfe",
    "a web page": "<html><body>Not found</body></html>",
}
CHANGED = {  # of the demo's tokenizer.json: keys and the value in their place
    "no model": ("model", None),
    "a model without a type": ("model", []),
    "a vocabulary that is a list": ("model.vocab", [1]),
    "ids that are text": ("model.vocab", {"a": "0"}),
    "ids below zero": ("model.vocab", {"a": -1}),
    "merges of unknown tokens": ("model.merges", ["qq zz"]),
    "merges that are a number": ("model.merges", 3),
    "added tokens that are text": ("added_tokens", ["a"]),
    "an added token without text": ("added_tokens", [{"id": 3}]),
    "an unknown pre-tokenizer": ("pre_tokenizer", {"type": "Nothing"}),
    "a broken pattern": (
        "pre_tokenizer",
        {"type": "Split", "pattern": {"Regex": "("}, "behavior": "Isolated", "invert": False},
    ),
    "a decoder that is a number": ("decoder", 3),
    # The library reads it, and panics when a text is encoded.
    "a template of unknown tokens": (
        "post_processor",
        {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "X", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        },
    ),
}
VOCABS = {
    "ids that are text": '{"a": "0"}',
    "ids that are fractions": '{"a": 0, "b": 1.5}',
    "ids below zero": '{"a": -1}',
    "ids too large": '{"a": 1099511627776}',
    "the same id twice": '{"a": 0, "b": 0}',
    "a number of 5000 digits": f'{{"a": {"9" * 5000}}}',
}
MERGES = {
    "one word": "abc\n",
    "three words": "a b c\n",
    "unknown tokens": "qq zz\n",
    "binary": b"\xff\xfe",
    "JSON": '{"a": 0}',
}
LISTS = {
    "a list": '{"added_tokens_decoder": [1]}',
    "text": '{"added_tokens_decoder": "abc"}',
    "true": '{"added_tokens_decoder": true}',
    "an entry that is text": _entry('"a"'),
    "an entry that is null": _entry("null"),
    "no content": _entry("{}"),
    "content that is a number": _entry('{"content": 3}'),
    "content that is a list": _entry('{"content": ["a"]}'),
    "empty content": _entry('{"content": ""}'),
    "half a surrogate pair": _entry('{"content": "\\ud800"}'),
    "a flag that is text": _entry('{"content": "a", "special": "no"}'),
    "an id that is a word": _entry('{"content": "a"}', "first"),
    "an id below zero": _entry('{"content": "a"}', "-1"),
    "an id that is a fraction": _entry('{"content": "a"}', "1.5"),
    "an id of 5000 digits": _entry('{"content": "a"}', "9" * 5000),
    "an id that others have": _entry('{"content": "a"}', "5"),
    "very long content": _entry(json.dumps({"content": "x" * 10**6}), "5"),
}
ADDED = {
    "ids that are text": '{"a": "b"}',
    "ids that are null": '{"a": null}',
    "ids that are lists": '{"a": [1]}',
    "infinite ids": '{"a": 1e999}',
    "half a surrogate pair": '{"\\ud800": 5}',
    "empty text": '{"": 5}',
}
NONSENSE = [
    *(("tokenizer.json", name, text) for name, text in WHOLE.items()),
    *(("vocab.json", name, text) for name, text in (WHOLE | VOCABS).items()),
    *(("merges.txt", name, text) for name, text in MERGES.items()),
    *((LISTED, name, text) for name, text in (WHOLE | LISTS).items()),
    *(("added_tokens.json", name, text) for name, text in (WHOLE | ADDED).items()),
]


@pytest.mark.parametrize(("file", "text"), [pytest.param(*case[::2], id=": ".join(case[:2])) for case in NONSENSE])
def test_nonsense_in_a_file_is_one_message_that_names_it(file: str, text: str | bytes, tmp_path: Path) -> None:
    if file in ("vocab.json", "merges.txt"):
        _vocab_and_merges(tmp_path)
    else:
        byte_tokenizer(tmp_path)
    (tmp_path / file).write_bytes(text if isinstance(text, bytes) else text.encode())
    _refuses(tmp_path, file)


@pytest.mark.parametrize(("key", "value"), CHANGED.values(), ids=CHANGED)
def test_a_tokenizer_json_that_makes_no_sense_is_one_message(key: str, value: object, tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    path = tmp_path / "tokenizer.json"
    content = json.loads(path.read_text())
    *outer, last = key.split(".")
    holder = content
    for name in outer:
        holder = holder[name]
    holder[last] = value
    path.write_text(json.dumps(content))
    _refuses(tmp_path, "tokenizer.json")


def _refuses(folder: Path, file: str) -> None:
    for load in (load_tokenizer, complete_tokenizer):
        with pytest.raises(UserError) as caught:
            load(folder)
        message = str(caught.value)
        assert str(folder) in message and file in message and len(message) < 500, message


def test_many_tokens_that_can_not_be_used_are_one_short_message(tmp_path: Path) -> None:
    byte_tokenizer(tmp_path)
    (tmp_path / LISTED).write_text(json.dumps({"added_tokens_decoder": {str(i): {} for i in range(300, 400)}}))
    with pytest.raises(UserError, match="lists tokens that can't be used") as caught:
        load_tokenizer(tmp_path)
    assert "added_tokens_decoder[300]" in str(caught.value) and "... and 92 more" in str(caught.value)


def test_a_config_without_a_list_of_tokens_is_accepted(tmp_path: Path) -> None:
    plain = byte_tokenizer(tmp_path)
    for text in ("{}", '{"added_tokens_decoder": null}', '{"added_tokens_decoder": {}}'):
        (tmp_path / LISTED).write_text(text)
        assert load_tokenizer(tmp_path).encode("text") == plain.encode("text")
