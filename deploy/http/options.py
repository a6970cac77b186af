"""Generation options in a request: checked one by one, bounded, and merged over the service's own."""

from __future__ import annotations

import json
from dataclasses import asdict, fields
from typing import Any, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from blip2_actor import GenerationOptions
from blip2_actor.flags import field_docs
from deploy.http.errors import bad_request, shorten

OPTION_NAMES = tuple(field.name for field in fields(GenerationOptions))
MAX_TOKEN_IDS = 256
"""Maximum number of token ids that one option names; they are looked at in every step."""
MAX_OPTION_CHARS = 8_192
"""Maximum length of one option as JSON, more than 256 token ids or eight stop texts need. Options are checked
on the event loop, where 600 kB of wrong token ids took 0.5 s."""
MAX_OPTIONS = {"max_new_tokens": 512, "num_beams": 16, "num_return_sequences": 16}
"""What one caller may ask of a shared engine; more would crowd out the other requests."""

_TYPES: dict[str, TypeAdapter[Any]] = {
    name: TypeAdapter(hint, config=ConfigDict(strict=True, allow_inf_nan=False))
    for name, hint in get_type_hints(GenerationOptions).items()
}


def parse_options(given: dict[str, Any] | None, defaults: GenerationOptions) -> GenerationOptions:
    """Return the service's options, with those that the caller gives in their place.

    Raises:
        ApiError: 400; an option is unknown, of the wrong type, out of range or without effect.
    """
    if not given:
        return defaults
    values = {name: _option(name, value) for name, value in given.items()}
    try:
        return GenerationOptions(**values).resolve(asdict(defaults), "the service")
    except ValueError as error:
        raise bad_request(f"options: {error}") from None


def options_schema() -> dict[str, Any]:
    """Return the JSON schema of the options."""
    docs = field_docs(GenerationOptions)
    properties = {name: one.json_schema() | {"description": docs[name]} for name, one in _TYPES.items()}
    for name, maximum in MAX_OPTIONS.items():
        properties[name] |= {"minimum": 1, "maximum": maximum}
    return {"type": "object", "properties": properties, "additionalProperties": False}


def _option(name: str, value: object) -> Any:
    if name not in _TYPES:
        raise bad_request(GenerationOptions.explain_unknown(name[:MAX_OPTION_CHARS]))
    written = json.dumps(value)
    if len(written) > MAX_OPTION_CHARS:
        raise bad_request(
            f"options: {name} must have at most {MAX_OPTION_CHARS} characters as JSON, got {len(written)}"
        )
    try:
        # Through JSON, in which a list is accepted for a tuple.
        parsed = _TYPES[name].validate_json(written)
    except ValidationError as error:
        rule = error.errors()[0]["msg"].removeprefix("Input should be ")
        raise bad_request(f"options: {name} must be {rule}, got {shorten(value)}") from None
    if name in MAX_OPTIONS and parsed > MAX_OPTIONS[name]:
        raise bad_request(f"options: {name} must be at most {MAX_OPTIONS[name]}, got {parsed}")
    if name == "stop" and (len(parsed) > 8 or any(len(text) > 64 for text in parsed)):
        got = f"{len(parsed)} of at most {max(map(len, parsed))}"
        raise bad_request(f"options: stop must be at most 8 strings of at most 64 characters, got {got}")
    num_ids = len(parsed) if name == "suppress_tokens" else 0
    num_ids += sum(map(len, parsed)) if name == "bad_words_ids" else 0
    if num_ids > MAX_TOKEN_IDS:
        raise bad_request(f"options: {name} must have at most {MAX_TOKEN_IDS} token ids, got {num_ids}")
    return parsed
