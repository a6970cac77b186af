"""The form of `POST /v1/batch`, and its lines: requests on their way to an endpoint, and results back."""

from __future__ import annotations

import dataclasses
import io
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from blip2_actor import Completion, GenerationOptions, ModelInfo, Result, Status


def form_of(
    asked: Sequence[tuple[np.ndarray, str | None]], options: GenerationOptions, model: ModelInfo
) -> tuple[str, bytes]:
    """Return content type and body of a request for texts.

    Args:
        asked: an image, uint8[S, S, 3], and a prompt for each text; an image that is the same object is sent
            once.
        options: of all texts, each option with a value.
        model: what the endpoint must serve.
    """
    images = {id(image): image for image, _ in asked}
    positions = {key: position for position, key in enumerate(images)}
    file = io.BytesIO()
    np.save(file, np.stack(list(images.values())))
    fields = {
        "texts": [{"image": positions[id(image)], "prompt": prompt} for image, prompt in asked],
        "options": dataclasses.asdict(options),
        "digest": model.digest,
        "dtype": model.dtype,
        "quantize": model.quantize,
    }
    boundary = secrets.token_hex(16)
    parts = [_part(boundary, f'name="{name}"', json.dumps(value).encode()) for name, value in fields.items()]
    parts.append(_part(boundary, 'name="pixels"; filename="pixels.npy"', file.getvalue()))
    body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    return f"multipart/form-data; boundary={boundary}", body


def result_of(line: Mapping[str, Any]) -> Result:
    """Return the result in a line of the answer."""
    completions = tuple(
        Completion(
            text=one["text"],
            token_ids=tuple(one["token_ids"]),
            logprob=one["logprob"],
            finish_reason=one["finish_reason"],
            token_logprobs=tuple(one["token_logprobs"]),
        )
        for one in line["completions"]
    )
    return Result(
        status=Status(line["status"]),
        error=line["error"],
        completions=completions,
        num_prompt_tokens=line["num_prompt_tokens"],
    )


def _part(boundary: str, head: str, value: bytes) -> bytes:
    return f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"
