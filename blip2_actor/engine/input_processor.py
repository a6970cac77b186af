"""From what a caller hands over to what the scheduler works on; the place where requests are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from blip2_actor.checkpoints.tokenizer import PromptTokenizer, require_non_empty, require_room
from blip2_actor.engine.memory import longest_slot, longest_text
from blip2_actor.engine.request_state import EncodedImage, RequestState, Searches
from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.search import TextSearch
from blip2_actor.models.blip2 import Blip2
from blip2_actor.options import GenerationOptions
from blip2_actor.preprocessing.images import decode_image, resize_image
from blip2_actor.request import ImageLike, Request
from blip2_actor.status import Status


class RequestRefused(ValueError):
    """A request that cannot be served; its status and why."""

    def __init__(self, status: Status, message: str) -> None:
        super().__init__(message)
        self.status = status


def to_pixels(image: ImageLike, size_px: int) -> np.ndarray:
    """uint8[S, S, 3] of an image; raises Refusal where it cannot be read, or is another engine's own."""
    if isinstance(image, EncodedImage):
        raise RequestRefused(
            Status.REFUSED,
            "image must be bytes, an array or a PIL image, got what another engine made of one; give the "
            "image itself",
        )
    if isinstance(image, bytes):
        decoded = decode_image(image, size_px)
        if decoded.status is not Status.OK:
            raise RequestRefused(decoded.status, decoded.error or decoded.status)
        return decoded.array(size_px)
    try:
        return resize_image(image, size_px)
    except ValueError as error:
        raise RequestRefused(Status.UNDECODABLE, str(error)) from error


class InputProcessor:
    """Runs in the caller's thread: images to pixels, prompts to ids, options to searches."""

    def __init__(self, model: Blip2, prompts: PromptTokenizer, image_size_px: int, max_slots: int) -> None:
        self.model = model
        self.max_positions = longest_text(model)
        """Of a text that is only read."""
        self.max_slot_positions = longest_slot(model, max_slots)
        """Of one that is written: all slots become as long as it is."""
        self.prompts = prompts
        self.image_size_px = image_size_px
        self.max_slots = max_slots
        self._maker = object()
        """Not this itself: an image that is held must not hold the model."""

    def image(self, image: ImageLike) -> EncodedImage:
        """Raises Refusal where the image cannot be read, or is another engine's."""
        if isinstance(image, EncodedImage) and image.maker is self._maker:
            return image
        return EncodedImage(to_pixels(image, self.image_size_px), self._maker)

    def job(
        self, request: Request, options: GenerationOptions, on_text: Callable[[str], None] | None = None
    ) -> RequestState:
        """Raises Refusal where the image or the prompt cannot be served."""
        options = request.options or options
        image = self.image(request.image)
        try:
            prompt_ids = self.prompts.encode(request.prompt)
        except ValueError as error:
            raise RequestRefused(Status.REFUSED, str(error)) from error
        self._check_room(prompt_ids, options)
        context = self.model.prefix_ids(prompt_ids)

        def make_searches() -> Searches:
            if options.num_beams > 1:
                return [BeamSearch(options, context, self.prompts)]
            on_token = None if on_text is None else self._text_sender(on_text, options.stop)
            count = options.num_return_sequences
            seeds = range(options.seed, options.seed + count) if options.do_sample else [None]
            return [TextSearch(options, context, self.prompts, seed, on_token) for seed in seeds]

        return RequestState(image, prompt_ids, options, make_searches)

    def text(
        self, image: EncodedImage, prompt: str | None, text: str
    ) -> tuple[EncodedImage, list[int], list[int]] | RequestRefused:
        """Image, prompt ids and text ids of one text to score; or why it cannot be scored."""
        try:
            prompt_ids, text_ids = self.prompts.encode(prompt), self.prompts.encode_text(text)
            num_tokens = len(prompt_ids) + len(text_ids)
            self._check_length(num_tokens, "prompt and text together", self.max_positions)
        except RequestRefused as refusal:
            return refusal
        except ValueError as error:
            return RequestRefused(Status.REFUSED, str(error))
        return image, prompt_ids, text_ids

    def text_alone(self, text: str) -> list[int] | RequestRefused:
        """Ids of a text that no image stands before; or why it cannot be read."""
        try:
            require_non_empty(text)
            token_ids = self.prompts.encode(text)
        except ValueError as error:
            return RequestRefused(Status.REFUSED, str(error))
        limit = self.max_positions
        if len(token_ids) > limit:
            return RequestRefused(
                Status.REFUSED, f"text must have at most {limit} tokens, got {len(token_ids)}; shorten it"
            )
        return token_ids

    def _check_length(self, num_tokens: int, what: str, limit: int) -> None:
        """Raises Refusal where queries and `num_tokens` exceed the positions of the model or of memory."""
        try:
            require_room(num_tokens, what, limit, self.model.config.num_query_tokens)
        except ValueError as error:
            remedy = ", or lower max_slots" if limit < self.max_positions else ""
            raise RequestRefused(Status.REFUSED, f"{error}{remedy}") from error

    def _check_room(self, prompt_ids: list[int], options: GenerationOptions) -> None:
        num_tokens = len(prompt_ids) + options.max_new_tokens
        self._check_length(num_tokens, "prompt and max_new_tokens together", self.max_slot_positions)
        num_slots = max(options.num_beams, options.num_return_sequences)
        if num_slots > self.max_slots:
            raise RequestRefused(
                Status.REFUSED,
                f"num_beams and num_return_sequences must be at most {self.max_slots}, got {num_slots}; "
                "raise max_slots",
            )

    def _text_sender(
        self, on_text: Callable[[str], None], stop: Sequence[str]
    ) -> Callable[[Sequence[int]], None]:
        def send(token_ids: Sequence[int]) -> None:
            on_text(stable_text(self.prompts.decode(token_ids), stop))

        return send


def stable_text(text: str, stop: Sequence[str]) -> str:
    """The part of a growing text that later tokens will not change: no cut character, no begun stop text."""
    text = text.rstrip("\ufffd")
    begun = (n for s in stop for n in range(min(len(s), len(text)), 0, -1) if text.endswith(s[:n]))
    return text[: len(text) - max(begun, default=0)].rstrip()
