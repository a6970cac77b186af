"""Does a checkpoint's folder hold the vocabulary that its model needs?

transformers makes an empty tokenizer of a folder without one, and every caption is then an empty text. This
module reads only JSON and text, so that the check costs little and needs no tokenizer.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path

MAX_PADDING = 512
"""Rows of the embeddings that stand for no token, at most: their number is rounded up."""
TOKENIZER_FILE = "tokenizer.json"
_OLDER_FILES = {
    # The tokenizer of GPT-2 has other special tokens than OPT, so their names must be stored.
    "opt": ("vocab.json", "merges.txt", "tokenizer_config.json"),
    "t5": ("spiece.model",),
    "bert": ("vocab.txt",),
}
"""Files of tokenizers without `tokenizer.json`, by the model that reads the text; the first one has the
vocabulary."""


def find_vocabulary(folder: Path, reader: str) -> Path:
    """Return the file with the vocabulary, in a folder that has all files of a tokenizer.

    Args:
        folder: folder of the checkpoint.
        reader: model that reads the text: "opt", "t5", or "bert" for the Q-Former of a retrieval checkpoint.

    Raises:
        ValueError: the folder has no tokenizer.
    """
    if (folder / TOKENIZER_FILE).exists():
        return folder / TOKENIZER_FILE
    files = _OLDER_FILES[reader]
    missing = [name for name in files if not (folder / name).exists()]
    if missing:
        raise ValueError(
            f"{folder} must have {TOKENIZER_FILE}, or {' and '.join(files)}, got no "
            f"{' and no '.join(missing)}; copy the files of the tokenizer from the model that this one was "
            "made from, or write them with processor.save_pretrained"
        )
    return folder / files[0]


def require_vocabulary(folder: Path, reader: str, vocab_size: int, special_ids: Collection[int]) -> None:
    """Check that a folder has a vocabulary with a text for every token of the model.

    Args:
        folder, reader: as for `find_vocabulary`.
        vocab_size: tokens of the model, with those that pad its embeddings.
        special_ids: ids of the tokens that begin and end a text.

    Raises:
        ValueError: the vocabulary is missing, broken or too small; the message names the file.
    """
    path = find_vocabulary(folder, reader)
    num_tokens = _count_tokens(path)
    needed = max(vocab_size - MAX_PADDING, max(special_ids, default=0) + 1, 1)
    if num_tokens is not None and num_tokens < needed:
        raise ValueError(
            f"the vocabulary in {path} must have at least {needed} tokens for this model, got {num_tokens}; "
            "copy the files of the tokenizer from the model that this one was made from"
        )


def _count_tokens(path: Path) -> int | None:
    """Return one more than the highest token id, or None if the file is not JSON or text and not empty."""
    if path.suffix == ".model":
        return None if path.stat().st_size else 0
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".txt":
            return len(text.splitlines())
        stored = json.loads(text)
        if path.name == TOKENIZER_FILE:
            vocabulary = stored["model"]["vocab"]
            ids = [token["id"] for token in stored.get("added_tokens") or []]
        else:
            vocabulary, added = stored, path.with_name("added_tokens.json")
            ids = list(json.loads(added.read_text(encoding="utf-8")).values()) if added.exists() else []
        ids += range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        return max(ids, default=-1) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be the vocabulary of a tokenizer, got {type(error).__name__}: {error}; "
            "fetch it again"
        ) from error
