"""Starting from a language model, a SigLIP ViT and the FLUX autoencoder instead of a BAGEL folder.

Guarantees: every tensor of the network can be read by name and flat range, without converting anything on disk. It is
read from one of the two checkpoints, copied from its understanding twin (copy_init_moe), or initialized from (seed,
name), so any number of ranks gets the same numbers. A vocabulary that is too small for the tokenizer grows; it never
shrinks. Any other missing tensor is an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import socket
from math import prod
from pathlib import Path
from typing import Any, Mapping

import torch
from torch import Tensor

from bagel_ds.config_files import read_json
from bagel_ds.errors import UserError, all_faults
from bagel_ds.model.embeddings import position_table
from bagel_ds.model.shape.parts import POSITION_TABLES, generation_twin
from bagel_ds.model_folder.folder import TOKENIZER_FILES, VAE
from bagel_ds.model_folder.tensor_files import TensorFiles, dtype_fault
from bagel_ds.model_folder.tokenizer import complete_tokenizer
from bagel_ds.ranges import TensorInfo

CONV_PATCHES = "vit_model.vision_model.embeddings.patch_embedding.weight"
_LLM, _VIT = "language_model.", "vit_model."
_VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
_INIT_STD = 0.02  # of a generation expert that is not copied; the language model's own default


def missing_pretrained(llm: Path, vit: Path, vae: Path) -> list[str]:
    """What is missing of the three pretrained models, for a message."""
    missing = []
    for argument, folder in (("llm_path", llm), ("vit_path", vit)):
        if not folder.is_dir():
            missing.append(f"--{argument} {folder}: no such folder")
        elif not (folder / "config.json").is_file() or not _weight_files(folder):
            missing.append(f"--{argument} {folder}: the folder lacks config.json or *.safetensors")
    if not vae.is_file():
        missing.append(f"--vae_path {vae}: no such file")
    return missing


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face model folder."""
    return sorted(folder.glob("*.safetensors"))


def assemble_folder(out: Path, llm: Path, vit: Path, vae: Path) -> Path:
    """Make `out` a model folder without weights: both configs, the tokenizer, the autoencoder.

    The tokenizer gets every special token that BAGEL needs, and `vocab_size` has a row for each of its tokens.
    """
    out.mkdir(parents=True, exist_ok=True)
    tokenizer, completed = complete_tokenizer(llm)
    files = {name: (llm / name).read_bytes() for name in TOKENIZER_FILES if (llm / name).is_file()}
    if completed is not None:
        files["tokenizer.json"] = completed.encode()
    for name in TOKENIZER_FILES:
        if name in files:
            _put(out / name, files[name])
        else:
            (out / name).unlink(missing_ok=True)  # from an earlier run with another llm_path
    _write(out / "llm_config.json", {**_config(llm), "vocab_size": max(_rows(llm), tokenizer.size)})
    found = _config(vit)
    _write(out / "vit_config.json", found.get("vision_config", found))
    temporary = out / f".{VAE}.{os.getpid()}"  # replaces the one of an earlier run with another vae_path
    temporary.unlink(missing_ok=True)
    try:
        os.link(vae.resolve(), temporary)
    except OSError:
        shutil.copyfile(vae, temporary)
    os.replace(temporary, out / VAE)
    temporary.unlink(missing_ok=True)  # if both were links to one file already, POSIX keeps both names
    return out


class PretrainedWeights:
    """A `WeightSource` for every parameter of a network, from a language model and a ViT."""

    def __init__(self, llm: Path, vit: Path, shapes: Mapping[str, tuple[int, ...]], copy_init_moe: bool, seed: int):
        self._llm, self._vit = TensorFiles(_weight_files(llm)), TensorFiles(_weight_files(vit))
        self._shapes, self._seed = dict(shapes), seed
        self._rows, self._spread = _rows(llm), float(_config(llm).get("initializer_range") or _INIT_STD)
        self._copy_init_moe = copy_init_moe
        self.made = [name for name in shapes if self._place(name) is None and name not in POSITION_TABLES]
        self._check(llm, vit)

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def info(self, name: str) -> TensorInfo:
        place = self._place(name)
        return TensorInfo(place[0].info(place[1]).dtype if place else torch.float32, self._shapes[name])

    def read(self, name: str, start: int = 0, numel: int | None = None) -> Tensor:
        numel = prod(self._shapes[name]) - start if numel is None else numel
        place = self._place(name)
        if self._new_rows(name):
            return self._grown(name, start, numel)
        if place is not None and name != CONV_PATCHES:
            return place[0].read(place[1], start, numel)
        return self._whole(name).flatten()[start : start + numel]

    def description(self) -> list[str]:
        read = len(self._shapes) - len(self.made)
        lines = [
            f"  {read} tensors from llm_path and vit_path; {len(self.made)} initialized: connectors, missing norms"
        ]
        new = max(map(self._new_rows, self._shapes))
        if new:
            lines.append(
                f"  the tokenizer has {self._rows + new} tokens, but llm_path has {self._rows} vocabulary rows: "
                f"{new} rows are added, drawn with a standard deviation of {self._spread}"
            )
        return lines

    def _place(self, name: str) -> tuple[TensorFiles, str] | None:
        """The file that a parameter comes from and its name in it; None if it is initialized."""
        if name.startswith(_VIT):
            return self._vit, name.removeprefix(_VIT)
        if not name.startswith(_LLM):
            return None
        twin = generation_twin(name)
        source = name if twin is None else twin
        if twin is not None and not self._copy_init_moe:
            return None
        inside = source.removeprefix(_LLM)
        if inside == "lm_head.weight" and inside not in self._llm:
            inside = "model.embed_tokens.weight"  # a small Qwen ties the two; BAGEL has both
        if inside.endswith(("q_norm.weight", "k_norm.weight")) and inside not in self._llm:
            return None
        return self._llm, inside

    def _new_rows(self, name: str) -> int:
        """How many rows are added to a vocabulary table of llm_path."""
        place = self._place(name)
        if place is None or place[1] not in _VOCABULARY or place[1] not in place[0]:
            return 0
        (rows, *width), (found, *found_width) = self._shapes[name], place[0].info(place[1]).shape
        return rows - found if found == self._rows and width == found_width else 0

    def _grown(self, name: str, start: int, numel: int) -> Tensor:
        """Elements of a vocabulary table with new rows. Tied tables get equal rows."""
        place = self._place(name)
        assert place is not None
        files, inside = place
        stored, dtype = prod(files.info(inside).shape), files.info(inside).dtype
        held = min(max(stored - start, 0), numel)
        found = [files.read(inside, start, held)] if held else []
        if held < numel:
            generator = torch.Generator().manual_seed(_seed_of(self._seed, f"new rows of {inside}"))
            new = torch.randn(prod(self._shapes[name]) - stored, generator=generator) * self._spread
            first = max(start - stored, 0)
            found.append(new[first : first + numel - held].to(dtype))
        return torch.cat(found)

    def _whole(self, name: str) -> Tensor:
        """A tensor that no file holds in its final form."""
        shape = self._shapes[name]
        if name in POSITION_TABLES:
            return position_table(shape[1], round(shape[0] ** 0.5))
        if name == CONV_PATCHES:
            files, inside = self._vit, name.removeprefix(_VIT)
            stored = files.read(inside).reshape(files.info(inside).shape)
            return stored.permute(0, 2, 3, 1).reshape(shape) if stored.dim() == 4 else stored
        if name.startswith("llm2vae."):
            return torch.zeros(shape)  # an untrained network predicts no velocity
        if "norm" in name:
            return torch.ones(shape)
        generator = torch.Generator().manual_seed(_seed_of(self._seed, name))
        if name.startswith(_LLM):
            return torch.zeros(shape) if name.endswith("bias") else torch.randn(shape, generator=generator) * _INIT_STD
        fan_in = self._shapes[name.rsplit(".", 1)[0] + ".weight"][1]
        return (torch.rand(shape, generator=generator) * 2 - 1) * fan_in**-0.5  # as torch.nn.Linear

    def _check(self, llm: Path, vit: Path) -> None:
        self._check_dtypes(llm, vit)
        faults = []
        for name, shape in self._shapes.items():
            place = self._place(name)
            if place is None or name in POSITION_TABLES:
                continue
            files, inside = place
            where = vit if name.startswith(_VIT) else llm
            if inside not in files:
                faults.append(f"{where}: tensor {inside} is missing")
            elif self._new_rows(name) <= 0 and prod(files.info(inside).shape) != prod(shape):
                found = list(files.info(inside).shape)
                faults.append(f"{where}: tensor {inside} has shape {found}, the configuration needs {list(shape)}")
        if len(faults) > 8:
            faults = faults[:8] + [f"... and {len(faults) - 8} more"]
        all_faults(faults, "llm_path and vit_path lack weights of the network:")

    def _check_dtypes(self, llm: Path, vit: Path) -> None:
        places = [place for name in self._shapes if (place := self._place(name)) and name not in POSITION_TABLES]
        for folder, files in ((llm, self._llm), (vit, self._vit)):
            inside = dict.fromkeys(name for found, name in places if found is files)
            if fault := dtype_fault(files, inside):
                raise UserError(f"{folder}: {fault}.")


def _seed_of(seed: int, name: str) -> int:
    return int.from_bytes(hashlib.sha256(f"{seed} {name}".encode()).digest()[:8], "little") >> 1


def _config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    found = read_json(path).content
    if not isinstance(found, dict) or not found:
        raise UserError(f"{path}: expected a JSON object, found {found!r:.60}. Download or copy it again.")
    return found


def _rows(llm: Path) -> int:
    """Rows of the language model's vocabulary tables, padded ones included."""
    rows = _config(llm).get("vocab_size")
    if type(rows) is not int or rows < 1:
        raise UserError(f"{llm / 'config.json'}: vocab_size is {rows!r:.60}, expected a whole number above 0.")
    return rows


def _write(path: Path, content: dict[str, Any]) -> None:
    _put(path, (json.dumps(content, indent=1) + "\n").encode())


def _put(path: Path, content: bytes) -> None:
    """Write a file in one step, because ranks on other hosts may already read it."""
    temporary = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(path)
