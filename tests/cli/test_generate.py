"""`bagel-ds generate`: one prompt, a file of them, a benchmark's layout; errors are reported, finished results stay."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from safetensors.torch import load_file, save_file

from bagel_ds.cli.main import main
from bagel_ds.demo import write_demo

TINY = ["--num_timesteps", "3", "--image_shapes", "32", "48", "--max_think_token_n", "6"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, seed=0)
    return folder / "model"


def generate(model: Path, *words: Any) -> int:
    return main(["generate", "--model_path", str(model), "--device", "cpu", *TINY, *map(str, words)])


def test_a_picture_that_is_not_there_is_named_once(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert generate(model, "--prompt", "make it blue", "--image", "nope.png") == 2
    message = capsys.readouterr().err
    assert "image nope.png: " in message and message.count("nope.png") == 1


def results(folder: Path) -> dict[str, dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]
    return {row["name"]: row for row in rows}


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.convert("RGB").tobytes()


def test_one_prompt_is_drawn_edited_and_asked_about(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert generate(model, "--prompt", "a red square") == 0
    with Image.open("out.png") as image:
        assert image.size == (48, 32)
    assert generate(model, "--prompt", "make it blue", "--image", "out.png", "--out", "blue.png") == 0
    assert Path("blue.png").is_file()
    capsys.readouterr()
    assert generate(model, "--prompt", "what is it?", "--image", "out.png", "--mode", "vqa") == 0
    said = capsys.readouterr().out
    assert generate(model, "--prompt", "what is it?", "--image", "out.png", "--mode", "vqa", "--out", "a.txt") == 0
    assert Path("a.txt").read_text() == said
    assert generate(model, "--prompt", "a cat", "--think", "--out", "cat.png") == 0
    assert capsys.readouterr().out.strip(), "the thought"


def test_a_file_of_prompts_goes_on_where_it_stopped(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.new("RGB", (40, 60), (200, 0, 0)).save(tmp_path / "red.png")
    lines = [
        {"prompt": "a circle"},
        {"prompt": 3},
        {"prompt": "make it blue", "image": "red.png", "seed": 9, "num_timesteps": 4},
        {"prompt": "what?", "image": "nowhere.png", "mode": "vqa"},
        {"prompt": "what?", "image": "red.png", "mode": "vqa"},
        {"prompt": "why?", "mode": "interleave", "max_iterations": 2},
        {"prompt": "x", "num_timestep": 4},
    ]
    prompts, out = tmp_path / "prompts.jsonl", tmp_path / "out"
    prompts.write_text("\n".join(map(json.dumps, lines)) + "\nnot json\n\n")
    assert generate(model, "--prompts", prompts, "--out", out, "--seed", 5) == 2
    said = capsys.readouterr().err
    for place in ("line 2: prompt is 3", "line 4: image", "line 7: num_timestep is not a setting", "line 8: not JSON"):
        assert place in said
    found = results(out)
    assert sorted(found) == ["000000", "000002", "000004", "000005"]
    assert (found["000000"]["seed"], found["000002"]["seed"]) == (5, 9)
    assert found["000002"]["num_timesteps"] == 4 and found["000000"]["num_timesteps"] == 3
    assert found["000004"]["text"] is not None and not found["000004"]["files"]

    first = pixels(out / "000000.png")
    (out / "000002.png").unlink()
    lines[4]["max_think_token_n"] = 3
    prompts.write_text("\n".join(map(json.dumps, lines)))
    generate(model, "--prompts", prompts, "--out", out, "--seed", 5)
    assert "2 made, 2 there already" in capsys.readouterr().err, "what was lost and what changed"
    assert pixels(out / "000000.png") == first


def test_a_picture_depends_neither_on_the_batch_nor_on_the_number_of_processes(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = tmp_path / "prompts.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b and c", "d"], "mode": [None, "t2i", None]}), prompts)
    assert generate(model, "--prompts", prompts, "--out", tmp_path / "one", "--batch_size", 1) == 0
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "10":
        monkeypatch.setenv("RANK", rank)
        assert generate(model, "--prompts", prompts, "--out", tmp_path / "two", "--local_rank", rank) == 0
    assert sorted(results(tmp_path / "two")) == sorted(results(tmp_path / "one")) == ["000000", "000001", "000002"]
    for name in ("000000.png", "000001.png", "000002.png"):
        one, two = pixels(tmp_path / "one" / name), pixels(tmp_path / "two" / name)
        assert max(abs(a - b) for a, b in zip(one, two)) <= 1


def test_the_layouts_of_benchmarks(model: Path, tmp_path: Path) -> None:
    rows = [{"tag": "single_object", "prompt": "a photo of a bench"}, {"tag": "counting", "prompt": "two cats"}]
    (tmp_path / "geneval.jsonl").write_text("\n".join(map(json.dumps, rows)))
    out = tmp_path / "geneval"
    assert generate(model, "--prompts", tmp_path / "geneval.jsonl", "--out", out, "--layout", "geneval") == 0
    for number, row in enumerate(rows):
        folder = out / f"{number:05d}"
        assert json.loads((folder / "metadata.jsonl").read_text()) == row
        assert [path.name for path in sorted((folder / "samples").iterdir())] == [f"{i:05d}.png" for i in range(4)]
    assert pixels(out / "00000/samples/00000.png") != pixels(out / "00000/samples/00001.png")
    (tmp_path / "wise.json").write_text(json.dumps([{"Prompt": "a fruit", "prompt_id": 17}, {"Prompt": "x"}]))
    words = ["--prompts", tmp_path / "wise.json", "--out", tmp_path / "wise", "--layout", "wise", "--think"]
    assert generate(model, *words) == 2
    assert [path.name for path in (tmp_path / "wise").glob("*.png")] == ["17.png"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "pass --prompt"),
        (["--prompt", "x", "--prompts", "p.jsonl"], "pass --prompt"),
        (["--prompt", " "], "the prompt is empty"),
        (["--prompt", "x", "--out", "no/such/folder/x.png"], "not a folder that can be written"),
        (["--prompt", "x", "--out", "."], "is a folder; pass a file name"),
        (["--prompts", "nowhere.jsonl"], "no such file"),
        (["--prompt", "x", "--image", "nowhere.png"], "nowhere.png"),
        (["--prompt", "x", "--image_shapes", "33", "32"], "multiples of 16"),
        (["--prompt", "x", "--num_timesteps", "1"], "num_timesteps is 1"),
    ],
)
def test_what_is_wrong_is_one_message(
    words: list[str], said: str, model: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    assert generate(model, *words) == 2
    found = capsys.readouterr().err
    assert said in found and "Traceback" not in found
    assert list(tmp_path.iterdir()) == []


def test_weights_chooses_the_file_that_draws(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = tmp_path / "both"
    shutil.copytree(model, both)
    tensors = load_file(both / "ema.safetensors")
    tensors["llm2vae.bias"] = tensors["llm2vae.bias"] + 1
    save_file(tensors, both / "model.safetensors", {"format": "pt"})
    drawn = {}
    for words in ([], ["--weights", "ema"], ["--weights", "model"]):
        out = tmp_path / "drawn.png"
        assert generate(both, "--prompt", "a red square", "--out", out, *words) == 0
        drawn[" ".join(words)] = pixels(out)
    assert drawn[""] == drawn["--weights ema"]
    assert drawn[""] != drawn["--weights model"]
    capsys.readouterr()
    assert generate(model, "--prompt", "x", "--weights", "model") == 2
    assert "holds no model.safetensors; leave out weights" in capsys.readouterr().err


def test_max_gpu_memory_is_read_and_has_no_effect_on_a_cpu(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.png"
    assert generate(model, "--prompt", "x", "--out", out, "--max_gpu_memory", "lots") == 2
    assert "max_gpu_memory 'lots': expected a size such as 24 or 24GiB" in capsys.readouterr().err
    assert generate(model, "--prompt", "x", "--out", out, "--max_gpu_memory", "24GB") == 0
    assert "max_gpu_memory has no effect on cpu" in capsys.readouterr().err and out.is_file()
