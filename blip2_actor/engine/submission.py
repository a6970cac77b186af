"""Hand requests to the engine's thread, and follow a text as it grows."""

from __future__ import annotations

import queue
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future

from blip2_actor.engine.core import EngineCore
from blip2_actor.engine.input_processor import InputProcessor
from blip2_actor.engine.memory import MAX_ENCODE_BATCH
from blip2_actor.engine.refusal import RequestRefused, or_refusal
from blip2_actor.engine.request_state import RequestState
from blip2_actor.options import GenerationOptions
from blip2_actor.request import Request, Result

OnText = Callable[[str], None]
Asked = tuple[Request, GenerationOptions, OnText | None]
"""A request, the options for it if it has none, and what is called with the whole text after each token."""


def submit(
    core: EngineCore,
    input_processor: InputProcessor,
    asked: Sequence[Asked],
    on_done: Callable[[], object] | None = None,
) -> list[Future[Result]]:
    """Queue requests in groups of one encode batch: the first group starts while the next is prepared.

    Args:
        on_done: called for each request that is finished.
    """
    core.require_own_process()
    futures: list[Future[Result]] = []
    try:
        for start in range(0, len(asked), MAX_ENCODE_BATCH):
            group = asked[start : start + MAX_ENCODE_BATCH]
            states: list[RequestState] = []
            for request, options, on_text in group:
                state = or_refusal(input_processor.request_state, request, options, on_text)
                if isinstance(state, RequestRefused):
                    futures.append(Future())
                    futures[-1].set_result(Result(status=state.status, error=str(state)))
                else:
                    futures.append(state.future)
                    states.append(state)
            core.enqueue(states, num_requests=len(group))
            if on_done is not None:
                for future in futures[start:]:
                    future.add_done_callback(lambda _: on_done())
    except BaseException:  # the caller never learns of the futures that are queued
        for future in futures:
            future.cancel()
        raise
    return futures


def text_pieces(texts: queue.SimpleQueue[str | None], future: Future[Result]) -> Generator[str, None, None]:
    """Yield what each text adds to the one before it. Closing the generator cancels the request.

    Args:
        texts: the growing text, from the engine's thread.

    Raises:
        ValueError: the request was refused.
    """
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
