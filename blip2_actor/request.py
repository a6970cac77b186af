"""What goes into the engine and what comes out: plain values, importable without torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Union

from blip2_actor.options import GenerationOptions
from blip2_actor.status import Status

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image

    from blip2_actor.engine.encoded_image import EncodedImage

ImageLike = Union[bytes, "Image", "np.ndarray", "EncodedImage"]
"""Encoded bytes, a PIL image, uint8[H, W, 3] in RGB, or what the engine's `image()` made of one."""

FinishReason = Literal["stop", "length"]
"""`stop`: the end token or a stop text; `length`: max_new_tokens was reached."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One image and what to do with it."""

    image: ImageLike
    """Encoded bytes, a PIL image, uint8[H, W, 3] in RGB, or an image shared through `Engine.image`."""
    prompt: str | None = None
    """Text the answer continues; None (or empty) captions the image."""
    options: GenerationOptions | None = None
    """This request's own options; None takes those of the call."""


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One generated text."""

    text: str
    token_ids: tuple[int, ...]
    """The new tokens alone, with the end token when there is one."""
    logprob: float
    """Sum of the tokens' log-softmax (natural log) before any logits processor."""
    finish_reason: FinishReason


@dataclass(frozen=True, kw_only=True)
class Result:
    """What became of one request; `text` and its fellows are those of the best completion."""

    status: Status = Status.OK
    error: str | None = None
    completions: tuple[Completion, ...] = field(default=())

    @property
    def ok(self) -> bool:
        return self.status is Status.OK

    @property
    def text(self) -> str | None:
        return self.completions[0].text if self.completions else None

    @property
    def token_ids(self) -> tuple[int, ...]:
        return self.completions[0].token_ids if self.completions else ()

    @property
    def logprob(self) -> float | None:
        return self.completions[0].logprob if self.completions else None

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.completions[0].finish_reason if self.completions else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What the encoders make of one image; None where `status` is not ok."""

    status: Status = Status.OK
    error: str | None = None
    qformer_features: np.ndarray | None = None
    """float32[Q, Dq], one row per query."""
    pooler_output: np.ndarray | None = None
    """float32[Dv], the vision encoder's output at the class token, normed once more: the reference's
    `pooler_output`."""
    image_embeds: np.ndarray | None = None
    """float32[P, Dv], the vision encoder's own output, where it was asked for."""
    attention_maps: dict[str, np.ndarray] | None = None
    """float32[H, Q, P] by layer, where they were asked for: what each query looks at in the image."""


@dataclass(frozen=True, kw_only=True, eq=False)
class TextFeatures:
    """A text alone, as the language model reads it; None where `status` is not ok."""

    status: Status = Status.OK
    error: str | None = None
    features: np.ndarray | None = None
    """float32[T, Dw], last hidden states; one row per token, special tokens included."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How probable a given text is behind an image."""

    status: Status = Status.OK
    error: str | None = None
    logprob: float | None = None
    """Sum over the text's tokens, natural log."""
    num_tokens: int = 0

    @property
    def loss(self) -> float | None:
        """Mean negative log-probability: the reference's `forward(labels=...)` for this row."""
        return None if self.logprob is None else -self.logprob / self.num_tokens


@dataclass(frozen=True, kw_only=True)
class Match:
    """How well a text fits an image, by a retrieval checkpoint."""

    status: Status = Status.OK
    error: str | None = None
    itm: float | None = None
    """Probability that the text describes the image, by the matching head."""
    itc: float | None = None
    """Cosine of the text and the image's best query, by the contrastive embeddings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """Unit vectors for contrastive search; None where `status` is not ok.

    An image and a text fit by `(image.vectors @ text.vectors.T).max()`, which is `Match.itc`.
    """

    status: Status = Status.OK
    error: str | None = None
    vectors: np.ndarray | None = None
    """float32[Q, De] of an image, one row per query; float32[1, De] of a text."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters since the engine started."""

    num_requests: int = 0
    """Requests accepted by `submit` and `generate`."""
    num_finished: int = 0
    num_encode_calls: int = 0
    """Passes through the vision encoder (each takes a batch of images)."""
    num_images_encoded: int = 0
    num_decode_steps: int = 0
    num_tokens: int = 0
    num_running: int = 0
    """Slots in use now."""
    num_waiting: int = 0
    """Requests not yet in a slot now."""
    busy_s: float = 0.0
    """Seconds the engine thread spent in `step()`."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a host must know of a model before it starts one; cheap to get, no weights are read."""

    model: str
    """As the user named it."""
    image_size_px: int
    """Side of the square the vision encoder takes."""
    dtype: str
    """Resolved: "float32", "bfloat16" or "float16"."""
    digest: str
    """Identifies the checkpoint's content: equal digests, equal captions."""
    vision_width: int = 0
    """Channels of the vision encoder's output, Dv."""
    qformer_width: int = 0
    """Channels of the Q-Former's output, Dq."""
    num_queries: int = 0
    """Rows of the Q-Former's output, Q."""
