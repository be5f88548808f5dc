"""A batch sent through memory is the batch, and its memory lasts exactly as long as its tensors."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
from multiprocessing import Pipe
from pathlib import Path
from typing import Any

import pytest
import torch

from bagel_ds.data.batches.shared_batch import ReceivedBatch, receive_batch, send_batch
from bagel_ds.model.batch import PackedBatch
from tests.data.stand_in import empty

REPOSITORY = Path(__file__).resolve().parents[3]


def full() -> PackedBatch:
    """Something else in every field; tensors of many sizes and types, one of them no contiguous one."""
    draw = torch.Generator().manual_seed(0)
    changed: dict[str, Any] = {
        field.name: torch.rand(n + 1, generator=draw) if n % 2 else torch.arange(n + 1)
        for n, field in enumerate(dataclasses.fields(PackedBatch))
        if field.type == "Tensor"
    }
    sizes = ((3, 1, 1), (3, 0, 5), (3, 33, 65))
    images = tuple(torch.randint(0, 256, size, dtype=torch.uint8, generator=draw) for size in sizes)
    changed |= {"vit_patches": images[2][0], "noise": torch.rand(7, 64, generator=draw).t(), "images": images}
    return empty(**changed, sample_lens=(3, 4), samples=("a", "b"), skipped=(("c", "broken"),))


def sent(batch: PackedBatch) -> PackedBatch:
    here, there = Pipe()
    with here, there:
        send_batch(there, batch)
        there.send("and something else")
        received = receive_batch(here)
        assert isinstance(received, ReceivedBatch)
        assert receive_batch(here) == "and something else"
    return received.batch()


def maps() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:bagel_ds_batch")


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def assert_same(found: PackedBatch, expected: PackedBatch) -> None:
    for field in dataclasses.fields(PackedBatch):
        one, other = getattr(found, field.name), getattr(expected, field.name)
        if field.type == "Tensor":
            assert one.dtype == other.dtype and torch.equal(one, other), field.name
        elif field.name == "images":
            assert all(map(torch.equal, one, other)) and len(one) == len(other)
        else:
            assert one == other, field.name


@pytest.mark.parametrize("batch", [full(), empty()], ids=["full", "empty"])
def test_every_field_comes_through(batch: PackedBatch) -> None:
    assert_same(sent(batch), batch)


def test_memory_is_gone_with_the_last_tensor_and_no_sooner() -> None:
    gc.collect()
    before = maps(), descriptors()
    batch = sent(full())
    assert maps() == before[0] + 1
    image = batch.images[2]
    del batch
    gc.collect()
    assert torch.equal(image, full().images[2])
    image += 1  # it may be written
    del image
    gc.collect()
    assert (maps(), descriptors()) == before


def test_a_full_dev_shm_changes_nothing(tmp_path: Path) -> None:
    """64 KiB, less than one image takes; a Docker container has 64 MiB, less than a pack may take."""
    code = """
import sys
from unittest import mock
from bagel_ds.data.batches import loader
from bagel_ds.data.plan.planner import PackingOptions
from tests.data.stand_in import Maker, Rows

open("/dev/shm/all", "wb").write(bytes(2**16))
with mock.patch.object(loader, "BatchMaker", Maker):
    data = loader.PlannedData([Rows()], None, "large", PackingOptions(300, 250, lookahead=32), 1)
batches = data.micro_batches(0, 1, num_workers=2)
print(sum(next(batches).batch.images[0].nbytes for _ in range(6)))
batches.close()
"""
    mount = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    command = ["unshare", "--mount", "sh", "-c", mount, "sh", sys.executable, "-c", code]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    ended = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    if ended.returncode and ("unshare" in ended.stderr or "mount" in ended.stderr):
        pytest.skip(f"no mount of one's own here: {ended.stderr.strip()}")
    assert (ended.stdout, ended.returncode) == (f"{6 * 3 * 512 * 512}\n", 0), ended.stderr
