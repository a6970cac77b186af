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
_VOCABULARIES = (
    ("tokenizer.json",),
    ("vocab.json", "merges.txt"),
    ("spiece.model",),
    ("tokenizer.model",),
    ("vocab.txt",),
)
"""Files in which tokenizers store their vocabulary; a folder needs those of one line."""


def require_vocabulary(folder: Path, vocab_size: int, special_ids: Collection[int]) -> None:
    """Check that a folder has a vocabulary with a text for every token of the model.

    Args:
        folder: folder of the checkpoint.
        vocab_size: tokens of the model, with those that pad its embeddings.
        special_ids: ids of the tokens that begin and end a text.

    Raises:
        ValueError: the vocabulary is missing, broken or too small; the message names the file.
    """
    files = next((names for names in _VOCABULARIES if all((folder / n).exists() for n in names)), None)
    if files is None:
        parts = [names for names in _VOCABULARIES if any((folder / name).exists() for name in names)]
        missing = [name for name in (parts or _VOCABULARIES)[0] if not (folder / name).exists()]
        raise ValueError(
            f"{folder} must hold the files of a tokenizer, but has no {' and no '.join(missing)}; copy "
            "them from the model that this one was made from, or write them with processor.save_pretrained"
        )
    path = folder / files[0]
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
        if path.name == "tokenizer.json":
            vocabulary = stored["model"]["vocab"]
            ids = [token["id"] for token in stored.get("added_tokens") or []]
        else:
            vocabulary, added = stored, path.with_name("added_tokens.json")
            ids = list(json.loads(added.read_text(encoding="utf-8")).values()) if added.exists() else []
        ids += range(len(vocabulary)) if isinstance(vocabulary, list) else vocabulary.values()
        return max(ids, default=-1) + 1
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} must be the vocabulary of a tokenizer, got {type(error).__name__}: {error}; "
            "fetch it again"
        ) from error
