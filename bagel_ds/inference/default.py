"""The module's default inferencer, as in the original's app: `setup_models(path)` makes it ready."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bagel_ds.errors import UserError

if TYPE_CHECKING:
    from bagel_ds.inference.generation import Inferencer


class DefaultInferencer:
    """Stands for the `Inferencer` of the latest `setup_models`; all of that one's methods are here."""

    def __init__(self) -> None:
        self._current: Inferencer | None = None

    def _ready(self) -> Inferencer:
        if self._current is None:
            raise UserError("no model is loaded: call bagel_ds.inference.setup_models(model_path) first")
        return self._current

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self._ready(), name)

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._ready()(*arguments, **options)


inferencer = DefaultInferencer()


def setup_models(
    model_path: str | Path,
    device: str | None = None,
    precision: str | None = None,
    weights: str | None = None,
    max_gpu_memory: float | str | None = None,
    lora: Sequence[str | Path] = (),
    attn: str = "auto",
) -> tuple[Any, Any, Any, dict[str, int]]:
    """(model, vae_model, tokenizer, new_token_ids) of a model folder; `inferencer` uses them from here on.

    Arguments and errors are those of `loading.open_inferencer`.
    """
    from bagel_ds.inference.loading import open_inferencer

    opened = open_inferencer(model_path, device, precision, weights, max_gpu_memory, lora, attn)
    inferencer._current = opened
    special = opened.network.tokenizer.special
    new_token_ids = {
        "bos_token_id": special.bos,
        "eos_token_id": special.eos,
        "start_of_image": special.start_of_image,
        "end_of_image": special.end_of_image,
    }
    return opened.network.model, opened.network.vae, opened.network.tokenizer, new_token_ids
