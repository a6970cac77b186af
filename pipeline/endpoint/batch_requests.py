"""The form of `POST /v1/batch`, and its lines: requests on their way to an endpoint, and outcomes back."""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from blip2_actor import Completion, Features, GenerationOptions, ModelInfo, Result, Score, Status

Outcome = Result | Score | Features


@dataclass(frozen=True, kw_only=True)
class Ask:
    """What is wanted of an image: a text by options, the score of a given text, or without both, features."""

    options: GenerationOptions | None = None
    """The options of a text to generate, each with a value."""
    text: str | None = None
    """A text to score."""
    prompt: str | None = None

    @property
    def part(self) -> Literal["texts", "scores", "features"]:
        """The field of the form for it."""
        if self.options is not None:
            return "texts"
        return "features" if self.text is None else "scores"

    def goes_with(self, other: Ask) -> bool:
        """Return whether both may stand in one request."""
        return (self.part, self.options) == (other.part, other.options)

    def without(self, status: Status, error: str) -> Outcome:
        """Return the outcome of what could not be made."""
        kind = {"texts": Result, "scores": Score, "features": Features}[self.part]
        return kind(status=status, error=error)

    def in_form(self, image: int) -> Any:
        """Return the entry in the field of the form, for an image with this position."""
        if self.part == "features":
            return image
        entry: dict[str, Any] = {"image": image, "prompt": self.prompt}
        return entry if self.part == "texts" else entry | {"text": self.text}


def form_of(asked: Sequence[tuple[np.ndarray, Ask]], model: ModelInfo) -> tuple[str, bytes]:
    """Return content type and body of a request.

    Args:
        asked: images, uint8[S, S, 3], and what is wanted of them; all may stand in one request. An image that
            is the same object is sent once.
        model: what the endpoint must serve.
    """
    images = {id(image): image for image, _ in asked}
    positions = {key: position for position, key in enumerate(images)}
    file = io.BytesIO()
    np.save(file, np.stack(list(images.values())))
    first = asked[0][1]
    fields: dict[str, Any] = {
        first.part: [ask.in_form(positions[id(image)]) for image, ask in asked],
        "digest": model.digest,
        "dtype": model.dtype,
        "quantize": model.quantize,
    }
    if first.options is not None:
        fields["options"] = dataclasses.asdict(first.options)
    boundary = secrets.token_hex(16)
    parts = [_part(boundary, f'name="{name}"', json.dumps(value).encode()) for name, value in fields.items()]
    parts.append(_part(boundary, 'name="pixels"; filename="pixels.npy"', file.getvalue()))
    body = b"".join([*parts, f"--{boundary}--\r\n".encode()])
    return f"multipart/form-data; boundary={boundary}", body


def outcome_of(line: Mapping[str, Any]) -> Outcome:
    """Return the outcome in a line of the answer."""
    status, error = Status(line["status"]), line["error"]
    if "completions" in line:
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
        num_prompt_tokens = line["num_prompt_tokens"]
        return Result(
            status=status, error=error, completions=completions, num_prompt_tokens=num_prompt_tokens
        )
    if "logprob" in line:
        return Score(status=status, error=error, logprob=line["logprob"], num_tokens=line["num_tokens"])
    return Features(
        status=status,
        error=error,
        qformer_features=_vectors(line["qformer_features"]),
        pooler_output=_vectors(line["pooler_output"]),
    )


def _vectors(file: str | None) -> np.ndarray | None:
    if file is None:
        return None
    vectors: np.ndarray = np.load(io.BytesIO(base64.b64decode(file)), allow_pickle=False)
    return vectors


def _part(boundary: str, head: str, value: bytes) -> bytes:
    return f"--{boundary}\r\nContent-Disposition: form-data; {head}\r\n\r\n".encode() + value + b"\r\n"
