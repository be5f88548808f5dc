"""Allocators return memory. Each test has its own process, which the settings change for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from bagel_ds.memory.states import EXACT_ABOVE_MIB

COMMON = """
import torch
from bagel_ds.train.process.allocators import (
    exact_pinned_memory, expandable_segments, return_freed_memory, rounds_pinned_memory
)
def anonymous_mib():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
"""


def output(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", COMMON + code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library's allocator is glibc's only on Linux")
def test_freed_blocks_go_back_to_the_system() -> None:
    """Small tensors that stay, made between large ones that go: what a load leaves behind."""
    measure = """
torch.ones(8 * 2**20, dtype=torch.uint8)  # freed: from here on glibc takes such blocks from its heap
before = anonymous_mib()
stays, goes = [], []
for _ in range(40):
    goes.append(torch.ones(4 * 2**20, dtype=torch.uint8))
    stays.append(torch.ones(64 * 2**10, dtype=torch.uint8))
goes.clear()
print(anonymous_mib() - before)
"""
    assert float(output(measure)) > 100, "glibc keeps the 160 MiB by itself, or this measures nothing"
    assert float(output("assert return_freed_memory()\n" + measure)) < 10, "2.5 MiB stay"


def test_where_the_c_library_is_another_nothing_is_set() -> None:
    assert output("import ctypes\nctypes.CDLL = lambda name: object()\nprint(return_freed_memory())") == "False"


PINNED = """
torch.empty(1)
before = rounds_pinned_memory()
exact_pinned_memory()
print(before, rounds_pinned_memory(), torch._C._accelerator_getAllocatorSettings())
"""


def test_large_pinned_blocks_are_exact_beside_other_settings_of_the_user() -> None:
    assert output(PINNED) == f"True False pinned_max_cached_size_mb:{EXACT_ABOVE_MIB}"
    given = "pinned_use_background_threads:True"
    settings = f"{given},pinned_max_cached_size_mb:{EXACT_ABOVE_MIB}"
    assert output(PINNED, PYTORCH_ALLOC_CONF=given) == f"True False {settings}"


@pytest.mark.parametrize("variable", ["PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"])
def test_a_limit_that_the_user_sets_stays(variable: str) -> None:
    code = "def refuse(_): raise SystemExit('set all the same')\ntorch._C._accelerator_setAllocatorSettings = refuse"
    assert output(f"{code}\n{PINNED}", **{variable: "pinned_max_cached_size_mb:5"}).startswith("True False")


def test_a_torch_that_cannot_do_that_rounds() -> None:
    assert output(f"del torch._C._accelerator_setAllocatorSettings\n{PINNED}").startswith("True True")


EXPANDABLE = """
exact_pinned_memory()
print(expandable_segments(), torch._C._accelerator_getAllocatorSettings())
"""


def test_segments_of_a_gpu_grow_beside_the_other_setting() -> None:
    assert output(EXPANDABLE) == f"True pinned_max_cached_size_mb:{EXACT_ABOVE_MIB},expandable_segments:True"


def test_a_user_who_does_not_want_that_is_heard() -> None:
    given = "expandable_segments:False"
    expected = f"True {given},pinned_max_cached_size_mb:{EXACT_ABOVE_MIB}"
    assert output(EXPANDABLE, PYTORCH_ALLOC_CONF=given) == expected


def test_a_torch_without_such_settings_has_no_such_segments() -> None:
    code = "del torch._C._accelerator_setAllocatorSettings\nprint(expandable_segments())"
    assert output(code) == "False"
