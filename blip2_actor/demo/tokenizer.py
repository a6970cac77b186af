"""The demonstration's tokenizer: byte-level BPE in which every word of a caption is one token.

The merges are not learned. They spell each word of the grammar from its left, so that it becomes one token;
any other text becomes bytes. The special tokens are where OPT has them.
"""

from __future__ import annotations

from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast

from blip2_actor.demo.grammar import all_captions

SPECIAL_TOKENS = ("<s>", "<pad>", "</s>", "<unk>")
IMAGE_TOKEN = "<image>"
_SPACE = "Ġ"  # how byte-level BPE writes the space before a word


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Build the tokenizer; `</s>` starts every text, as in OPT, and also ends a caption."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL_TOKENS)}
    for byte in sorted(pre_tokenizers.ByteLevel.alphabet()):
        vocabulary[byte] = len(vocabulary)
    merges: list[tuple[str, str]] = []
    for word in _words():
        for end in range(1, len(word)):
            if word[: end + 1] not in vocabulary:
                vocabulary[word[: end + 1]] = len(vocabulary)
                merges.append((word[:end], word[end]))

    tokenizer = Tokenizer(BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="</s> $A", pair="</s> $A </s> $B", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="</s>",
        eos_token="</s>",
        pad_token="<pad>",
        unk_token="<unk>",
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=192,
    )
    fast.add_tokens([AddedToken(IMAGE_TOKEN, normalized=False, special=True)], special_tokens=True)
    return fast


def _words() -> list[str]:
    """Return the words of the grammar with their space, then those that start a caption, without a space.

    The merges of the latter have the lowest rank, so that "an" never splits a word such as "orange".
    """
    inner: dict[str, None] = {}
    opening: dict[str, None] = {}
    for caption in all_captions():
        first, *rest = str(caption).split()
        opening[first] = None
        inner.update((_SPACE + word, None) for word in rest)
    return [*inner, *opening]
