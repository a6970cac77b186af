"""`Blip2Actor`: the one class that both hosts run, Ray Data in an actor pool and Ray Serve in a replica.

It knows neither of them. A host builds it from a picklable `EngineBuilder`. Then it calls `caption` from any
number of threads, or `submit` for a future; all calls share the engine's slots.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future

from blip2_actor.options import GenerationOptions
from blip2_actor.protocols import EngineBuilder
from blip2_actor.request import EngineStats, ImageLike, Request, Result


class Blip2Actor:
    """A running engine, and the options that its host was configured with.

    Examples:
        >>> actor = Blip2Actor(EngineConfig(model="demo", device="cpu"))
        >>> actor.caption([picture])[0].text
        'a red circle on a white background'
        >>> actor.submit(Request(image=picture)).result().ok
        True
        >>> actor.close()
    """

    def __init__(self, engine: EngineBuilder, options: GenerationOptions = GenerationOptions()) -> None:
        self.info = engine.info()
        self.options = options.resolve(self.info.generation_config)
        self.engine = engine.build()

    def caption(
        self, images: Sequence[ImageLike], prompts: Sequence[str | None] | None = None
    ) -> list[Result]:
        """Caption a batch and wait for it; thread-safe.

        Args:
            images: each uint8[S, S, 3] at the model's size, or anything else that `Request.image` takes.
            prompts: one per image; None for plain captions.

        Returns:
            One result per image, in order. A bad image is a result with a status.

        Raises:
            TypeError: a single image or prompt is given in the place of a list.
            ValueError: there is not one prompt per image.
        """
        from blip2_actor.inputs.arguments import require_one_per_image, to_images, to_texts

        images = to_images(images)
        prompts = [None] * len(images) if prompts is None else to_texts("prompts", prompts)
        require_one_per_image("prompts", prompts, images)
        requests = [Request(image=i, prompt=p) for i, p in zip(images, prompts, strict=True)]
        return self.engine.generate(requests, self.options)

    def submit(self, request: Request, on_text: Callable[[str], None] | None = None) -> Future[Result]:
        """Queue one request. Cancelling the future frees its slot.

        Args:
            on_text: as in `Engine.submit`.
        """
        return self.engine.submit(request, self.options, on_text)

    def stream(self, request: Request) -> Generator[str, None, None]:
        """Yield the text in pieces as they come. Closing the generator cancels the request."""
        return self.engine.stream(request, self.options)

    def stats(self) -> EngineStats:
        return self.engine.stats()

    def close(self) -> None:
        """Finish what was accepted, and refuse everything else.

        The device's memory is free when nothing refers to this object any longer.
        """
        self.engine.close()
