"""Files that a clone without Git LFS left as pointers are named as what they are, wherever they are read."""

from __future__ import annotations

from pathlib import Path
from typing import Callable

import pytest

from bagel_ds.config_files import read_json, read_yaml
from bagel_ds.data.formats.registry import KINDS
from bagel_ds.data.index.data_file import layout_of
from bagel_ds.data.index.index import DataFile
from bagel_ds.data.samples.images import BadImage, decode_rgb, image_size
from bagel_ds.errors import UserError
from bagel_ds.git_lfs import pointer_fault
from bagel_ds.model_folder.tensor_files import read_header
from bagel_ds.model_folder.tokenizer import load_tokenizer

POINTER = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 29000000000\n"
WORDS = ("Git LFS pointer", "29,000,000,000 bytes", "git lfs pull", "hf download")


@pytest.mark.parametrize("read", [read_header, read_json, read_yaml])
@pytest.mark.parametrize("name", ["a.safetensors", "a.yaml", "a"])
def test_files_of_a_model_and_configs(read: Callable[[Path], object], name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    with pytest.raises(UserError) as caught:
        read(tmp_path / name)
    assert all(word in str(caught.value) for word in (str(tmp_path / name), *WORDS))
    assert "damaged" not in str(caught.value)


@pytest.mark.parametrize("names", [["tokenizer.json"], ["vocab.json", "merges.txt"], ["merges.txt", "vocab.json"]])
def test_tokenizers(names: list[str], tmp_path: Path) -> None:
    (tmp_path / names[0]).write_text(POINTER)
    for other in names[1:]:
        (tmp_path / other).write_text("{}")
    with pytest.raises(UserError) as caught:
        load_tokenizer(tmp_path)
    assert all(word in str(caught.value) for word in (names[0], *WORDS))


@pytest.mark.parametrize("kind, name", [("t2i_pretrain", "a.parquet"), ("vlm_sft", "a.jsonl")])
def test_data_files(kind: str, name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(POINTER)
    layout = layout_of(DataFile(str(tmp_path / name), KINDS[kind]))
    assert layout.rows == 0 and all(word in layout.error for word in WORDS)


def test_pictures(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text(POINTER)
    for source in (tmp_path / "a.png", POINTER.encode()):
        for read in (image_size, decode_rgb):
            with pytest.raises(BadImage, match="it is a Git LFS pointer"):
                read(source)


@pytest.mark.parametrize(
    "content", [b"", b"version https://example.org/spec/v1\n", b"\x89PNG", b" " + POINTER.encode()]
)
def test_anything_else_is_no_pointer(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(content)
    assert pointer_fault(tmp_path / "a") is None and pointer_fault(content) is None
    assert pointer_fault(tmp_path / "absent") is None and pointer_fault(tmp_path) is None
