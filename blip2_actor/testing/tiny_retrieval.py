"""Tiny checkpoints of image-text retrieval with random weights, written by transformers."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import Blip2ForImageTextRetrieval, Blip2Processor, PreTrainedTokenizerFast
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_actor.testing.random_weights import randomize_weights
from blip2_actor.testing.tiny_checkpoints import IMAGE_SIZE_PX, NUM_QUERIES, tiny_config
from blip2_actor.testing.tokenizer import IMAGE_TOKEN

_WORDS = (
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "dog",
    "cat",
    "on",
    "the",
    "sofa",
    "##s",
    "[DEC]",
    IMAGE_TOKEN,
)


def save_tiny_retrieval_checkpoint(folder: Path, image_token: bool = False) -> Path:
    """Write a retrieval checkpoint with random weights, as transformers writes it.

    Args:
        folder: folder of the checkpoint.
        image_token: whether its processor puts image tokens in front of a text, as newer checkpoints do.

    Returns:
        `folder`.
    """
    config = tiny_config("opt", image_token=False)
    config.image_token_index = _WORDS.index(IMAGE_TOKEN) if image_token else None
    config.qformer_config.use_qformer_text_input = True
    config.image_text_hidden_size = 12
    model = Blip2ForImageTextRetrieval(config)
    randomize_weights(model)
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    num_query_tokens = NUM_QUERIES if image_token else None
    processor = Blip2Processor(BlipImageProcessorPil(size=size), _bert_tokenizer(), num_query_tokens)
    processor.save_pretrained(folder)
    return folder


def _bert_tokenizer() -> PreTrainedTokenizerFast:
    """Build a lower-case BERT tokenizer with [DEC] as its start token, as in the published checkpoint."""
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(_WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    specials = [(word, _WORDS.index(word)) for word in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing(single="[CLS] $A [SEP]", special_tokens=specials)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[DEC]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        additional_special_tokens=[IMAGE_TOKEN],
    )
