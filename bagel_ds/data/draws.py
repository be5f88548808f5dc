"""Counter-based randomness: a draw depends on what it is for, never on who makes it or what was drawn before.

Guarantees: equal (seed, names, counters) give equal draws in any process, at any time, on any number of ranks. Choices
come from BLAKE2b (one hash gives eight draws in a microsecond, so planning a million samples stays cheap), normal
deviates from numpy's Philox keyed by such a hash.
"""

from __future__ import annotations

import hashlib
import struct

import numpy as np


class Draws:
    """A stream of draws for one purpose: `Draws("captions", seed, group, epoch, row)`."""

    __slots__ = ("_key", "_block", "_left")

    def __init__(self, *key: int | str) -> None:
        self._key = "\x1f".join(map(str, key)).encode()
        self._block = 0
        self._left: list[int] = []

    def uniform(self) -> float:
        """The next number in [0, 1), from 53 random bits."""
        if not self._left:
            digest = hashlib.blake2b(b"%d\x1f%b" % (self._block, self._key), digest_size=64).digest()
            self._left = list(struct.unpack("<8Q", digest))
            self._block += 1
        return (self._left.pop() >> 11) * 2.0**-53

    def choice(self, count: int) -> int:
        """One of 0 .. count - 1, all equally likely."""
        return int(self.uniform() * count)


def normals(shape: tuple[int, ...], *key: int | str) -> np.ndarray:
    """float32 standard normals of `shape`, a function of `key` alone."""
    digest = hashlib.blake2b("\x1f".join(map(str, key)).encode(), digest_size=16).digest()
    generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
    return generator.standard_normal(shape, dtype=np.float32)
