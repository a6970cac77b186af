"""What hosts ask of an engine, and of the recipe that builds one. Protocols only, no implementation.

`EngineConfig` and `Engine` are the real pair, `blip2_actor.testing` has a fake pair.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import TYPE_CHECKING, Protocol

from blip2_actor.options import GenerationOptions
from blip2_actor.request import (
    EngineStats,
    Features,
    ImageLike,
    ModelInfo,
    Request,
    Result,
    Score,
    StepWatcher,
)

if TYPE_CHECKING:
    from blip2_actor.engine.encoded_image import EncodedImage


class Detokenizer(Protocol):
    """What a host asks of a model's tokenizer."""

    def token_texts(self, token_ids: Sequence[int]) -> list[str]:
        """Return what each token adds to the text of generated ids; together they are the text."""
        ...


class EngineLike(Protocol):
    """A loaded model that generates texts; `Engine` is the real one."""

    @property
    def prompts(self) -> Detokenizer: ...

    @property
    def step_watchers(self) -> list[StepWatcher]: ...

    def generate(self, requests: Sequence[Request], options: GenerationOptions = ...) -> list[Result]: ...

    def submit(
        self, request: Request, options: GenerationOptions = ..., on_text: Callable[[str], None] | None = ...
    ) -> Future[Result]: ...

    def stream(self, request: Request, options: GenerationOptions = ...) -> Generator[str, None, None]: ...

    def image(self, image: ImageLike) -> EncodedImage: ...

    def features(
        self,
        images: Sequence[ImageLike],
        with_image_embeds: bool = ...,
        with_attention_maps: bool | str = ...,
    ) -> list[Features]: ...

    def score(
        self,
        images: Sequence[ImageLike],
        texts: Sequence[str],
        prompts: Sequence[str | None] | None = ...,
    ) -> list[Score]: ...

    def stats(self) -> EngineStats: ...

    def close(self) -> None: ...


class EngineBuilder(Protocol):
    """A picklable recipe for an engine; `EngineConfig` is the real one."""

    def info(self) -> ModelInfo:
        """Describe the model without loading it.

        Raises:
            ValueError: the model cannot be run; the message says what to do.
            OSError: the model cannot be found or fetched; the message says what to do.
        """
        ...

    def check_prompts(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Raise ValueError if the model cannot take a prompt that every row would have."""
        ...

    def build(self) -> EngineLike: ...
