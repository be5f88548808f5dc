"""Training commands as people paste them: what is the trainer's, and how many ranks the launcher starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from bagel_ds.cli.launch_line import Ranks, launched_ranks, read_launch_line
from bagel_ds.errors import UserError

TRAINING = ["--ds_config", "zero3.json", "--lr", "2e-5"]


@pytest.mark.parametrize(
    ("launcher", "ranks"),
    [
        ("deepspeed --num_gpus 4 launch/train.py", (4, 4)),
        ("deepspeed --num_gpus=2 --master_port 29501 /home/me/bagel_ds/launch/train.py", (2, 2)),
        ("deepspeed --num_gpus 8 --module bagel_ds.train", (8, 8)),
        ("deepspeed --num_nodes 2 --num_gpus 8 launch/train.py", (16, 8)),
        ("CUDA_VISIBLE_DEVICES=0,1,2 PYTHONPATH=. deepspeed launch/train.py", (3, 3)),
        ("deepspeed --include localhost:2,3 launch/train.py", (2, 2)),
        ("deepspeed -i a:0,1@b:4,5 launch/train.py", (4, 2)),
        ("/opt/venv/bin/deepspeed --hostfile HOSTS launch/train.py", (24, 8)),
        ("deepspeed -H HOSTS --num_nodes 2 --num_gpus 4 launch/train.py", (8, 4)),
        ("deepspeed -H HOSTS --exclude two launch/train.py", (16, 8)),
        ("deepspeed -H HOSTS --include one@three:0,1,2,3,4,5,6,7 launch/train.py", (16, 8)),
        (
            "torchrun --nnodes=2 --node_rank=0 --nproc_per_node=4 --master_port=29500 train/pretrain_unified_navit.py",
            (8, 4),
        ),
        ("torchrun --nproc-per-node 2 -m train.pretrain_unified_navit", (2, 2)),
        ("python -m torch.distributed.run --nproc_per_node 2 train/main.py", (2, 2)),
        ("torchrun train/main.py", (1, 1)),
        ("nohup deepspeed --no_ssh_check --num_gpus 2 launch/train.py", (2, 2)),
        ("srun --nodes 1 python3 -m deepspeed.launcher.runner --num_gpus 2 launch/train.py", (2, 2)),
        ("deepspeed launch/train.py", None),
        ("python launch/train.py", None),
        ("launch/train.py", None),
        ("torchrun --nproc_per_node gpu train/main.py", None),
        ("torchrun --nnodes 1:4 --nproc_per_node 8 train/main.py", None),
        ("deepspeed --include one launch/train.py", None),
    ],
)
def test_a_launchers_line(launcher: str, ranks: tuple[int, int] | None, tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=8\n# two more\ntwo  slots=8 # in the next rack\n\nthree slots=8\n")
    words = launcher.replace("HOSTS", str(hosts)).split()
    before = ["--max_num_tokens", "11520"]
    quoted = " ".join(words) + " \\\n  " + " ".join(TRAINING) + " 2>&1 | tee log.txt"
    for given, kept in (([*words, *TRAINING], []), ([*before, *words, *TRAINING], before), ([quoted], [])):
        found = read_launch_line(given)
        assert found.training == [*kept, *TRAINING]
        assert launched_ranks(found.launcher) == (ranks and Ranks(*ranks))


@pytest.mark.parametrize(
    "words",
    [
        TRAINING,
        ["--dataset_info", "data/dataset_info.py", *TRAINING],
        ["--results_dir", "deepspeed", *TRAINING],
        ["--wandb_name", "my run with deepspeed", *TRAINING],
        ["--wandb_name=deepspeed launch/train.py", *TRAINING],
        ["lr=2e-5"],
        [],
    ],
)
def test_words_without_a_launcher_stay_as_they_are(words: list[str]) -> None:
    assert read_launch_line(words) == (words, [])


def test_a_line_without_a_script_is_refused() -> None:
    with pytest.raises(UserError, match=r"deepspeed --num_gpus 4 .*launch/train.py"):
        read_launch_line(["deepspeed", "--num_gpus", "4", *TRAINING])


def test_unequal_hosts_and_hostfiles_that_are_elsewhere_are_refused(tmp_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("one slots=8\ntwo slots=4\n")
    with pytest.raises(UserError, match=r"unequal numbers of GPUs \(8, 4\).*--world_size"):
        launched_ranks(["deepspeed", "--hostfile", str(hosts)])
    with pytest.raises(UserError, match="no/such/file can't be read.*--world_size"):
        launched_ranks(["deepspeed", "--hostfile", "no/such/file"])
