"""Many requests in one batch: each gets what it gets by itself, in as few calls of the network as one takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bagel_ds.errors import UserError
from bagel_ds.inference.generation import Inferencer, Request, Result
from tests.inference.recorded import inferencer

TINY = {"num_timesteps": 4, "image_shapes": (64, 96), "max_think_token_n": 6}
PICTURE = Image.fromarray(np.arange(40 * 60 * 3, dtype=np.uint8).reshape(40, 60, 3))


@contextmanager
def counted(found: Inferencer) -> Iterator[list[int]]:
    """Calls of the network inside the block."""
    calls: list[int] = []
    hook = found.network.model.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def requests(found: Inferencer) -> list[Request]:
    """Five that differ in mode, length, size, steps and seed."""
    return [
        found.request("a red square", None, "t2i", seed=1, **TINY),
        found.request("a cat that sits on a table", None, "t2i", seed=2, **TINY | {"image_shapes": (48, 32)}),
        found.request("make it blue", PICTURE, "edit", seed=3, **TINY | {"num_timesteps": 6}),
        found.request("what is it?", PICTURE, "vqa", seed=4, do_sample=True, text_temperature=2.0, **TINY),
        found.request("a green circle", None, "think", seed=5, **TINY | {"cfg_renorm_type": "channel"}),
    ]  # fmt: skip


def assert_same(found: Result, alone: Result) -> None:
    assert found.text == alone.text
    assert (found.image is None) == (alone.image is None)
    if found.image is not None and alone.image is not None:
        assert found.image.size == alone.image.size
        difference = np.abs(np.asarray(found.image).astype(int) - np.asarray(alone.image).astype(int))
        assert difference.max() <= 1, "sums of other sizes round differently by a last bit"


def test_a_batch_gives_each_request_what_it_gets_by_itself() -> None:
    found = inferencer()
    together = found.run(requests(found))
    for result, request in zip(together, requests(found)):
        assert_same(result, found.run([request])[0])
    assert [result.image is not None for result in together] == [True, True, True, False, True]
    assert [result.text is not None for result in together] == [False, False, False, True, True]


def test_four_prompts_with_all_their_branches_are_one_call_a_step() -> None:
    found = inferencer()
    four = [
        found.request(f"picture {number}", PICTURE, "edit", seed=number, **TINY | {"num_timesteps": 8})
        for number in range(4)
    ]
    with counted(found) as one:
        found.run(four[:1])
    with counted(found) as many:
        found.run(four)
    assert len(many) == len(one) == 7 + 2, "seven steps, and the contexts before and after the last text"


def test_a_picture_from_text_alone_computes_two_branches_and_not_three() -> None:
    """Image guidance compares with what has read the texts only, which is all that there is."""
    found = inferencer()
    options = TINY | {"cfg_interval": (0.0, 1.0), "enable_taylorseer": True}
    drawn: list[int] = []
    hook = found.network.model.register_forward_pre_hook(lambda _, args: drawn.append(len(args[0].latent_shapes)))
    found.run([found.request("a red square", None, "t2i", **options)])
    found.run([found.request("a red square", PICTURE, "edit", **options)])
    hook.remove()
    assert drawn == [0, 2, 2, 2] + [1, 0, 3, 3, 3]


def test_texts_of_a_batch_take_as_many_calls_as_the_longest() -> None:
    found = inferencer()
    asked = [found.request("what?", PICTURE, "vqa", max_think_token_n=most) for most in (3, 9, 5)]
    with counted(found) as calls:
        found.run(asked)
    assert len(calls) <= 2 + 8


def test_a_picture_depends_on_its_seed() -> None:
    found = inferencer()
    first, again, other = found.generate(["a cat"] * 3, seed=[7, 7, 8], **TINY)
    assert np.array_equal(np.asarray(first.image), np.asarray(again.image))
    assert not np.array_equal(np.asarray(first.image), np.asarray(other.image))


def test_seeds_of_a_list_of_prompts_count_up() -> None:
    found = inferencer()
    (_, second) = found.generate(["a dog", "a cat"], seed=3, **TINY)
    assert_same(second, found.generate("a cat", seed=4, **TINY))


def test_sampled_texts_follow_their_seed_and_temperature() -> None:
    found = inferencer()
    hot = {"do_sample": True, "text_temperature": 50.0, "max_think_token_n": 12}
    texts = [found.generate("say", PICTURE, "vqa", seed=seed, **hot).text for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]
    greedy = found.generate("say", PICTURE, "vqa", max_think_token_n=12).text
    assert found.generate("say", PICTURE, "vqa", **hot | {"text_temperature": 1e-4}).text == greedy


def test_interleaved_requests_together_are_what_each_is() -> None:
    found = inferencer()
    options: dict[str, Any] = {"max_iterations": 3, "do_sample": True, "text_temperature": 3.0, **TINY}
    together = found.generate(["one", "two and more"], [None, PICTURE], "interleave", seed=1, **options)
    alone = found.generate("two and more", PICTURE, "interleave", seed=2, **options)
    assert [type(item) for item in together[1]] == [type(item) for item in alone]
    assert [item for item in together[1] if isinstance(item, str)] == [item for item in alone if isinstance(item, str)]
    assert all(1 <= len(items) <= 3 for items in together)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"prompt": "  "}, "the prompt is empty"),
        ({"prompt": "x", "mode": "paint"}, "expected one of t2i, edit, vqa, think, interleave"),
        ({"prompt": "x", "mode": "edit"}, "needs an image"),
        ({"prompt": "x", "cfg_text_scal": 3}, "did you mean cfg_text_scale"),
        ({"prompt": "x", "num_timesteps": 1}, "num_timesteps is 1, expected a whole number from 2"),
        ({"prompt": "x", "cfg_renorm_type": "local"}, "global or channel or text_channel"),
        ({"prompt": "x", "image_shapes": (60, 64)}, "multiples of 16"),
        ({"prompt": "x", "image_shapes": (4096, 64)}, "at most"),
        ({"prompt": "x", "cfg_interval": (0.9, 0.1)}, "the smaller first"),
        ({"prompt": "x", "image": "nowhere.png"}, "nowhere.png: .*no such file"),
        ({"prompt": ["x", "y"], "seed": [1]}, "2 prompts, 2 images and 1 seeds"),
    ],
)
def test_wrong_requests_are_one_message(wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        inferencer().generate(**wrong)


def test_all_wrong_settings_are_listed_at_once() -> None:
    with pytest.raises(UserError) as raised:
        inferencer().generate("x", num_timesteps=0, cfg_renorm_min=2, text_temperature=0)
    assert all(name in str(raised.value) for name in ("num_timesteps", "cfg_renorm_min", "text_temperature"))


def test_the_originals_call_gives_its_dictionary() -> None:
    found = inferencer()
    result = found(image=PICTURE, text="make it blue", num_timesteps=3)
    assert result["image"].size == result.image.size and result["text"] is None
    assert found(image=PICTURE, text="what?", understanding_output=True, max_think_token_n=4)["text"] is not None
    listed = found.interleave_inference(["a cat"], think=True, **TINY)
    assert [type(item).__name__ for item in listed] == ["str", "Image"]
    with pytest.raises(UserError, match="nothing to read"):
        found()
