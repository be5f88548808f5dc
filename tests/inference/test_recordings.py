"""What the network says and draws equals the original's inference, recording by recording."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from bagel_ds.inference import pictures, reasoning, sampler
from bagel_ds.inference.generation import Inferencer, Request
from bagel_ds.inference.sampler import Drawing, draw
from bagel_ds.inference.text import Text, generate_texts, written
from bagel_ds.model.bagel import Bagel
from tests.inference.recorded import assert_close, assert_context, feed, inferencer, settings
from tests.recordings import cases, read_json, reference, tensors

ALL = cases("inference/*.json")
KINDS = {} if not isinstance(ALL[0], str) else {stem: read_json(stem)["kind"] for stem in ALL}


def of_kind(*kinds: str) -> list[Any]:
    """The recordings of these kinds, or the reason why there are none."""
    found = [stem for stem, kind in KINDS.items() if kind in kinds]
    if not KINDS:
        return ALL
    assert found, f"no recording of {kinds}"
    return found


def test_every_kind_of_recording_is_compared() -> None:
    reference()
    assert set(KINDS.values()) <= {
        "vqa", "t2i", "edit", "think_vqa", "think_t2i", "think_edit", "taylor_t2i", "interleave",
    }  # fmt: skip


def inputs_of(info: dict[str, Any]) -> tuple[Any, ...]:
    items: list[Any] = []
    if info.get("image"):
        items.append(pictures.opened(reference() / "inference" / info["image"]))
    return (*items, info["text"])


def request_of(info: dict[str, Any]) -> Request:
    own = settings(info) if "args" in info else settings({"args": {}})
    return Request(
        inputs_of(info),
        answers=info["kind"] in ("vqa", "think_vqa"),
        think=info["kind"].startswith("think"),
        think_prompt=info.get("think_prompt"),
        settings=own.changed({"max_think_token_n": info.get("max_think_token_n", info.get("max_length"))}),
    )


def draws_of(recorded: dict[str, Tensor]) -> Iterator[Tensor]:
    """Posterior draws of the inputs, then the noise of the image."""
    posterior = sorted((name for name in recorded if name.startswith("cond_vae_posterior_eps.")), key=_number)
    yield from (recorded[name] for name in posterior)
    yield recorded["init_noise"]


def _number(name: str) -> int:
    return int(name.rpartition(".")[2])


class Heard:
    """The logits of every text token, as the head gave them."""

    def __init__(self, model: Bagel) -> None:
        self.logits: list[Tensor] = []
        self.hook = model.language_model.lm_head.register_forward_hook(
            lambda module, given, output: self.logits.append(output) if len(output) else None
        )


@pytest.mark.parametrize("stem", of_kind("vqa", "think_vqa"))
def test_an_answer_is_token_for_token_the_originals(stem: str) -> None:
    info, recorded, found = read_json(stem), tensors(stem), inferencer()
    (work,) = found.contexts([request_of(info)])
    text = Text(work.branches.gen, work.request.settings, work.generator)
    heard = Heard(found.network.model)
    generate_texts(found.network, [text])
    heard.hook.remove()
    assert text.ids == recorded["generated_ids"].tolist()
    logits = torch.cat(heard.logits)
    assert len(logits) >= len(text.ids) - 1
    assert_close(logits, recorded["logits"][: len(logits)], "logits")
    assert written(found.network, text.ids) == info["output_text"]
    assert found.run([request_of(info)])[0].text == info["output_text"]


@pytest.mark.parametrize("stem", of_kind("t2i", "edit", "taylor_t2i", "think_t2i", "think_edit"))
def test_an_image_is_drawn_step_by_step_as_the_original_does(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info, recorded, found = read_json(stem), tensors(stem), inferencer()
    feed(draws_of(recorded), monkeypatch)
    (work,) = found.contexts([request_of(info)])
    found._think([work])
    if "generated_ids" in recorded:
        assert work.text == info["output_text"]
    for name, recorded_context in info["contexts"].items():
        context = getattr(work.branches, name)
        assert [context.length] == recorded_context["kv_lens"] and [context.position] == recorded_context["ropes"]
        if any(key.startswith(f"cache.{name}.") for key in recorded):
            assert_context(context, recorded, f"cache.{name}")
    drawing = found.begin(work)
    assert [drawing.height, drawing.width] == info["output_hw"]
    _compare_steps(found, drawing, recorded, info, "", monkeypatch)
    image = np.asarray(found.finish(drawing)).astype(int)
    assert np.abs(image - recorded["image_uint8_hwc"].numpy().astype(int)).max() <= 1


def _compare_steps(
    found: Inferencer,
    drawing: Drawing,
    recorded: dict[str, Tensor],
    info: dict[str, Any],
    prefix: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    steps: list[tuple[Tensor, Tensor]] = []
    guided = sampler.guided

    def noted(velocities: dict[str, Tensor], own: Any) -> Tensor:
        velocity = guided(velocities, own)
        steps.append((drawing.latents, velocity))
        return velocity

    monkeypatch.setattr(sampler, "guided", noted)
    draw(found.network, [drawing])
    monkeypatch.setattr(sampler, "guided", guided)
    if "timesteps" in info:
        assert drawing.times.tolist() == pytest.approx(info["timesteps"], rel=1e-6)
    assert steps and f"{prefix}step.{len(steps)}.x_t" not in recorded
    for number, (latents, velocity) in enumerate(steps):
        assert_close(latents, recorded[f"{prefix}step.{number}.x_t"], f"step {number} x_t")
        assert_close(velocity, recorded[f"{prefix}step.{number}.v_t"], f"step {number} v_t")
    assert_close(drawing.latents, recorded[f"{prefix}final_latent"], "final latent")


@pytest.mark.parametrize("stem", of_kind("taylor_t2i"))
def test_extrapolated_sampling_leaves_the_steps_out_that_the_original_leaves_out(
    stem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    info, recorded, found = read_json(stem), tensors(stem), inferencer()
    calls: list[int] = []
    hook = found.network.model.register_forward_hook(lambda *_: calls.append(1))
    feed(draws_of(recorded), monkeypatch)
    found.run([request_of(info)])
    hook.remove()
    computed = sum(step["type"] == "full" for step in info["branch_steps"]["gen"])
    assert len(calls) == computed + 1, "and one for the prompt"


@pytest.mark.parametrize("stem", of_kind("interleave"))
def test_interleaved_reasoning_follows_the_original(stem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    info, recorded, found = read_json(stem), tensors(stem), inferencer()
    network = found.network
    feed(iter([recorded[draw["key"]] for draw in info["draws"]]), monkeypatch)
    script = _Script(info, network.model)
    drawn: list[int] = []
    iteration = iter(range(info["max_iterations"]))

    def stored_image(*_: Any) -> Image.Image:
        """What was drawn, compared, then the recorded pixels: a flipped one would spread."""
        number = drawn[-1]
        return Image.fromarray(recorded[f"iter.{number}.image_uint8_hwc"].numpy())

    monkeypatch.setattr(pictures, "decoded", stored_image)
    inputs = [
        item["text"] if item["type"] == "text" else pictures.opened(reference() / "inference" / item["image"])
        for item in info["inputs"]
    ]
    empty = network.empty
    own = settings(info).changed({"max_iterations": info["max_iterations"]})
    work = reasoning.Reasoning(own, torch.Generator(), sampler.Branches(empty, empty, empty), own.image_shapes)
    for item in inputs:
        reasoning.hear(network, [work], [item])
    latents = draw

    def compared(network: Any, drawings: list[Drawing], on_step: Any) -> None:
        number = drawn[-1]
        (drawing,) = drawings
        monkeypatch.setattr(reasoning, "draw", latents)
        _compare_steps(found, drawing, recorded, {}, f"iter.{number}.", monkeypatch)

    while not work.done:
        drawn.append(next(iteration))
        monkeypatch.setattr(reasoning, "draw", compared)
        is_text = not work.draws_next
        script.begin(drawn[-1])
        reasoning.advance(network, [work])
        if is_text:
            script.compare(recorded)
    script.remove()
    kinds = ["text" if isinstance(item, str) else "image" for item in work.items]
    assert kinds == [one["kind"] if "kind" in one else one["type"] for one in info["iterations"]]
    for name in ("gen", "cfg_text", "cfg_img"):
        context = getattr(work.branches, name)  # without the last text, which the original reads in vain
        prefix = f"final.cache.{name}"
        kept = {key: value[: context.length] for key, value in recorded.items() if key.startswith(f"{prefix}.")}
        if kept:
            assert_context(context, kept, prefix)


class _Script:
    """Raises the tokens that the recording forced, and keeps the logits as they were before."""

    def __init__(self, info: dict[str, Any], model: Bagel) -> None:
        self.info = info
        self.texts = iter(info["script"])
        self.logits: list[Tensor] = []
        self.number, self.current = 0, None
        self.hook = model.language_model.lm_head.register_forward_hook(self._raise)

    def begin(self, number: int) -> None:
        self.number, self.current, self.logits = number, None, []

    def _raise(self, module: Any, given: Any, output: Tensor) -> Tensor | None:
        if len(output) != 1:
            return None
        self.current = self.current or next(self.texts)
        self.logits.append(output[0].clone())
        forced = {self.current["free_tokens"]: self.info["action_ids"]["eos"]}
        names = {"text": "bos / text", "image": "image", "end": "end"}
        forced[self.current["free_tokens"] + 1] = self.info["action_ids"][names[self.current["action"]]]
        if len(self.logits) - 1 in forced:
            output = output.clone()
            output[0, forced[len(self.logits) - 1]] = output.max() + 1
        return output

    def compare(self, recorded: dict[str, Tensor]) -> None:
        prefix = f"iter.{self.number}"
        *of_tokens, of_action = self.logits
        assert_close(torch.stack(of_tokens), recorded[f"{prefix}.logits"][:-1], f"{prefix}.logits")
        assert_close(of_action, recorded[f"{prefix}.action_logits_own_kv"], "action logits")

    def remove(self) -> None:
        self.hook.remove()


def test_the_recordings_settings_are_ours_by_name() -> None:
    for stem, kind in KINDS.items():
        if kind != "interleave":
            json.dumps(settings({"args": read_json(stem).get("args", {})}).__dict__)
