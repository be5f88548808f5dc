"""A metric of the user's own: what it is given, what is refused, and that answers are deterministic."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch

from bagel_ds.arguments.run_config import make_config
from bagel_ds.data.batches.held_out import HeldOut
from bagel_ds.demo import exact_answer as exact_answer_module
from bagel_ds.demo import write_demo
from bagel_ds.demo.exact_answer import exact_answer
from bagel_ds.errors import UserError
from bagel_ds.inference.evaluate import Evaluator
from bagel_ds.inference.generation import Inferencer
from bagel_ds.inference.jobs import Made
from bagel_ds.inference.loading import open_inferencer
from bagel_ds.inference.task_metric import Function, TaskMetric, load_metric
from bagel_ds.inputs.data import open_held_out, open_inputs

SETTINGS = {"num_timesteps": 3, "max_think_token_n": 5, "max_iterations": 3}
CONFIG = """
interleave_reasoning:
  dataset_names: [blockmoving_test]
  image_transform_args: {image_stride: 16, max_image_size: 64, min_image_size: 32}
  vit_image_transform_args: {image_stride: 14, max_image_size: 56, min_image_size: 28}
  weight: 1
t2i_pretrain:
  dataset_names: [t2i]
  image_transform_args: {image_stride: 16, max_image_size: 64, min_image_size: 32}
  num_used_data: [1]
  weight: 1
unified_edit:
  dataset_names: [seedxedit_multi]
  image_transform_args: {image_stride: 16, max_image_size: 64, min_image_size: 32}
  vit_image_transform_args: {image_stride: 14, max_image_size: 56, min_image_size: 28}
  num_used_data: [1]
  weight: 1
vlm_sft:
  dataset_names: [llava_ov]
  image_transform_args: {image_stride: 14, max_image_size: 56, min_image_size: 28}
  frame_sampler_args: {max_num_frames: 12, min_num_frames: 8}
  num_used_data: [60]
  weight: 1
"""


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "demo"
    write_demo(folder)
    (folder / "val.yaml").write_text(CONFIG)
    return folder


@pytest.fixture(scope="module")
def inferencer(demo: Path) -> Inferencer:
    return open_inferencer(demo / "model", "cpu", "fp32")


def held_out(demo: Path, packs: int) -> HeldOut:
    values = {
        "model_path": str(demo / "model"),
        "finetune_from_hf": True,
        "dataset_config_file": str(demo / "val.yaml"),
    }
    values |= {"val_config": str(demo / "val.yaml"), "max_num_tokens": 400, "val_max_batches": packs}
    inputs = open_inputs(make_config(values))
    return open_held_out(inputs.config, inputs.folder, inputs.model, inputs.vae, progress=False)


def metric(function: Function, settings: dict[str, Any] | None = None) -> TaskMetric:
    return TaskMetric("own", "own.py:own", function, SETTINGS | (settings or {}), batch_size=3)


@pytest.fixture(scope="module")
def judged(demo: Path, inferencer: Inferencer) -> list[tuple[Made, dict[str, Any]]]:
    """What a metric is given for rows of all kinds."""
    found: list[tuple[Made, dict[str, Any]]] = []

    def judge(prediction: Made, row: dict[str, Any]) -> float:
        found.append((prediction, row))
        return len(found)

    split = held_out(demo, 7)
    assert metric(judge).mean(inferencer, split) == pytest.approx((split.rows + 1) / 2), "the mean over all rows"
    return found


def test_each_kind_of_row_is_answered_in_its_own_way(judged: list[tuple[Made, dict[str, Any]]]) -> None:
    kinds = {
        "solution_interleave": lambda made: made.text is not None,
        "captions": lambda made: len(made.images) == 1 and made.text is None,
        "image_list": lambda made: len(made.images) == 1 and made.text is None,
        "conversations": lambda made: made.text is not None and not made.images,
    }
    for column, fits in kinds.items():
        rows = [made for made, row in judged if column in row]
        assert rows and all(map(fits, rows)), column


def test_the_row_has_all_its_columns(judged: list[tuple[Made, dict[str, Any]]]) -> None:
    (row, *_) = [row for _, row in judged if "solution_interleave" in row]
    assert {"answer", "question_interleave", "question_images", "solution_images"} <= row.keys()
    assert isinstance(row["answer"], str) and isinstance(row["question_images"][0], bytes)


def test_answers_are_deterministic_and_do_not_depend_on_the_batch(
    demo: Path, inferencer: Inferencer, judged: list[tuple[Made, dict[str, Any]]]
) -> None:
    texts: list[str | None] = []
    one = TaskMetric("own", "own.py:own", lambda made, row: texts.append(made.text) or 0.0, SETTINGS, batch_size=1)
    one.mean(inferencer, held_out(demo, 7))
    assert texts == [made.text for made, _ in judged]


@pytest.mark.parametrize("value", ["yes", None, float("nan"), [1.0]])
def test_a_metric_must_give_a_number(value: Any, demo: Path, inferencer: Inferencer) -> None:
    with pytest.raises(UserError, match=r"--metric own.py:own gave .* at .*, expected a finite number"):
        metric(lambda made, row: value).mean(inferencer, held_out(demo, 1))


def test_a_metric_that_fails_names_the_row(demo: Path, inferencer: Inferencer) -> None:
    with pytest.raises(UserError, match=r"--metric own.py:own failed at .*: KeyError: 'anser'"):
        metric(lambda made, row: row["anser"]).mean(inferencer, held_out(demo, 1))


def test_a_metric_is_loaded_by_file_and_name(demo: Path, tmp_path: Path) -> None:
    found = load_metric(f"{demo / 'exact_answer.py'}:exact_answer", {})
    assert found.name == "exact_answer"
    assert found.function(Made([], "The answer is: red up."), {"answer": "red up"}) == 1.0
    (tmp_path / "broken.py").write_text("import nothing_of_this_name")
    for word, words in {
        "exact_answer": "expected FILE.py:function",
        f"{demo}/exact_answer.py:": "expected FILE.py:function",
        "nowhere.py:f": "no such file",
        f"{demo}/exact_answer.py:exact_anser": "has no function exact_anser; it has exact_answer, words",
        f"{tmp_path}/broken.py:f": "can't be imported: ModuleNotFoundError",
        f"{demo}/val.yaml:f": "must end with .py",
    }.items():
        with pytest.raises(UserError, match=words):
            load_metric(word, {})


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Move 1: ...\n\n![](x.png)\n\nThe board looks like the goal. The answer is: red up, blue left.", 1.0),
        ("the answer is:  Red up,  blue left", 1.0),
        ("The answer is: red up.", 0.0),
        ("The answer is: red up, blue left, red down.", 0.0),
        ("", 0.0),
        (None, 0.0),
    ],
)
def test_exact_answer(text: str | None, right: float) -> None:
    assert exact_answer(Made([], text), {"answer": "red up, blue left"}) == right


def test_the_documented_example_is_the_one_that_the_demo_writes() -> None:
    page = (Path(__file__).parents[2] / "docs" / "inference.md").read_text()
    assert inspect.getsource(exact_answer_module).partition("def exact_answer")[2].strip() in page


def test_the_mean_is_among_the_scores(demo: Path) -> None:
    values = {"model_path": str(demo / "model"), "finetune_from_hf": True, "precision": "fp32", "num_workers": 0}
    values |= {"val_config": str(demo / "val.yaml"), "max_num_tokens": 400, "val_max_batches": 1}
    evaluator = Evaluator(make_config(values), torch.device("cpu"), metric=metric(lambda made, row: 0.25))
    scores = evaluator.scores(demo / "model", "ema")
    assert scores["val/own"] == 0.25 and "val/mse" in scores
