"""safetensors files read and written by range: interchangeable with the library's, damage is a message."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from bagel_ds.errors import UserError
from bagel_ds.model_folder.crc import joined_crc
from bagel_ds.model_folder.tensor_files import TensorFiles, TensorFileWriter, Written, joined_checksums, read_header
from bagel_ds.ranges import TensorInfo

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.uint8]


def values(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return (torch.rand(shape, generator=generator) * 200).to(dtype)


def write(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFileWriter(path, infos, metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, 0, tensor.flatten())
    return path


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_we_write_the_library_loads(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a.weight": values(dtype, 3, 5), "b": values(dtype, 7), "scalar": values(dtype)}
    loaded = load_file(write(tmp_path / "x.safetensors", tensors))
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype and torch.equal(loaded[name], tensor)


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_the_library_writes_we_read(dtype: torch.dtype, tmp_path: Path) -> None:
    tensors = {"a.weight": values(dtype, 3, 5), "b": values(dtype, 7)}
    save_file(tensors, tmp_path / "x.safetensors")
    files = TensorFiles([tmp_path / "x.safetensors"])
    assert sorted(files.names) == ["a.weight", "b"] and files.nbytes == 22 * dtype.itemsize
    for name, tensor in tensors.items():
        assert files.info(name) == TensorInfo(dtype, tuple(tensor.shape))
        assert torch.equal(files.read(name), tensor.flatten())


def test_ranges_written_in_any_order_make_the_tensor(tmp_path: Path) -> None:
    whole = values(torch.float32, 100)
    with TensorFileWriter(tmp_path / "x.safetensors", {"w": TensorInfo(torch.float32, (10, 10))}) as writer:
        for start, stop in ((70, 100), (0, 1), (1, 70)):
            writer.write("w", start, whole[start:stop])
    assert torch.equal(load_file(tmp_path / "x.safetensors")["w"], whole.view(10, 10))


def test_ranges_read_are_those_of_the_flattened_tensor(tmp_path: Path) -> None:
    whole = values(torch.bfloat16, 10, 10)
    files = TensorFiles([write(tmp_path / "x.safetensors", {"pad": values(torch.uint8, 3), "w": whole})])
    for start, numel in ((0, 100), (99, 1), (13, 29), (50, 0)):
        assert torch.equal(files.read("w", start, numel), whole.flatten()[start : start + numel])
    assert torch.equal(files.read("w", 40), whole.flatten()[40:])


def test_a_range_that_nobody_wrote_is_zero(tmp_path: Path) -> None:
    with TensorFileWriter(tmp_path / "x.safetensors", {"w": TensorInfo(torch.float32, (4,))}) as writer:
        writer.write("w", 1, torch.ones(2))
    assert load_file(tmp_path / "x.safetensors")["w"].tolist() == [0, 1, 1, 0]


def test_metadata_is_kept_and_names_the_format(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"w": values(torch.float32, 2)}, {"starts": "{}"})
    with safe_open(path, "pt") as opened:
        assert opened.metadata() == {"format": "pt", "starts": "{}"}
    assert TensorFiles([path]).metadata == {"format": "pt", "starts": "{}"}


def test_shards_are_one_source(tmp_path: Path) -> None:
    first = write(tmp_path / "1.safetensors", {"a": values(torch.float32, 2)})
    second = write(tmp_path / "2.safetensors", {"b": values(torch.float32, 3)})
    files = TensorFiles([first, second])
    assert "a" in files and "b" in files and "c" not in files
    assert files.read("b").shape == (3,)


def _header(content: object) -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text


_ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
_DAMAGED = {
    "empty": b"",
    "only a length": (100).to_bytes(8, "little"),
    "length beyond the file": (2**40).to_bytes(8, "little") + b"{}",
    "no json": _header(b"version https://git-lfs"),
    "no utf-8": _header(b'{"\xff": 1}'),
    "not an object": _header([1, 2]),
    "data cut short": _header({"w": _ENTRY}) + bytes(7),
    "offsets that do not fit the shape": _header({"w": {**_ENTRY, "shape": [3]}}) + bytes(12),
    "negative offsets": _header({"w": {**_ENTRY, "data_offsets": [-8, 0]}}) + bytes(8),
    "an entry without a dtype": _header({"w": {"shape": [2], "data_offsets": [0, 8]}}) + bytes(8),
    "an entry that is a number": _header({"w": 3}) + bytes(8),
    "fractions in a shape": _header({"w": {**_ENTRY, "shape": [1.5]}}) + bytes(8),
    "text as a shape": _header({"w": {**_ENTRY, "shape": "2"}}) + bytes(8),
    "metadata that are a number": _header({"__metadata__": 3, "w": _ENTRY}) + bytes(8),
    "deep nesting": _header(b'{"w":' * 50_000),
    "an unknown dtype": _header({"w": {**_ENTRY, "dtype": "?4"}}) + bytes(8),
}


@pytest.mark.parametrize("damage", list(_DAMAGED))
def test_a_damaged_file_is_a_message_that_names_it(damage: str, tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(_DAMAGED[damage])
    with pytest.raises(UserError, match=r"x\.safetensors.*again"):
        TensorFiles([path])


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: os.symlink("nowhere", path)])
def test_only_regular_files_are_opened(make: Callable[[Path], None], tmp_path: Path) -> None:
    """Opening a named pipe would wait for a writer."""
    make(tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"x\.safetensors is missing or not a regular file"):
        TensorFiles([tmp_path / "x.safetensors"])


def test_a_missing_shard_is_a_message(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.safetensors"):
        TensorFiles([tmp_path / "gone.safetensors"])


def test_read_header_gives_where_the_data_begins(tmp_path: Path) -> None:
    path = write(tmp_path / "x.safetensors", {"w": values(torch.float32, 2)})
    header, start = read_header(path)
    assert path.stat().st_size == start + 8 and start % 8 == 0
    assert header["w"]["data_offsets"] == [0, 8]


def test_an_error_while_writing_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="disk"):
        with TensorFileWriter(tmp_path / "x.safetensors", {"w": TensorInfo(torch.float32, (2,))}):
            raise KeyError("disk")


# ------------------------------------------------------------------------------------------ several writers of a file
@pytest.mark.parametrize("cuts", [[], [3], [1, 2, 8], [0, 10], [4, 4]])
def test_several_writers_of_a_file_make_the_one_that_a_single_writer_makes(cuts: list[int], tmp_path: Path) -> None:
    tensors = {"w": values(torch.bfloat16, 2, 5), "empty": values(torch.float32, 0), "b": values(torch.float32, 4)}
    infos = {name: TensorInfo(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFileWriter(write(tmp_path / "one.safetensors", tensors), infos) as one:
        for name, tensor in tensors.items():
            one.write(name, 0, tensor.flatten())
    edges = [0, *cuts, 10]
    writers = [
        TensorFileWriter(tmp_path / "many.safetensors", infos, joins=number > 0) for number in range(len(edges) - 1)
    ]
    for writer, low, high in reversed(list(zip(writers, edges, edges[1:]))):
        for at in range(low, high):  # in order, in pieces
            writer.write("w", at, tensors["w"].flatten()[at : at + 1])
    writers[-1].write("b", 0, tensors["b"])
    for writer in writers:
        writer.close()
    assert (tmp_path / "many.safetensors").read_bytes() == (tmp_path / "one.safetensors").read_bytes()
    found = joined_checksums(infos, [writer.written for writer in writers])
    files = TensorFiles([tmp_path / "many.safetensors"])
    assert found == {name: files.checksum(name) for name in infos} == one.checksums


def test_ranges_of_a_tensor_may_grow_in_turn(tmp_path: Path) -> None:
    """As when rank 0 writes what several ranks send it."""
    tensor = values(torch.float32, 10)
    with TensorFileWriter(tmp_path / "x.safetensors", {"w": TensorInfo(torch.float32, (10,))}) as writer:
        for start, stop in ((6, 8), (0, 2), (8, 9), (2, 6)):
            writer.write("w", start, tensor[start:stop])
            assert writer.checksums == {}
        writer.write("w", 9, tensor[9:])
        assert writer.checksums == {"w": zlib.crc32(tensor.numpy().tobytes())} and writer.written_bytes == 40
        writer.write("w", 3, tensor[3:4])
        assert writer.checksums == {}, "written twice"


@pytest.mark.parametrize(
    ("ranges", "fault"), [([(0, 4), (6, 10)], "4 to 6"), ([(0, 6), (4, 10)], "once"), ([(0, 9)], "9 to 10")]
)
def test_what_was_not_written_once_is_found(ranges: list[tuple[int, int]], fault: str) -> None:
    written = [{"w": [Written(start, stop, 0)]} for start, stop in ranges]
    with pytest.raises(AssertionError, match=fault):
        joined_checksums({"w": TensorInfo(torch.float32, (10,))}, written)


@pytest.mark.parametrize(("first", "second"), [(b"", b"x"), (b"x", b""), (b"abc" * 1000, bytes(70_001))])
def test_checksums_of_parts_join_to_that_of_the_whole(first: bytes, second: bytes) -> None:
    assert joined_crc(zlib.crc32(first), zlib.crc32(second), len(second)) == zlib.crc32(first + second)
