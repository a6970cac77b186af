"""`Blip2Actor`: the one class that both hosts run, Ray Data in an actor pool and Ray Serve in a replica.

It knows neither. A host builds it from a picklable `EngineBuilder`, then calls `caption` from as many
threads as it likes, or `submit` for a future; all calls share the engine's slots.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from concurrent.futures import Future

from blip2_actor.options import GenerationOptions
from blip2_actor.protocols import EngineBuilder
from blip2_actor.request import EngineStats, ImageLike, Request, Result


class Blip2Actor:
    """A running engine and the options its host was configured with."""

    def __init__(self, engine: EngineBuilder, options: GenerationOptions = GenerationOptions()) -> None:
        self.options = options
        self.info = engine.info()
        self.engine = engine.build()

    def caption(
        self, images: Sequence[ImageLike], prompts: Sequence[str | None] | None = None
    ) -> list[Result]:
        """Caption a batch and wait for it; thread-safe.

        Args:
            images: each uint8[S, S, 3] at the model's size (or anything `Request.image` takes).
            prompts: one per image, or None for plain captions.

        Returns:
            One result per image, in order; a bad image is a result with a status.
        """
        prompts = prompts if prompts is not None else [None] * len(images)
        requests = [Request(image=i, prompt=p) for i, p in zip(images, prompts, strict=True)]
        return self.engine.generate(requests, self.options)

    def submit(self, request: Request) -> Future[Result]:
        """Queue one request; cancelling the future frees its slot."""
        return self.engine.submit(request, self.options)

    def stream(self, request: Request) -> Iterable[str]:
        """Yield pieces of the text as they come; closing the iterator cancels the request."""
        return self.engine.stream(request, self.options)

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        """Finish what runs, refuse what comes; the device's memory is free once nobody holds this."""
        self.engine.close()
