"""What a person gets wrong is one message that says what, where and what to do, exit code 2, and no traceback.

Most cases share one process: what they test is the message. The launcher's own behaviour is tested with real launches
at the end.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any, Callable

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from bagel_ds.data.plan.planner import PROBED_ROWS
from bagel_ds.data.plan.row_order import RowOrder
from tests.distributed.cases import Case, Outcome, arguments, linked_model, own, run_cases
from tests.launch import TRAIN, cpu_environment, deepspeed
from tests.small_data import conversation, picture, write_conversations

pytestmark = pytest.mark.distributed

Make = Callable[[Path, Path], list[str]]  # (demo, an empty folder of the case) -> arguments
_CASES: dict[str, tuple[Make, list[str]]] = {}
_LOADS: dict[str, Make] = {}


def bad(*expected: str) -> Callable[[Make], Make]:
    """Registers a faulty run and what its message must name: thing, expected, found, remedy (regular expressions)."""

    def register(make: Make) -> Make:
        _CASES[make.__name__] = (make, list(expected))
        return make

    return register


def loads(make: Make) -> Make:
    """Registers a run that must go through."""
    _LOADS[make.__name__] = make
    return make


# ------------------------------------------------------------------------------------------------------- arguments
@bad("bagel-ds download", "bagel-ds demo", "--model_path hf/BAGEL-7B-MoT", "--dataset_config_file")
def the_bare_command(demo: Path, own_folder: Path) -> list[str]:
    return ["--ds_config", "zero3.json"]


@bad("unknown argument --max_num_token_per_sampel", "--max_num_tokens_per_sample", "--help")
def unknown_argument(demo: Path, own_folder: Path) -> list[str]:
    return [*arguments(demo, own_folder), "--max_num_token_per_sampel", "512"]


@bad("total_stepz", "total_steps", "--lr", "fast", "a finite number")
def several_wrong_arguments(demo: Path, own_folder: Path) -> list[str]:
    return [*arguments(demo, own_folder), "--total_stepz", "4", "--lr", "fast"]


@bad("--attn flash", "flash-attn: it computes on a GPU only", "Leave out --attn", "--attn sdpa")
def flash_on_a_cpu(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, attn="flash")


@bad("--attn flex", "no backward pass on a CPU", "--attn sdpa")
def flex_on_a_cpu(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, attn="flex")


@bad("zero9", "zero2, ", "zero3", "zero3_cpu")
def unknown_ds_config(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, ds_config="zero9")


@bad(r"mine\.json", r"optimizer\.params\.lr is 0\.5", r"--lr is 0\.001", "auto|equal")
def ds_config_contradicts_lr(demo: Path, own_folder: Path) -> list[str]:
    config = {"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW", "params": {"lr": 0.5}}}
    (own_folder / "mine.json").write_text(json.dumps(config))
    return arguments(demo, own_folder, ds_config=own_folder / "mine.json")


@bad("--ds_config", r"mine\.json, line 3", "'zero_optimisation'", "did you mean 'zero_optimization'")
def ds_config_misspelt(demo: Path, own_folder: Path) -> list[str]:
    (own_folder / "mine.json").write_text(json.dumps({"steps_per_print": 5, "zero_optimisation": {}}, indent=1))
    return arguments(demo, own_folder, ds_config=own_folder / "mine.json")


@bad("visual_gen False", "visual_und False", "leave out at least one")
def both_modalities_off(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, visual_gen=False, visual_und=False)


@bad("nothing to start from", "--finetune_from_hf True", "--resume_from")
def nothing_to_start_from(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, finetune_from_hf=None)


@bad("--resume_from .*nowhere", "no such folder|does not exist")
def resume_from_nowhere(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, resume_from=own_folder / "nowhere")


@bad("--results_dir .*file", "written")
def results_dir_is_a_file(demo: Path, own_folder: Path) -> list[str]:
    (own_folder / "file").write_text("")
    return arguments(demo, own_folder, results_dir=own_folder / "file")


@bad("--checkpoint_dir .*file", "written")
def checkpoint_dir_is_a_file(demo: Path, own_folder: Path) -> list[str]:
    (own_folder / "file").write_text("")
    return arguments(demo, own_folder, checkpoint_dir=own_folder / "file")


# ------------------------------------------------------------------------------------------------- the model folder
@bad("--model_path .*nowhere", "bagel-ds download", "bagel-ds demo")
def model_folder_missing(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, model_path=own_folder / "nowhere")


@bad("lacks", r"llm_config\.json", r"ae\.safetensors", r"tokenizer\.json", r"ema\.safetensors", "bagel-ds download")
def model_folder_nearly_empty(demo: Path, own_folder: Path) -> list[str]:
    left_out = [file.name for file in (demo / "model").iterdir() if file.name != "vit_config.json"]
    return arguments(demo, own_folder, model_path=linked_model(demo / "model", own_folder / "model", left_out))


@bad("max_latent_size=32", r"ema\.safetensors", "64x64", "--max_latent_size 64")
def max_latent_size_contradicts(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, max_latent_size=32)


def _changed_weights(demo: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
    model = linked_model(demo / "model", folder / "model", ["ema.safetensors"])
    tensors = load_file(demo / "model" / "ema.safetensors")
    change(tensors)
    save_file(tensors, model / "ema.safetensors")
    return model


@bad(r"ema\.safetensors", r"llm2vae\.bias", r"\[3\]", r"\[64\]", "don't match the folder")
def a_tensor_of_the_wrong_shape(demo: Path, own_folder: Path) -> list[str]:
    model = _changed_weights(demo, own_folder, lambda tensors: tensors.update({"llm2vae.bias": torch.zeros(3)}))
    return arguments(demo, own_folder, model_path=model)


@bad(r"ema\.safetensors", r"connector\.fc1\.weight is missing", "don't match the folder")
def a_missing_tensor(demo: Path, own_folder: Path) -> list[str]:
    model = _changed_weights(demo, own_folder, lambda tensors: tensors.pop("connector.fc1.weight"))
    return arguments(demo, own_folder, model_path=model)


@bad(r"ema\.safetensors", "is missing", r"and \d+ more")
def weights_of_another_network(demo: Path, own_folder: Path) -> list[str]:
    """Fine-tuning asked for, and nothing in the file that could be loaded."""
    model = linked_model(demo / "model", own_folder / "model", ["ema.safetensors"])
    save_file({"transformer.wte": torch.zeros(4, 4)}, model / "ema.safetensors")
    return arguments(demo, own_folder, model_path=model)


@bad(r"lacks ema\.safetensors or model\.safetensors", "bagel-ds download")
def no_weights_at_all(demo: Path, own_folder: Path) -> list[str]:
    model = linked_model(demo / "model", own_folder / "model", ["ema.safetensors"])
    return arguments(demo, own_folder, model_path=model)


@bad(r"ema\.safetensors", "cut short|damaged|not a readable", "again")
def weights_cut_short(demo: Path, own_folder: Path) -> list[str]:
    model = linked_model(demo / "model", own_folder / "model")
    file = own(model / "ema.safetensors")
    file.write_bytes(file.read_bytes()[:-1000])
    return arguments(demo, own_folder, model_path=model)


@bad(r"ae\.safetensors", "not a readable safetensors file|damaged|cut short", "again")
def autoencoder_is_no_safetensors(demo: Path, own_folder: Path) -> list[str]:
    model = linked_model(demo / "model", own_folder / "model", ["ae.safetensors"])
    (model / "ae.safetensors").write_text("<html>not found</html>\n")
    return arguments(demo, own_folder, model_path=model)


LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 29000000000\n"


def _with_pointer(demo: Path, folder: Path, name: str, *without: str) -> Path:
    model = linked_model(demo / "model", folder / "model", [name, *without])
    (model / name).write_text(LFS)
    return model


@bad(r"ema\.safetensors: it is a Git LFS pointer", "29,000,000,000 bytes", "git lfs pull", "hf download")
def weights_are_a_git_lfs_pointer(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, model_path=_with_pointer(demo, own_folder, "ema.safetensors"))


@bad(r"ae\.safetensors: it is a Git LFS pointer", "git lfs pull")
def autoencoder_is_a_git_lfs_pointer(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, model_path=_with_pointer(demo, own_folder, "ae.safetensors"))


@bad(r"tokenizer\.json: it is a Git LFS pointer", "git lfs pull")
def tokenizer_is_a_git_lfs_pointer(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, model_path=_with_pointer(demo, own_folder, "tokenizer.json"))


@bad(r"ema\.safetensors: \d+ tensors, such as \S+, are stored as F8_E4M3", "Quantized weights can't be", "bf16")
def weights_in_8_bit_floats(demo: Path, own_folder: Path) -> list[str]:
    def quantize(tensors: dict[str, torch.Tensor]) -> None:
        tensors.update({name: t.to(torch.float8_e4m3fn) for name, t in tensors.items() if "_proj.weight" in name})

    return arguments(demo, own_folder, model_path=_changed_weights(demo, own_folder, quantize))


def _with_nan(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name].view(-1)[-1] = float("nan")

    return spoil


@bad(r"model: tensor connector\.fc2\.bias holds nan at element \d+", "again", "an earlier checkpoint")
def nan_in_a_part_that_the_data_does_not_use(demo: Path, own_folder: Path) -> list[str]:
    """Text to image has no picture that the model reads."""
    model = _changed_weights(demo, own_folder, _with_nan("connector.fc2.bias"))
    data = _dataset(own_folder, _t2i(demo / "data/bagel_example/t2i"))
    return arguments(demo, own_folder, model_path=model, **data)


@bad(r"ae\.safetensors: tensor decoder\.conv_out\.bias holds inf at element 2", "again")
def infinity_in_the_autoencoder(demo: Path, own_folder: Path) -> list[str]:
    model = linked_model(demo / "model", own_folder / "model", ["ae.safetensors"])
    tensors = load_file(demo / "model" / "ae.safetensors")
    tensors["decoder.conv_out.bias"][2] = float("inf")
    save_file(tensors, model / "ae.safetensors")
    return arguments(demo, own_folder, model_path=model)


@bad(r"llm_config\.json", "not valid JSON", "again")
def llm_config_is_no_json(demo: Path, own_folder: Path) -> list[str]:
    model = linked_model(demo / "model", own_folder / "model", ["llm_config.json"])
    (model / "llm_config.json").write_text("{hidden_size: 128")
    return arguments(demo, own_folder, model_path=model)


@bad(r"vit_config\.json", "num_hidden_layers")
def vit_config_lacks_a_key(demo: Path, own_folder: Path) -> list[str]:
    model = linked_model(demo / "model", own_folder / "model", ["vit_config.json"])
    (model / "vit_config.json").write_text(json.dumps({"hidden_size": 64, "model_type": "siglip_vision_model"}))
    return arguments(demo, own_folder, model_path=model)


@bad(r"llm_config\.json", "hidden_size", "wide")
def llm_config_holds_words(demo: Path, own_folder: Path) -> list[str]:
    model = linked_model(demo / "model", own_folder / "model", ["llm_config.json"])
    content = json.loads((demo / "model" / "llm_config.json").read_text())
    (model / "llm_config.json").write_text(json.dumps({**content, "hidden_size": "wide"}))
    return arguments(demo, own_folder, model_path=model)


@bad(r"vit_config\.json", "--vit_patch_size 16", "14")
def vit_patch_size_contradicts(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, vit_patch_size=16)


@bad("tokenizer|model", r"<\|vision_start\|>", r"<\|im_start\|>")
def tokenizer_without_special_tokens(demo: Path, own_folder: Path) -> list[str]:
    dropped = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>")
    names = ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json"]
    model = linked_model(demo / "model", own_folder / "model", names)
    content = json.loads((demo / "model" / "tokenizer.json").read_text())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] not in dropped]
    content["model"]["vocab"] = {word: i for word, i in content["model"]["vocab"].items() if word not in dropped}
    (model / "tokenizer.json").write_text(json.dumps(content))
    return arguments(demo, own_folder, model_path=model)


@bad(r"the tokenizer of .*model has \d+ tokens", r"llm_config\.json", r"vocab_size=\d+", "belong together")
def tokenizer_larger_than_the_embedding(demo: Path, own_folder: Path) -> list[str]:
    model = linked_model(demo / "model", own_folder / "model", ["tokenizer.json"])
    content = json.loads((demo / "model" / "tokenizer.json").read_text())
    size = json.loads((demo / "model" / "llm_config.json").read_text())["vocab_size"]
    first = 1 + max(token["id"] for token in content["added_tokens"])
    for number in range(first, size + 1):
        content["added_tokens"].append({**content["added_tokens"][0], "id": number, "content": f"<|new_{number}|>"})
    (model / "tokenizer.json").write_text(json.dumps(content))
    return arguments(demo, own_folder, model_path=model)


# ---------------------------------------------------------------------------------------------------------- the data
def _dataset(own_folder: Path, config: Any, info: Any = None) -> dict[str, object]:
    written = config if isinstance(config, str) else yaml.safe_dump(config)
    (own_folder / "data.yaml").write_text(written)
    if info is not None:
        (own_folder / "dataset_info.yaml").write_text(yaml.safe_dump(info))
    return {"dataset_config_file": own_folder / "data.yaml"}


def _t2i(folder: object) -> dict[str, Any]:
    transform = {"image_stride": 16, "max_image_size": 96, "min_image_size": 64}
    dataset = {"name": "mine", "data_dir": str(folder)}
    return {"t2i_pretrain": {"dataset_names": [dataset], "image_transform_args": transform, "weight": 1}}


@bad("--dataset_config_file .*nowhere", "bagel-ds demo|docs/data.md")
def dataset_config_missing(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, dataset_config_file=own_folder / "nowhere.yaml")


@bad(r"data\.yaml", "line|YAML")
def dataset_config_malformed(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, **_dataset(own_folder, "t2i_pretrain: [unclosed\n  - x: }"))


@bad(r"dataset_info\.yaml", "mi_data", "my_data")
def unknown_dataset(demo: Path, own_folder: Path) -> list[str]:
    config = {"t2i_pretrain": {**_t2i("x")["t2i_pretrain"], "dataset_names": ["mi_data"]}}
    info = {"t2i_pretrain": {"my_data": {"data_dir": str(demo / "data/bagel_example/t2i")}}}
    return arguments(demo, own_folder, **_dataset(own_folder, config, info))


@bad("t2i_pretrian", "unknown kind", "t2i_pretrain")
def unknown_kind(demo: Path, own_folder: Path) -> list[str]:
    config = {"t2i_pretrian": _t2i(demo / "data/bagel_example/t2i")["t2i_pretrain"]}
    return arguments(demo, own_folder, **_dataset(own_folder, config))


@bad("mine", "data_dir", "nowhere", "does not exist", "correct the path")
def data_folder_missing(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, **_dataset(own_folder, _t2i(own_folder / "nowhere")))


@bad("mine", r"holds no \.parquet file")
def data_folder_empty(demo: Path, own_folder: Path) -> list[str]:
    (own_folder / "empty").mkdir()
    return arguments(demo, own_folder, **_dataset(own_folder, _t2i(own_folder / "empty")))


@bad("t2i_pretrain/mine", r"broken\.parquet", "none of its|can.?not be used|not be read")
def data_folder_with_nothing_readable(demo: Path, own_folder: Path) -> list[str]:
    (own_folder / "rows").mkdir()
    (own_folder / "rows" / "broken.parquet").write_bytes(b"PAR1 but not really")
    return arguments(demo, own_folder, **_dataset(own_folder, _t2i(own_folder / "rows")))


@bad("t2i_pretrain/mine", r"a\.parquet", "it is a Git LFS pointer", "git lfs pull")
def data_files_are_git_lfs_pointers(demo: Path, own_folder: Path) -> list[str]:
    (own_folder / "rows").mkdir()
    (own_folder / "rows" / "a.parquet").write_text(LFS)
    return arguments(demo, own_folder, **_dataset(own_folder, _t2i(own_folder / "rows")))


@bad("max_num_tokens_per_sample=8", "raise it or shrink")
def every_sample_too_long(demo: Path, own_folder: Path) -> list[str]:
    return arguments(demo, own_folder, max_num_tokens_per_sample=8)


@bad("t2i_pretrain", "--visual_gen False", "no data to train on", "Change the switches or add data")
def a_switch_that_leaves_no_data(demo: Path, own_folder: Path) -> list[str]:
    config = _t2i(demo / "data/bagel_example/t2i")
    return arguments(demo, own_folder, visual_gen=False, **_dataset(own_folder, config))


# ------------------------------------------------------------------------------------------------ what must be loaded
@loads
def tokenizer_json_alone(demo: Path, own_folder: Path) -> list[str]:
    left_out = ["tokenizer_config.json", "vocab.json", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
    return arguments(demo, own_folder, model_path=linked_model(demo / "model", own_folder / "model", left_out))


@loads
def vocab_and_merges_alone(demo: Path, own_folder: Path) -> list[str]:
    left_out = ["tokenizer_config.json", "tokenizer.json", "special_tokens_map.json", "added_tokens.json"]
    return arguments(demo, own_folder, model_path=linked_model(demo / "model", own_folder / "model", left_out))


@loads
def no_config_json(demo: Path, own_folder: Path) -> list[str]:
    left_out = ["config.json", "generation_config.json"]
    return arguments(demo, own_folder, model_path=linked_model(demo / "model", own_folder / "model", left_out))


@pytest.fixture(scope="module")
def outcomes(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    folder = tmp_path_factory.mktemp("bad")
    cases = []
    for name, make in [(name, make) for name, (make, _) in _CASES.items()] + list(_LOADS.items()):
        own_folder = folder / name
        own_folder.mkdir()
        cases.append(Case(name, make(demo, own_folder), directory=str(own_folder)))
    return {name: ranks[0] for name, ranks in run_cases(folder / "results", cases).items()}


def _assert_one_message(output: str, expected: list[str]) -> None:
    assert "Traceback" not in output, output
    assert output.count("ERROR:") == 1, output
    message = output[output.index("ERROR:") :]
    for pattern in expected:
        assert re.search(pattern, message), f"{pattern!r} is not in:\n{message}"


@pytest.mark.parametrize("name", list(_CASES))
def test_a_fault_is_one_message_and_code_2(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    _assert_one_message(outcome.output, _CASES[name][1])
    assert outcome.code == 2


@pytest.mark.parametrize("name", list(_LOADS))
def test_model_folders_of_every_layout_train(name: str, outcomes: dict[str, Outcome]) -> None:
    outcome = outcomes[name]
    assert outcome.code == 0, outcome.output
    assert "0 missing" in outcome.output and "done: 1 steps" in outcome.output


# -------------------------------------------------------------------------------------------- ranks that differ
def _relative(demo: Path, folder: Path, name: str, config: dict[str, Any]) -> Path:
    """A working folder whose relative paths name a dataset config and a checkpoint folder of its own."""
    here = folder / name
    here.mkdir(parents=True)
    (here / "data.yaml").write_text(yaml.safe_dump(config))
    return here


def _other_pictures(folder: Path) -> tuple[Path, Path]:
    """Two working folders with the same lines, and pictures of other sizes for those that no start looks at."""
    rows = RowOrder([range(256), range(256, 300)], 42, "vlm_sft")
    late = {row for _, row in islice(iter(rows.next, None), PROBED_ROWS, 300)}
    group = {"image_transform_args": {"image_stride": 14, "max_image_size": 98, "min_image_size": 28}}
    dataset = {"name": "lines", "data_dir": "images", "jsonl_path": "lines.jsonl"}
    config = {"vlm_sft": {**group, "dataset_names": [dataset], "is_mandatory": True}}
    lines = [conversation("<image> what?", "a thing", image=f"{row}.png") for row in range(300)]
    places = []
    for name, side in (("one_host", 42), ("another_host", 98)):
        here = _relative(folder, folder, name, config)
        images = {f"{row}.png": picture(side if row in late else 42, 42) for row in range(300)}
        written = write_conversations(here, lines, images)
        Path(written["jsonl_path"]).rename(here / "lines.jsonl")
        places.append(here)
    return places[0], places[1]


def _spoiled_model(demo: Path, folder: Path) -> Path:
    """A NaN that rank 1 of 2 reads under ZeRO-3: the last element of a tensor."""
    (folder / "spoiled").mkdir()
    return _changed_weights(demo, folder / "spoiled", _with_nan("vae2llm.weight"))


def _differing_cases(demo: Path, folder: Path) -> list[Case]:
    rows = demo / "data/bagel_example/t2i"
    one, heavier = _t2i(rows), {"t2i_pretrain": {**_t2i(rows)["t2i_pretrain"], "num_used_data": [1]}}
    common = _relative(demo, folder, "common", one)
    shared = {"results_dir": folder / "results", "dataset_config_file": "data.yaml"}
    same = arguments(demo, folder, **shared)

    def differs(name: str, **on_rank_1: Any) -> Case:
        return Case(name, same, str(common), on_rank_1)

    other_plan = _relative(demo, folder, "other_plan", heavier)
    no_data = _relative(demo, folder, "no_data", _t2i("nowhere"))
    elsewhere = _relative(demo, folder, "elsewhere", one)
    one_host, another_host = _other_pictures(folder)
    relative_checkpoints = arguments(demo, folder, **shared, checkpoint_dir="checkpoints")
    return [
        differs("package_version", versions={"transformers": "5.0.1"}),
        differs("argument", arguments=arguments(demo, folder, **shared, checkpoint_dir=folder / "other")),
        differs("plan", directory=str(other_plan)),
        differs("fault_on_one_rank", directory=str(no_data)),
        Case("nan_on_one_rank", [*same, "--model_path", str(_spoiled_model(demo, folder))], str(common)),
        Case("pictures", same, str(one_host), {"directory": str(another_host)}),
        Case("checkpoint_dir", relative_checkpoints, str(common), {"directory": str(elsewhere)}),
    ]


_DIFFERING = {
    "package_version": ["the version of transformers differs", "rank 0 on", "rank 1 on", r"5\.0\.1", "same"],
    "argument": ["--checkpoint_dir differs", "rank 1 on", "other", "same"],
    "nan_on_one_rank": [r"tensor vae2llm\.weight holds nan at element"],
    "plan": ["data plan", "differs", "rank 1 on", "same files"],
    "pictures": ["plan of the data", "as indexed on each host", "differs", "rank 1 on", "same files"],
    "fault_on_one_rank": ["mine", "nowhere", "does not exist"],
    "checkpoint_dir": ["--checkpoint_dir checkpoints", "not the folder that rank 0 writes to", "share"],
}


@pytest.fixture(scope="module")
def differing(demo: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Outcome]]:
    folder = tmp_path_factory.mktemp("differing")
    return run_cases(folder / "outcomes", _differing_cases(demo, folder), ranks=2)


@pytest.mark.parametrize("name", list(_DIFFERING))
def test_ranks_that_differ_end_together_with_one_message(name: str, differing: dict[str, list[Outcome]]) -> None:
    main, other = differing[name]
    _assert_one_message(main.output, _DIFFERING[name])
    assert (main.code, other.code) == (2, 2)
    assert "ERROR" not in other.output and "Traceback" not in other.output


# ------------------------------------------------------------------------------------------- the launcher's own part
def test_without_a_launcher_the_message_shows_the_command(demo: Path, tmp_path: Path) -> None:
    ran = subprocess.run(
        [sys.executable, str(TRAIN), *arguments(demo, tmp_path)],
        env={name: value for name, value in cpu_environment().items() if name not in ("RANK", "SLURM_PROCID")},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    _assert_one_message(ran.stderr, ["no launcher has started", "deepspeed --num_gpus 1 launch/train.py"])
    assert ran.returncode == 2


def test_the_launcher_returns_2_for_an_unknown_argument(demo: Path, tmp_path: Path) -> None:
    finished = deepspeed(TRAIN, [*arguments(demo, tmp_path), "--total_stepz", "4"], ranks=2)
    _assert_one_message(finished.output, ["total_stepz", "--total_steps"])
    assert finished.code == 2


def test_the_launcher_returns_2_for_a_wrong_tensor(demo: Path, tmp_path: Path) -> None:
    finished = deepspeed(TRAIN, a_tensor_of_the_wrong_shape(demo, tmp_path), ranks=2)
    _assert_one_message(finished.output, [r"llm2vae\.bias"])
    assert finished.code == 2
