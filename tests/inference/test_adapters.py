"""Several adapters of one model: named, weighted, chosen by request, and gone without a trace."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from bagel_ds.checkpoint.step_folders import MANIFEST
from bagel_ds.cli.main import main
from bagel_ds.demo import write_demo
from bagel_ds.errors import UserError
from bagel_ds.inference.adapters import Adapters, NamedAdapter, asked_adapters, named_adapters
from bagel_ds.inference.generation import Inferencer
from bagel_ds.inference.loading import load_bagel, open_inferencer
from bagel_ds.lora.base import base_fingerprint
from bagel_ds.lora.peft_files import CONFIG, WEIGHTS, AdapterFolder, AdapterRecord, peft_name
from bagel_ds.model.bagel import Bagel
from bagel_ds.model.shape.lora import LoRA, is_adapter
from bagel_ds.model.shape.parameters import adapted_layers
from bagel_ds.model_folder.tensor_files import TensorFiles

TINY: dict[str, Any] = {"num_timesteps": 3, "image_shapes": (32, 32), "seed": 1}
PROMPT = "a red square"
LORAS = {"cat": LoRA(4, 8.0, targets="gen"), "style": LoRA(2, 6.0, targets="both")}
FEW = ["--image_shapes", "32", "32", "--num_timesteps", "3"]


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, seed=0)
    for name, lora in LORAS.items():
        write_adapter(folder / name, folder / "model", lora)
    return folder


def write_adapter(folder: Path, model: Path, lora: LoRA) -> Path:
    """An adapter of the demo's network, as training writes it, that has learned something."""
    config = replace(open_inferencer(model, "cpu").network.model.config, lora=lora)
    with torch.device("meta"):
        parameters = {name: value.shape for name, value in Bagel(config).named_parameters() if is_adapter(name)}
    generator = torch.Generator().manual_seed(len(str(lora)))
    tensors = {peft_name(name): 0.1 * torch.randn(shape, generator=generator) for name, shape in parameters.items()}
    fingerprint = base_fingerprint(TensorFiles([model / "ema.safetensors"]))
    record = AdapterRecord(lora, adapted_layers(config), str(model), fingerprint)
    folder.mkdir()
    (folder / CONFIG).write_text(record.config())
    save_file(tensors, folder / WEIGHTS, record.metadata())
    return folder


@pytest.fixture(scope="module")
def both(demo: Path) -> Inferencer:
    return open_inferencer(demo / "model", "cpu", lora=[str(demo / "cat"), f"painted={demo / 'style'}:0.5"])


@pytest.fixture(scope="module")
def drawn(both: Inferencer) -> Callable[..., np.ndarray]:
    def drawn(found: Inferencer = both, **options: Any) -> np.ndarray:
        return np.array(found.generate(PROMPT, **TINY, **options).image).astype(int)

    return drawn


def trained(found: Inferencer, folder: Path, lora: LoRA) -> Inferencer:
    """The network that training runs, whose layers hold the adapter."""
    model = Bagel(replace(found.network.model.config, lora=lora)).eval()
    adapter = AdapterFolder(folder)
    held = dict(found.network.model.named_parameters())  # type: ignore[attr-defined]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(adapter.matrix(name) if is_adapter(name) else held[name])
    return Inferencer(replace(found.network, model=model, adapters=Adapters()))


@pytest.mark.parametrize("name", LORAS)
def test_an_adapter_draws_what_the_network_draws_that_trained_it(
    name: str, demo: Path, drawn: Callable[..., np.ndarray]
) -> None:
    alone = open_inferencer(demo / "model", "cpu", lora=[demo / name])
    expected = drawn(trained(alone, demo / name, LORAS[name]))
    assert np.array_equal(drawn(alone), expected)
    assert not np.array_equal(drawn(alone, lora=[]), expected)


def test_without_adapters_the_base_is_there_bit_for_bit(
    demo: Path, both: Inferencer, drawn: Callable[..., np.ndarray]
) -> None:
    base = drawn(open_inferencer(demo / "model", "cpu"))
    for asked in ("cat", {"cat": 2.0, "painted": -1.0}, None):
        assert not np.array_equal(drawn(lora=asked), base)
        assert np.array_equal(drawn(lora=[]), base)
    assert np.array_equal(drawn(lora={"cat": 0, "painted": 0.0}), base)
    held = load_file(demo / "model" / "ema.safetensors")
    for name, parameter in both.network.model.named_parameters():  # type: ignore[attr-defined]
        if "pos_embed" not in name:
            assert torch.equal(parameter, held[name].reshape(parameter.shape).float()), name


def test_weights_count_as_in_merged_ones(
    demo: Path, tmp_path: Path, both: Inferencer, drawn: Callable[..., np.ndarray]
) -> None:
    pictures = []
    for cat, painted, asked in ((1.0, 0.5, None), (-0.5, 2.0, {"painted": 2.0, "cat": -0.5}), (0.0, 0.5, "painted")):
        merged = open_inferencer(demo / "model", "cpu")
        for name, weight in ("cat", cat), ("style", painted):
            adapter = AdapterFolder(demo / name)
            for layer in adapter.layers:
                parameter = merged.network.model.get_parameter(f"{layer}.weight")  # type: ignore[attr-defined]
                rows = adapter.rows_of_b(layer, 0, len(parameter))
                parameter += weight * adapter.scale(layer) * rows @ adapter.a(layer)
        pictures.append(drawn(lora=asked))
        assert np.abs(pictures[-1] - drawn(merged)).max() <= 1, "sums in another order round differently"
    assert not np.array_equal(pictures[0], pictures[1]) and not np.array_equal(pictures[0], pictures[2])


def test_a_batch_may_mix_them_and_keeps_its_order(both: Inferencer) -> None:
    choices = ("cat", [], "painted", "cat", None)
    requests = [both.request(f"a {number}", lora=lora, **TINY) for number, lora in enumerate(choices)]
    for result, request in zip(both.run(requests), requests):
        (alone,) = both.run([request])
        difference = np.array(result.image).astype(int) - np.array(alone.image).astype(int)
        assert np.abs(difference).max() <= 1, "sums of other sizes round differently by a last bit"
    short = {"mode": "interleave", "seed": 3, "max_iterations": 1, "max_think_token_n": 8}
    said = [both.request("why?", lora=lora, **short) for lora in ([], "painted")]
    found = both.reason(said)
    assert found == [both.reason([one])[0] for one in said] and found[0] != found[1]


def test_layers_that_are_streamed_have_adapters(demo: Path, both: Inferencer, drawn: Callable[..., np.ndarray]) -> None:
    adapters, files = Adapters([demo / "cat"]), TensorFiles([demo / "model" / "ema.safetensors"])
    assert adapters.nbytes(torch.bfloat16) == 2 * sum(
        value.numel() for value in load_file(demo / "cat" / WEIGHTS).values()
    )
    config, place = both.network.model.config, torch.device("cpu")
    model = load_bagel(config, files, "demo", place, torch.float32, (0, 2), adapters)
    streamed = Inferencer(replace(both.network, model=model, adapters=adapters))
    assert np.array_equal(drawn(streamed), drawn(lora="cat"))


def test_what_is_passed_means_a_name_a_folder_and_a_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/lr=1e-4/step_5", "a:2"):
        Path(folder).mkdir(parents=True)
    expected = {
        "runs/lr=1e-4/step_5": ("step_5", "runs/lr=1e-4/step_5", 1.0),
        "runs/lr=1e-4/step_5/": ("step_5", "runs/lr=1e-4/step_5", 1.0),
        "runs/lr=1e-4/step_5:0.8": ("step_5", "runs/lr=1e-4/step_5", 0.8),
        "cat=runs/lr=1e-4/step_5:-1": ("cat", "runs/lr=1e-4/step_5", -1.0),
        "cat=a:2": ("cat", "a:2", 1.0),
        "a:2:.5": ("a:2", "a:2", 0.5),
    }
    for word, (name, folder, weight) in expected.items():
        assert named_adapters([word]) == [NamedAdapter(name, Path(folder), weight)], word
    assert named_adapters([Path("a:2")]) == [NamedAdapter("a:2", Path("a:2"), 1.0)]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], r"--lora nowhere: there is no folder nowhere; expected \[NAME=\]FOLDER\[:WEIGHT\]"),
        (["=a"], "no name before ="),
        (["a:much"], "weight 'much': expected a number from -100 to 100"),
        (["a:nan"], "weight 'nan'"),
        (["a:1000"], "weight '1000'"),
        (["a", "b/a"], "a and b/a are both called a; pass a name with each, such as --lora first=a --lora second=b/a"),
        (["x=a", "x=b/a"], "both called x"),
    ],
)
def test_what_can_not_be_meant_is_refused(
    words: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("a", "b/a"):
        Path(folder).mkdir(parents=True)
    with pytest.raises(UserError, match=said):
        named_adapters(words)


def test_beside_checkpoints_they_are_named(tmp_path: Path) -> None:
    (tmp_path / "checkpoints" / "step_500").mkdir(parents=True)
    (tmp_path / "checkpoints" / "step_500" / MANIFEST).write_text("{}")
    with pytest.raises(UserError, match=r"holds no adapter; .*checkpoints holds step_500"):
        Adapters([tmp_path])


def test_a_request_names_adapters_in_three_ways(both: Inferencer) -> None:
    chosen = both.network.adapters.chosen
    assert chosen(asked_adapters(None)) == {"cat": 1.0, "painted": 0.5}
    assert chosen(asked_adapters("painted")) == {"painted": 0.5}
    assert list(chosen(asked_adapters(["painted", "cat"]))) == ["cat", "painted"], "sums keep one order"
    assert chosen(asked_adapters({"cat": 2, "painted": None})) == {"cat": 2.0}, "as a column of a parquet file"
    assert chosen(asked_adapters([])) == {}
    for wrong in (5, ["cat", 1], {"cat": "much"}, {"cat": True}):
        with pytest.raises(UserError, match="lora"):
            asked_adapters(wrong)
    with pytest.raises(UserError, match="there is no adapter 'dog'; expected one of cat, painted"):
        both.generate(PROMPT, lora="dog", **TINY)
    with pytest.raises(UserError, match="opened without any; pass --lora cat=FOLDER"):
        Adapters().chosen({"cat": None})


def test_adapters_of_another_model_or_of_no_linear_layer_are_refused(demo: Path, tmp_path: Path) -> None:
    other = write_adapter(tmp_path / "other", demo / "model", LORAS["cat"])
    tensors = load_file(other / WEIGHTS)
    save_file(tensors, other / WEIGHTS, {"base_fingerprint": "0123"})
    with pytest.raises(UserError, match="trained on different base models"):
        open_inferencer(demo / "model", "cpu", lora=[demo / "cat", other])
    with pytest.raises(UserError, match="is not the model that the adapter"):
        open_inferencer(demo / "model", "cpu", lora=[other])
    head = load_file(demo / "model" / "ema.safetensors")["language_model.lm_head.weight"]
    pair = {"lora_A": torch.zeros(4, head.shape[1]), "lora_B": torch.zeros(len(head), 4)}
    save_file({peft_name(f"language_model.lm_head.{kind}"): value for kind, value in pair.items()}, other / WEIGHTS)
    with pytest.raises(UserError, match="lm_head, which is no linear layer; merge it with bagel-ds export --merge"):
        open_inferencer(demo / "model", "cpu", lora=[other])


def test_lines_of_a_file_choose_and_a_wrong_name_is_reported_with_its_place(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], drawn: Callable[..., np.ndarray]
) -> None:
    choices: list[Any] = [{}, {"lora": "cat"}, {"lora": []}, {"lora": "dog"}, {"lora": {"cat": 0.3}}]
    lines = [json.dumps({"prompt": PROMPT, "seed": 1, **choice}) for choice in choices]
    (tmp_path / "prompts.jsonl").write_text("\n".join(lines))
    out = tmp_path / "out"
    words = ["generate", "--model_path", str(demo / "model"), "--device", "cpu", *FEW]
    words += ["--prompts", str(tmp_path / "prompts.jsonl"), "--out", str(out), "--lora", str(demo / "cat")]
    assert main([*words, "--lora", f"painted={demo / 'style'}:0.5"]) == 2
    said = capsys.readouterr().err
    assert "prompts.jsonl line 4: lora: there is no adapter 'dog'; expected one of cat, painted" in said
    assert "4 made, 0 there already, 1 left out" in said
    from PIL import Image

    for number, choice in enumerate(choices):
        if choice.get("lora") != "dog":
            with Image.open(out / f"{number:06d}.png") as image:
                assert np.abs(np.array(image).astype(int) - drawn(**choice)).max() <= 1, number
    rows = {row["name"]: row for row in map(json.loads, (out / "results.jsonl").read_text().splitlines())}
    assert rows["000000"]["lora"] == {"cat": 1.0, "painted": 0.5} and rows["000001"]["lora"] == {"cat": 1.0}
    words[-1] += ":0.9"
    assert main([*words, "--lora", f"painted={demo / 'style'}:0.5"]) == 2
    assert "2 made, 2 there already" in capsys.readouterr().err, "the lines that take the usual weight of cat"


def test_a_model_is_evaluated_with_adapters(demo: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--val_config", str(demo / "example.yaml"), "--val_max_batches", "1", "--device", "cpu", "--json"]
    common += ["--precision", "fp32", "--max_num_tokens", "512", "--expected_num_tokens", "256"]
    common += ["--max_num_tokens_per_sample", "512"]
    model = str(demo / "model")

    def rows(*words: str) -> list[dict[str, Any]]:
        assert main(["evaluate", *words, *common]) == 0
        return json.loads(capsys.readouterr().out)["results"]

    (alone,) = rows(str(demo / "cat"))
    (named,) = rows(model, "--lora", str(demo / "cat"))
    assert named["weights"] == "cat:1" and named["scores"] == alone["scores"]
    (mixed,) = rows(model, "--lora", f"{demo / 'cat'}:0", "--lora", f"{demo / 'style'}:0.5")
    assert mixed["weights"] == "cat:0 + style:0.5" and mixed["scores"] != alone["scores"]
    assert main(["evaluate", str(demo / "cat"), "--lora", str(demo / "style"), *common]) == 2
    assert "is an adapter: pass it with --lora, too" in capsys.readouterr().err
    assert main(["evaluate", model, "--lora", str(demo / "style"), "--weights", "ema", *common]) == 2
    assert "--weights: the adapters say which" in capsys.readouterr().err


def test_adapters_of_one_base_are_evaluated_on_a_base_that_is_read_once(
    demo: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    common = ["--val_config", str(demo / "example.yaml"), "--val_max_batches", "1", "--device", "cpu", "--json"]
    common += ["--precision", "fp32", "--max_num_tokens", "512", "--expected_num_tokens", "256"]
    common += ["--max_num_tokens_per_sample", "512"]

    def scores(*folders: Path) -> list[dict[str, float]]:
        assert main(["evaluate", *map(str, folders), *common]) == 0
        return [row["scores"] for row in json.loads(capsys.readouterr().out)["results"]]

    read: list[str] = []

    class Counted(TensorFiles):
        def read(self, name: str, start: int = 0, numel: int | None = None) -> torch.Tensor:
            if numel is None or numel > 4096:  # the fingerprint of a base reads the beginnings
                read.append(name)
            return super().read(name, start, numel)

    folders = [demo / "cat", demo / "style"]
    apart = [scores(folder)[0] for folder in folders]
    monkeypatch.setattr("bagel_ds.lora.base.TensorFiles", Counted)
    together = scores(*folders, demo / "cat")
    assert together == [*apart, apart[0]] and apart[0] != apart[1], "no adapter stays behind"
    assert len(read) == len(set(read)) > 100
    read.clear()
    mixed = scores(demo / "cat", demo / "model", demo / "style")
    assert [mixed[0], mixed[2]] == apart and mixed[1] not in apart, "nor on other weights"
