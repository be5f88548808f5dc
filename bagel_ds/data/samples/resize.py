"""Bicubic resizing of RGB pictures: Pillow's pixels to the last bit, by `resize.cpp` in an eighth of the time.

Guarantees: the kernel is used only if it gives the installed Pillow's pixels for images of noise, which each process
compares once; otherwise Pillow resizes, and a warning gives the reason, once per host and run. The kernel is compiled
at first use (about a second) and kept with torch's extensions; several processes may compile it at the same time. It
reads Pillow's memory without a copy. `BAGEL_DS_RESIZE=pillow` turns it off.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any, Callable, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from bagel_ds.errors import UserError
from bagel_ds.machine.user_folders import extensions_folder

logger = logging.getLogger("bagel_ds")

# One block of memory per image. Otherwise images of more than 4 megapixels have several, which the kernel can't read
# without a copy. Decoding takes as long.
Image.core.set_use_block_allocator(1)

_SWITCH = "BAGEL_DS_RESIZE"
_SOURCE = Path(__file__).with_name("resize.cpp")
# No -march=native, as hosts may share the folder, and no fused multiply-add, as weights must be rounded as Pillow's.
_FLAGS = ("-O3", "-mavx2", "-ffp-contract=off", "-std=c++17", "-shared", "-fPIC")
_COMPILE_SECONDS = 120.0
_STRIP_BYTES = 2**23  # of the copies of an image that is in several blocks; Pillow's blocks have 2^24

_Kernel = Callable[[Image.Image, tuple[int, int]], Tensor | None]

# (width, height) before and after that the kernel is tried on: smaller and larger, both sides and one, either pass
# first and the border between the two orders, narrower and shorter than the filter, long filters, no change.
_TRIED = (
    ((97, 64), (90, 51)),
    ((97, 64), (90, 49)),
    ((60, 120), (40, 80)),
    ((60, 120), (40, 79)),
    ((53, 41), (112, 96)),
    ((64, 48), (64, 33)),
    ((64, 48), (37, 48)),
    ((1, 1), (16, 16)),
    ((3, 90), (16, 32)),
    ((90, 3), (32, 16)),
    ((2000, 9), (16, 16)),
    ((9, 2000), (16, 16)),
    ((33, 17), (33, 17)),
)


class _CannotBuild(Exception):
    """The message says why."""


class _Choice(NamedTuple):
    """What resizes in this process: the kernel, or Pillow and the reason for that."""

    kernel: _Kernel | None
    fault: str


def bicubic(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """uint8 [height, width, 3] of an RGB image in `size`, which is (width, height), as `Image.resize` gives it.

    An image of this size already is not resampled. Raises `UserError` for an unknown value of BAGEL_DS_RESIZE.
    """
    if not _is_off():
        kernel, fault = _choice()
        _report(fault)
        if kernel is not None and (pixels := kernel(image, size)) is not None:
            return pixels
    return by_pillow(image, size)


def by_pillow(image: Image.Image, size: tuple[int, int]) -> Tensor:
    """The same by Pillow alone."""
    if size != image.size:
        image = image.resize(size, Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(image))


def prepare() -> str:
    """Compile and try the kernel now, and report a fault. Returns it, for `began`; empty where the kernel is used."""
    if _is_off():
        return ""
    _report(fault := _choice().fault)
    return fault


def began(fault: str) -> None:
    """In a worker process: `fault` is what `prepare` returned in the process that started it, which has reported it."""
    global _starters_fault
    _starters_fault = fault


_starters_fault: str | None = None
_reported: set[str] = set()


def _report(fault: str) -> None:
    if not fault or fault in _reported:
        return
    _reported.add(fault)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"  # the other ranks of a host find the same
    if is_first if _starters_fault is None else fault != _starters_fault:
        logger.warning(
            "Pillow resizes images, because the faster kernel can't be used: %s. Pixels are the same; a data worker "
            "takes about twice as long per sample",
            fault,
        )


def _is_off() -> bool:
    value = os.environ.get(_SWITCH, "")
    if value not in ("", "pillow"):
        raise UserError(f"{_SWITCH}={value} is unknown; the only value is {_SWITCH}=pillow. Unset it for the kernel.")
    return value == "pillow"


@cache
def _choice() -> _Choice:
    if fault := processor_fault():
        return _Choice(None, fault)
    try:
        kernel = loaded(build(_SOURCE, extensions_folder()))
    except (_CannotBuild, OSError, AttributeError) as error:  # the file system's, the dynamic loader's
        return _Choice(None, " ".join(str(error).split()))
    return _Choice(None, fault) if (fault := difference(kernel)) else _Choice(kernel, "")


def processor_fault(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Why this processor can't run the kernel; empty if it can."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"it is written for x86-64 processors, and this is {platform.machine() or 'an unknown one'}"
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError as error:
        return f"the processor's features are unknown ({cpuinfo}: {error.strerror})"
    flags = next((line for line in lines if line.startswith("flags")), "")
    return "" if "avx2" in flags.split() else "the processor has no AVX2"


def build(source: Path, folder: Path) -> Path:
    """The compiled kernel, made below `folder` unless it is there. Raises `OSError` or `_CannotBuild`.

    It has a new name for other source, flags or compiler, and gets it when it is complete.
    """
    command = shlex.split(os.environ.get("CXX") or "c++")
    compiler = shutil.which(command[0]) if command else None
    if compiler is None:
        raise _CannotBuild(f"there is no C++ compiler ({' '.join(command)}); apt-get install g++ (as root)")
    found = os.stat(compiler)
    identity = (*command, os.path.realpath(compiler), found.st_size, found.st_mtime_ns, *_FLAGS)
    digest = hashlib.sha256(source.read_bytes() + repr(identity).encode()).hexdigest()[:16]
    library = folder / f"bagel_ds_resize_{digest}" / "resize.so"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=library.parent, suffix=".so")
        os.close(handle)
        try:
            _compile([compiler, *command[1:], *_FLAGS, str(source), "-o", name])
            _write_through(name)
            os.replace(name, library)
        finally:
            with suppress(FileNotFoundError):
                os.unlink(name)
    return library


def _compile(command: list[str]) -> None:
    try:
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, capture_output=True, errors="replace", timeout=_COMPILE_SECONDS
        )
    except subprocess.TimeoutExpired:
        raise _CannotBuild(f"{command[0]} took more than {_COMPILE_SECONDS:.0f} seconds") from None
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        said = next((line for line in lines if "error" in line), lines[-1])
        raise _CannotBuild(f"{command[0]} can't compile it: {said[:300]}")


def _write_through(name: str) -> None:
    """Else a host that loses power could keep the name without the content."""
    handle = os.open(name, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def loaded(library: Path) -> _Kernel:
    """The kernel of a compiled file, which gives None for an image that only Pillow can resize.

    Raises `OSError` or `AttributeError`.
    """
    function = ctypes.CDLL(str(library)).bagel_ds_resize
    function.restype = ctypes.c_int
    function.argtypes = [ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64] * 2

    def kernel(image: Image.Image, size: tuple[int, int]) -> Tensor | None:
        width, height = size
        found = _rows(image) if image.mode == "RGB" and min(*image.size, *size) > 0 else None
        if found is None:
            return None
        pixels = torch.empty((height, width, 3), dtype=torch.uint8)
        short_of_memory = function(found.pointers.ctypes.data, *image.size, pixels.data_ptr(), width, height)
        return None if short_of_memory else pixels

    return kernel


def difference(kernel: _Kernel) -> str:
    """Where the kernel's pixels aren't those of the installed Pillow; empty if they are equal in all cases."""
    noise = np.random.default_rng(0)
    for source, size in _TRIED:
        pixels = noise.integers(0, 256, (source[1], source[0], 3), dtype=np.uint8)
        for values in (pixels, pixels // 128 * np.uint8(255)):  # the second reaches beyond black and white
            image = Image.fromarray(values)
            found = kernel(image, size)
            if found is None or not torch.equal(found, by_pillow(image, size)):
                before, after = (f"{width} x {height}" for width, height in (source, size))
                return f"its pixels differ from those of Pillow {Image.__version__} (noise of {before} in {after})"
    return ""


class _Rows(NamedTuple):
    """Where the rows of an image lie, four bytes per pixel."""

    pointers: np.ndarray[Any, np.dtype[np.uint64]]
    owner: object  # of the memory


def _rows(image: Image.Image) -> _Rows | None:
    """In place where the image is one block of memory, else of copies; None where Pillow gives no access."""
    if (found := _in_place(image)) is not None:
        return found
    width, height = image.size
    step = max(_STRIP_BYTES // (4 * width), 1)
    strips = [_in_place(image.crop((0, top, width, min(top + step, height)))) for top in range(0, height, step)]
    whole = [strip for strip in strips if strip is not None]
    if len(whole) < len(strips):
        return None
    return _Rows(np.concatenate([strip.pointers for strip in whole]), whole)


class _ArrowArray(ctypes.Structure):
    """The beginning of a struct ArrowArray of Arrow's C data interface."""


_ArrowArray._fields_ = [
    *((name, ctypes.c_int64) for name in ("length", "null_count", "offset", "n_buffers", "n_children")),
    ("buffers", ctypes.POINTER(ctypes.c_void_p)),
    ("children", ctypes.POINTER(ctypes.POINTER(_ArrowArray))),
]
_pointer_of = ctypes.PYFUNCTYPE(ctypes.c_void_p, ctypes.py_object, ctypes.c_char_p)(
    ("PyCapsule_GetPointer", ctypes.pythonapi)
)


def _in_place(image: Image.Image) -> _Rows | None:
    """Through the Arrow interface: pixels are lists of four bytes. None where the image is not one block."""
    width, height = image.size
    try:
        _, capsule = image.__arrow_c_array__()
    except ValueError:
        return None
    lists = ctypes.cast(_pointer_of(capsule, b"arrow_array"), ctypes.POINTER(_ArrowArray)).contents
    if lists.n_children != 1 or lists.offset:
        return None
    samples = lists.children[0].contents
    if samples.length != 4 * width * height or samples.offset or samples.n_buffers != 2:
        return None
    start = samples.buffers[1] or 0
    return _Rows(np.arange(height, dtype=np.uint64) * np.uint64(4 * width) + np.uint64(start), capsule)
