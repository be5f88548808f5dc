"""What a conversion writes: parquet shards, or one jsonl with a folder of pictures; and how far it has come.

Guarantees: a shard has its final name only when it is complete and on the disk. `Progress` names the complete shards
and the number of the next row, so a conversion that is killed continues there and writes what it would have written:
shards end at the same rows, and nothing in a file depends on the time or the process.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import IO, Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from bagel_ds.convert.chat import Line
from bagel_ds.convert.pictures import suffix
from bagel_ds.data.files.image_folder import ImageFolder
from bagel_ds.data.formats.registry import SOURCES

GROUP_ROWS, GROUP_BYTES = 100, 32 * 2**20  # of a row group, which is what training reads at once
SHARD_BYTES = 512 * 2**20
LINES_PER_SHARD = 1000  # of a jsonl: how many rows a killed conversion does again at most

PROGRESS, BAD_ROWS = "conversion.json", "bad_rows.jsonl"
LINES, IMAGES = "conversations.jsonl", "images"


@dataclass
class Progress:
    """How far a conversion has come, and of what: `input` and `options` must be the same when it goes on."""

    input: dict[str, Any]
    options: dict[str, Any]
    next_row: int = 0
    usable: int = 0
    bad: int = 0
    bad_bytes: int = 0  # of `BAD_ROWS`
    files: dict[str, int] = field(default_factory=dict)  # name: bytes
    done: bool = False

    def save(self, folder: Path) -> None:
        with replacing(folder / PROGRESS) as file:
            file.write(
                (json.dumps(asdict(self), indent=1, ensure_ascii=False) + "\n").encode("utf-8", "backslashreplace")
            )


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A new file that takes the name `path` when it is complete and on the disk."""
    beside = path.with_name(f".{path.name}.part")
    with open(beside, "wb") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


class Output(Protocol):
    """Takes converted rows, in order."""

    def add(self, row: Any) -> None: ...

    @property
    def is_full(self) -> bool:
        """Whether the shard should be finished before the next row."""
        ...

    def finish(self) -> dict[str, int]:
        """Finish the shard, if it has a row; {name: bytes} of the files that have changed."""
        ...

    def close(self) -> None: ...


class ParquetShards:
    """NAME/00000.parquet, NAME/00001.parquet, ..."""

    def __init__(self, folder: Path, schema: pa.Schema, rows_per_file: int, number: int) -> None:
        self.folder, self.schema, self.rows_per_file, self.number = folder, schema, rows_per_file, number
        self.writer: pq.ParquetWriter | None = None
        self._start()

    def _start(self) -> None:
        self.group: list[dict[str, Any]] = []
        self.group_bytes = self.shard_bytes = self.rows = 0

    def add(self, row: dict[str, Any]) -> None:
        images = row.get("image_list") or [row["image"]]
        self.group.append(row)
        self.rows += 1
        self.group_bytes += sum(map(len, images))
        self.shard_bytes += sum(map(len, images))
        if len(self.group) >= GROUP_ROWS or self.group_bytes >= GROUP_BYTES:
            self._write_group()

    @property
    def is_full(self) -> bool:
        return self.rows >= self.rows_per_file or self.shard_bytes >= SHARD_BYTES

    def finish(self) -> dict[str, int]:
        if not self.rows:
            return {}
        self._write_group()
        assert self.writer is not None
        self.writer.close()
        self.writer = None
        path = self.folder / f"{self.number:05d}.parquet"
        with open(self._part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(self._part, path)
        self.number += 1
        self._start()
        return {path.name: path.stat().st_size}

    def close(self) -> None:
        if self.writer is not None:
            self.writer.close()

    @property
    def _part(self) -> Path:
        return self.folder / f".{self.number:05d}.parquet.part"

    def _write_group(self) -> None:
        if self.group:
            if self.writer is None:
                self.writer = pq.ParquetWriter(self._part, self.schema)
            self.writer.write_table(pa.Table.from_pylist(self.group, schema=self.schema))
            self.group, self.group_bytes = [], 0


class Conversations:
    """NAME/conversations.jsonl, and NAME/images with each picture once, named by its content."""

    def __init__(self, folder: Path, size: int) -> None:
        """`size`: bytes of the lines that are complete; what lies after them is removed."""
        self.images = folder / IMAGES
        self.images.mkdir(exist_ok=True)
        self.path = folder / LINES
        self.file = open(self.path, "ab")
        self.file.truncate(size)
        self.lines = 0

    def add(self, row: Line) -> None:
        names = [self._store(content) for content in row.pictures]
        images = {"image": names[0] if len(names) == 1 else names} if names else {}
        line = {**row.line, **images}
        # Whatever it says about the row is a `BadRow`; its pictures are in place now.
        SOURCES["vlm"].parse(line, ImageFolder(str(self.images)))
        self.file.write((json.dumps(line, ensure_ascii=False) + "\n").encode())
        self.lines += 1

    @property
    def is_full(self) -> bool:
        return self.lines >= LINES_PER_SHARD

    def finish(self) -> dict[str, int]:
        if not self.lines:
            return {}
        self.file.flush()
        os.fsync(self.file.fileno())
        self.lines = 0
        return {LINES: self.path.stat().st_size}

    def close(self) -> None:
        self.file.close()

    def _store(self, content: bytes) -> str:
        digest = blake2b(content, digest_size=16).hexdigest()
        name = f"{digest[:2]}/{digest}.{suffix(content)}"
        path = self.images / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as file:
                file.write(content)
        return name


class BadRows:
    """NAME/bad_rows.jsonl: number, place and reason of every row that can't be used."""

    def __init__(self, folder: Path, size: int) -> None:
        self.path = folder / BAD_ROWS
        self.file = open(self.path, "ab")
        self.file.truncate(size)

    def add(self, number: int, place: str, reason: str) -> None:
        line = {"row": number, "place": place, "reason": reason}
        text = json.dumps(line, ensure_ascii=False).encode("utf-8", "backslashreplace")
        self.file.write(text + b"\n")

    def finish(self) -> int:
        """The size in bytes."""
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.path.stat().st_size

    def close(self) -> None:
        self.file.close()
