"""The engine as callers see it: captions here, scores and features in `Reader`, from any thread.

`generate` and `stream` are thin shells over `submit`. Each method prepares its inputs in the caller's thread
and hands the rest to `EngineCore`, whose thread computes.
"""

from __future__ import annotations

import queue
import weakref
from collections.abc import Generator, Iterable
from concurrent.futures import Future
from functools import partial
from typing import Any, NoReturn

from tqdm.auto import tqdm

from blip2_actor.config import EngineConfig
from blip2_actor.engine.core import EngineCore
from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.own_process import CANNOT_BE_SENT
from blip2_actor.engine.readings import Reader
from blip2_actor.engine.startup import start_model
from blip2_actor.engine.submission import OnText, submit, text_pieces
from blip2_actor.inputs.arguments import to_options, to_request, to_requests
from blip2_actor.options import GenerationOptions
from blip2_actor.request import EngineStats, ImageLike, Request, Result


class Engine(Reader):
    """A loaded model that batches requests continuously. Close it, or use it as a context manager.

    The token ids of a request do not depend on the requests that run next to it. An engine without references
    closes itself. It belongs to the process that built it.

    Examples:
        >>> engine = Engine(EngineConfig(model="demo", device="cpu"))
        >>> engine.generate([Request(image=picture)])[0].text
        'a red circle on a white background'
        >>> "".join(engine.stream(Request(image=picture)))
        'a red circle on a white background'
        >>> shared = engine.image(picture)  # encoded once for all requests that use it
        >>> red, blue = engine.score([shared, shared], ["a red circle", "a blue square"])
        >>> red.logprob > blue.logprob
        True
        >>> engine.close()
    """

    def __init__(self, config: EngineConfig) -> None:
        """Load the weights and start the engine's thread.

        Raises:
            ValueError: the configuration or the checkpoint cannot be run; the message names the field.
            OSError: the checkpoint cannot be found or read.
        """
        self.config = config
        core = EngineCore(partial(start_model, **vars(config)), config.num_threads)
        # An engine without references ends its thread; at exit, the core does that by itself.
        weakref.finalize(self, core.release).atexit = False
        started = core.started
        super().__init__(core, started.input_processor)
        self._submit = partial(submit, core, started.input_processor)
        self.model, self.self_test = started.runner.model, started.self_test
        self.prompts = started.input_processor.prompts
        self.image_size_px = started.input_processor.image_size_px
        self.step_watchers, self.quantization = core.step_watchers, started.quantization

    def generate(
        self,
        requests: Request | ImageLike | Iterable[Request | ImageLike | None],
        options: GenerationOptions = GenerationOptions(),
        *,
        prompt: str | None = None,
        progress: bool = False,
        **changes: Any,
    ) -> list[Result]:
        """Serve requests and wait for them.

        Args:
            requests: a list of requests and images, or one of them.
            options: used by requests that have none of their own. Options that are not given are those of the
                checkpoint's `generation_config.json`, or else the defaults.
            prompt: the prompt of images that are given without a `Request`.
            progress: show a progress bar on standard error.
            **changes: changes to `options`, and to those of each request, such as `max_new_tokens=30`.

        Returns:
            One result per request, in order, even for a single request. A bad image or prompt is a result
            with a status.

        Raises:
            TypeError: an argument has another type, or a changed option does not exist.
            ValueError: options contradict each other.
        """
        self._core.require_caller_may_wait()
        options = to_options(options, changes)
        asked = to_requests(requests, prompt, changes)
        with tqdm(total=len(asked), unit="image", disable=not progress) as bar:
            futures = self._submit(
                [(request, options, None) for request in asked], lambda: bar.n < bar.total and bar.update()
            )
            try:
                results = [future.result() for future in futures]
                bar.update(bar.total - bar.n)  # the last callbacks may come after the results
                return results
            except BaseException:
                for future in futures:
                    future.cancel()
                raise

    def submit(
        self,
        request: Request | ImageLike,
        options: GenerationOptions = GenerationOptions(),
        on_text: OnText | None = None,
        *,
        prompt: str | None = None,
        **changes: Any,
    ) -> Future[Result]:
        """Queue one request from any thread. Cancelling the future frees its slots.

        The other arguments are those of `generate`.

        Args:
            on_text: called in the engine's thread with the whole text so far, whenever it has grown; the last
                characters of the result may be missing. It must return at once. If it raises, the error is
                logged and it is not called again. Never called for several beams or texts.

        Raises:
            RuntimeError: the engine is closed, or has failed.
        """
        asked = to_request(request, prompt, changes), to_options(options, changes), on_text
        (future,) = self._submit([asked])
        return future

    def stream(
        self,
        request: Request | ImageLike,
        options: GenerationOptions = GenerationOptions(),
        *,
        prompt: str | None = None,
        **changes: Any,
    ) -> Generator[str, None, None]:
        """Yield the text in pieces as its tokens come. Closing the generator cancels the request.

        The arguments are those of `generate`.

        Raises:
            ValueError: the request asks for several beams or texts, or was refused.
        """
        self._core.require_caller_may_wait()
        request, options = to_request(request, prompt, changes), to_options(options, changes)
        chosen = self._input_processor.resolve(request.options or options)
        if chosen.num_beams > 1 or chosen.num_return_sequences > 1:
            raise ValueError("num_beams and num_return_sequences must be 1 to stream, a stream is one text")
        texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        (future,) = self._submit([(request, chosen, texts.put)])
        yield from text_pieces(texts, future)

    def image(self, image: ImageLike) -> EncodedImage:
        """Return an image that several requests can share: it is encoded once, as long as it is held.

        Raises:
            ValueError: the image cannot be read.
        """
        self._core.require_own_process()
        return self._input_processor.image(image)

    def stats(self) -> EngineStats:
        """Return counters since the start; cheap, from any thread."""
        return self._core.stats()

    def close(self) -> None:
        """Finish what was accepted, refuse everything else, and end the thread."""
        self._core.close()

    def __enter__(self) -> Engine:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(CANNOT_BE_SENT)

    def __exit__(self, *_: object) -> None:
        self.close()
