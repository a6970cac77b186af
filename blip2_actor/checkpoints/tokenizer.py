"""Prompts to token ids and back, exactly as the checkpoint's own processor does it.

The queries stand before the text in both layouts of the reference (image tokens in the prompt since
transformers 4.47, concatenation before), so image tokens never occur here.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, Blip2Config

from blip2_actor.checkpoints.checkpoint import Checkpoint


class PromptTokenizer:
    """The tokenizer of one checkpoint."""

    def __init__(self, folder: Path, config: Blip2Config) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.image_token_id: int | None = config.image_token_index
        text_config = config.text_config
        self.vocab_size: int = text_config.vocab_size
        start = text_config.bos_token_id if text_config.bos_token_id is not None else text_config.eos_token_id
        self.empty_ids = [start]
        eos = text_config.eos_token_id
        self.end_ids = frozenset(eos if isinstance(eos, list) else [eos])

    def encode(self, prompt: str | None) -> list[int]:
        """Token ids that follow the queries.

        Raises:
            ValueError: the prompt is no text, or holds the image token or one that the model does not know.
        """
        if prompt is None or prompt == "":
            return self.empty_ids
        token_ids: list[int] = self.tokenizer(require_text(prompt)).input_ids
        require_known(token_ids, self.vocab_size, self.image_token_id)
        return token_ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text to score: nothing in front, the end token behind.

        Raises:
            ValueError: it is no text, is empty, or holds a token as above.
        """
        token_ids: list[int] = self.tokenizer(require_text(text), add_special_tokens=False).input_ids
        if not token_ids:
            raise ValueError("text must have at least one token to score, got an empty text")
        require_known(token_ids, self.vocab_size, self.image_token_id)
        return [*token_ids, min(self.end_ids)]

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of generated ids, without end tokens and surrounding spaces."""
        kept = [t for t in token_ids if t not in self.end_ids]
        return self.tokenizer.decode(kept, skip_special_tokens=True).strip()


def require_text(text: object) -> str:
    """The text itself; raises ValueError where it is none, or holds halves of characters."""
    if not isinstance(text, str):
        raise ValueError(f"text must be a str, got {type(text).__name__}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"text must be whole characters, got half of one at {error.start} (a lone surrogate); "
            "decode it with errors='replace'"
        ) from error
    return text


def require_something(text: object) -> str:
    """As `require_text`, and not empty."""
    if text == "":
        raise ValueError("text must say something, got an empty text")
    return require_text(text)


def require_known(token_ids: Sequence[int], vocab_size: int, image_token_id: int | None) -> None:
    """Raises ValueError where a text holds the image token, or one that was added to the tokenizer alone."""
    if image_token_id in token_ids:
        raise ValueError(
            "text must not contain the image token, got it; leave it out, the image always comes first"
        )
    if max(token_ids, default=0) >= vocab_size:
        raise ValueError(
            f"text must not contain a token that the model does not know ({vocab_size} are known), got "
            f"number {max(token_ids)}; leave it out"
        )


def require_room(num_tokens: int, what: str, max_positions: int | None, num_queries: int) -> None:
    """Raises ValueError where queries and `num_tokens` exceed the positions there are."""
    if max_positions is not None and num_queries + num_tokens > max_positions:
        raise ValueError(
            f"{what} must have at most {max_positions - num_queries} tokens ({max_positions} positions less "
            f"{num_queries} queries), got {num_tokens}; shorten the text"
        )


def check_prompts(checkpoint: Checkpoint, prompts: Sequence[str], max_new_tokens: int) -> None:
    """See `EngineConfig.check_prompts`; reads the tokenizer alone."""
    config = checkpoint.config
    known = PromptTokenizer(checkpoint.folder, config)
    has_positions = config.text_config.model_type == "opt"  # T5's are relative, without end
    limit = config.text_config.max_position_embeddings if has_positions else None
    for prompt in prompts:
        num_tokens = len(known.encode(prompt)) + max_new_tokens
        require_room(num_tokens, "prompt and max_new_tokens together", limit, config.num_query_tokens)
