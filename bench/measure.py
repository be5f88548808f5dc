"""Memory of a tree of processes while it runs, by phase.

Guarantees: counts what no file backs (anonymous and shared memory), each shared page once (the kernel's proportional
set size summed over all who map it, which are all in the tree); file-backed pages are reported apart: they are cache.
Peaks are those seen at the sampling interval. Linux only.
"""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

_FIELDS = {"Pss_Anon": "anonymous", "Pss_Shmem": "shared", "Pss_File": "file"}


@dataclass
class Peak:
    """Largest host memory of a phase and what it was made of, bytes over all processes."""

    host: int = 0
    anonymous: int = 0
    shared: int = 0
    file: int = 0  # largest seen; not necessarily at the same moment
    last: int = 0  # host memory at the last sample of the phase
    by_process: dict[str, int] = field(default_factory=dict)  # at the peak: "12345 python" -> bytes


def descendants(root: int) -> list[int]:
    """`root` and every process below it."""
    children: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((path / "stat").read_text().rsplit(")", 1)[1].split()[1])
        except (OSError, IndexError, ValueError):
            continue  # it ended while we looked
        children.setdefault(parent, []).append(int(path.name))
    found, waiting = [], [root]
    while waiting:
        process = waiting.pop()
        found.append(process)
        waiting += children.get(process, [])
    return found


def proportional_memory(process: int) -> dict[str, int]:
    """Bytes by kind of one process; empty when it has ended."""
    found = {}
    try:
        for line in Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()[1:]:
            name, value = line.split(":", 1)
            if name in _FIELDS:
                found[_FIELDS[name]] = int(value.split()[0]) * 1024
    except (OSError, ValueError):
        return {}
    return found


class MemorySampler:
    """Samples the tree under `root` from entering to leaving the context; set `phase` to open a new one."""

    def __init__(self, root: int, interval: float = 0.1):
        self.peaks: dict[str, Peak] = {}
        self.phase = "start"
        self._root, self._interval = root, interval
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> MemorySampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            began = time.monotonic()
            self._sample()
            self._stop.wait(max(self._interval, 2 * (time.monotonic() - began)))  # at most a third of one core

    def _sample(self) -> None:
        phase = self.phase
        total: dict[str, int] = dict.fromkeys(_FIELDS.values(), 0)
        by_process: dict[str, int] = {}
        for process in descendants(self._root):
            if process == os.getpid():
                continue
            memory = proportional_memory(process)
            for kind, size in memory.items():
                total[kind] += size
            by_process[str(process)] = memory.get("anonymous", 0) + memory.get("shared", 0)
        peak = self.peaks.setdefault(phase, Peak())
        peak.file = max(peak.file, total["file"])
        host = peak.last = total["anonymous"] + total["shared"]
        if host > peak.host:
            peak.host, peak.anonymous, peak.shared = host, total["anonymous"], total["shared"]
            peak.by_process = by_process
