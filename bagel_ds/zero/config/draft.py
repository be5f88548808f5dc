"""A DeepSpeed configuration on its way from the file to the engine.

Guarantees: a `Draft` collects every fault and remark and raises none. It knows nothing of what keys mean. Needs no
deepspeed.
"""

from __future__ import annotations

import dataclasses
import json
import math
from typing import Any

from bagel_ds.arguments.run_config import RunConfig

AUTO = "auto"


@dataclasses.dataclass
class Draft:
    """A configuration on its way from the file to the engine."""

    ds: dict[str, Any]
    file: str
    config: RunConfig
    world_size: int
    ranks_per_host: int | None = None  # None: all on one host
    faults: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def section(self, *keys: str) -> dict[str, Any]:
        """The mapping at `keys`, added where it is absent; another type there is a fault."""
        here = self.ds
        for key in keys:
            below = here.get(key)
            if below is None or below == AUTO:
                below = here[key] = {}
            if not isinstance(below, dict):
                self.fault(f"{key} must be a mapping, found {below!r:.60}")
                below = here[key] = {}
            here = below
        return here

    def settle(self, path: str, value: Any, says: str, remedy: str) -> None:
        """Fill in the key at dotted `path` where the file leaves it open; there, another value is a fault.

        The message quotes `says`, where `value` comes from, and `remedy`, what to do.
        """
        *parents, key = path.split(".")
        section = self.section(*parents)
        found = section.get(key, AUTO)
        if found == AUTO:
            section[key] = value
        elif not same(found, value):
            self.fault(f'{path} is {json.dumps(found)}, but {says}; write "auto" in the file or {remedy}')

    def fault(self, text: str) -> None:
        self.faults.append(f"ds_config {self.file}: {text}")


def same(found: Any, value: Any) -> bool:
    """Whether a value in the file means `value`: numbers may be written as 1, 1.0, 1e0 or "1", and "auto" agrees."""
    if isinstance(value, (list, tuple)):
        is_list = isinstance(found, (list, tuple)) and len(found) == len(value)
        return is_list and all(same(one, other) for one, other in zip(found, value))
    if isinstance(value, bool) or isinstance(found, bool) or not isinstance(value, (int, float)):
        return bool(found == value)
    try:
        return found == AUTO or math.isclose(float(found), value, rel_tol=1e-9)
    except (TypeError, ValueError):
        return False
