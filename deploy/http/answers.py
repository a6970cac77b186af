"""The answers of the project's own routes: models for OpenAPI, filled from what the engine has made.

A caption has the columns of the batch job's output under the same names.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict

from blip2_actor import (
    Embedding,
    Features,
    FinishReason,
    Match,
    ModelInfo,
    Result,
    Score,
    abstention_flags,
    find_quality_flags,
)
from deploy.http.served_model import ServedModel
from deploy.http.wishes import Wishes
from deploy.reuse.made import Made
from deploy.work import ImageWork, TextToGenerate

Vector = list[float]


class Answer(BaseModel):
    model_config = ConfigDict(use_attribute_docstrings=True)


class TextAnswer(Answer):
    """An answer to one of the prompts of `ask`."""

    text: str
    logprob: float
    num_tokens: int
    finish_reason: FinishReason
    flags: list[str]
    token_ids: list[int]


class Choice(Answer):
    """One of the texts of `choices`."""

    text: str
    logprob: float
    """Sum of the log-probabilities of its tokens, natural log."""
    probability: float
    """Its share among the choices."""


class ScoreAnswer(Answer):
    """How probable a text is after the image and the prompt, its end included."""

    text: str
    logprob: float
    """Sum of the log-probabilities of its tokens, natural log."""
    num_tokens: int
    loss: float
    """Mean negative log-probability of a token."""


class MatchAnswer(Answer):
    """How well a text fits the image, by the retrieval model."""

    text: str
    itm: float
    """Probability that the text describes the image."""
    itc: float
    """Cosine of the contrastive embeddings of both."""


class CaptionAnswer(Answer):
    """The columns of the batch job's output, and what else was asked."""

    caption: str
    """The text that the model gives for the image."""
    captions: list[str] | None
    """All texts, if num_return_sequences is above 1."""
    logprobs: list[float] | None
    """Log-probability of each of `captions`."""
    logprob: float
    """Sum of the log-probabilities of the tokens, natural log."""
    num_tokens: int
    """Number of tokens of the caption; the end token is counted if there is one."""
    finish_reason: FinishReason
    """stop: it ended with the end token or a stop text; length: it reached max_new_tokens."""
    confidence: float | None
    """Probability that the caption is right; null without a calibration of its prompt and options."""
    flags: list[str]
    """What looks degenerate: empty, looping, echoes_prompt; truncated if the image lacks its end; abstained
    if the confidence is below the service's limit."""
    status: str
    """ok, as of a row of the batch job: an image that fails has an error in place of this answer."""
    error: str | None
    """null; a column of the batch job."""
    width: int | None
    """Width of the original image, in pixels."""
    height: int | None
    """Height of the original image, in pixels."""
    sha256: str
    """SHA-256 of the encoded image, in hexadecimal."""
    token_ids: list[int] | None
    """Of the caption; the end token is included if there is one. Null if the caption is from a finished run
    (`cache_from`), which has none."""
    model: str
    """Name of the model that made the answer."""
    fingerprint: str
    """Identifies what decides the caption besides the image: checkpoint, dtype, quantization, prompt and
    options."""
    captions_flags: list[list[str]] | None = None
    """Flags of each of `captions`."""
    answers: dict[str, TextAnswer] | None = None
    """Answers to the prompts of `ask`, by name."""
    choices: list[Choice] | None = None
    """The choices, in the order of the request."""
    scores: list[ScoreAnswer] | None = None
    """Scores of the texts of `score`, in their order."""
    matches: list[MatchAnswer] | None = None
    """Matches of the texts of `match`, in their order."""
    embeddings: dict[str, Vector | list[Vector]] | None = None
    """Vectors, by the names in `embed`."""
    attention: list[Vector] | None = None
    """Where the Q-Former looked: one weight for each patch of the image, in rows from its top; they add up
    to 1. The grid covers the whole image, whatever its shape."""


def caption_answer(model: ServedModel, wishes: Wishes, work: ImageWork, made: Made) -> dict[str, Any]:
    """Return a `CaptionAnswer` as JSON; parts that were not asked for are left out.

    Args:
        wishes: what was asked.
        work: what it became.
        made: what was made of it.
    """
    outputs = made.outputs
    model = model.made_by(outputs.model)
    caption, *answers = map(_text_answer, outputs.texts, work.texts)
    if made.image.is_truncated:
        caption["flags"].append("truncated")
    if made.num_tokens is not None:
        caption |= {"num_tokens": made.num_tokens, "token_ids": None}
    confidence = confidence_of(model, work.texts[0], caption["logprob"], caption["num_tokens"])
    caption["flags"] += abstention_flags(confidence, model.min_confidence)
    completions = outputs.texts[0].completions
    several = len(completions) > 1
    answer = {
        "caption": caption.pop("text"),
        "captions": [completion.text for completion in completions] if several else None,
        "logprobs": [completion.logprob for completion in completions] if several else None,
        "confidence": confidence,
        **caption,
        "status": "ok",
        "error": None,
        "width": made.image.width,
        "height": made.image.height,
        "sha256": made.sha256,
        "model": model.name,
        "fingerprint": fingerprint(model.info, work.texts[0]),
    }
    choices, scored = wishes.choices or [], wishes.score or []
    parts = {
        "captions_flags": [find_quality_flags(c.text, wishes.prompt) for c in completions] if several else [],
        "answers": dict(zip(wishes.ask or {}, answers, strict=True)),
        "choices": _choices(choices, outputs.scores[: len(choices)]),
        "scores": score_answers(scored, outputs.scores[len(choices) :]),
        "matches": match_answers(wishes.match or [], outputs.matches),
        "embeddings": vectors_of(wishes.embed or [], outputs.features, outputs.contrastive),
        "attention": None if outputs.attention is None else outputs.attention.tolist(),
    }
    return answer | {name: part for name, part in parts.items() if part}


def confidence_of(model: ServedModel, asked: TextToGenerate, logprob: float, num_tokens: int) -> float | None:
    """Return the probability that the best text is right; None without a calibration of what was asked."""
    calibration = model.calibration
    if calibration is None or not calibration.fits(model.info.digest, asked.prompt, asked.options):
        return None
    return calibration.probability(logprob, num_tokens)


def _text_answer(result: Result, asked: TextToGenerate) -> dict[str, Any]:
    text = result.text or ""
    return {
        "text": text,
        "logprob": result.logprob,
        "num_tokens": len(result.token_ids),
        "finish_reason": result.finish_reason,
        "flags": find_quality_flags(text, asked.prompt),
        "token_ids": list(result.token_ids),
    }


def score_answers(texts: Sequence[str], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Return a `ScoreAnswer` for each text."""
    return [
        {"text": text, "logprob": score.logprob, "num_tokens": score.num_tokens, "loss": score.loss}
        for text, score in zip(texts, scores, strict=True)
    ]


def match_answers(texts: Sequence[str], matches: Sequence[Match]) -> list[dict[str, Any]]:
    """Return a `MatchAnswer` for each text."""
    return [
        {"text": text, "itm": match.itm, "itc": match.itc} for text, match in zip(texts, matches, strict=True)
    ]


def _choices(texts: Sequence[str], scores: Sequence[Score]) -> list[dict[str, Any]]:
    logprobs = [score.logprob if score.logprob is not None else -math.inf for score in scores]
    weights = [math.exp(logprob - max(logprobs)) for logprob in logprobs]
    return [
        {"text": text, "logprob": logprob, "probability": weight / sum(weights)}
        for text, logprob, weight in zip(texts, logprobs, weights, strict=True)
    ]


def vectors_of(
    kinds: Sequence[str], features: Features | None, contrastive: Embedding | None
) -> dict[str, Any]:
    """Return the vectors of an image by kind, as lists."""
    return {kind: vector_of(kind, features, contrastive).tolist() for kind in kinds}


def vector_of(kind: str, features: Features | None, contrastive: Embedding | None) -> np.ndarray:
    """Return float32[Dv], float32[Dq], float32[Q, Dq] or float32[Q, De], depending on the kind."""
    if kind == "contrastive":
        assert contrastive is not None and contrastive.vectors is not None
        return contrastive.vectors
    assert features is not None and features.pooler_output is not None
    assert features.qformer_features is not None
    if kind == "vision":
        return features.pooler_output
    return features.qformer_features if kind == "queries" else features.qformer_features.mean(axis=0)


def fingerprint(model: ModelInfo, text: TextToGenerate) -> str:
    """Return SHA-256, in hexadecimal, of everything that decides a text besides the image."""
    parts = {
        "model": model.digest,
        "dtype": model.dtype,
        "prompt": text.prompt,
        "options": asdict(text.options),
    }
    if model.quantize is not None:  # newer than the fingerprints that callers have stored
        parts["quantize"] = model.quantize
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
