"""The network that arguments and a model folder ask for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bagel_ds.arguments.run_config import make_config
from bagel_ds.inputs.data import sample_options
from bagel_ds.inputs.network import bagel_config
from bagel_ds.model.shape.config import VAEConfig
from bagel_ds.model_folder.folder import ModelFolder


@pytest.fixture
def folder(tmp_path: Path) -> ModelFolder:
    llm = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
    }
    vit = {
        "hidden_size": 24,
        "intermediate_size": 32,
        "num_attention_heads": 2,
        "patch_size": 14,
    }
    (tmp_path / "llm_config.json").write_text(json.dumps({**llm, "vocab_size": 300, "qk_norm": False}))
    (tmp_path / "vit_config.json").write_text(json.dumps({**vit, "num_hidden_layers": 3}))
    return ModelFolder(tmp_path)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_llm_qk_norm_decides_whatever_the_folder_says(qk_norm: bool, folder: ModelFolder) -> None:
    given = {} if qk_norm else {"llm_qk_norm": False}
    model = bagel_config(make_config(given), folder, None, VAEConfig())
    assert model.llm.qk_norm is qk_norm


@pytest.mark.parametrize("interpolates", [True, False])
def test_samples_are_planned_with_the_position_ids_they_will_get(interpolates: bool, folder: ModelFolder) -> None:
    config = make_config({"interpolate_pos": interpolates})
    options = sample_options(config, bagel_config(config, folder, None, VAEConfig()), VAEConfig())
    assert options.layout.interpolate_pos is interpolates
