"""The compiled kernel of `update.cpp`, built when it is first needed.

Guarantees: one build for each kind of processor, so that different hosts may share a folder; without a compiler, None
and one line in the log. Importing this imports no torch: the processes that fork ranks may have no threads.
"""

from __future__ import annotations

import ctypes
import hashlib
import logging
import platform
from functools import cache
from pathlib import Path
from typing import Any

from bagel_ds.machine.user_folders import extensions_folder

logger = logging.getLogger("bagel_ds")

_SOURCE = Path(__file__).with_name("update.cpp")
_FLAGS = ["-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-std=c++17"]


@cache
def kernel() -> Any:
    """The compiled kernel, None if it can't be built. Compiled at first use on this kind of processor."""
    try:
        return build_kernel()
    except Exception as error:  # of any kind: torch's, a compiler's, the file system's
        lines = str(error).splitlines() or [""]
        said = next((line for line in lines if "error:" in line), lines[-1])
        logger.warning(
            "the kernel that updates split masters can't be built (%s: %.300s): torch updates them, which takes many "
            "times as long; with g++ installed it is compiled at the next start",
            type(error).__name__,
            said,
        )
        return None


def build_kernel() -> Any:
    """Compile it as DeepSpeed compiles its ops, in the same folder, unless that was done before. Raises any error."""
    from torch.utils.cpp_extension import load

    name = kernel_name()
    folder = extensions_folder() / name
    folder.mkdir(parents=True, exist_ok=True)
    load(
        name,
        [str(_SOURCE)],
        extra_cflags=_FLAGS,
        extra_ldflags=["-fopenmp"],
        build_directory=str(folder),
        is_python_module=False,
    )
    library = ctypes.CDLL(str(folder / f"{name}.so"))
    library.bagel_ds_update.restype = ctypes.c_int64
    library.bagel_ds_ties.restype = None
    return library


@cache
def kernel_name() -> str:
    """With the processor's features: a folder shared by different hosts holds one kernel for each kind."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        features = next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        features = ""
    source = _SOURCE.read_text() + features + platform.machine() + " ".join(_FLAGS)
    return f"bagel_ds_adam_{hashlib.sha256(source.encode()).hexdigest()[:8]}"
