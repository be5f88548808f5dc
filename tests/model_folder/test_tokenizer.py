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
from bagel_ds.model_folder.tokenizer import load_tokenizer
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
        ({"tokenizer.json": "{"}, "cannot be read as a tokenizer"),
        ({"vocab.json": "[", "merges.txt": ""}, "cannot be read as a tokenizer"),
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
