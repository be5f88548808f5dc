"""Texts, token by token: many sequences in one call per token, each ending by itself.

Source: the original's generate_text; of BAGEL-Canvas the token after a text, which says what comes next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bagel_ds.inference.network import Context, Network
from bagel_ds.inference.settings import Settings


@dataclass
class Text:
    """A text under way. `ids` begin with <|im_start|> and never hold <|im_end|>; `next_id`: what follows <|im_end|>."""

    context: Context
    settings: Settings
    generator: torch.Generator
    ids: list[int] = field(default_factory=list)
    next_id: int | None = None

    def choose(self, logits_V: Tensor) -> int:
        """The next token: the likeliest, or drawn from this text's own generator."""
        if not self.settings.do_sample:
            return int(logits_V.argmax())
        probabilities = torch.softmax(logits_V.cpu() / self.settings.text_temperature, dim=-1)
        return int(torch.multinomial(probabilities, 1, generator=self.generator))


def generate_texts(network: Network, texts: Sequence[Text], wants_next: bool = False) -> None:
    """Fill each text's `ids`, at most `max_think_token_n` of them; with `wants_next` its `next_id` too."""
    special = network.tokenizer.special
    for text in texts:
        text.ids = [special.bos]
    feed = [(text, special.bos) for text in texts]
    while feed:
        logits, contexts = network.read_tokens([text.context for text, _ in feed], [token for _, token in feed])
        coming = []
        for (text, token), context, row in zip(feed, contexts, logits):
            text.context = context
            chosen = text.choose(row)
            if token == special.eos:
                text.next_id = chosen
            elif chosen == special.eos or len(text.ids) == text.settings.max_think_token_n:
                coming += [(text, special.eos)] if wants_next else []
            else:
                text.ids.append(chosen)
                if wants_next or len(text.ids) < text.settings.max_think_token_n:
                    coming.append((text, chosen))
        feed = coming


def written(network: Network, ids: Sequence[int]) -> str:
    """The text of generated ids, without the marker at their beginning. Padding rows of the vocabulary have no text."""
    known = [token for token in ids[1:] if token < network.tokenizer.size]
    return network.tokenizer.decode(known)
