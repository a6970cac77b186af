"""A tokenizer without training data: every byte is a token."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"


def byte_tokenizer(
    special_ids: Mapping[str, int],
    first_byte_id: int,
    *,
    first: str | None = None,
    last: str | None = None,
    **roles: str,
) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the 256 bytes and some special tokens.

    Args:
        special_ids: id of each special token; "<image>" must be one of them.
        first_byte_id: id of the first byte token; the other 255 follow.
        first: special token at the start of every text, as in the tokenizer of OPT.
        last: special token at the end of every text, as in the tokenizer of T5; exclusive with `first`.
        roles: special tokens by their name in transformers, such as `eos_token="<end>"`.

    Returns:
        A tokenizer that pads on the left.
    """
    if (first is None) == (last is None):
        raise ValueError(f"first or last must be given, and not both, got {first!r} and {last!r}")
    vocab = dict(special_ids)
    for offset, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())):
        vocab[byte] = first_byte_id + offset
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token=roles.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    added = first or last or ""
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{added} $A" if first else f"$A {added}", special_tokens=[(added, vocab[added])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        **roles,
    )
