"""What a model reads instead of writing: features of images and of texts, and scores of given texts.

Images are encoded in batches with whatever else is running; everything else is computed in the engine's
thread, between two steps. Hidden states and attention maps take a pass of their own for each image or text.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import TypeVar

from blip2_actor.engine.core import EngineCore
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.input_processor import InputProcessor
from blip2_actor.engine.refusal import RequestRefused
from blip2_actor.engine.request_state import RequestState
from blip2_actor.engine.results import to_features, to_score, to_text_features
from blip2_actor.inputs.arguments import Names, require_one_per_image, to_list, to_names, to_texts
from blip2_actor.models.recorder import NO_RECORDER, Recorder
from blip2_actor.request import Features, ImageLike, Result, Score, TextFeatures

RowT = TypeVar("RowT")
ValueT = TypeVar("ValueT")


class Readings:
    """The calls of an engine that generate nothing. Each prepares its inputs in the caller's thread."""

    def __init__(self, core: EngineCore, input_processor: InputProcessor) -> None:
        self._core = core
        self._input_processor = input_processor

    def features(
        self,
        images: Sequence[ImageLike],
        with_image_embeds: bool,
        with_attention_maps: Names,
        with_hidden_states: Names,
    ) -> list[Features]:
        """See `Engine.features`."""
        names = _Names(with_hidden_states, with_attention_maps)
        keeps_image_embeds = with_image_embeds or names.are_of("qformer")
        encoded = self._encode(to_list("images", images), keeps_image_embeds)
        served = [image for image in encoded if isinstance(image, EncodedImage)]
        recorders = iter(self._read(served, partial(self._record, names), names) if names else [])

        def copy() -> list[Features]:  # in the engine's thread, whose stream of a GPU has made the tensors
            return [
                to_features(i, with_image_embeds, next(recorders, (None, NO_RECORDER))[1]) for i in served
            ]

        copied = iter(self._core.call(copy) if served else [])
        return [
            next(copied)
            if isinstance(image, EncodedImage)
            else Features(status=image.status, error=str(image))
            for image in encoded
        ]

    def text_features(
        self,
        texts: Sequence[str | Sequence[int]],
        attention_masks: Sequence[Sequence[int] | None] | None,
        with_attention_maps: Names,
        with_hidden_states: Names,
    ) -> list[TextFeatures]:
        """See `Engine.text_features`."""
        names = _Names(with_hidden_states, with_attention_maps)
        texts = to_texts("texts", texts)
        masks = (
            [None] * len(texts) if attention_masks is None else to_texts("attention_masks", attention_masks)
        )
        if len(masks) != len(texts):
            raise ValueError(f"attention_masks must be one per text ({len(texts)}), got {len(masks)}")
        prepared = [
            self._input_processor.text_without_image(text, mask)
            for text, mask in zip(texts, masks, strict=True)
        ]
        served = [ids for ids in prepared if not isinstance(ids, RequestRefused)]
        read = iter(self._read(served, self._core.runner.text_features, names))
        return [
            TextFeatures(status=ids.status, error=str(ids))
            if isinstance(ids, RequestRefused)
            else to_text_features(*next(read))
            for ids in prepared
        ]

    def score(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        prompts: Sequence[str | None] | None,
        with_attention_maps: Names,
        with_hidden_states: Names,
    ) -> list[Score]:
        """See `Engine.score`."""
        names = _Names(with_hidden_states, with_attention_maps)
        images, texts = to_list("images", images), to_texts("texts", texts)
        prompts = [None] * len(texts) if prompts is None else to_texts("prompts", prompts)
        require_one_per_image("texts", texts, images)
        require_one_per_image("prompts", prompts, images)
        prepared = [
            image
            if isinstance(image, RequestRefused)
            else self._input_processor.text_to_score(image, prompt, text)
            for image, text, prompt in zip(self._encode(images), texts, prompts, strict=True)
        ]
        served = [row for row in prepared if not isinstance(row, RequestRefused)]
        read = iter(self._read(served, self._core.runner.text_logprobs, names))
        return [
            Score(status=row.status, error=str(row))
            if isinstance(row, RequestRefused)
            else to_score(*next(read))
            for row in prepared
        ]

    def _record(self, names: _Names, images: list[EncodedImage], recorder: Recorder) -> list[None]:
        """Run one image through the encoders once more, or through the Q-Former if all names are of it."""
        self._core.runner.record(images, recorder, from_image_embeds=names.are_of("qformer"))
        return [None] * len(images)

    def _encode(
        self, images: Sequence[ImageLike], keeps_image_embeds: bool = False
    ) -> list[EncodedImage | RequestRefused]:
        """Run images through the encoders, in batches with whatever else is running.

        An image that does not fit into memory even alone is refused.
        """
        self._core.require_caller_may_wait()
        encoded: list[EncodedImage | RequestRefused] = []
        for image in images:
            try:
                shared = self._input_processor.image(image)
                shared.keeps_image_embeds |= keeps_image_embeds
                encoded.append(shared)
            except RequestRefused as refusal:
                encoded.append(refusal)
        served = (image for image in encoded if isinstance(image, EncodedImage))
        states = [RequestState(image, low_priority=image.low_priority) for image in served]
        for state in states:
            state.image.note_wait(state.future)
        try:
            self._core.enqueue(states)
            results = iter([state.future.result() for state in states])
        except BaseException:  # the caller waits for none of the others
            for state in states:
                state.future.cancel()
            raise
        return [
            image if isinstance(image, RequestRefused) else _outcome(image, next(results))
            for image in encoded
        ]

    def _read(
        self, rows: list[RowT], read: Callable[[list[RowT], Recorder], list[ValueT]], names: _Names
    ) -> list[tuple[ValueT, Recorder]]:
        """Let the model read rows: all at once, or one by one if names are to be recorded."""
        if not names:
            return [(value, NO_RECORDER) for value in self._core.call(partial(read, rows, NO_RECORDER))]
        found: list[tuple[ValueT, Recorder]] = []
        for row in rows:
            recorder = Recorder(names.hidden_states, names.attention_maps)
            (value,) = self._core.call(partial(read, [row], recorder))
            recorder.require_all_found()
            found.append((value, recorder))
        return found


def _outcome(image: EncodedImage, result: Result) -> EncodedImage | RequestRefused:
    return image if result.ok else RequestRefused(result.status, str(result.error))


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
