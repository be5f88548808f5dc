"""Pictures with a text, as TensorBoard and W&B show them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image


@dataclass(frozen=True)
class Shown:
    """`name` is the tag, such as samples/model/000000; `text` the prompt and what was answered."""

    name: str
    text: str
    images: Sequence[Image.Image] = ()

    def named_images(self) -> list[tuple[str, Image.Image]]:
        """Each picture under a name of its own."""
        if len(self.images) == 1:
            return [(self.name, self.images[0])]
        return [(f"{self.name}_{number}", image) for number, image in enumerate(self.images)]
