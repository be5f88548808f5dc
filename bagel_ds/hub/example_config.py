"""The dataset YAML for the example archive: the original's data/configs/example.yaml, with the paths in it.

Guarantees: a file that exists is never changed. Paths are relative to the YAML, so the folder can be moved. Every file
of the archive is used, where the original's numbers (10, 10 and 1000) name as many as there were.
"""

from __future__ import annotations

from pathlib import Path

from bagel_ds.errors import UserError, disk_fault

EXAMPLE = """\
# Written by `bagel-ds download`: the original's example.yaml, with the paths of the data. docs/data.md explains it.
t2i_pretrain:
  dataset_names:
  - name: t2i
    data_dir: ../bagel_example/t2i
  image_transform_args:
    image_stride: 16
    max_image_size: 1024
    min_image_size: 512
  is_mandatory: true
  weight: 1

unified_edit:
  dataset_names:
  - name: seedxedit_multi
    data_dir: ../bagel_example/editing/seedxedit_multi
  image_transform_args:
    image_stride: 16
    max_image_size: 1024
    min_image_size: 512
  vit_image_transform_args:
    image_stride: 14
    max_image_size: 518
    min_image_size: 224
  is_mandatory: false
  weight: 1

vlm_sft:
  dataset_names:
  - name: llava_ov
    data_dir: ../bagel_example/vlm/images
    jsonl_path: ../bagel_example/vlm/llava_ov_si.jsonl
  image_transform_args:
    image_stride: 14
    max_image_size: 980
    min_image_size: 378
    max_pixels: 2_007_040
  frame_sampler_args:
    max_num_frames: 12
    min_num_frames: 8
  is_mandatory: true
  weight: 1
"""


def write_example_config(data: Path) -> tuple[Path, bool]:
    """Write `configs/example.yaml` beside the unpacked folder `data`. Returns its path and whether it is this text.

    False means that another file was there, which stays. Raises `UserError`.
    """
    path = data.parent / "configs" / "example.yaml"
    try:
        path.parent.mkdir(exist_ok=True)
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(EXAMPLE)
                file.flush()
            except OSError:
                path.unlink()  # half of it would look like another file
                raise
    except FileExistsError:
        return path, path.is_file() and path.read_bytes() == EXAMPLE.encode()
    except OSError as error:
        raise UserError(f"{path} can't be written: {disk_fault(error, 'pass another --out')}") from None
    return path, True
