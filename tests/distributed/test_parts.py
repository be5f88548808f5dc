"""A run that begins with a language model, a ViT and an autoencoder leaves a BAGEL that is taken up like any other."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from bagel_ds.model_folder.folder import TOKENIZER_FILES
from bagel_ds.model_folder.tokenizer import load_tokenizer
from tests.distributed.cases import Case, arguments, run_cases

pytestmark = pytest.mark.distributed

MISSING_ROWS = 5  # of the language model's vocabulary, for the tokens that BAGEL brings


def cut_in_parts(model: Path, folder: Path) -> dict[str, object]:
    """The demo's network as a Qwen2 and a SigLIP have theirs; the arguments that name the parts."""
    tensors, rows = load_file(model / "ema.safetensors"), load_tokenizer(model).size - MISSING_ROWS
    llm = {name.removeprefix("language_model."): value for name, value in tensors.items() if "_moe_gen" not in name}
    llm = {name: value for name, value in llm.items() if name.startswith(("model.", "lm_head."))}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        llm[name] = llm[name][:rows].clone()
    vit = {name.removeprefix("vit_model."): value for name, value in tensors.items() if name.startswith("vit_model.")}
    for part, held in (("llm", llm), ("vit", vit)):
        (folder / part).mkdir(parents=True)
        save_file(held, folder / part / "model.safetensors")
        config = json.loads((model / f"{part}_config.json").read_text())
        changed = {"vocab_size": rows} if part == "llm" else {}
        (folder / part / "config.json").write_text(json.dumps({**config, **changed}))
    for name in filter(lambda name: (model / name).is_file(), TOKENIZER_FILES):
        shutil.copyfile(model / name, folder / "llm" / name)
    return {
        "llm_path": folder / "llm",
        "vit_path": folder / "vit",
        "vae_path": model / "ae.safetensors",
        "model_path": None,
        "finetune_from_hf": None,
    }


def test_a_start_from_parts_with_new_vocabulary_rows_can_be_resumed_and_fine_tuned(demo: Path, tmp_path: Path) -> None:
    parts, run = cut_in_parts(demo / "model", tmp_path / "parts"), tmp_path / "run"
    step_1, step_2 = (run / "checkpoints" / f"step_{step}" for step in (1, 2))
    cases = [
        Case("begun", arguments(demo, run, **parts)),
        Case("resumed", arguments(demo, run, **{**parts, "auto_resume": True, "total_steps": 2})),
        Case("tuned", arguments(demo, tmp_path / "tuned", model_path=step_2)),
    ]
    outcomes = run_cases(tmp_path / "launch", cases)
    for name, (found,) in outcomes.items():
        assert found.code == 0, f"{name}: {found.output[-4000:]}"
    assert f"{MISSING_ROWS} rows are added" in outcomes["begun"][0].output
    assert "resumed after step 1" in outcomes["resumed"][0].output
    assert "0 missing; 0 unexpected" in outcomes["tuned"][0].output

    tokens = load_tokenizer(demo / "model").size
    for folder in (step_1, step_2, tmp_path / "tuned" / "checkpoints" / "step_1"):
        assert json.loads((folder / "llm_config.json").read_text())["vocab_size"] == tokens
        tables = load_file(folder / "ema.safetensors")
        for name in ("language_model.model.embed_tokens.weight", "language_model.lm_head.weight"):
            assert len(tables[name]) == tokens and tables[name][-MISSING_ROWS:].any(dim=1).all()
