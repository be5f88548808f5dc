"""The files that the arguments name, looked for before a run starts.

Guarantees: one message lists everything that is missing and says how to get it. Nothing is opened or downloaded: the
code that reads a file checks what it holds, and `doctor/environment.py` finds what the machine lacks.
"""

from __future__ import annotations

import re
from pathlib import Path

from bagel_ds.arguments.run_config import RunConfig
from bagel_ds.errors import UserError, all_faults


def check_inputs(config: RunConfig) -> None:
    """Raise UserError listing every file or folder that the arguments name and that is not there."""
    from bagel_ds.zero.config.files import find_ds_config

    faults = _model_faults(config) + _data_faults(config)
    try:
        find_ds_config(config.training.ds_config)
    except UserError as fault:
        faults.append(str(fault))
    all_faults(config.placed(faults), "This run can't start; what is missing:")


def check_data_inputs(config: RunConfig) -> None:
    """The same for commands for data, which need no weights and no DeepSpeed configuration."""
    faults = _folder_faults(config, weights=False) + _data_faults(config)
    all_faults(config.placed(faults), "What is missing:")


def pretrained_of(config: RunConfig) -> tuple[Path, Path, Path]:
    """llm_path, vit_path and vae_path."""
    model = config.model
    llm, vit, vae = (Path(name) for name in (model.llm_path, model.vit_path, model.vae_path))
    return llm, vit, vae


def starts_from_pretrained(config: RunConfig) -> bool:
    """Whether the run starts from a separate language model, ViT and autoencoder: nothing else is given, all exist."""
    from bagel_ds.model_folder.pretrained import missing_pretrained

    training = config.training
    is_named = training.finetune_from_hf or training.resume_from is not None
    return not is_named and not missing_pretrained(*pretrained_of(config))


def is_hub_id(name: str) -> bool:
    """Whether a model_path that isn't a folder can mean `owner/model` on the hub.

    The folders of the original's scripts (hf/BAGEL-7B-MoT, models/BAGEL-7B-MoT) look the same but are local paths, and
    so is a path below an existing folder.
    """
    owner, slash, model = name.partition("/")
    looks_so = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name) is not None
    return looks_so and bool(slash and model) and owner not in ("hf", "models") and not Path(owner).exists()


def missing_model_files(path: Path, weights: bool = True) -> list[str]:
    """What a folder in the layout of BAGEL-7B-MoT lacks, in words; `weights` are needed to start from it."""
    from bagel_ds.model_folder.folder import EMA, MODEL, VAE

    missing = [name for name in ("llm_config.json", "vit_config.json", VAE) if not (path / name).is_file()]
    if not (path / "tokenizer.json").is_file() and not all((path / f).is_file() for f in ("vocab.json", "merges.txt")):
        missing.append("tokenizer.json (or vocab.json and merges.txt)")
    found = [name for name in (EMA, MODEL) if (path / name).is_file() or (path / f"{name}.index.json").is_file()]
    if weights and not found:
        missing.append(f"{EMA} or {MODEL} (or their .index.json)")
    return missing


def _model_faults(config: RunConfig) -> list[str]:
    from bagel_ds.checkpoint.step_folders import checkpoints_near, meant_checkpoint
    from bagel_ds.model_folder.pretrained import missing_pretrained

    training, faults = config.training, []
    resumes = training.resume_from is not None or (training.auto_resume and _holds_checkpoints(training.checkpoint_dir))
    if training.resume_from is not None:
        folder = meant_checkpoint(Path(training.resume_from))
        if not folder.is_dir():
            near = checkpoints_near(folder)
            remedy = f"pass a checkpoint or a model folder{near and ': ' + near}"
            faults.append(f"--resume_from {training.resume_from}: no such folder; {remedy}")
    if starts_from_pretrained(config):
        return faults
    if not training.finetune_from_hf and not resumes:
        faults.append(
            "nothing to start from: pass --finetune_from_hf True (the weights of --model_path) or --resume_from. To "
            "start from a language model, a ViT and an autoencoder instead, these are missing: "
            + "; ".join(missing_pretrained(*pretrained_of(config)))
        )
    return faults + _folder_faults(config, weights=training.finetune_from_hf and not resumes)


def _folder_faults(config: RunConfig, weights: bool) -> list[str]:
    """What is wrong with model_path; `weights`: they are needed to start."""
    from bagel_ds.model_folder.folder import DOWNLOAD

    name = config.model.model_path
    path = Path(name)
    if path.is_dir():
        missing = missing_model_files(path, weights)
        remedy = instead_of_base_model(config) or DOWNLOAD
        return [f"--model_path {name}: the folder lacks {', '.join(missing)}. {remedy}"] if missing else []
    if is_hub_id(name):
        return []
    return [f"--model_path {name}: no such folder. {instead_of_base_model(config) or DOWNLOAD}"]


def instead_of_base_model(config: RunConfig) -> str:
    """The remedy for a run that resumes without its base model: a checkpoint is a model folder too."""
    from bagel_ds.checkpoint.step_folders import meant_checkpoint, step_folders

    training = config.training
    held = [path for _, path in step_folders(Path(training.checkpoint_dir))][::-1] if training.auto_resume else []
    if training.resume_from is not None:
        held.append(meant_checkpoint(Path(training.resume_from)))
    whole = next((path for path in held if not missing_model_files(path, weights=False)), None)
    return "" if whole is None else f"A checkpoint is a model folder too: pass --model_path {whole} to resume with it."


def _holds_checkpoints(folder: str) -> bool:
    return any(Path(folder).glob("step_*"))


def _data_faults(config: RunConfig) -> list[str]:
    faults = []
    name = config.data.dataset_config_file
    if not Path(name).is_file():
        faults.append(
            f"--dataset_config_file {name}: no such file. Write one as docs/data.md shows, or make small data sets "
            "with `bagel-ds demo --out demo` and pass --dataset_config_file demo/example.yaml"
        )
    validation = config.training.val_config
    if validation is not None and not Path(validation).is_file():
        faults.append(
            f"--val_config {validation}: no such file. Write a dataset YAML of the held-out rows (docs/inference.md)"
        )
    info = config.data.dataset_info
    if info is not None and not Path(info).is_file():
        faults.append(f"--dataset_info {info}: no such file; pass a .yaml, .json or .py file with DATASET_INFO")
    return faults
