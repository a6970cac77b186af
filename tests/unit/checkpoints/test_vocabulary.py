"""A checkpoint without its tokenizer files is refused before any weights are read."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from blip2_actor import EngineConfig, MatchingConfig
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.checkpoints.vocabulary import require_vocabulary
from blip2_actor.testing import save_tiny_checkpoint, save_tiny_retrieval_checkpoint


def test_weights_without_a_tokenizer_are_refused_by_info_and_build(tmp_path: Path) -> None:
    """`model.save_pretrained` writes no tokenizer: every caption used to be "" with status ok."""
    for name in ("config.json", "preprocessor_config.json"):
        shutil.copy(DEMO_FOLDER / name, tmp_path)
    config = EngineConfig(model=str(tmp_path), device="cpu")
    for ask in (config.info, config.build, lambda: config.check_prompts(["a"], 3)):
        with pytest.raises(ValueError, match=r"must have tokenizer\.json, .* copy the files"):
            ask()


def test_retrieval_needs_a_tokenizer_too(tmp_path: Path) -> None:
    folder = save_tiny_retrieval_checkpoint(tmp_path)
    config = MatchingConfig(model=str(folder), device="cpu")
    config.info()
    for path in folder.glob("*token*"):
        path.unlink()
    with pytest.raises(ValueError, match=r"must have tokenizer\.json, or vocab\.txt"):
        config.info()


def test_a_vocabulary_without_the_end_token_is_refused(tmp_path: Path) -> None:
    """A tokenizer of another model turns ids into wrong texts, or into none."""
    folder = save_tiny_checkpoint(tmp_path)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["model"]["vocab"] = {"a": 0, "b": 1}
    tokenizer["added_tokens"] = []
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"tokenizer\.json must have at least 4 tokens .*, got 2"):
        EngineConfig(model=str(folder), device="cpu").info()


FAST, WORDS, MERGES = "tokenizer.json", "vocab.json", {"merges.txt": "", "tokenizer_config.json": "{}"}
VOCABULARIES: dict[str, tuple[str, dict[str, str], str | None]] = {
    "fast": ("opt", {FAST: '{"model": {"vocab": {"a": 0, "b": 9}}}'}, None),
    "fast, unigram": (
        "t5",
        {FAST: '{"model": {"vocab": [["a", 0]]}, "added_tokens": [{"id": 9}]}'},
        None,
    ),
    "fast, too small": ("opt", {FAST: '{"model": {"vocab": {"a": 8}}}'}, "at least 10 tokens .*, got 9"),
    "fast, empty": ("opt", {FAST: '{"model": {"vocab": {}}}'}, "at least 10 tokens .*, got 0"),
    "fast, cut": ("opt", {FAST: '{"model": {"vo'}, r"tokenizer\.json must be the vocabulary"),
    "fast, no vocabulary": ("opt", {FAST: "{}"}, r"tokenizer\.json must be the vocabulary"),
    "slow": ("opt", {WORDS: '{"a": 0}', "added_tokens.json": '{"b": 9}', **MERGES}, None),
    "slow, too small": ("opt", {WORDS: '{"a": 0}', **MERGES}, r"vocab\.json must .*, got 1"),
    "slow, no merges": ("opt", {WORDS: '{"a": 9}'}, r"got no merges\.txt and no tokenizer_config\.json;"),
    "slow, of another model": ("t5", {WORDS: '{"a": 9}', **MERGES}, r"got no spiece\.model;"),
    "sentencepiece": ("t5", {"spiece.model": "…"}, None),
    "sentencepiece, empty": ("t5", {"spiece.model": ""}, "got 0"),
    "wordpiece": ("bert", {"vocab.txt": "a\n" * 10}, None),
}


@pytest.mark.parametrize("case", VOCABULARIES)
def test_every_kind_of_vocabulary_is_counted(case: str, tmp_path: Path) -> None:
    reader, files, message = VOCABULARIES[case]
    for name, text in files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    check: Callable[[], None] = lambda: require_vocabulary(tmp_path, reader, 10, [9])  # noqa: E731
    if message is None:
        check()
    else:
        with pytest.raises(ValueError, match=message):
            check()


def test_rows_that_only_pad_the_embeddings_need_no_token(tmp_path: Path) -> None:
    """blip2-opt-2.7b has 50304 rows and 50266 tokens; a tokenizer of BERT (30522) is another model's."""
    (tmp_path / "vocab.txt").write_text("a\n" * 50266)
    require_vocabulary(tmp_path, "bert", 50304, [2, 50118])
    (tmp_path / "vocab.txt").write_text("a\n" * 30522)
    with pytest.raises(ValueError, match="at least 31616 tokens for this model, got 30522"):
        require_vocabulary(tmp_path, "bert", 32128, [1])
