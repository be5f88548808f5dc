"""CRC-32 of concatenated bytes, from the CRC-32 of each run of bytes (zlib's crc32_combine, which Python lacks).

A CRC is a polynomial over GF(2) modulo `_MODULUS`, with its highest power in the lowest bit. Appending n bytes
multiplies it by x^(8 n).
"""

from __future__ import annotations

from functools import lru_cache

_MODULUS = 0xEDB88320
_ONE = 1 << 31


def joined_crc(first: int, second: int, second_bytes: int) -> int:
    """The CRC-32 of some bytes followed by `second_bytes` more."""
    return _times(_power(8 * second_bytes), first) ^ second


@lru_cache(4096)
def _power(exponent: int) -> int:
    """x^exponent."""
    found, square = _ONE, _ONE >> 1
    while exponent:
        if exponent & 1:
            found = _times(found, square)
        square, exponent = _times(square, square), exponent >> 1
    return found


def _times(one: int, other: int) -> int:
    product = 0
    for bit in range(31, -1, -1):
        if one >> bit & 1:
            product ^= other
        other = other >> 1 ^ (_MODULUS if other & 1 else 0)
    return product
