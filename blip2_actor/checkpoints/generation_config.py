"""The options of a checkpoint's `generation_config.json`, for requests that do not give their own.

They are what `generate(generation_config=model.generation_config)` of transformers uses, as its pipelines do.
BLIP-2's plain `generate` hands the work to the language model, which does not see this file.

An option that this package does not have, and that would change the answers, is refused by name. Special
tokens are those of `config.json`; a file that names others is refused too, unless transformers has derived it
from a `config.json` (`_from_model_config`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig

from blip2_actor.options import GenerationOptions

DEFAULTS: dict[str, Any] = {
    option.name: option.metadata["resolved_default"]
    for option in fields(GenerationOptions)
    if option.name not in ("seed", "stop")  # transformers has no such options
}
"""Options that the file may hold, with the defaults of this package."""
TOP_K_OF_SAMPLING = 50
"""What transformers uses when it samples, unless it is set."""
_WITHOUT_EFFECT = {
    # about the file itself, the speed and the memory of transformers, and the form of its results
    *("_from_model_config", "transformers_version", "continuous_batching_config", "compile_config"),
    *("disable_compile", "prefill_chunk_size", "low_memory", "use_cache", "use_mtp", "max_cache_len"),
    *("cache_implementation", "cache_config", "return_dict_in_generate", "output_attentions"),
    *("output_hidden_states", "output_scores", "output_logits"),
    # a draft model, which leaves the answers as they are
    *("is_assistant", "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_lookbehind"),
    *("assistant_confidence_threshold", "assistant_early_exit", "assistant_ensemble_weight"),
    *("target_lookbehind", "speculation_type", "prompt_lookup_num_tokens", "max_matching_ngram_size"),
    # special tokens that generation does not read
    *("pad_token_id", "bos_token_id"),
}
"""Keys of the file that change no answer."""
_NEUTRAL_AT_1 = ("typical_p", "encoder_repetition_penalty", "guidance_scale", "num_beam_groups")
"""Keys of the file that change no answer if they are 1; the others change none if they are 0 or empty."""
_NEVER_NEUTRAL = ("forced_bos_token_id", "forced_eos_token_id", "watermarking_config")
"""Keys of the file that change answers with any value: 0 is a token, and {} asks for the usual watermark."""
_SPECIAL_TOKENS = ("eos_token_id", "decoder_start_token_id")


def read_generation_config(stored: Mapping[str, Any], text: PreTrainedConfig, file: object) -> dict[str, Any]:
    """Return the options that a checkpoint sets, without those that are the defaults.

    Args:
        stored: content of the file.
        text: configuration of the language model.
        file: name of the file, for messages.

    Raises:
        ValueError: the file has an option that is not supported, or with a value that cannot be used.
    """
    given = {name: value for name, value in stored.items() if value is not None}
    for name, value in given.items():
        if not _is_harmless(name, value, given, text):
            hint = "use max_new_tokens" if name == "max_length" else "remove it from the file"
            raise ValueError(
                f"{file} must not have '{name}', which is not supported, got {value!r}; {hint}, or set "
                "ignore_generation_config"
            )
    options = {name: value for name, value in given.items() if name in DEFAULTS}
    if options.get("do_sample"):
        options.setdefault("top_k", TOP_K_OF_SAMPLING)
    try:
        for name, value in options.items():
            checked = GenerationOptions(**{name: value})
            if isinstance(value, list):
                options[name] = getattr(checked, name)
        GenerationOptions().resolve(options)
    except ValueError as error:
        raise ValueError(
            f"{file} must have options that can be used: {error}; correct the file, or set "
            "ignore_generation_config"
        ) from error
    return {name: value for name, value in options.items() if value != DEFAULTS[name]}


def fill_special_tokens(text: PreTrainedConfig, folder: Path) -> None:
    """Set the special tokens that a configuration of the language model leaves out, as transformers does.

    A T5 starts its answers with `decoder_start_token_id`, or else with `bos_token_id`.

    Raises:
        ValueError: a T5 has neither, or the model does not know one of the tokens.
    """
    first = "bos_token_id"
    text.bos_token_id = getattr(text, "bos_token_id", None)
    if text.model_type == "t5":
        start = getattr(text, "decoder_start_token_id", None)
        text.decoder_start_token_id = text.bos_token_id if start is None else start
        if text.decoder_start_token_id is None:
            raise ValueError(
                f"text_config in {folder}/config.json must have decoder_start_token_id or bos_token_id, got "
                "neither; T5 models usually start with their pad token, 0"
            )
        first = "decoder_start_token_id"
    for name in ("bos_token_id", first):
        token_id = getattr(text, name)
        if token_id is not None and not (type(token_id) is int and 0 <= token_id < text.vocab_size):
            raise ValueError(
                f"{name} in text_config in {folder}/config.json must be a token of the model, from 0 to "
                f"{text.vocab_size - 1}, got {token_id}; take the config.json of the model that this one was "
                "made from"
            )
    if text.pad_token_id is None:
        eos = text.eos_token_id
        text.pad_token_id = next(iter(eos), None) if isinstance(eos, list) else eos


def _is_harmless(name: str, value: object, given: Mapping[str, Any], text: PreTrainedConfig) -> bool:
    """Is a key one of our options, or without effect on the answers?"""
    if name in DEFAULTS or name in _WITHOUT_EFFECT or not hasattr(_KNOWN, name):
        return True
    if name in _SPECIAL_TOKENS:
        ours = getattr(text, name, None)
        return bool(given.get("_from_model_config")) or _as_list(value) == _as_list(ours)
    if name == "max_length":
        return "max_new_tokens" in given  # which transformers prefers
    if name in _NEVER_NEUTRAL:
        return False
    return value == 1 if name in _NEUTRAL_AT_1 else value in (0, "", [], {})


_KNOWN = GenerationConfig()


def _as_list(token_ids: object) -> list[Any]:
    return sorted(token_ids, key=str) if isinstance(token_ids, list) else [token_ids]
