"""`bagel-ds demo`: a tiny BAGEL and small data sets to try every command on, written in seconds, without a network.

Promises: files, folders, columns and keys are those of BAGEL-7B-MoT, bagel_example and BlockMoving, so what works here
works on them. The same seed writes the same bytes (with the same library versions). A folder that holds anything else
is refused. Paths in the written files are relative, so the folder can be moved. May import every room but `cli`. Begin
with `write_demo` below: datasets.py and blockmoving.py make data (scenes.py draws), model.py the network,
autoencoder.py its VAE, tokenizer.py its tokenizer. summary.py and gallery.py show what a training run achieved.
"""

from __future__ import annotations

import random
from pathlib import Path

from tqdm import tqdm

from bagel_ds.errors import UserError

MARK = "# Written by `bagel-ds demo`."
_EXAMPLE = "data/bagel_example"

DATASET_INFO = f"""{MARK} Where the data sets of both configs are; paths are relative to this file.
t2i_pretrain:
  t2i:
    data_dir: {_EXAMPLE}/t2i
    num_files: 2
    num_total_samples: 160

unified_edit:
  seedxedit_multi:
    data_dir: {_EXAMPLE}/editing/seedxedit_multi
    num_files: 2
    num_total_samples: 120
    parquet_info_path: {_EXAMPLE}/editing/parquet_info/seedxedit_multi_nas.json

vlm_sft:
  llava_ov:
    data_dir: {_EXAMPLE}/vlm/images
    jsonl_path: {_EXAMPLE}/vlm/llava_ov_si.jsonl
    num_total_samples: 160

interleave_reasoning:
  blockmoving_train:
    path: data/blockmoving
    parquet: train_split.parquet
    parquet_info: train_split_info.json
  blockmoving_test:
    path: data/blockmoving
    parquet: test_split.parquet
    parquet_info: test_split_info.json
"""

EXAMPLE = f"""{MARK} All four kinds of data; as the original's example.yaml, with image sizes for the demo.
t2i_pretrain:
  dataset_names:
  - t2i
  image_transform_args:
    image_stride: 16
    max_image_size: 96
    min_image_size: 64
  is_mandatory: true
  num_used_data:  # files
  - 2
  weight: 1

unified_edit:
  dataset_names:
  - seedxedit_multi
  image_transform_args:
    image_stride: 16
    max_image_size: 96
    min_image_size: 64
  vit_image_transform_args:
    image_stride: 14
    max_image_size: 98
    min_image_size: 56
  is_mandatory: false
  num_used_data:  # files
  - 2
  weight: 1

vlm_sft:
  dataset_names:
  - llava_ov
  image_transform_args:
    image_stride: 14
    max_image_size: 98
    min_image_size: 56
    max_pixels: 2_007_040
  frame_sampler_args:
    max_num_frames: 12
    min_num_frames: 8
  is_mandatory: true
  shuffle_lines: True
  shuffle_seed: 0
  num_used_data:  # lines
  - 160
  weight: 1

interleave_reasoning:
  dataset_names:
  - blockmoving_train
  image_transform_args:
    image_stride: 16
    max_image_size: 192
    min_image_size: 48
  vit_image_transform_args:
    image_stride: 14
    max_image_size: 196
    min_image_size: 42
  is_mandatory: false
  num_used_data:  # files
  - 1
  weight: 1
"""

BLOCKMOVING = f"""{MARK} BlockMoving SFT training config, as in the guide: published image sizes (512), all rows.
data_weights:
  interleave_reasoning: 1.0

data_names:
  interleave_reasoning:
    - blockmoving_train
"""


def write_demo(out: Path, seed: int = 0) -> None:
    """Write `out`/model, data, example.yaml, dataset_info.yaml and blockmoving_sft.yaml.

    About 30 MB, nearly all of it the autoencoder, whose normalization in 32 groups needs at least 32 channels. An
    earlier demo there is overwritten. Raises UserError if `out` holds anything else or can't be written.
    """
    _check_folder(out)
    try:
        out.mkdir(parents=True, exist_ok=True)
        # First, so that an interrupted demo is still recognized as one.
        for name, text in (
            ("example.yaml", EXAMPLE),
            ("dataset_info.yaml", DATASET_INFO),
            ("blockmoving_sft.yaml", BLOCKMOVING),
        ):
            (out / name).write_text(text)
        _write_data_and_model(out, seed)
    except OSError as fault:
        raise UserError(
            f"the demo can't be written to {out}: {fault}; pass a folder that you can write to as --out"
        ) from fault


def _check_folder(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; pass the name of a new folder")
    example = out / "example.yaml"
    ours = example.is_file() and example.read_text(errors="replace").startswith(MARK)
    if out.is_dir() and any(out.iterdir()) and not ours:
        found = ", ".join(sorted(path.name for path in out.iterdir())[:5])
        raise UserError(
            f"--out {out} holds other files ({found}), not an earlier demo; pass a new or empty folder, so that "
            "nothing of yours is overwritten"
        )


def _write_data_and_model(out: Path, seed: int) -> None:
    # Imported here, because `bagel-ds --help` must not need torch and pyarrow.
    from bagel_ds.demo.blockmoving import write_blockmoving
    from bagel_ds.demo.datasets import write_edit, write_t2i, write_vlm
    from bagel_ds.demo.model import write_model
    from bagel_ds.demo.tokenizer import train_tokenizer

    def rng(name: str) -> random.Random:
        return random.Random(f"{seed}/{name}")

    with tqdm(total=5, desc="demo", disable=None) as bar:
        texts = write_t2i(out, f"{_EXAMPLE}/t2i", rng("t2i"))
        bar.update()
        editing = f"{_EXAMPLE}/editing"
        info = f"{editing}/parquet_info/seedxedit_multi_nas.json"
        texts += write_edit(out, f"{editing}/seedxedit_multi", info, rng("edit"))
        bar.update()
        texts += write_vlm(out, f"{_EXAMPLE}/vlm/images", f"{_EXAMPLE}/vlm/llava_ov_si.jsonl", rng("vlm"))
        bar.update()
        texts += write_blockmoving(out, "data/blockmoving", rng("blockmoving"))
        bar.update()
        write_model(out / "model", train_tokenizer(texts, vocab_size=1000), seed)
        bar.update()
