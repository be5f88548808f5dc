"""The constants of packing, by version of the algorithm.

Guarantees: a saved state names the version that planned its block, and `rules_of` that version gives the block's packs
again. So a run can finish a block that an older version began. Raise `ALGORITHM` when equal input would give other
packs, and keep the old rules here.
"""

from __future__ import annotations

import math
from typing import NamedTuple

ALGORITHM = 3
UNNAMED_ALGORITHM = 2  # of a state that names none

LARGEST_BLOCK, SMALLEST_BLOCK = 256, 32  # packs; powers of two
BLOCK_SAMPLES = 16_384  # planned before the first step, at most; packs of so many samples need no larger block
WINDOW_PACKS = 2  # the window holds at least so many packs' worth, however short the samples are
SMALLEST_WINDOW = 32  # samples; of algorithm 2


class PackingRules(NamedTuple):
    """How packs are chosen and ordered."""

    window: int  # samples that the packer chooses from
    block: int  # packs that are ordered together
    slack_divisor: int  # a pack counts as full from 1 - 1/slack_divisor of the limit on: that room buys equal cost
    firsts: int  # samples tried as the first of a pack's last two, from short to long


def rules_of(algorithm: int, lookahead: int, samples_per_pack: float, rows: int) -> PackingRules:
    """The rules of a version of the algorithm for data of `rows` rows (those of groups that are drawn from)."""
    window, block = lookahead, LARGEST_BLOCK
    if algorithm == 2:  # at most a quarter of the rows, and half of them
        window = min(window, max(SMALLEST_WINDOW, rows // 4))
        most = rows / 2
    else:
        most = float(BLOCK_SAMPLES)
    while block > SMALLEST_BLOCK and block * samples_per_pack > most:
        block //= 2
    window = max(window, math.ceil(WINDOW_PACKS * samples_per_pack))
    return PackingRules(window, block, 400, 16) if algorithm == 2 else PackingRules(window, block, 800, 32)
