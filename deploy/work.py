"""What a gateway asks of a captioner, and what comes back: plain values that are sent between processes.

Everything in one `ImageWork` shares one pass of the vision encoder. While an endpoint is updated, the values
are sent between two versions of this module, by the names of their classes and fields.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from blip2_actor import (
    Completion,
    Embedding,
    EngineLike,
    Features,
    GenerationOptions,
    ImageLike,
    Match,
    ModelInfo,
    Request,
    Result,
    Score,
    Status,
)

READ_AT_ONCE = 8
"""Scores or features of batch work that are computed between two steps, while all other texts wait."""


class OtherModel(RuntimeError):
    """The captioner has another model than the gateway asks for: one of them is being updated."""


@dataclass(frozen=True, kw_only=True)
class TextToGenerate:
    """A caption, or an answer to a prompt."""

    prompt: str | None
    options: GenerationOptions


@dataclass(frozen=True)
class TextOfBatch:
    """A text of a batch job, for one of the images that came with it."""

    image: int
    text: TextToGenerate

    def request(self, images: Sequence[ImageLike]) -> Request:
        """Return the request to the engine, behind all others."""
        text = self.text
        return Request(image=images[self.image], prompt=text.prompt, options=text.options, low_priority=True)


@dataclass(frozen=True, kw_only=True)
class TextToScore:
    """A text whose probability after the image and a prompt is requested."""

    text: str
    prompt: str | None = None


@dataclass(frozen=True)
class ScoreOfBatch:
    """A text of a batch job to score, for one of the images that came with it."""

    image: int
    text: TextToScore


BatchOutcome = Result | Score | Features
"""The outcome of one position of `BatchWork`."""


@dataclass(frozen=True, kw_only=True)
class BatchWork:
    """What a batch job asks of its images. Positions count texts, then scores, then features."""

    texts: tuple[TextOfBatch, ...] = ()
    scores: tuple[ScoreOfBatch, ...] = ()
    features: tuple[int, ...] = ()
    """Images whose outputs of the vision encoder and the Q-Former are wanted."""

    def __len__(self) -> int:
        return len(self.texts) + len(self.scores) + len(self.features)

    def readings(
        self, engine: EngineLike, images: Sequence[ImageLike]
    ) -> Iterator[tuple[range, Callable[[], list[Any]]]]:
        """Yield positions of a few scores or features, and the call of the engine that returns them."""
        first = len(self.texts)
        for start in range(0, len(self.scores), READ_AT_ONCE):
            scores = self.scores[start : start + READ_AT_ONCE]
            of_scores = [images[one.image] for one in scores]
            texts, prompts = [one.text.text for one in scores], [one.text.prompt for one in scores]
            positions = range(first + start, first + start + len(scores))
            yield positions, partial(engine.score, of_scores, texts, prompts)
        first += len(self.scores)
        for start in range(0, len(self.features), READ_AT_ONCE):
            of_features = [images[index] for index in self.features[start : start + READ_AT_ONCE]]
            positions = range(first + start, first + start + len(of_features))
            yield positions, partial(engine.features, of_features)


@dataclass(frozen=True, kw_only=True)
class ImageWork:
    """Everything that one request asks of one image."""

    texts: tuple[TextToGenerate, ...] = ()
    scores: tuple[TextToScore, ...] = ()
    matches: tuple[str, ...] = ()
    """Texts for the retrieval model to compare with the image."""
    features: bool = False
    """Whether the outputs of the vision encoder and the Q-Former are wanted."""
    contrastive: bool = False
    """Whether the retrieval model's vectors of the image are wanted."""
    attention: bool = False
    """Whether the places where the Q-Former looked are wanted."""
    token_texts: bool = False
    """Whether the text of each token is wanted."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ImageOutputs:
    """One entry for each entry of the work, in order. A part that cannot be made has a status."""

    texts: tuple[Result, ...] = ()
    scores: tuple[Score, ...] = ()
    matches: tuple[Match, ...] = ()
    features: Features | None = None
    contrastive: Embedding | None = None
    attention: np.ndarray | None = None
    """float32[R, R], as `Features.attention_grid`; only if it is wanted."""
    model: ModelInfo | None = None
    """The model that made them. During an update, it may not be the one that the gateway knows."""
    token_texts: tuple[tuple[str, ...], ...] = ()
    """What each token adds to its text, one entry for each of `completions`; only if it is wanted."""

    @property
    def completions(self) -> list[Completion]:
        """The completions of all `texts`, one text after the other."""
        return [completion for result in self.texts for completion in result.completions]

    @property
    def failure(self) -> tuple[Status, str | None] | None:
        """Status and error of the first part that could not be made; it would be the status of a row."""
        parts = (*self.texts, *self.scores, *self.matches, self.features, self.contrastive)
        failed = (part for part in parts if part is not None and part.status is not Status.OK)
        return next(((part.status, part.error) for part in failed), None)


@dataclass(frozen=True, kw_only=True)
class TextPiece:
    """A text of a stream has grown."""

    index: int
    """Which of `ImageWork.texts`."""
    text: str
    """The added text; the pieces of a text join to the text of its result."""
