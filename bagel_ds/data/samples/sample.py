"""SamplePlan: one sample with every random choice made, and nothing read yet.

Guarantees: `length` is exactly the number of tokens that the sample fills in a pack, dropout included; equal plans give
equal tensors. `streams/stream.py` makes plans, `plan/planner.py` packs them (it uses only the integers here), and
`batches/materialize.py` turns them into tensors.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, Sequence

TEXT, VIT, VAE = "text", "vit_image", "vae_image"


class Entry(NamedTuple):
    """One piece of a sample's sequence (names as in the original's sequence_plan)."""

    kind: str  # TEXT, VIT or VAE
    content: int  # which text or image of the row, as its format's `parse` numbers them
    tokens: int  # text ids, ViT patches or latent tokens, without the two markers around them
    loss: bool = False
    dropped: bool = False  # condition dropped: no tokens; an image still advances the position by one
    special_label: int = -1  # token id predicted at the text's end marker, -1 for none
    height: int = 0  # pixels after the resize (images only)
    width: int = 0
    frame: int = -1  # where `content` is a video: which of its frames

    @property
    def length(self) -> int:
        """Tokens in the sequence, markers included."""
        return 0 if self.dropped else self.tokens + 2


class SamplePlan(NamedTuple):
    """`group` counts the groups of the run; (group, epoch, row) is the counter of all draws of the sample."""

    group: int
    epoch: int
    row: int
    entries: tuple[Entry, ...]

    @property
    def length(self) -> int:
        return sum(entry.length for entry in self.entries)

    def tokens(self, kind: str) -> int:
        """Tokens of one kind that the sample will hold, markers not counted."""
        return sum(entry.tokens for entry in self.entries if entry.kind == kind and not entry.dropped)


class Stream(Protocol):
    """A group of datasets as the planner sees it: numbered rows in units that are cheap to read together."""

    name: str  # group name, e.g. "t2i_pretrain"
    weight: float
    is_mandatory: bool

    @property
    def units(self) -> Sequence[range]:
        """Row numbers of each read unit (a parquet row group, a slice of a jsonl file); disjoint, in file order."""
        ...

    def plan_sample(self, row: int, epoch: int) -> SamplePlan | None:
        """The sample of `row` in `epoch`, every choice made; None where the row is unusable (counted at indexing)."""
        ...


class BadRow(ValueError):
    """A row that cannot be used. The message is the reason without the row's place, which the caller knows."""
