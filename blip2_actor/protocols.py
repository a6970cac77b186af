"""What the hosts ask of an engine, and of the recipe that builds one: protocols, without an implementation.

`EngineConfig` and `Engine` are the real ones; `blip2_actor.testing` has a fake pair.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future
from typing import Protocol

from blip2_actor.options import GenerationOptions
from blip2_actor.request import EngineStats, Features, ImageLike, ModelInfo, Request, Result, Score


class EngineLike(Protocol):
    """What `Blip2Actor` asks of an engine; `Engine` is the real one."""

    def generate(self, requests: Sequence[Request], options: GenerationOptions = ...) -> list[Result]: ...

    def submit(self, request: Request, options: GenerationOptions = ...) -> Future[Result]: ...

    def stream(self, request: Request, options: GenerationOptions = ...) -> Iterable[str]: ...

    def image(self, image: ImageLike) -> ImageLike: ...

    def features(self, images: Sequence[ImageLike], with_image_embeds: bool = ...) -> list[Features]: ...

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
        """Resolve the model by name without loading it; raises ValueError or OSError with the remedy."""
        ...

    def check_prompts(self, prompts: Sequence[str], max_new_tokens: int) -> None:
        """Raise ValueError where the model cannot take a prompt that every row will have."""
        ...

    def build(self) -> EngineLike: ...
