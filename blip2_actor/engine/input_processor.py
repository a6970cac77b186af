"""Turn what callers pass into what the scheduler works on; requests are refused here."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

from blip2_actor.checkpoints.tokenizer import (
    PromptTokenizer,
    require_known_tokens,
    require_non_empty,
    require_room,
)
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.memory import max_positions_in_slots, max_positions_read
from blip2_actor.engine.model_runner import TextToScore
from blip2_actor.engine.request_state import RequestState, Searches
from blip2_actor.generation.beam_search import BeamSearch
from blip2_actor.generation.search import TextSearch, cut_at_stop
from blip2_actor.inputs.image_input import to_pixels
from blip2_actor.inputs.token_ids import to_token_ids, without_padding
from blip2_actor.models.blip2 import Blip2
from blip2_actor.options import GenerationOptions
from blip2_actor.request import ImageLike, Request

logger = logging.getLogger(__name__)

MAX_OPTIONS = 256
"""Number of different options that are kept resolved: resolving takes two thirds of the time to prepare a
request."""
_BEGUN_CONTRACTION = re.compile(r"( n'?| '[vr]|')$")
"""Many tokenizers drop the space before 's, n't and others (`clean_up_tokenization_spaces`)."""


class InputProcessor:
    """Turns images into pixels, prompts into ids, and options into searches; runs in the caller's thread."""

    def __init__(
        self,
        model: Blip2,
        prompts: PromptTokenizer,
        image_size_px: int,
        max_slots: int,
        generation_config: Mapping[str, Any],
        allow_urls: bool = False,
    ) -> None:
        self.model = model
        self.max_positions_read = max_positions_read(model)
        """Maximum length of a text that is only read."""
        self.max_positions_in_slots = max_positions_in_slots(model, max_slots)
        """Maximum length of a text that is generated: all slots become as long as the longest text."""
        self.prompts = prompts
        self.image_size_px = image_size_px
        self.resolve = lru_cache(MAX_OPTIONS)(partial(GenerationOptions.resolve, stored=generation_config))
        """`GenerationOptions.resolve` with the options of the checkpoint."""
        self.max_slots = max_slots
        self.allow_urls = allow_urls
        self._owner = object()
        """Marks this engine's images. It is not `self`, because an image that is held must not hold the
        model."""

    def image(self, image: ImageLike | None) -> EncodedImage:
        """Return an image that several requests can share.

        Raises:
            RequestRefused: the image cannot be read, or belongs to another engine.
        """
        if isinstance(image, EncodedImage) and image.owner is self._owner:
            return image
        return EncodedImage(to_pixels(image, self.image_size_px, self.allow_urls), self._owner)

    def request_state(
        self, request: Request, options: GenerationOptions, on_text: Callable[[str], None] | None
    ) -> RequestState:
        """Prepare a request for the scheduler.

        Args:
            options: used if the request has none of its own.
            on_text: called with the whole text so far after each token, unless there are several beams or
                texts.

        Raises:
            ValueError: the image, the prompt or the options cannot be served.
        """
        options = self.resolve(request.options or options)
        image = self.image(request.image)
        prompt_ids = self.prompts.encode(request.prompt)
        options.require_known_tokens(self.prompts.vocab_size)
        self._require_slots(prompt_ids, options)
        processor = request.logits_processor
        prefix_ids = self.model.prefix_ids(prompt_ids)
        count = options.num_return_sequences
        on_token = None if on_text is None or count > 1 else self._text_sender(on_text, options.stop)

        def make_searches() -> Searches:
            if options.num_beams > 1:
                return [BeamSearch(options, prefix_ids, self.prompts, processor)]
            seeds = range(options.seed, options.seed + count) if options.do_sample else [None]
            return [
                TextSearch(options, prefix_ids, self.prompts, seed, on_token, processor) for seed in seeds
            ]

        return RequestState(image, prompt_ids, options, make_searches, request.low_priority)

    def text_to_score(self, image: EncodedImage, prompt: str | None, text: str) -> TextToScore:
        """Return the ids of a prompt and of a text to score.

        Raises:
            ValueError: the text cannot be scored.
        """
        prompt_ids, text_ids = self.prompts.encode(prompt), self.prompts.encode_text(text)
        num_tokens = len(prompt_ids) + len(text_ids)
        self._require_room(num_tokens, "prompt and text together", self.max_positions_read)
        return image, prompt_ids, text_ids

    def text_without_image(self, text: str | Sequence[int], mask: Sequence[int] | None) -> list[int]:
        """Return the ids of a text without an image; see `Engine.text_features`.

        Raises:
            ValueError: the text cannot be read.
        """
        if isinstance(text, str):
            token_ids = self.prompts.encode(require_non_empty(text))
        else:
            token_ids = to_token_ids(text)
            require_known_tokens(token_ids, self.prompts.vocab_size, self.prompts.image_token_id)
        token_ids, limit = without_padding(token_ids, mask), self.max_positions_read
        if not token_ids:
            raise ValueError("text must have at least one token, got none")
        if len(token_ids) > limit:
            raise ValueError(f"text must have at most {limit} tokens, got {len(token_ids)}; shorten it")
        return token_ids

    def _require_room(self, num_tokens: int, what: str, limit: int) -> None:
        """Raise ValueError if the queries and `num_tokens` exceed the positions of the model or of memory."""
        require_room(num_tokens, what, limit, self.model.config.num_query_tokens)

    def _require_slots(self, prompt_ids: list[int], options: GenerationOptions) -> None:
        """Raise ValueError if the slots are too few or too short for a request."""
        num_tokens, limit = len(prompt_ids) + options.max_new_tokens, self.max_positions_in_slots
        try:
            self._require_room(num_tokens, "prompt and max_new_tokens together", limit)
        except ValueError as error:
            remedy = ", or lower max_slots" if limit < self.max_positions_read else ""
            raise ValueError(f"{error}{remedy}") from error
        num_slots = max(options.num_beams, options.num_return_sequences)
        if num_slots > self.max_slots:
            raise ValueError(
                f"num_beams and num_return_sequences must be at most {self.max_slots}, got {num_slots}; "
                "raise max_slots"
            )

    def _text_sender(
        self, on_text: Callable[[str], None], stop: Sequence[str]
    ) -> Callable[[Sequence[int]], None]:
        is_broken = False

        def send(token_ids: Sequence[int]) -> None:
            nonlocal is_broken
            if is_broken:
                return
            try:
                on_text(stable_text(self.prompts.detokenize(token_ids), stop))
            except BaseException:  # a fault of one caller must not end the requests of all others
                is_broken = True
                logger.exception("on_text has raised an error; it is not called again for this request")

        return send


def stable_text(text: str, stop: Sequence[str]) -> str:
    """Return the part of a growing text that later tokens will not change.

    An incomplete character at the end, a stop text, the beginning of one, the beginning of a contraction, and
    white space around the text are left out.
    """
    cut = cut_at_stop(text, stop)
    if cut is not None:
        return cut
    text = text.rstrip("\ufffd")
    begun = (n for s in stop for n in range(min(len(s), len(text)), 0, -1) if text.endswith(s[:n]))
    return _BEGUN_CONTRACTION.sub("", text[: len(text) - max(begun, default=0)]).strip()
