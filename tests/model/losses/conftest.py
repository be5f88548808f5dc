"""The process group of one rank that normalization exchanges its counts in."""

from tests.train.conftest import one_rank

__all__ = ["one_rank"]
