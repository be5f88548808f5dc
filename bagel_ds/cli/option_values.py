"""Types of the sub-commands' options for argparse, with messages that say what is expected."""

from __future__ import annotations

import argparse
import math


def at_least_one(word: str) -> int:
    return _whole_number(word, 1)


def not_negative(word: str) -> int:
    return _whole_number(word, 0)


def port(word: str) -> int:
    """A TCP port, or 0 for any that is free."""
    number = _whole_number(word, 0)
    if number > 65535:
        raise argparse.ArgumentTypeError(f"expected a port from 0 to 65535, found {word!r}")
    return number


def gibibytes(word: str) -> float:
    """A size in GiB, above 0."""
    value = _number(word)
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected GiB as a number above 0, such as 24, found {word!r}")
    return value


def gibibytes_or_none(word: str) -> float:
    """A size in GiB, or 0 for none."""
    value = _number(word)
    if not value >= 0:
        raise argparse.ArgumentTypeError(
            f"expected GiB as a number above 0, such as 1000, or 0 where there is none, found {word!r}"
        )
    return value


def _number(word: str) -> float:
    """NaN where the word is not a finite number, as no comparison with NaN is true."""
    try:
        value = float(word)
    except ValueError:
        return math.nan
    return value if math.isfinite(value) else math.nan


def _whole_number(word: str, least: int) -> int:
    if not word.isdecimal() or int(word) < least:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least {least}, found {word!r}")
    return int(word)
