"""The tokenizer against the recorded ids, from every set of files a model folder may hold."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from bagel_ds.model_folder.tokenizer import load_tokenizer
from tests.recordings import read_json, reference

FOLDERS = {
    "tokenizer.json alone": ["tokenizer.json"],
    "tokenizer.json and config": ["tokenizer.json", "tokenizer_config.json"],
    "vocab and merges": ["vocab.json", "merges.txt", "tokenizer_config.json"],
    "vocab and merges alone": ["vocab.json", "merges.txt"],
    "everything": ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"],
}


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS.keys())
def test_every_recorded_text_has_the_recorded_ids(files: list[str], tmp_path: Path) -> None:
    for name in files:
        shutil.copy(reference() / "model" / name, tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    examples = read_json("tokenizer_examples")
    assert examples
    assert [tokenizer.encode(example["text"]) for example in examples] == [example["ids"] for example in examples]
    assert tokenizer.encode_batch([example["text"] for example in examples]) == [example["ids"] for example in examples]


@pytest.mark.parametrize("files", FOLDERS.values(), ids=FOLDERS.keys())
def test_special_tokens_are_those_the_recordings_were_made_with(files: list[str], tmp_path: Path) -> None:
    for name in files:
        shutil.copy(reference() / "model" / name, tmp_path)
    special = load_tokenizer(tmp_path).special
    ids = [read_json(f"packing/expected/{path.stem}")["special_token_ids"] for path in _sample_files()]
    assert ids
    for recorded in ids:
        assert (special.bos, special.eos) == (recorded["bos_token_id"], recorded["eos_token_id"])
        assert (special.start_of_image, special.end_of_image) == (recorded["start_of_image"], recorded["end_of_image"])
        assert special.end_of_text == recorded["end_of_text"]


def _sample_files() -> list[Path]:
    return sorted((reference() / "packing" / "expected").glob("samples_*.json"))
