"""The body of `POST /v1/chat/completions`: OpenAI's fields, and what they become.

What BLIP-2 cannot do is refused by name: it reads one image and at most one text, and has no tools, roles or
turns. A temperature of 0 is greedy search; without a temperature, the service's own options apply.
"""

from __future__ import annotations

import secrets
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from blip2_actor import GenerationOptions
from deploy.http.errors import bad_request
from deploy.http.options import MAX_OPTIONS, parse_options
from deploy.http.wishes import MAX_TEXT_CHARS, Body, Text

NO_EFFECT = (
    "user",
    "store",
    "metadata",
    "service_tier",
    "safety_identifier",
    "prompt_cache_key",
    "prompt_cache_retention",
)
"""Fields that change no text of any model; they are accepted."""
NEUTRAL: dict[str, Any] = {
    "modalities": ["text"],
    "tool_choice": "none",
    "function_call": "none",
    "parallel_tool_calls": True,
    "reasoning_effort": "none",
    "verbosity": "medium",
}
"""Values that ask for what is so in any case; with another value, these fields are refused."""

MIN_TEMPERATURE = 1e-6
"""Smallest temperature that the engine samples with."""
GREEDY: dict[str, Any] = {
    "do_sample": False,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "seed": 0,
    "num_beams": 1,
    "length_penalty": 1.0,
    "early_stopping": False,
    "num_return_sequences": 1,
}
"""Options of greedy search."""


class ImageUrl(Body):
    url: str
    """A data URI such as data:image/jpeg;base64,..., or a URL of a host that the service allows."""
    detail: Literal["auto", "low", "high"] = "auto"
    """Accepted; images always have the model's size."""


class ImagePart(Body):
    type: Literal["image_url"]
    image_url: ImageUrl


class TextPart(Body):
    type: Literal["text"]
    text: Text


ContentPart = Annotated[ImagePart | TextPart, Field(discriminator="type")]


class Message(Body):
    """The one message of the user: an image, and perhaps a text that the answer continues."""

    role: str
    content: Text | list[ContentPart]
    name: str | None = None


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class ResponseFormat(Body):
    type: Literal["text"]


MaxTokens = Annotated[int, Field(ge=1, le=MAX_OPTIONS["max_new_tokens"])]


class ChatBody(BaseModel):
    """OpenAI's fields that BLIP-2 has a meaning for, and those of vLLM."""

    model_config = ConfigDict(extra="allow", strict=True, use_attribute_docstrings=True)

    model: str
    messages: Annotated[list[Message], Field(min_length=1)]
    n: Annotated[int, Field(ge=1, le=MAX_OPTIONS["num_return_sequences"])] | None = None
    max_tokens: MaxTokens | None = None
    max_completion_tokens: MaxTokens | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    """0 is greedy search; without one, the options of the service apply."""
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1)] | None = None
    """0 and -1 leave all tokens, as in vLLM."""
    repetition_penalty: float | None = None
    stop: str | list[str] | None = None
    seed: int | None = None
    """Seed of the samples; without one, each request is sampled anew."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    logprobs: bool | None = None
    """Return the log-probability of each token; a stream has them in the last chunk of each choice."""
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = None
    """Must be 0 or left out: only the chosen tokens have log-probabilities."""
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    response_format: ResponseFormat | None = None

    def check(self) -> None:
        """Refuse fields that would have no effect; raise ApiError 400."""
        for name, value in (self.model_extra or {}).items():
            if name not in NO_EFFECT and value not in (None, False, [], {}, 0, NEUTRAL.get(name)):
                raise bad_request(f"{name} is not supported by BLIP-2; leave it out")
        if self.stream_options is not None and not self.stream:
            raise bad_request("stream_options must be left out without stream")
        if self.top_logprobs is not None and not self.logprobs:
            raise bad_request("top_logprobs must be left out without logprobs")
        if self.top_logprobs:
            raise bad_request(
                f"top_logprobs must be 0, got {self.top_logprobs}; only the chosen tokens have "
                "log-probabilities"
            )

    def generation_options(self, defaults: GenerationOptions) -> GenerationOptions:
        """Return how the answer is generated; raise ApiError 400 if it cannot be."""
        max_tokens = self.max_completion_tokens or self.max_tokens
        if self.max_tokens and self.max_tokens != max_tokens:
            raise bad_request("max_tokens must equal max_completion_tokens, or be left out")
        search = self._search(defaults)
        searched = replace(defaults, **search)
        if (self.n or 1) > 1 and not searched.do_sample and searched.num_beams < (self.n or 1):
            raise bad_request(f"n must be 1 without sampling, got {self.n}; set temperature above 0")
        given = {
            "max_new_tokens": max_tokens,
            "min_new_tokens": self.min_tokens,
            "repetition_penalty": self.repetition_penalty,
            "stop": [self.stop] if isinstance(self.stop, str) else self.stop,
            "num_return_sequences": self.n,
        }
        return parse_options({name: value for name, value in given.items() if value is not None}, searched)

    def _search(self, defaults: GenerationOptions) -> dict[str, Any]:
        """Return the options that the temperature decides; none if it is left to the service."""
        seed = secrets.randbits(62) if self.seed is None else self.seed % (1 << 62)
        top_k = max(self.top_k or 0, 0)
        is_narrowed = (self.top_p or 1) < 1 or top_k > 0
        if self.temperature or (self.temperature is None and is_narrowed):
            return GREEDY | {
                "do_sample": True,
                "temperature": max(self.temperature or 1.0, MIN_TEMPERATURE),
                "top_p": self.top_p or 1.0,
                "top_k": top_k,
                "seed": seed,
            }
        if self.temperature == 0:
            return GREEDY
        return {"seed": seed} if defaults.do_sample else {}


def content_of(messages: list[Message]) -> tuple[str | None, str]:
    """Return the text and the URL of the image of a conversation; raise ApiError 400 if it has others."""
    if len(messages) != 1 or messages[0].role != "user":
        raise bad_request(
            "messages must be one message of the role user: BLIP-2 has no system messages and no turns; "
            "write earlier turns into the text, such as Question: ... Answer: ... Question: ... Answer:"
        )
    [message] = messages
    parts = [] if isinstance(message.content, str) else message.content
    images = [part.image_url.url for part in parts if isinstance(part, ImagePart)]
    if len(images) != 1:
        raise bad_request(f"messages must contain exactly one image, got {len(images)}")
    text = "\n".join(part.text for part in parts if isinstance(part, TextPart))
    if len(text) > MAX_TEXT_CHARS:  # as in one part; an engine splits it into tokens, and others wait
        raise bad_request(f"messages must have at most {MAX_TEXT_CHARS} characters of text, got {len(text)}")
    return text or None, images[0]
