"""Reads and writes safetensors files by flat range.

Guarantees: reading maps the file and copies only the requested range; writing puts each range directly at its place in
the file. So neither ever holds a whole tensor. The header is checked when a file is opened. The files are ordinary
safetensors files.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import zlib
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterable, Mapping, NamedTuple

import numpy as np
import torch
from torch import Tensor

from bagel_ds.errors import NO_SPACE, UserError
from bagel_ds.git_lfs import pointer_fault
from bagel_ds.machine.liveness import going_on
from bagel_ds.model_folder.crc import joined_crc
from bagel_ds.ranges import TensorInfo
from bagel_ds.units import GIB

_TORCH = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    # Known only so that a message can name them.
    "I8": torch.int8,
    "I16": torch.int16,
    "U16": torch.uint16,
    "U32": torch.uint32,
    "U64": torch.uint64,
    "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
}
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # that weights may have
_NUMBER_FORMAT = re.compile(r"[A-Z]+\d+(_\w+)?")
_CHECKSUM_BYTES = 2**24
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


UNQUANTIZED = (
    "Quantized weights can't be trained: use weights in bf16 or fp32, such as those that `bagel-ds download` fetches"
)


def dtype_fault(files: TensorFiles, names: Iterable[str]) -> str | None:
    """What is wrong with the dtypes of tensors to train, as a message, or None. Missing tensors are skipped."""
    wrong = [name for name in names if name in files and files.info(name).dtype not in WEIGHT_DTYPES]
    if not wrong:
        return None
    formats = sorted({_NAMES[files.info(name).dtype] for name in wrong})
    count = f"tensor {wrong[0]} is" if len(wrong) == 1 else f"{len(wrong)} tensors, such as {wrong[0]}, are"
    return f"{count} stored as {' and '.join(formats)}. {UNQUANTIZED}"


class TensorFiles:
    """Several safetensors files as one `WeightSource`."""

    def __init__(self, paths: Iterable[Path]):
        self.paths = [Path(path) for path in paths]
        self._where: dict[str, tuple[np.memmap, TensorInfo, int]] = {}
        self.metadata: dict[str, str] = {}
        for path in self.paths:
            header, data_start = read_header(path)
            self.metadata.update(header.pop("__metadata__"))
            mapped = np.memmap(path, dtype=np.uint8, mode="r")
            for name, entry in header.items():
                info, start, stop = _placed(path, name, entry, data_start)
                if stop > len(mapped) or stop - start != info.nbytes:
                    raise UserError(
                        f"{path}: the file is cut short or damaged at tensor {name!r} (it needs {stop:,} bytes, the "
                        f"file has {len(mapped):,}). Download or copy it again."
                    )
                self._where[name] = (mapped, info, start)

    def __contains__(self, name: str) -> bool:
        return name in self._where

    @property
    def names(self) -> list[str]:
        return list(self._where)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for _, info, _ in self._where.values())

    def info(self, name: str) -> TensorInfo:
        return self._where[name][1]

    def place(self, name: str) -> tuple[int, int]:
        """Offsets of a tensor's first byte, and of the byte after its last, in its file."""
        _, info, offset = self._where[name]
        return offset, offset + info.nbytes

    def checksum(self, name: str, first: int = 0, last: int | None = None) -> int:
        """CRC-32 of a tensor's bytes, or of those in [first, last)."""
        mapped, info, offset = self._where[name]
        stop = offset + (info.nbytes if last is None else last)
        found = 0
        for start in range(offset + first, stop, _CHECKSUM_BYTES):
            found = zlib.crc32(mapped[start : min(start + _CHECKSUM_BYTES, stop)].data, found)
            going_on()
        return found

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        mapped, info, offset = self._where[name]
        numel = info.numel - start if numel is None else numel
        assert 0 <= start and start + numel <= info.numel, (name, start, numel, info)
        if numel == 0:
            return torch.empty(0, dtype=info.dtype)
        size = info.dtype.itemsize
        raw = np.array(mapped[offset + start * size : offset + (start + numel) * size])
        return torch.from_numpy(raw).view(info.dtype)


class Written(NamedTuple):
    """Elements [start, stop) of a tensor that were written in order, and the CRC-32 of their bytes."""

    start: int
    stop: int
    crc: int


def joined_checksums(
    tensors: Mapping[str, TensorInfo], written: Iterable[Mapping[str, list[Written]]]
) -> dict[str, int]:
    """CRC-32 of each of `tensors`, from the ranges that each of several writers has `written`."""
    ranges: dict[str, list[Written]] = {name: [] for name in tensors}
    for writer in written:
        for name, parts in writer.items():
            ranges[name] += parts
    found = {}
    for name, info in tensors.items():
        stop = crc = 0
        for each in sorted(ranges[name]):
            assert each.start == stop, f"{name}: elements {stop} to {each.start} were not written once"
            crc = joined_crc(crc, each.crc, (each.stop - each.start) * info.dtype.itemsize)
            stop = each.stop
        assert stop == info.numel, f"{name}: no rank has written elements {stop} to {info.numel}"
        found[name] = crc
    return found


def _reserve(descriptor: int, size: int) -> None:
    """Reserve `size` bytes, to fail early on a full disk.

    If the file system can't reserve space, the file only gets its size, and a full disk shows while it is written.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


class TensorFileWriter:
    """A safetensors file with a fixed layout, whose ranges are written in any order.

    Construction reserves its space (OSError if there is too little), unless `joins` says that another writer of the
    same tensors has done so. As a context manager it flushes the file to disk on success. Missing ranges read as zeros.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, TensorInfo],
        metadata: Mapping[str, str] | None = None,
        joins: bool = False,
    ):
        self._tensors = dict(tensors)
        self._offsets: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        position = 0
        for name, info in self._tensors.items():
            header[name] = {
                "dtype": _NAMES[info.dtype],
                "shape": list(info.shape),
                "data_offsets": [position, position + info.nbytes],
            }
            self._offsets[name] = position
            position += info.nbytes
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._data_start = 8 + len(encoded)
        self.path = path
        self.nbytes = self._data_start + position
        self.written: dict[str, list[Written]] = {}
        self.written_bytes = 0  # so far
        self._file = open(path, "r+b" if joins else "wb")
        if joins:
            return
        try:
            _reserve(self._file.fileno(), self.nbytes)
            self._file.write(len(encoded).to_bytes(8, "little") + encoded)
        except OSError as error:
            self._file.close()
            if error.errno not in NO_SPACE:
                raise OSError(error.errno, error.strerror, str(path)) from None
            free = shutil.disk_usage(path.parent).free
            sizes = f"{self.nbytes / GIB:.2f} GiB needed, {free / GIB:.2f} GiB free"
            raise OSError(error.errno, f"{error.strerror} ({sizes})", str(path)) from None

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write `values` (1-D, in the declared dtype, on CPU) at flat offset `start` of `name`."""
        info = self._tensors[name]
        assert values.dtype == info.dtype and start + values.numel() <= info.numel, (name, start, values.shape, info)
        self._file.seek(self._data_start + self._offsets[name] + start * info.dtype.itemsize)
        raw = values.contiguous().view(torch.uint8).numpy().data
        self._file.write(raw)
        self.written_bytes += len(raw)
        # Several ranges may grow at the same time: those of ranks that hold parts of one tensor.
        ranges = self.written.setdefault(name, [])
        grown = next((number for number, each in enumerate(ranges) if each.stop == start), len(ranges))
        before = ranges[grown] if grown < len(ranges) else Written(start, start, 0)
        ranges[grown : grown + 1] = [Written(before.start, start + values.numel(), zlib.crc32(raw, before.crc))]

    @property
    def checksums(self) -> dict[str, int]:
        """CRC-32 of each tensor of which every element was written once."""
        whole = {name: info for name, info in self._tensors.items() if self._is_whole(name)}
        return joined_checksums(whole, [{name: self.written.get(name, []) for name in whole}])

    def _is_whole(self, name: str) -> bool:
        stop = 0
        for each in sorted(self.written.get(name, [])):
            if each.start != stop:
                return False
            stop = each.stop
        return stop == self._tensors[name].numel

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close an unwanted file and ignore errors."""
        with suppress(OSError):
            self._file.close()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, error: type[BaseException] | None, *_: object) -> None:
        if error is None:
            self.close()
        else:
            self.discard()


def read_header(path: Path) -> tuple[dict, int]:
    """The JSON header of a safetensors file and the offset where its data begins."""
    if not path.is_file():  # opening a named pipe would block
        raise UserError(f"{path} is missing or not a regular file. Download or copy it again.")
    if fault := pointer_fault(path):
        raise UserError(f"{path}: {fault}.")
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 0 < length <= os.fstat(file.fileno()).st_size - 8:
                raise ValueError("header length out of range")
            header = json.loads(file.read(length))
            if not isinstance(header, dict):
                raise ValueError("the header is not a JSON object")
            if not isinstance(header.setdefault("__metadata__", {}), dict):
                raise ValueError("the metadata is not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}). Download or copy it again.") from None
    return header, 8 + length


def _placed(path: Path, name: str, entry: Any, data_start: int) -> tuple[TensorInfo, int, int]:
    """The dtype and shape of a header's entry, and where its bytes begin and end in the file."""
    try:
        dtype = entry["dtype"]
        if dtype not in _TORCH and _NUMBER_FORMAT.fullmatch(dtype):
            raise UserError(f"{path}: tensor {name} is stored as {dtype}. {UNQUANTIZED}.")
        info = TensorInfo(_TORCH[dtype], tuple(entry["shape"]))
        first, last = entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (first, last, *info.shape)):
            raise ValueError("shape and data_offsets must be whole numbers")
    except UserError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path}: the header is damaged at tensor {name!r} or of an unknown kind "
            f"({type(error).__name__}: {error}). Download or copy it again."
        ) from None
    return info, data_start + first, data_start + last
