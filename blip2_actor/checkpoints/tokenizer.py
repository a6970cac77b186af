"""Prompts and texts to token ids and back, exactly as the checkpoint's own processor converts them.

A `tokenizer.json` is the whole tokenizer and is used as it stands. transformers does the same for the names
of the published checkpoints; for their folders it builds a tokenizer of the class in `tokenizer_config.json`
instead, and the one of T5 drops spaces and newlines at the end of a prompt.

The queries come before the text in both layouts of the reference (image tokens in the prompt since
transformers 4.47, concatenation before that), so image tokens never occur here.

The functions `require_…` refuse texts that the model cannot take; their errors are shown to the caller.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import BertTokenizer, Blip2Config, GPT2Tokenizer, PreTrainedTokenizerFast, T5Tokenizer

from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.checkpoints.vocabulary import TOKENIZER_FILE, find_vocabulary

_OLDER_CLASSES: dict[str, Any] = {"opt": GPT2Tokenizer, "t5": T5Tokenizer, "bert": BertTokenizer}
"""Classes of tokenizers without `tokenizer.json`, by the model that reads the text."""


def load_tokenizer(folder: Path, reader: str) -> PreTrainedTokenizerFast:
    """Load the tokenizer of a checkpoint.

    Args:
        folder, reader: as for `find_vocabulary`.

    Raises:
        ValueError: the folder has no tokenizer, a file of it is damaged, or a package that reads it is not
            installed.
    """
    has_whole_file = find_vocabulary(folder, reader).name == TOKENIZER_FILE
    if reader == "t5" and not has_whole_file:
        _require_sentencepiece(folder)
    tokenizer_class = PreTrainedTokenizerFast if has_whole_file else _OLDER_CLASSES[reader]
    try:
        loaded: PreTrainedTokenizerFast = tokenizer_class.from_pretrained(folder)
    except Exception as error:  # transformers and tokenizers raise errors of many classes for damaged files
        reason = " ".join(str(error).split())
        raise ValueError(
            f"the tokenizer in {folder} must be readable, got {reason}; fetch it again"
        ) from error
    return loaded


def _require_sentencepiece(folder: Path) -> None:
    missing = [package for package in ("sentencepiece", "protobuf") if not _is_installed(package)]
    if missing:
        raise ValueError(
            f"{folder} has spiece.model and no {TOKENIZER_FILE}, which needs {' and '.join(missing)}; run: "
            f"pip install {' '.join(missing)}"
        )


def _is_installed(package: str) -> bool:
    module = {"protobuf": "google.protobuf"}.get(package, package)
    try:
        return find_spec(module) is not None
    except ImportError:  # there is no package "google" at all
        return False


class PromptTokenizer:
    """The tokenizer of one checkpoint."""

    def __init__(self, folder: Path, config: Blip2Config) -> None:
        self.tokenizer = load_tokenizer(folder, config.text_config.model_type)
        self.image_token_id: int | None = config.image_token_index
        text_config = config.text_config
        self.vocab_size: int = text_config.vocab_size
        bos = text_config.bos_token_id
        # transformers' generate has no answer without the start token; its processor tokenizes an empty text.
        self.empty_ids: list[int] = self.tokenizer("").input_ids if bos is None else [bos]
        if not self.empty_ids:
            raise ValueError(
                f"text_config in {folder}/config.json must have bos_token_id, got none; add it, because the "
                "tokenizer makes no token of an empty text"
            )
        eos = text_config.eos_token_id
        stored = eos if isinstance(eos, list) else [] if eos is None else [eos]
        # An id outside the vocabulary, such as -1, means that no token ends a text.
        end_ids = [token_id for token_id in stored if 0 <= token_id < self.vocab_size]
        self.end_ids: frozenset[int] = frozenset(end_ids)
        own = self.tokenizer.eos_token_id
        self._end_of_scored: list[int] = [own] if own in self.end_ids else end_ids[:1]

    def encode(self, prompt: str | None) -> list[int]:
        """Return the token ids of a prompt, which follow the queries.

        Raises:
            ValueError: the prompt is not a valid text, or contains the image token or a token that the model
                does not know.
        """
        if prompt is None or prompt == "":
            return self.empty_ids
        # verbose=False: transformers would warn about a long prompt, which the engine refuses by itself.
        token_ids: list[int] = self.tokenizer(require_text(prompt), verbose=False).input_ids
        require_known_tokens(token_ids, self.vocab_size, self.image_token_id)
        return token_ids

    def encode_text(self, text: str) -> list[int]:
        """Return the token ids of a text to score: no special token before it, the end token after it.

        Of several end tokens it is the tokenizer's own, with which models are trained, or else the first.

        Raises:
            ValueError: as from `encode`, or the text is empty.
        """
        token_ids: list[int] = self.tokenizer(
            require_text(text), add_special_tokens=False, verbose=False
        ).input_ids
        if not token_ids:
            raise ValueError("text must have at least one token to score, got an empty text")
        require_known_tokens(token_ids, self.vocab_size, self.image_token_id)
        return [*token_ids, *self._end_of_scored]

    def detokenize(self, token_ids: Sequence[int]) -> str:
        """Return the text of generated ids, without end tokens, with the white space around it."""
        kept = [t for t in token_ids if t not in self.end_ids]
        text: str = self.tokenizer.decode(kept, skip_special_tokens=True)
        return text

    def decode(self, token_ids: Sequence[int]) -> str:
        """Return the text of generated ids, without end tokens and surrounding spaces."""
        return self.detokenize(token_ids).strip()

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return what each token adds to the text of generated ids; together they are the text.

        A token that ends inside a character adds nothing, and the next one adds the whole character.
        """
        whole, texts, length = self.decode(token_ids), [], 0
        for end in range(1, len(token_ids) + 1):
            known = whole if end == len(token_ids) else self.decode(token_ids[:end]).rstrip("\ufffd")
            texts.append(known[length:] if whole.startswith(known) else "")
            length += len(texts[-1])
        return texts


def require_text(text: object) -> str:
    """Return the text.

    Raises:
        ValueError: it is not a str, or contains half of a character.
    """
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must consist of whole characters, got half of one (a lone surrogate) at index "
            f"{error.start}; decode its bytes with errors='replace'"
        ) from error
    return text


def require_non_empty(text: object) -> str:
    """Return the text.

    Raises:
        ValueError: as from `require_text`, or the text is empty.
    """
    if text == "":
        raise ValueError("text must not be empty")
    return require_text(text)


def require_known_tokens(token_ids: Sequence[int], vocab_size: int, image_token_id: int | None) -> None:
    """Check the tokens of a text.

    Raises:
        ValueError: the text contains the image token, or a token that was added to the tokenizer but not to
            the model.
    """
    if image_token_id in token_ids:
        raise ValueError(
            "text must not contain the image token; leave it out, the image always comes before the text"
        )
    if max(token_ids, default=0) >= vocab_size:
        raise ValueError(
            f"text must contain only tokens that the model knows (0 to {vocab_size - 1}), got token "
            f"{max(token_ids)}; leave it out"
        )


def require_room(num_tokens: int, what: str, max_positions: int | None, num_queries: int) -> None:
    """Check that queries and text fit into the positions of the model.

    Args:
        num_tokens: tokens of the text.
        what: the subject of the error message.
        max_positions: None if there is no limit.
        num_queries: Q.

    Raises:
        ValueError: there are too many tokens.
    """
    if max_positions is not None and num_queries + num_tokens > max_positions:
        has_new_tokens = "max_new_tokens" in what
        remedy = "lower max_new_tokens, or shorten the prompt" if has_new_tokens else "shorten the text"
        raise ValueError(
            f"{what} must have at most {max_positions - num_queries} tokens ({max_positions} positions minus "
            f"{num_queries} queries), got {num_tokens}; {remedy}"
        )


def check_prompts(checkpoint: Checkpoint, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Refuse prompts that the model cannot take (see `EngineConfig.check_prompts`); no weights are read.

    Raises:
        ValueError: as from `PromptTokenizer.encode`, or a prompt and `max_new_tokens` need too many
            positions.
    """
    config = checkpoint.config
    tokenizer = PromptTokenizer(checkpoint.folder, config)
    has_positions = config.text_config.model_type == "opt"  # T5's positions are relative and unlimited
    limit = config.text_config.max_position_embeddings if has_positions else None
    for prompt in prompts:
        num_tokens = len(tokenizer.encode(prompt)) + max_new_tokens
        require_room(num_tokens, "prompt and max_new_tokens together", limit, config.num_query_tokens)
