"""The demo's last picture: what its model draws and answers, beside the targets."""

from __future__ import annotations

from pathlib import Path

import pytest
from PIL import Image

from bagel_ds.demo import write_demo
from bagel_ds.demo.gallery import answers, examples, main, sheet
from bagel_ds.inference.generation import Result
from bagel_ds.inference.loading import open_inferencer


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    write_demo(folder, seed=0)
    return folder


def test_rows_are_drawn_at_their_size_and_questions_answered(demo: Path) -> None:
    found = examples(demo / "data" / "bagel_example")
    results = answers(open_inferencer(demo / "model", "cpu"), found)
    assert [example.answer is None for example in found] == [True, True, False, False]
    for example, result in zip(found, results):
        if example.answer is None:
            assert result.image is not None and result.image.size == example.picture.size
        else:
            assert result.text is not None and "<image>" not in example.prompt


def test_the_sheet_shows_target_and_drawing_side_by_side(demo: Path) -> None:
    found = examples(demo / "data" / "bagel_example")[:1]
    drawn = Image.new("RGB", found[0].picture.size, (1, 200, 3))
    page = sheet(found, [Result(drawn)])
    left, right = page.crop((8, 8, 128, 128)), page.crop((136, 8, 256, 128))
    assert (1, 200, 3) not in {color for _, color in left.getcolors(2**16)}
    assert (1, 200, 3) in {color for _, color in right.getcolors(2**16)}
    assert sheet(found, [Result()]).size == page.size


def test_the_newest_checkpoint_is_shown_and_a_missing_one_is_an_error(
    demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(demo), str(tmp_path), str(tmp_path / "out.png")]) == 2
    assert "Traceback" not in capsys.readouterr().err
    assert main([str(demo), str(demo / "model"), str(tmp_path / "out.png")]) == 0
    with Image.open(tmp_path / "out.png") as image:
        assert image.width > 200
