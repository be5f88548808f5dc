"""Allocators told to give memory back; each test in a process of its own, since they change it for good."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

COMMON = """
import torch
from bagel_ds.train.process.allocators import exact_pinned_memory, return_freed_memory
def anonymous_mib():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("RssAnon")).split()[1]) / 1024
"""


def output(code: str, **environment: str) -> str:
    command = [sys.executable, "-c", COMMON + code]
    return subprocess.run(
        command, env={**os.environ, **environment}, capture_output=True, text=True, check=True
    ).stdout.strip()


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="the C library's allocator is glibc's on Linux alone")
def test_freed_blocks_go_back_to_the_system() -> None:
    """Small tensors that stay, made between large ones that go: what a load leaves behind."""
    kept = output("""
if not return_freed_memory():
    print("no glibc")
else:
    before = anonymous_mib()
    stays, goes = [], []
    for _ in range(40):
        goes.append(torch.ones(4 * 2**20, dtype=torch.uint8))
        stays.append(torch.ones(64 * 2**10, dtype=torch.uint8))
    goes.clear()
    print(anonymous_mib() - before)
""")
    if kept == "no glibc":
        pytest.skip("this Linux has another C library")
    assert float(kept) < 10  # of 160 MiB; 2.5 MiB stay


def test_large_pinned_blocks_are_exact() -> None:
    said = output("""
settings = getattr(torch._C, "_accelerator_getAllocatorSettings", lambda: "")
print(exact_pinned_memory(), settings())
""")
    assert said.startswith("False") or "pinned_max_cached_size_mb" in said


def test_a_persons_own_allocator_setting_stays() -> None:
    given = "pinned_max_cached_size_mb:5"
    said = output("print(exact_pinned_memory())", PYTORCH_ALLOC_CONF=given)
    assert said == "True"
