"""safetensors files read and written by flat range.

Guarantees: reading maps the file and copies only the range asked for; writing puts each range straight at its place in
the file, so neither side ever holds a whole tensor. The header is checked when a file is opened; the files are ordinary
safetensors that any reader loads.
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
    # Read only so far that a message can say what they are.
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
WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # those that weights may have
_NUMBER_FORMAT = re.compile(r"[A-Z]+\d+(_\w+)?")
_CHECKSUM_BYTES = 2**24
_NAMES = {dtype: name for name, dtype in _TORCH.items()}


UNQUANTIZED = (
    "Quantized weights can't be trained: take those in bf16 or fp32, such as "
    "`hf download ByteDance-Seed/BAGEL-7B-MoT --local-dir models/BAGEL-7B-MoT`"
)


def dtype_fault(files: TensorFiles, names: Iterable[str]) -> str | None:
    """What is wrong with the number formats of tensors that are to be trained; missing ones are passed over."""
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
        """Where a tensor's bytes begin and end in its file."""
        _, info, offset = self._where[name]
        return offset, offset + info.nbytes

    def checksum(self, name: str, first: int = 0, last: int | None = None) -> int:
        """CRC-32 of a tensor's bytes, or of those in [first, last), read through the mapping piece by piece."""
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


def joined_checksums(tensors: Mapping[str, TensorInfo], written: Iterable[Mapping[str, Written]]) -> dict[str, int]:
    """CRC-32 of the bytes of each of `tensors`, of which several writers have each `written` a range, or none."""
    parts: dict[str, list[Written]] = {name: [] for name in tensors}
    for ranges in written:
        for name, part in ranges.items():
            parts[name].append(part)
    found = {}
    for name, info in tensors.items():
        stop = crc = 0
        for part in sorted(parts[name]):
            assert part.start == stop, f"{name}: elements {stop} to {part.start} were not written once"
            crc = joined_crc(crc, part.crc, (part.stop - part.start) * info.dtype.itemsize)
            stop = part.stop
        assert stop == info.numel, f"{name}: no rank has written elements {stop} to {info.numel}"
        found[name] = crc
    return found


def _reserve(descriptor: int, size: int) -> None:
    """Take `size` bytes of the disk now, so that a full one is found before anything is written.

    Where a file system can't reserve, the file gets its size only, and a full disk is found while it is written.
    """
    try:
        os.posix_fallocate(descriptor, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(descriptor, size)


class TensorFileWriter:
    """A safetensors file whose layout is fixed first and whose ranges are then written in any order.

    Its space is reserved at construction (OSError where there is too little); with `joins` another writer of the same
    tensors has done so. Use as a context manager; on success the file is flushed to disk. Missing ranges read as zeros.
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
        self.written: dict[str, Written] = {}
        self._disordered: set[str] = set()
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
        """Put `values` (1-D, the declared dtype, on CPU) at flat offset `start` of `name`."""
        info = self._tensors[name]
        assert values.dtype == info.dtype and start + values.numel() <= info.numel, (name, start, values.shape, info)
        self._file.seek(self._data_start + self._offsets[name] + start * info.dtype.itemsize)
        raw = values.contiguous().view(torch.uint8).numpy().data
        self._file.write(raw)
        before = self.written.get(name, Written(start, start, 0))
        if start != before.stop:
            self._disordered.add(name)
        self.written[name] = Written(before.start, start + values.numel(), zlib.crc32(raw, before.crc))

    @property
    def checksums(self) -> dict[str, int]:
        """CRC-32 of the bytes of each tensor that was written whole and in order."""
        parts = {name: self.written.get(name, Written(0, 0, 0)) for name in self._tensors}
        return {
            name: part.crc
            for name, part in parts.items()
            if part[:2] == (0, self._tensors[name].numel) and name not in self._disordered
        }

    def close(self) -> None:
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()

    def discard(self) -> None:
        """Close a file that is not wanted any more, whatever it holds."""
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
    if not path.is_file():  # opening a named pipe would wait for a writer
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
                raise ValueError("its metadata are not a JSON object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}). Download or copy it again.") from None
    return header, 8 + length


def _placed(path: Path, name: str, entry: Any, data_start: int) -> tuple[TensorInfo, int, int]:
    """A header's entry as the tensor's type and shape and its place in the file."""
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
