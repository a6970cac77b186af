"""Prompts are tokenized as transformers does for published names, whichever version saved the checkpoint.

For these names transformers uses `tokenizer.json` unchanged. For a folder, it builds a T5Tokenizer
instead, which drops spaces and newlines at the end of a prompt.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE, Unigram
from transformers import AutoTokenizer, GPT2Tokenizer

from blip2_actor.checkpoints.tokenizer import PromptTokenizer, load_tokenizer
from blip2_actor.testing.tiny_checkpoints import tiny_config

PROMPTS = (
    "a photo",
    "a photo ",
    "  a photo",
    "answer:\n",
    "a \n b\t",
    " ",
    "\n",
    "a photo </s> b ",
    "<extra_id_0> a",
)
END_IDS = {"t5": 1, "opt": 2}
HUB_NAMES = {"t5": "Salesforce/blip2-flan-t5-xl", "opt": "Salesforce/blip2-opt-2.7b"}
_T5_ROLES = {"eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
_T5_EXTRA = [f"<extra_id_{i}>" for i in range(100)]
_OPT_ROLES = {"bos_token": "</s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "</s>"}
_ADDED_TOKEN = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
SAVED_BY: dict[str, dict[str, dict[str, Any] | None]] = {
    "t5": {
        "4.27": {
            "tokenizer_class": "T5Tokenizer",
            "extra_ids": 100,
            "additional_special_tokens": _T5_EXTRA,
            **_T5_ROLES,
        },
        "4.46": {
            "tokenizer_class": "T5Tokenizer",
            "processor_class": "Blip2Processor",
            "added_tokens_decoder": {"1": {"content": "</s>", "special": True, **_ADDED_TOKEN}},
            "clean_up_tokenization_spaces": True,
            "extra_ids": 100,
            "additional_special_tokens": _T5_EXTRA,
            **_T5_ROLES,
        },
        "4.57": {"tokenizer_class": "T5TokenizerFast", "extra_ids": 100, **_T5_ROLES},
        "5": {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", **_T5_ROLES},
        "no class": {"model_max_length": 512, **_T5_ROLES},
        "no tokenizer_config.json": None,
    },
    "opt": {
        "4.27": {
            "tokenizer_class": "GPT2Tokenizer",
            "add_bos_token": True,
            "add_prefix_space": False,
            **{
                role: {"__type": "AddedToken", "content": token, **_ADDED_TOKEN}
                for role, token in _OPT_ROLES.items()
            },
        },
        "4.46": {
            "tokenizer_class": "GPT2Tokenizer",
            "processor_class": "Blip2Processor",
            "add_bos_token": True,
            "clean_up_tokenization_spaces": True,
            **_OPT_ROLES,
        },
        "5": {"tokenizer_class": "TokenizersBackend", "backend": "tokenizers", **_OPT_ROLES},
        "no class": _OPT_ROLES,
        "no tokenizer_config.json": None,
    },
}
"""Contents of `tokenizer_config.json`, by the version of transformers that saved it."""


def _t5_tokenizer() -> Tokenizer:
    """Build a tokenizer with the layout of the published Flan-T5: Metaspace alone splits the text."""
    letters = [(letter, -3.0) for letter in "abcdefghijklmnopqrstuvwxyz:.?"]
    vocab = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -2.0), *letters, ("▁a", -2.5)]
    tokenizer = Tokenizer(Unigram([*vocab, *((token, 0.0) for token in reversed(_T5_EXTRA))], 2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *_T5_EXTRA])
    return tokenizer


def _opt_tokenizer() -> Tokenizer:
    """Build a tokenizer with the layout of OPT: bytes, and `</s>` in front."""
    vocab = {"<s>": 0, "<pad>": 1, "</s>": 2}
    vocab |= {byte: len(vocab) + i for i, byte in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["Ġa"] = len(vocab)
    tokenizer = Tokenizer(BPE(vocab=vocab, merges=[("Ġ", "a")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 2)])
    tokenizer.add_special_tokens(["<pad>", "</s>"])
    return tokenizer


BUILD = {"t5": _t5_tokenizer, "opt": _opt_tokenizer}


def _save_to_hub_cache(cache: Path, language: str, tokenizer_config: dict[str, Any] | None) -> Path:
    """Write a checkpoint's configuration as the hub's cache stores it; return the folder of the snapshot."""
    repository = cache / f"models--{HUB_NAMES[language].replace('/', '--')}"
    folder = repository / "snapshots" / ("a" * 40)
    folder.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("a" * 40)
    BUILD[language]().save(str(folder / "tokenizer.json"))
    tiny_config(language).save_pretrained(folder)
    if tokenizer_config is not None:
        (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    return folder


@pytest.mark.parametrize(
    ("language", "saved_by"), [(language, version) for language in SAVED_BY for version in SAVED_BY[language]]
)
def test_a_folder_equals_the_published_name(tmp_path, language, saved_by):
    """The engine sees only the folder: with its class T5Tokenizer, "answer:\
    " used to lose its newline."""
    folder = _save_to_hub_cache(tmp_path, language, SAVED_BY[language][saved_by])
    theirs = AutoTokenizer.from_pretrained(HUB_NAMES[language], cache_dir=tmp_path, local_files_only=True)
    ours = PromptTokenizer(folder, tiny_config(language, vocab_size=1000, eos_token_id=END_IDS[language]))
    stored = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for prompt in PROMPTS:
        assert ours.encode(prompt) == theirs(prompt).input_ids == stored.encode(prompt).ids
        text = ours.encode_text(prompt)[:-1]
        assert text == theirs(prompt, add_special_tokens=False).input_ids
        assert ours.decode(text) == theirs.decode(text, skip_special_tokens=True).strip()


def test_a_folder_with_only_vocabulary_and_merges_equals_transformers(tmp_path):
    """OPT's older files; without names for the special tokens, those of GPT-2 would be used."""
    _opt_tokenizer().model.save(str(tmp_path))
    with pytest.raises(ValueError, match=r"got no tokenizer_config\.json; copy"):
        load_tokenizer(tmp_path, "opt")
    settings = {"tokenizer_class": "GPT2Tokenizer", "add_bos_token": True, **_OPT_ROLES}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    ours, theirs = load_tokenizer(tmp_path, "opt"), GPT2Tokenizer.from_pretrained(tmp_path)
    stored = _opt_tokenizer()
    for prompt in PROMPTS:
        assert ours(prompt).input_ids == theirs(prompt).input_ids == stored.encode(prompt).ids
