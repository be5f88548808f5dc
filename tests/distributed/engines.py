"""Makes further engines of a process cheaper: what DeepSpeed does for each of them is done once."""

from __future__ import annotations

import gc
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from unittest import mock

import cpuinfo


@contextmanager
def many_engines() -> Iterator[None]:
    importlib.import_module("torch._dynamo")  # the first optimizer imports it
    gc.collect()
    gc.freeze()  # an engine collects garbage several times, among all that was imported
    # Every CPU Adam asks for the processor's name, which takes another process a second.
    with mock.patch.object(cpuinfo, "get_cpu_info", cache(cpuinfo.get_cpu_info)):
        yield
