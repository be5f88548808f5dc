"""The tokenizer of a model folder, as plain lists of ids.

Guarantees: ids equal the original's (transformers' Qwen2 tokenizer) for every text, including special-token strings in
user text. Instances can be pickled and forked. Reads tokenizer.json, or vocab.json and merges.txt, with or without
tokenizer_config.json. Whatever these files hold, they are used or refused with one `UserError`. Only
`complete_tokenizer` adds tokens that a folder doesn't list.

Why not transformers' own tokenizer class: it wraps the same `tokenizers` object but costs more at every start of a
command or a worker. Measured with transformers 5.23 on the recorded examples and 2 CPU cores; all three give equal ids.
This module: 0.09 s to start, 7 MiB of private memory, no torch. Qwen2TokenizerFast: 1.3 s, 38 MiB. AutoTokenizer:
2.5 s, 164 MiB, imports torch, and warns that it doesn't know the model type `bagel`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

# Set before `tokenizers` is imported: its thread pool does not survive a fork.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors  # noqa: E402
from tokenizers import Tokenizer as FastTokenizer  # noqa: E402

from bagel_ds.config_files import read_json  # noqa: E402
from bagel_ds.errors import UserError, all_faults, shown  # noqa: E402
from bagel_ds.git_lfs import pointer_fault  # noqa: E402

T = TypeVar("T")

logger = logging.getLogger("bagel_ds")

BOS, EOS = "<|im_start|>", "<|im_end|>"
START_OF_IMAGE, END_OF_IMAGE = "<|vision_start|>", "<|vision_end|>"
END_OF_TEXT = "<|endoftext|>"
_NEEDED = (END_OF_TEXT, BOS, EOS, START_OF_IMAGE, END_OF_IMAGE)  # the order in which the original adds missing ones

# Qwen2's split into words (transformers, models/qwen2): contractions, words, single digits, punctuation, blanks.
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# vocab.json of every Qwen2.5 model has 151,643 entries. Its published tokenizer.json adds these, in this order.
_QWEN25_VOCAB = 151643
_QWEN25_ADDED = (
    [END_OF_TEXT, BOS, EOS]
    + ["<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>", "<|quad_start|>", "<|quad_end|>"]
    + [START_OF_IMAGE, END_OF_IMAGE, "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>"]
)
_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")
_ID = re.compile(r"\d{1,9}", re.ASCII)  # as keys of added_tokens_decoder
_MOST_IDS = 10**9
_MOST_FAULTS = 8  # in one message
_TRIAL = f"A 1, \u00e9 {BOS}"


@dataclass(frozen=True)
class SpecialTokens:
    """Ids of the tokens that frame texts (bos, eos) and images; `end_of_text` closes a reasoning answer."""

    bos: int
    eos: int
    start_of_image: int
    end_of_image: int
    end_of_text: int


class Tokenizer:
    """Byte-level BPE with the special tokens BAGEL needs."""

    def __init__(self, fast: FastTokenizer, folder: str) -> None:
        fast.no_truncation()
        fast.no_padding()
        # Some faults, as in a post-processor, show only when a text is encoded.
        _from_library(lambda: fast.decode(fast.encode(_TRIAL).ids), *_files(Path(folder)))
        self._fast = fast
        self.special = _special_tokens(fast, folder)
        added = fast.get_added_tokens_decoder().values()
        # Strings that become one special token wherever they are in a text.
        self.special_strings: tuple[str, ...] = tuple(token.content for token in added if token.special)
        self.size: int = fast.get_vocab_size(with_added_tokens=True)
        self.fingerprint: str = _fingerprint(Path(folder))

    def encode(self, text: str) -> list[int]:
        """Ids of `text`; an empty text has none."""
        return self._fast.encode(text).ids

    def encode_batch(self, texts: list[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._fast.encode_batch(texts)]

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, including special tokens."""
        return self._fast.decode(ids, skip_special_tokens=False)


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """The tokenizer of a model folder. Raises `UserError` if files are missing or damaged, or lack a special token."""
    return Tokenizer(_open(Path(folder)), str(folder))


def complete_tokenizer(folder: Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer of a language model's folder. Missing special tokens get the next ids, as in the original.

    Also returns a tokenizer.json with the added tokens, or None if none were missing. Raises `UserError`.
    """
    fast = _open(folder)
    missing = [text for text in _NEEDED if fast.token_to_id(text) is None]
    if missing:
        first = fast.get_vocab_size(with_added_tokens=True)
        fast.add_special_tokens([AddedToken(text, normalized=False, special=True) for text in missing])
        logger.info("%s: added tokens that the tokenizer lacks, from id %d: %s", folder, first, ", ".join(missing))
    return Tokenizer(fast, str(folder)), fast.to_str(pretty=True) if missing else None


def _open(folder: Path) -> FastTokenizer:
    files = _files(folder)
    for path in files:
        if fault := pointer_fault(path):
            raise UserError(f"{path}: {fault}.")
    if not all(path.is_file() for path in files):
        found = ", ".join(sorted(path.name for path in folder.glob("*"))[:12]) if folder.is_dir() else "no such folder"
        raise UserError(
            f"No tokenizer in {folder}: expected tokenizer.json, or vocab.json and merges.txt; found:"
            f" {found or 'nothing'}. Copy the tokenizer files of BAGEL-7B-MoT into the model folder."
        )
    listed = _listed_tokens(folder)
    if len(files) == 1:
        fast = _from_library(lambda: FastTokenizer.from_file(str(files[0])), *files)
    else:
        fast = _from_vocab(*files)
        listed = listed or _assumed_tokens(fast, folder)
    _add_listed(fast, listed, folder)
    return fast


def _files(folder: Path) -> tuple[Path, ...]:
    """The files that hold the vocabulary: tokenizer.json if there is one, else vocab.json and merges.txt."""
    whole = folder / "tokenizer.json"
    return (whole,) if whole.is_file() else (folder / "vocab.json", folder / "merges.txt")


def _from_library(call: Callable[[], T], *files: Path) -> T:
    """The result of `call`. Raises `UserError` about `files` if the library fails.

    It raises bare Exceptions, and its Rust code panics with a BaseException that can't be imported.
    """
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        named = " and ".join(map(str, files))
        again = "the file" if len(files) == 1 else "them"
        raise UserError(f"{named} can't be read as a tokenizer: {error}. Download {again} again.") from None


def _fingerprint(folder: Path) -> str:
    """A hash of the files that decide all ids; the same with every version of the library."""
    digest = hashlib.sha256()
    for path in _files(folder):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    for number, token in sorted(_listed_tokens(folder).items()):
        flags = (token.single_word, token.lstrip, token.rstrip, token.normalized, token.special)
        digest.update(f"{number} {token.content} {flags}\n".encode())
    return digest.hexdigest()[:16]


def _from_vocab(vocab: Path, merges: Path) -> FastTokenizer:
    _check_vocab(vocab)
    fast = _from_library(lambda: FastTokenizer(models.BPE.from_file(str(vocab), str(merges))), vocab, merges)
    fast.normalizer = normalizers.NFC()
    fast.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    fast.decoder = decoders.ByteLevel()
    fast.post_processor = processors.ByteLevel(trim_offsets=False)
    return fast


def _check_vocab(vocab: Path) -> None:
    """Raise `UserError` unless vocab.json gives every token its own id: the library skips entries that it can't use.

    Not `read_json`, which also looks for the line of each key: there are 150,000.
    """
    try:
        found = json.loads(vocab.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{vocab} is not valid JSON: {error}. Download the file again.") from None
    if not isinstance(found, dict):
        raise UserError(f"{vocab}: expected an object of ids by token, found {shown(found)}. Download the file again.")
    wrong = next((item for item in found.items() if not _is_id(item[1])), None)
    if wrong is not None:
        raise UserError(
            f"{vocab}: the token {shown(wrong[0])} has the id {shown(wrong[1])}, expected a whole number. "
            "Download the file again."
        )
    if len(set(found.values())) < len(found):
        raise UserError(f"{vocab}: several tokens have the same id. Download the file again.")


def _listed_tokens(folder: Path) -> dict[int, AddedToken]:
    """Added tokens by id, from tokenizer_config.json or added_tokens.json; empty if neither lists any.

    Raises `UserError` that names every entry that is not a token with its id.
    """
    config = folder / "tokenizer_config.json"
    listed = _read_object(config).get("added_tokens_decoder")
    if listed:
        if not isinstance(listed, dict):
            raise UserError(
                f"{config}: added_tokens_decoder is {shown(listed)}, expected an object of tokens by id. "
                "Download the file again."
            )
        _refuse(config, [fault for number, entry in listed.items() if (fault := _entry_fault(number, entry))])
        return {
            int(number): AddedToken(entry["content"], **{flag: entry.get(flag, False) for flag in _FLAGS})
            for number, entry in listed.items()
        }
    path = folder / "added_tokens.json"
    added = _read_object(path)
    _refuse(
        path,
        [
            f"the token {shown(text)} has the id {shown(number)}, expected text and a whole number"
            for text, number in added.items()
            if not _is_token(text) or not _is_id(number)
        ],
    )
    return {number: AddedToken(text, normalized=False, special=True) for text, number in added.items()}


def _refuse(path: Path, faults: list[str]) -> None:
    """Raise one `UserError` about the first few faults of a list of tokens, if there are any."""
    if len(faults) > _MOST_FAULTS:
        faults = [*faults[:_MOST_FAULTS], f"... and {len(faults) - _MOST_FAULTS} more"]
    alone = [f"{path}: {fault}. Download the file again." for fault in faults]
    all_faults(alone if len(faults) == 1 else faults, f"{path} lists tokens that can't be used. Download it again:")


def _entry_fault(number: str, entry: Any) -> str:
    """What is wrong with one entry of added_tokens_decoder; "" if nothing is."""
    if not _ID.fullmatch(number):
        return f"the key {shown(number)} in added_tokens_decoder is not an id"
    where = f"added_tokens_decoder[{number}]"
    if not isinstance(entry, dict):
        return f"{where} is {shown(entry)}, expected an object"
    if not _is_token(entry.get("content")):
        return f"content in {where} is {shown(entry.get('content'))}, expected text"
    wrong = next((flag for flag in _FLAGS if not isinstance(entry.get(flag, False), bool)), None)
    return f"{wrong} in {where} is {shown(entry[wrong])}, expected true or false" if wrong else ""


def _is_id(value: Any) -> bool:
    return type(value) is int and 0 <= value < _MOST_IDS


def _is_token(value: Any) -> bool:
    """Whether `value` is a text that a tokenizer can hold; JSON also allows half a surrogate pair."""
    return isinstance(value, str) and value != "" and not any("\ud800" <= letter <= "\udfff" for letter in value)


def _assumed_tokens(fast: FastTokenizer, folder: Path) -> dict[int, AddedToken]:
    """The added tokens of a vocab.json without a list: those published with Qwen2.5, else as the original adds them."""
    size = fast.get_vocab_size()
    texts = _QWEN25_ADDED if size == _QWEN25_VOCAB else [text for text in _NEEDED if fast.token_to_id(text) is None]
    if texts:
        logger.info(
            "%s: neither vocab.json nor tokenizer_config.json lists special tokens: %s ... get the ids from %d",
            folder,
            texts[0],
            size,
        )
    return {size + i: AddedToken(text, normalized=False, special=True) for i, text in enumerate(texts)}


def _add_listed(fast: FastTokenizer, tokens: dict[int, AddedToken], folder: Path) -> None:
    present = fast.get_added_tokens_decoder()
    for number, token in sorted(tokens.items()):
        if number in present and present[number].content == token.content:
            continue
        if fast.token_to_id(token.content) in (None, number):
            (fast.add_special_tokens if token.special else fast.add_tokens)([token])
        if fast.token_to_id(token.content) != number:
            files = " and ".join(path.name for path in _files(folder))
            raise UserError(
                f"{folder}: the token {token.content[:100]} has id {fast.token_to_id(token.content)} in {files} but"
                f" {number} in tokenizer_config.json or added_tokens.json. Use the tokenizer files of one model."
            )


def _special_tokens(fast: FastTokenizer, folder: str) -> SpecialTokens:
    ids = {text: number for text in _NEEDED if (number := fast.token_to_id(text)) is not None}
    missing = [text for text in _NEEDED if text not in ids]
    if missing:
        raise UserError(
            f"The tokenizer in {folder} lacks {', '.join(missing)}; BAGEL needs {', '.join(_NEEDED)}."
            " Use the tokenizer files of BAGEL-7B-MoT (or of any Qwen2.5 model)."
        )
    return SpecialTokens(ids[BOS], ids[EOS], ids[START_OF_IMAGE], ids[END_OF_IMAGE], ids[END_OF_TEXT])


def _read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file; empty if there is no file. Raises `UserError`."""
    if not path.is_file():
        return {}
    content = read_json(path).content
    if not isinstance(content, dict):
        raise UserError(f"{path}: expected a JSON object, found {shown(content)}. Download the file again.")
    return content
