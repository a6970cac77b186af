"""The calls that generate no text: features of images and of texts, and scores of given texts.

Images are encoded in batches with whatever else is running; everything else is computed in the engine's
thread, between two steps. Hidden states and attention maps need a separate pass for each image or text.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import TypeVar

import numpy as np
from torch import Tensor

from blip2_actor.engine.core import EngineCore
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.input_processor import InputProcessor
from blip2_actor.engine.model_runner import TextToScore
from blip2_actor.engine.refusal import RequestRefused, RowT, or_refusal, with_refusals
from blip2_actor.engine.request_state import NOT_FINITE, RequestState
from blip2_actor.inputs.arguments import Names, require_one_per_image, to_images, to_names, to_texts
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.request import Features, ImageLike, Score, TextFeatures
from blip2_actor.status import Status
from blip2_actor.transfer import to_numpy

ReadT = TypeVar("ReadT", Features, TextFeatures, Score)


class Reader:
    """The calls of an engine that generate nothing. Each prepares its inputs in the caller's thread."""

    def __init__(self, core: EngineCore, input_processor: InputProcessor) -> None:
        self._core = core
        self._input_processor = input_processor

    def features(
        self,
        images: Sequence[ImageLike],
        with_image_embeds: bool = False,
        with_attention_maps: Names = False,
        with_hidden_states: Names = False,
    ) -> list[Features]:
        """Return what the encoders compute of images, in order; a bad image is an entry with a status.

        Args:
            images: as in `Request.image`.
            with_image_embeds: also return the output of the vision encoder.
            with_attention_maps: also return attention maps of both encoders: True for all, or names and
                patterns of names, such as `["qformer.*.cross_attention"]`. Those of a ViT-g take 165 MB an
                image.
            with_hidden_states: also return what each layer of both encoders computes, all or by name.

        Raises:
            ValueError: the model has no attention map or hidden state of such a name; the message lists them.
        """
        names = _Names(with_hidden_states, with_attention_maps)
        of_qformer = names.are_of("qformer")  # the vision encoder does not run again

        def read(images: list[EncodedImage], recorder: Recorder) -> list[Features]:
            if names:  # so this is one image
                self._core.runner.record(images[0], recorder, from_image_embeds=of_qformer)
            return [_features(image, with_image_embeds) for image in images]

        encoded = self._encode(to_images(images), with_image_embeds or of_qformer)
        return with_refusals(encoded, partial(self._read, read, names), Features)

    def text_features(
        self,
        texts: Sequence[str | Sequence[int]],
        attention_masks: Sequence[Sequence[int] | None] | None = None,
        with_attention_maps: Names = False,
        with_hidden_states: Names = False,
    ) -> list[TextFeatures]:
        """Return texts without an image as the language model (for T5: its encoder) reads them.

        A text that is empty or too long is an entry with a status.

        Args:
            texts: texts, or their token ids.
            attention_masks: one per text, 0 for tokens before and after it that are not read (padding).
            with_attention_maps: as in `features`, of the language model.
            with_hidden_states: as in `features`, of the language model.

        Raises:
            ValueError: as in `features`.
        """
        names = _Names(with_hidden_states, with_attention_maps)
        texts = to_texts("texts", texts)
        masks = (
            [None] * len(texts) if attention_masks is None else to_texts("attention_masks", attention_masks)
        )
        if len(masks) != len(texts):
            raise ValueError(f"attention_masks must be one per text ({len(texts)}), got {len(masks)}")

        def read(token_ids: list[list[int]], recorder: Recorder) -> list[TextFeatures]:
            return [_text_features(one) for one in self._core.runner.text_features(token_ids, recorder)]

        prepare = self._input_processor.text_without_image
        rows = [or_refusal(prepare, text, mask) for text, mask in zip(texts, masks, strict=True)]
        return with_refusals(rows, partial(self._read, read, names), TextFeatures)

    def score(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        prompts: Sequence[str | None] | None = None,
        with_attention_maps: Names = False,
        with_hidden_states: Names = False,
    ) -> list[Score]:
        """Return how probable each text is after its image (and prompt), the end token included.

        A bad image or text is an entry with a status. An image of `Engine.image` that is scored with several
        texts is encoded once.

        Args:
            with_attention_maps: as in `features`, of the language model as it reads image, prompt and text.
            with_hidden_states: as in `features`, of the language model.

        Raises:
            ValueError: as in `features`, or there is not one text (and prompt) per image.
        """
        names = _Names(with_hidden_states, with_attention_maps)
        images, texts = to_images(images), to_texts("texts", texts)
        prompts = [None] * len(texts) if prompts is None else to_texts("prompts", prompts)
        require_one_per_image("texts", texts, images)
        require_one_per_image("prompts", prompts, images)

        def read(rows: list[TextToScore], recorder: Recorder) -> list[Score]:
            return [_score(logprobs) for logprobs in self._core.runner.text_logprobs(rows, recorder)]

        prepare = self._input_processor.text_to_score
        rows = [
            image if isinstance(image, RequestRefused) else or_refusal(prepare, image, prompt, text)
            for image, text, prompt in zip(self._encode(images), texts, prompts, strict=True)
        ]
        return with_refusals(rows, partial(self._read, read, names), Score)

    def _encode(
        self, images: Sequence[ImageLike], keeps_image_embeds: bool = False
    ) -> list[EncodedImage | RequestRefused]:
        """Run images through the encoders, in batches with whatever else is running.

        An image that does not fit into memory even alone is refused.
        """
        self._core.require_caller_may_wait()
        shared = [or_refusal(self._input_processor.image, image) for image in images]

        def encode(images: list[EncodedImage]) -> list[EncodedImage | RequestRefused]:
            for image in images:
                image.keeps_image_embeds |= keeps_image_embeds
            states = [RequestState(image, low_priority=image.low_priority) for image in images]
            for state in states:
                state.image.note_wait(state.future)
            try:
                self._core.enqueue(states)
                results = [state.future.result() for state in states]
            except BaseException:  # the caller waits for none of the others
                for state in states:
                    state.future.cancel()
                raise
            return [
                image if result.ok else RequestRefused(result.status, str(result.error))
                for image, result in zip(images, results, strict=True)
            ]

        return with_refusals(shared, encode, RequestRefused)

    def _read(
        self, read: Callable[[list[RowT], Recorder], list[ReadT]], names: _Names, rows: list[RowT]
    ) -> list[ReadT]:
        """Let the engine's thread read rows: all at once, or one by one if names are to be recorded.

        Its stream of a GPU has made the tensors of encoded images, so it also copies them to the host.
        """
        if not names:
            return self._core.call(partial(read, rows, NO_RECORDER))
        found: list[ReadT] = []
        for row in rows:
            recorder = Recorder(names.hidden_states, names.attention_maps)
            (result,) = self._core.call(partial(read, [row], recorder))
            recorder.require_all_found()
            found.append(_with_recorded(result, recorder))
        return found


class _Names:
    """The hidden states and attention maps that a call asks for; false if it asks for none."""

    def __init__(self, with_hidden_states: Names, with_attention_maps: Names) -> None:
        self.hidden_states = to_names("with_hidden_states", with_hidden_states)
        self.attention_maps = to_names("with_attention_maps", with_attention_maps)

    def are_of(self, part: str) -> bool:
        """Return whether there are names, and all begin with a part of the model, such as `qformer`."""
        names = (*self.hidden_states, *self.attention_maps)
        return bool(names) and all(name.startswith(f"{part}.") for name in names)

    def __bool__(self) -> bool:
        return bool(self.hidden_states or self.attention_maps)


def _features(image: EncodedImage, with_image_embeds: bool) -> Features:
    assert image.qformer_features is not None and image.pooler_output is not None, "the image is encoded"
    qformer_features, pooler_output = to_numpy(image.qformer_features), to_numpy(image.pooler_output)
    if not (np.isfinite(qformer_features).all() and np.isfinite(pooler_output).all()):
        return Features(status=Status.FAILED, error=NOT_FINITE)
    image_embeds = image.image_embeds if with_image_embeds else None
    return Features(
        qformer_features=qformer_features,
        pooler_output=pooler_output,
        image_embeds=None if image_embeds is None else to_numpy(image_embeds),
    )


def _text_features(features: Tensor) -> TextFeatures:
    array = to_numpy(features)
    if not np.isfinite(array).all():
        return TextFeatures(status=Status.FAILED, error=NOT_FINITE)
    return TextFeatures(features=array)


def _score(logprobs: list[float]) -> Score:
    total = sum(logprobs)
    if not math.isfinite(total):
        return Score(status=Status.FAILED, error=NOT_FINITE)
    return Score(logprob=total, num_tokens=len(logprobs))


def _with_recorded(result: ReadT, recorder: Recorder) -> ReadT:
    """Add what was requested to a result that is ok; the rest stays None."""
    if result.status is not Status.OK:
        return result
    return replace(
        result,
        hidden_states=recorder.hidden_states or None,
        attention_maps=recorder.attention_maps or None,
    )
