"""What goes into the engine and what comes out: plain values, importable without torch.

In the examples, `engine` is a running `Engine`, `matching_engine` a running `MatchingEngine`, and `picture`
an RGB image, uint8[H, W, 3].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Union

from blip2_actor.options import GenerationOptions
from blip2_actor.status import Status

if TYPE_CHECKING:
    import numpy as np
    from PIL.Image import Image
    from torch import Tensor

    from blip2_actor.engine.encoded_image import EncodedImage

ImageLike = Union[bytes, str, Path, "Image", "np.ndarray", "Tensor", "EncodedImage"]
"""Encoded bytes; the path of a file; an http or https URL, if the engine was built with `allow_urls`; a PIL
image; an array of a layout that `array_to_rgb` reads; a tensor of uint8[3, H, W] or uint8[H, W, 3]; or an
image that `Engine.image` returned."""

LogitsProcessor = Callable[["Tensor", "Tensor"], "Tensor"]
"""A function of int64[N, T], the token ids so far, and float32[N, V], their scores, that returns new scores.
N is 1, or num_beams in beam search; image tokens and prompt come first. The processors of
`transformers.LogitsProcessorList` have this form."""

StepWatcher = Callable[[float, int, int], None]
"""Gets the seconds, encoded images and tokens of a step; must return at once. One that raises is dropped."""

FinishReason = Literal["stop", "length"]
"""`stop`: the text ended with the end token or a stop text; `length`: it reached max_new_tokens."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """One image, and what to do with it.

    Examples:
        >>> engine.generate([Request(image=picture, options=GenerationOptions(max_new_tokens=3))])[0].text
        'a red circle'
    """

    image: ImageLike | None = field(repr=False)
    """As in `ImageLike`. The engine keeps a copy, so an array may be overwritten after `submit`. None gives
    the status `missing_image`."""
    prompt: str | None = None
    """Text that the answer continues; None, or an empty text, captions the image."""
    options: GenerationOptions | None = None
    """Options of this request, in place of those of the call."""
    logits_processor: LogitsProcessor | None = None
    """Changes the scores of each step, after the options' own logits processors and before temperature and
    top_k. It runs in the engine's thread. If it raises or leaves no token, the status is `failed`."""
    low_priority: bool = False
    """Take only what no other request wants. A slot that another wants is given up; the text begins again."""

    def __post_init__(self) -> None:
        if not isinstance(self.options, GenerationOptions | None):
            raise TypeError(f"options must be GenerationOptions or None, got {type(self.options).__name__}")


@dataclass(frozen=True, kw_only=True)
class Completion:
    """One generated text."""

    text: str
    token_ids: tuple[int, ...]
    """The new tokens only; the end token is included if there is one."""
    logprob: float
    """Sum of the tokens' log-probabilities (natural log), before any logits processor."""
    finish_reason: FinishReason
    token_logprobs: tuple[float, ...] = ()
    """Log-probability of each of `token_ids`; `logprob` is their sum."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """The outcome of one request; `text`, `token_ids` and so on are those of the best completion.

    The token ids are those of the reference model, and do not depend on other requests in the batch.

    Examples:
        >>> result = engine.generate([Request(image=picture)])[0]
        >>> result.status, result.text, result.finish_reason
        (<Status.OK: 'ok'>, 'a red circle on a white background', 'stop')
        >>> bad = engine.generate([Request(image=b"not an image")])[0]
        >>> bad.ok, str(bad.status), bad.text
        (False, 'undecodable', None)
    """

    status: Status = Status.OK
    error: str | None = None
    completions: tuple[Completion, ...] = field(default=())
    num_prompt_tokens: int = 0
    """Tokens of the prompt, without the queries of the image; a caption without a prompt has one."""

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
    def token_logprobs(self) -> tuple[float, ...]:
        return self.completions[0].token_logprobs if self.completions else ()

    @property
    def finish_reason(self) -> FinishReason | None:
        return self.completions[0].finish_reason if self.completions else None


@dataclass(frozen=True, kw_only=True, eq=False)
class Features:
    """What the encoders compute of one image; the arrays are None if `status` is not ok.

    Examples:
        >>> features = engine.features([picture], with_attention_maps=["*.cross_attention"])[0]
        >>> features.qformer_features.shape, features.pooler_output.shape
        ((8, 128), (128,))
        >>> list(features.attention_maps)
        ['qformer.layers.0.cross_attention', 'qformer.layers.1.cross_attention']
    """

    status: Status = Status.OK
    error: str | None = None
    qformer_features: np.ndarray | None = None
    """float32[Q, Dq], one row per query."""
    pooler_output: np.ndarray | None = None
    """float32[Dv], the output of the vision encoder at the class token after another layer norm; the
    reference calls it `pooler_output` too."""
    image_embeds: np.ndarray | None = None
    """float32[P, Dv], the output of the vision encoder, on demand."""
    attention_maps: dict[str, np.ndarray] | None = None
    """On demand, by name: what each position attends to in each layer, `vision.layers.0.self_attention` as
    float32[H, P, P], `qformer.layers.0.self_attention` as float32[H, Q, Q] and
    `qformer.layers.0.cross_attention` as float32[H, Q, P]."""
    hidden_states: dict[str, np.ndarray] | None = None
    """On demand, by name: what enters the first layer of each encoder (`vision.embeddings`,
    `qformer.embeddings`) and what each layer computes (`vision.layers.0`, …), as float32[P, Dv] for the
    vision encoder and float32[Q, Dq] for the Q-Former."""

    @property
    def attention_grid(self) -> np.ndarray | None:
        """Where the queries looked: float32[R, R], a weight for each patch from the top left, 1 in total.

        It is the mean of the Q-Former's cross-attentions, without the class token; None without their maps.
        """
        maps = [one for name, one in (self.attention_maps or {}).items() if name.endswith(".cross_attention")]
        if not maps:
            return None
        patches = sum(one.mean(axis=(0, 1))[1:] for one in maps)
        return (patches / patches.sum()).reshape(math.isqrt(len(patches)), -1)


@dataclass(frozen=True, kw_only=True, eq=False)
class TextFeatures:
    """A text without an image, as the language model reads it; `features` is None if `status` is not ok."""

    status: Status = Status.OK
    error: str | None = None
    features: np.ndarray | None = None
    """float32[T, Dw], last hidden states, one row per token; special tokens are included."""
    attention_maps: dict[str, np.ndarray] | None = None
    """On demand, by name: `language_model.layers.0.self_attention` (of T5:
    `language_model.encoder.layers.0.self_attention`) and so on, as float32[H, T, T]."""
    hidden_states: dict[str, np.ndarray] | None = None
    """On demand, by name, as float32[T, D]: `language_model.embeddings`, `language_model.layers.0` and so on,
    and `language_model.last_hidden_state` after the final norm; of T5 those of `language_model.encoder`."""


@dataclass(frozen=True, kw_only=True)
class Score:
    """How probable a given text is after an image.

    Examples:
        >>> score = engine.score([picture], ["a red circle on a white background"])[0]
        >>> score.loss == -score.logprob / score.num_tokens
        True
    """

    status: Status = Status.OK
    error: str | None = None
    logprob: float | None = None
    """Sum of the log-probabilities of the text's tokens, natural log."""
    num_tokens: int = 0
    attention_maps: dict[str, np.ndarray] | None = field(default=None, compare=False, repr=False)
    """On demand, by the names in `TextFeatures`. Positions are those that the language model reads: the
    queries, the prompt, and the text without its last token. T5's encoder reads queries and prompt, and its
    decoder the start token and the text; `language_model.decoder.layers.0.cross_attention` joins the two."""
    hidden_states: dict[str, np.ndarray] | None = field(default=None, compare=False, repr=False)
    """On demand, by the names in `TextFeatures`, for the same positions."""

    @property
    def loss(self) -> float | None:
        """Mean negative log-probability: what the reference's `forward(labels=...)` returns for this row."""
        return None if self.logprob is None else -self.logprob / self.num_tokens


@dataclass(frozen=True, kw_only=True)
class Match:
    """How well a text fits an image, by a retrieval checkpoint.

    Examples:
        >>> match = matching_engine.score([picture], ["a dog"])[0]
        >>> 0 <= match.itm <= 1 and -1 <= match.itc <= 1
        True
    """

    status: Status = Status.OK
    error: str | None = None
    itm: float | None = None
    """Probability that the text describes the image, by the matching head."""
    itc: float | None = None
    """Cosine similarity of the text and the image's best query, by the contrastive embeddings."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Embedding:
    """Unit vectors for contrastive search; `vectors` is None if `status` is not ok.

    `(image.vectors @ text.vectors.T).max()` says how well an image and a text fit; it equals `Match.itc`.
    """

    status: Status = Status.OK
    error: str | None = None
    vectors: np.ndarray | None = None
    """float32[Q, De] of an image, one row per query; float32[1, De] of a text."""


@dataclass(frozen=True, kw_only=True)
class EngineStats:
    """Counters since the engine started."""

    num_requests: int = 0
    """Requests that were submitted; those that are refused or cancelled never count as finished."""
    num_finished: int = 0
    num_encode_calls: int = 0
    """Passes through the vision encoder; each takes a batch of images."""
    num_images_encoded: int = 0
    num_decode_steps: int = 0
    num_tokens: int = 0
    num_preempted: int = 0
    """Requests of low priority that gave their slots up, and began again."""
    num_running: int = 0
    """Slots that are in use now."""
    num_waiting: int = 0
    """Requests that have no slot yet, and images that are not encoded yet."""
    busy_s: float = 0.0
    """Seconds that the engine's thread spent in `step()`."""


@dataclass(frozen=True, kw_only=True)
class ModelInfo:
    """What a host must know about a model before it starts it; no weights are read."""

    DEMO_CAVEAT: ClassVar = (
        "the demonstration checkpoint knows drawn scenes only; about other images it says nonsense"
    )
    model: str
    """The model as the user named it."""
    image_size_px: int
    """Side of the square that the vision encoder takes."""
    dtype: str
    """Resolved: "float32", "bfloat16" or "float16"."""
    digest: str
    """Identifies the content of the checkpoint: equal digests give equal captions."""
    quantize: str | None = None
    """As in `EngineConfig`; quantized weights give other captions."""
    vision_width: int = 0
    """Channels of the output of the vision encoder, Dv."""
    qformer_width: int = 0
    """Channels of the output of the Q-Former, Dq."""
    num_queries: int = 0
    """Rows of the output of the Q-Former, Q."""
    vocab_size: int = 0
    """Token ids of the language model are below this number; 0 if it has none."""
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    """Options of `generation_config.json` other than the defaults, for requests that do not give them."""

    @property
    def caveat(self) -> str | None:
        """What a user must know before reading this model's texts; None for published models."""
        return self.DEMO_CAVEAT if self.model == "demo" else None
