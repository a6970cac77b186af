"""Missing tokenizer files; and a tokenizer that tells the text of each token and prints nothing."""

import logging

import pytest
from transformers import AutoConfig

from blip2_actor.checkpoints import tokenizer
from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.checkpoints.tokenizer import PromptTokenizer, load_tokenizer
from blip2_actor.testing import EOS_TOKEN_ID, save_tiny_checkpoint, tiny_config, tiny_tokenizer


def test_transformers_does_not_warn_about_a_long_prompt(caplog):
    """The engine refuses it in one sentence, but a warning of transformers used to come first."""
    prompts = PromptTokenizer(DEMO_FOLDER, AutoConfig.from_pretrained(DEMO_FOLDER))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(prompts.encode("x" * 900)) > 192
        assert len(prompts.encode_text("x" * 900)) > 192
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []


def test_the_texts_of_tokens_are_together_the_text(tmp_path):
    """A byte inside a character decodes to a replacement character, which belongs to no text."""
    tiny_tokenizer("opt").save_pretrained(tmp_path)
    prompts = PromptTokenizer(tmp_path, tiny_config())
    token_ids = prompts.encode_text(" a ü\ufffd🐱")
    texts = prompts.token_texts(token_ids)
    assert texts == ["", "a", "", " ", "ü", "", "", "", "", "", "", "\ufffd🐱", ""]
    assert "".join(texts) == prompts.decode(token_ids)


def test_a_folder_without_tokenizer_names_the_missing_files(tmp_path):
    """transformers used to make an empty tokenizer of it."""
    with pytest.raises(ValueError, match=r"must have tokenizer\.json, or vocab\.json and merges\.txt"):
        load_tokenizer(tmp_path, "opt")
    with pytest.raises(ValueError, match=r"got no spiece\.model; copy the files"):
        load_tokenizer(tmp_path, "t5")


@pytest.mark.parametrize("is_installed", [("sentencepiece",), ("google.protobuf",), ()])
def test_a_sentencepiece_model_names_the_missing_packages(tmp_path, monkeypatch, is_installed):
    """transformers used to fall back to reading the file as tiktoken's, and to name tiktoken."""
    (tmp_path / "spiece.model").write_bytes(b"")
    monkeypatch.setattr(tokenizer, "find_spec", lambda module: module in is_installed or None)
    missing = [p for p in ("sentencepiece", "protobuf") if not any(p in name for name in is_installed)]
    with pytest.raises(ValueError, match=f"run: pip install {' '.join(missing)}$"):
        load_tokenizer(tmp_path, "t5")


@pytest.mark.parametrize("content", ["", "[1]", "null"])
def test_a_damaged_tokenizer_names_its_folder(tmp_path, content):
    """transformers raises a TypeError, or an error that names no file."""
    save_tiny_checkpoint(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"the tokenizer in {tmp_path} must be readable, got"):
        load_tokenizer(tmp_path, "opt")


@pytest.mark.parametrize(
    ("eos_token_id", "end_ids", "scored"),
    [
        (EOS_TOKEN_ID, {EOS_TOKEN_ID}, [EOS_TOKEN_ID]),
        ([2, EOS_TOKEN_ID], {2, EOS_TOKEN_ID}, [EOS_TOKEN_ID]),
        ([7, 5], {7, 5}, [7]),
        (-1, set(), []),
        ([6, 264], {6}, [6]),
        (None, set(), []),
    ],
)
def test_end_tokens_are_tokens_of_the_model(tmp_path, eos_token_id, end_ids, scored):
    """-1 stands for "none" in configurations. It banned the model's last token while a text was too short,
    and made scores fail. Of several end tokens a scored text got the smallest, whatever it means."""
    tiny_tokenizer("opt").save_pretrained(tmp_path)
    prompts = PromptTokenizer(tmp_path, tiny_config(eos_token_id=eos_token_id))
    assert prompts.end_ids == end_ids
    assert prompts.encode_text("a")[1:] == scored


def test_too_many_new_tokens_have_a_remedy_of_their_own():
    """A prompt of one word with max_new_tokens=100000 was said to be too long."""
    with pytest.raises(ValueError, match="got 200; lower max_new_tokens, or shorten the prompt"):
        tokenizer.require_room(200, "prompt and max_new_tokens together", 192, 8)
