"""The text of one request in pieces, as its tokens come: `Engine.stream`."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator
from concurrent.futures import Future

from blip2_actor.options import GenerationOptions
from blip2_actor.request import Request, Result

OnText = Callable[[str], None]
"""Takes the whole text so far."""


def stream_text(
    submit: Callable[[Request, GenerationOptions, OnText], Future[Result]],
    request: Request,
    options: GenerationOptions,
) -> Generator[str, None, None]:
    """Yield what the text grows by; closing the generator cancels the request.

    Args:
        submit: queues the request, and reports its text so far from another thread.

    Raises:
        ValueError: the request asks for several beams or texts, or was refused.
    """
    if options.num_beams > 1 or options.num_return_sequences > 1:
        raise ValueError("num_beams and num_return_sequences must be 1 to stream, a stream is one text")
    texts: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    future = submit(request, options, texts.put)
    future.add_done_callback(lambda _: texts.put(None))
    sent = ""
    try:
        while (text := texts.get()) is not None:
            if text.startswith(sent) and text != sent:
                yield text[len(sent) :]
                sent = text
        result = future.result()
        if result.text is None:
            raise ValueError(result.error)
        if result.text.startswith(sent) and result.text != sent:
            yield result.text[len(sent) :]
    finally:
        future.cancel()
