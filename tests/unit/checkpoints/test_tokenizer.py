"""What tokenizing a prompt writes to the terminal: nothing."""

import logging

from transformers import AutoConfig

from blip2_actor.checkpoints.checkpoint import DEMO_FOLDER
from blip2_actor.checkpoints.tokenizer import PromptTokenizer


def test_transformers_does_not_warn_about_a_long_prompt(caplog):
    """The engine refuses it by itself, in a sentence; the warning of transformers came before that."""
    tokenizer = PromptTokenizer(DEMO_FOLDER, AutoConfig.from_pretrained(DEMO_FOLDER))
    logger = logging.getLogger("transformers")
    logger.addHandler(caplog.handler)
    try:
        assert len(tokenizer.encode("x" * 900)) > 192
        assert len(tokenizer.encode_text("x" * 900)) > 192
    finally:
        logger.removeHandler(caplog.handler)
    assert caplog.messages == []
