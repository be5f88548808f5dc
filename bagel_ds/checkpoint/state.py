"""The training state: ranges of parameters in safetensors files, one file per rank.

Guarantees: files hold named ranges of unpadded parameters, so any number of ranks can read what any other number wrote,
whatever the ZeRO stage or offload. Reading maps the files and copies only what is requested. Nothing is pickled.

A file holds 1-D tensors named "<kind>/<parameter>". Kinds are master, exp_avg, exp_avg_sq, ema (all fp32) and weight
(frozen parameters in their own dtype). The header's metadata gives the start of each range.
"""

from __future__ import annotations

import json
from math import prod
from pathlib import Path
from typing import Iterable, Mapping, NamedTuple

import torch
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.model_folder.tensor_files import TensorFiles, TensorFileWriter
from bagel_ds.ranges import Pieces, TensorInfo

EMA, WEIGHT = "ema", "weight"
_CHUNK_BYTES = 2**24  # of one write


class Held(NamedTuple):
    """One range of one kind that a rank will write."""

    kind: str
    name: str
    start: int
    numel: int
    dtype: torch.dtype


def rank_file(folder: Path, rank: int) -> Path:
    return folder / f"rank_{rank:05d}.safetensors"


def open_rank(path: Path, held: Iterable[Held]) -> TensorFileWriter:
    """Create one rank's file with space for all of `held`. Raises OSError if there is too little."""
    held = list(held)
    tensors = {f"{each.kind}/{each.name}": TensorInfo(each.dtype, (each.numel,)) for each in held}
    starts = {f"{each.kind}/{each.name}": each.start for each in held}
    return TensorFileWriter(path, tensors, {"starts": json.dumps(starts)})


def fill_rank(writer: TensorFileWriter, held: Iterable[Held], pieces: Iterable[tuple[str, Pieces]]) -> None:
    """Write the ranges of `held` into the file that `open_rank` created. `pieces`: by kind, in any order."""
    announced = {f"{each.kind}/{each.name}": each for each in held}
    on_host = _HostCopies()
    for kind, (name, ranges) in pieces:
        for place, values in ranges:
            expected = announced[f"{kind}/{name}"]
            assert place.start == expected.start, "one contiguous range per parameter and rank"
            _write(writer, f"{kind}/{name}", 0, values, expected.dtype, on_host)


def fill_whole(writer: TensorFileWriter, dtype: torch.dtype, pieces: Iterable[Pieces]) -> None:
    """Write this rank's ranges at their places into an open file of whole tensors of `dtype`."""
    on_host = _HostCopies()
    for name, ranges in pieces:
        for place, values in ranges:
            _write(writer, name, place.start, values, dtype, on_host)


def _write(
    writer: TensorFileWriter, name: str, start: int, values: Tensor, dtype: torch.dtype, on_host: _HostCopies
) -> None:
    for chunk in values.detach().split(_CHUNK_BYTES // values.element_size()):
        writer.write(name, start, on_host(chunk).to(dtype))
        start += chunk.numel()


class _HostCopies:
    """Copies device tensors of up to `_CHUNK_BYTES` to the host; a copy is valid until the next call.

    All copies share one page-locked buffer: CUDA copies to pageable memory in steps that delay other work. Host tensors
    are returned as they are.
    """

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def __call__(self, values: Tensor) -> Tensor:
        if not values.is_cuda:
            return values
        if self._buffer is None:
            self._buffer = torch.empty(_CHUNK_BYTES, dtype=torch.uint8, pin_memory=True)
        return self._buffer[: values.nbytes].view(values.dtype).copy_(values)  # synchronous


class StateFiles:
    """All ranks' files of one checkpoint, read by range."""

    def __init__(self, folder: Path):
        self._files = [TensorFiles([path]) for path in sorted(folder.glob("rank_*.safetensors"))]
        if not self._files:
            raise UserError(f"{folder} holds no rank_*.safetensors: it is not a training state of bagel_ds.")
        self._folder = folder
        self._ranges: dict[str, list[tuple[int, int, TensorFiles]]] = {}  # name -> (start, stop, file), by start
        for files in self._files:
            if "starts" not in files.metadata:
                raise UserError(
                    f"{files.paths[0]} is not a training state of bagel_ds (its header names no ranges); resume from "
                    "another checkpoint."
                )
            starts = json.loads(files.metadata["starts"])
            for name in files.names:
                start = starts[name]
                self._ranges.setdefault(name, []).append((start, start + files.info(name).numel, files))
        for ranges in self._ranges.values():
            ranges.sort(key=lambda each: each[:2])

    def read(self, kind: str, name: str, start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of one kind of one parameter, joined from as many files as needed."""
        found = []
        position = start
        for low, high, files in self._ranges.get(f"{kind}/{name}", []):
            if low <= position < high and position < start + numel:
                stop = min(high, start + numel)
                found.append(files.read(f"{kind}/{name}", position - low, stop - position))
                position = stop
        if position < start + numel:
            raise UserError(
                f"{self._folder}: elements {position} to {start + numel} of {kind}/{name} are in none of its "
                f"{len(self._files)} rank files. A file is missing or belongs to another run; "
                "resume from another checkpoint."
            )
        return found[0] if len(found) == 1 else torch.cat(found) if found else torch.empty(0)

    def source(self, shapes: Mapping[str, tuple[int, ...]], *kinds: str) -> StateSource:
        """A `WeightSource` that reads each parameter from the first of `kinds` that is stored for it.

        Raises `UserError` if a stored parameter is larger than in `shapes`: its first elements would be wrong weights.
        """
        faults = [
            f"{kind}/{name} has {stop:,} elements, this run's network {numel:,}"
            for name, shape in shapes.items()
            for kind in kinds
            if (stop := self._stop(kind, name)) > (numel := prod(shape))
        ]
        if faults:
            raise UserError(
                f"{self._folder} is the state of another network: {'; '.join(faults[:3])}"
                f"{f' and {len(faults) - 3} more' if faults[3:] else ''}. Pass --model_path and the model arguments "
                "(such as --max_latent_size) of the run that saved it, or leave them out."
            )
        return StateSource(self, shapes, kinds)

    def _stop(self, kind: str, name: str) -> int:
        """The end of the last stored range of one kind of one parameter."""
        return max((stop for _, stop, _ in self._ranges.get(f"{kind}/{name}", [])), default=0)

    def has(self, kind: str, name: str) -> bool:
        return f"{kind}/{name}" in self._ranges

    def dtype(self, kind: str, name: str) -> torch.dtype:
        return self._ranges[f"{kind}/{name}"][0][2].info(f"{kind}/{name}").dtype


class StateSource:
    """Masters (or moments, or averages) of a training state as a `WeightSource`."""

    def __init__(self, state: StateFiles, shapes: Mapping[str, tuple[int, ...]], kinds: tuple[str, ...]):
        self._state, self._shapes, self._kinds = state, shapes, kinds

    def _kind(self, name: str) -> str:
        for kind in self._kinds:
            if self._state.has(kind, name):
                return kind
        return self._kinds[0]  # `read` then reports what is missing

    def __contains__(self, name: str) -> bool:
        return any(self._state.has(kind, name) for kind in self._kinds)

    def info(self, name: str) -> TensorInfo:
        return TensorInfo(self._state.dtype(self._kind(name), name), self._shapes[name])

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        numel = TensorInfo(torch.float32, self._shapes[name]).numel - start if numel is None else numel
        return self._state.read(self._kind(name), name, start, numel)
