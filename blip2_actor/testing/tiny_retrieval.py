"""Tiny random checkpoints of image-text retrieval, as transformers itself writes them."""

from __future__ import annotations

from pathlib import Path

from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from tokenizers.models import WordPiece
from transformers import (
    Blip2ForImageTextRetrieval,
    Blip2Processor,
    BlipImageProcessor,
    PreTrainedTokenizerFast,
)

from blip2_actor.testing.tiny_checkpoints import IMAGE_SIZE_PX, NUM_QUERIES, make_config, randomize

WORDS = [
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
    "<image>",
]


def make_bert_tokenizer() -> PreTrainedTokenizerFast:
    """As in the published checkpoint: BERT's, lower case, with [DEC] as the start of sentence."""
    tokenizer = Tokenizer(WordPiece({word: i for i, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="[DEC]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        pad_token="[PAD]",
        unk_token="[UNK]",
        additional_special_tokens=["<image>"],
    )


def save_retrieval_checkpoint(folder: Path, image_token: bool = False) -> Path:
    """A random checkpoint, with or without image tokens in front of the text in its processor."""
    config = make_config("opt", image_token=False)
    config.image_token_index = WORDS.index("<image>") if image_token else None
    config.qformer_config.use_qformer_text_input = True
    config.image_text_hidden_size = 12
    model = Blip2ForImageTextRetrieval(config)
    randomize(model)
    model.save_pretrained(folder)
    size = {"height": IMAGE_SIZE_PX, "width": IMAGE_SIZE_PX}
    Blip2Processor(
        BlipImageProcessor(size=size), make_bert_tokenizer(), NUM_QUERIES if image_token else None
    ).save_pretrained(folder)
    return folder
