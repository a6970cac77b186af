"""A tokenizer without training data: every byte is a token."""

from __future__ import annotations

from collections.abc import Mapping

from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"


def byte_tokenizer(
    special_ids: Mapping[str, int], first_byte_id: int, template: str, **roles: str
) -> PreTrainedTokenizerFast:
    """Build a tokenizer whose tokens are the 256 bytes and some special tokens.

    Args:
        special_ids: id of each special token; "<image>" must be one of them.
        first_byte_id: id of the first byte token; the other 255 follow.
        template: what becomes of a text $A: "<start> $A" with a special token first, as in the tokenizer of
            OPT, or "$A <end>", as in that of T5.
        roles: special tokens by their name in transformers, such as `eos_token="<end>"`.

    Returns:
        A tokenizer that pads on the left.
    """
    vocab = dict(special_ids)
    for offset, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet())):
        vocab[byte] = first_byte_id + offset
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[], unk_token=roles.get("unk_token")))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [(token, special_ids[token]) for token in template.split() if token != "$A"]
    tokenizer.post_processor = processors.TemplateProcessing(single=template, special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        additional_special_tokens=[IMAGE_TOKEN],
        padding_side="left",
        **roles,
    )
