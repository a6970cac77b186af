"""`RemoteEngine`: the engine of a job whose model is loaded elsewhere.

Threads send decoded images to an endpoint, many in one request, and take outcomes as they are finished. They
wait for an endpoint that is busy, gone, or has another model for a while, and ask again for what it has not
answered. So the endpoint may make a text twice; its result is taken once.
"""

from __future__ import annotations

import http.client
import logging
import threading
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future
from contextlib import closing
from typing import Any, NoReturn

import numpy as np

from blip2_actor import (
    EngineStats,
    Features,
    GenerationOptions,
    ImageLike,
    ModelInfo,
    Request,
    Result,
    Score,
    Status,
)
from pipeline.endpoint.batch_requests import Ask, Outcome, form_of
from pipeline.endpoint.client import ANSWER_S, Endpoint, EndpointError
from pipeline.endpoint.connection import BrokenOff, Connection, WorkRefused
from pipeline.endpoint.waiting import GivenUp, Outage
from pipeline.endpoint.wanted import MAX_BREAKS, Wanted
from pipeline.storage.retrying import TELL_EVERY_S

NUM_CONNECTIONS = 4
"""Requests at the same time; with `MAX_IMAGES` texts each they fill the slots of a large engine twice."""
MAX_IMAGES = 64
MAX_BYTES = 8 << 20
"""Pixels of one request."""
PAUSE_S = 1.0
"""Minimum pause before the next try if the endpoint asks for none."""
BUSY = ("overloaded", "quota", "too_many_bytes")
"""Types of refusals that only ask for patience."""
REFUSALS = (400, 413, 415, 422)
"""HTTP codes of requests that would be refused again."""
KEY_REFUSED = (401, 403)

logger = logging.getLogger(__name__)


class RemoteEngine:
    """Has an endpoint generate texts, score given ones and encode images. Thread-safe."""

    def __init__(self, endpoint: Endpoint, model: ModelInfo, waits: bool = True) -> None:
        """Start the threads.

        Args:
            model: what the endpoint must serve; an answer of another model is never taken.
            waits: wait for an endpoint that does not answer, instead of raising from the futures; one that
                is busy is then an error after `ANSWER_S`.
        """
        self.step_watchers: list[Any] = []
        self._endpoint, self._model, self._waits = endpoint, model, waits
        self._queue: deque[Wanted] = deque()
        self._unfinished: set[Wanted] = set()
        self._has_work = threading.Condition()
        self._is_closed = False
        self._is_given_up = False
        """Whether the job stops; everything without an outcome then ends with `GivenUp`."""
        self._ended = threading.Event()
        self._outage = Outage()
        self._max_images = max(1, min(MAX_IMAGES, MAX_BYTES // (3 * model.image_size_px**2)))
        self._num_requests = self._num_finished = self._num_tokens = 0
        runs = {f"endpoint-{n}": self._run for n in range(NUM_CONNECTIONS)} | {"endpoint-watch": self._watch}
        self._threads = [threading.Thread(target=run, name=name, daemon=True) for name, run in runs.items()]
        for thread in self._threads:
            thread.start()

    # As an engine ---------------------------------------------------------------------------------------

    def submit(
        self,
        request: Request,
        options: GenerationOptions = GenerationOptions(),
        on_text: Any = None,
    ) -> Future[Result]:
        """Queue one request; its image is uint8[S, S, 3] at the model's size."""
        assert on_text is None, "an endpoint sends no pieces of the texts of batch work"
        resolved = (request.options or options).resolve(self._model.generation_config)
        return self._add(Wanted(self.image(request.image), Ask(options=resolved, prompt=request.prompt)))

    def generate(
        self, requests: Sequence[Request], options: GenerationOptions = GenerationOptions()
    ) -> list[Result]:
        return [future.result() for future in [self.submit(request, options) for request in requests]]

    def stream(
        self, request: Request, options: GenerationOptions = GenerationOptions()
    ) -> Generator[str, None, None]:
        yield self.submit(request, options).result().text or ""

    def image(self, image: ImageLike | None) -> Any:
        """Return an image that several requests can share; requests that are sent together send it once."""
        if not isinstance(image, np.ndarray):
            raise TypeError(f"image must be uint8[S, S, 3], got {type(image).__name__}")
        if image.flags.writeable:  # the caller may write over it
            image = image.copy()
            image.flags.writeable = False
        return image

    @property
    def prompts(self) -> NoReturn:
        raise ValueError("an endpoint shows no tokens of batch work")

    def features(self, images: Sequence[ImageLike], *_: Any, **__: Any) -> list[Features]:
        """Return what the encoders compute of uint8[S, S, 3]; raise GivenUp when the job stops meanwhile."""
        return self._read([Wanted(self.image(image), Ask()) for image in images])

    def score(
        self, images: Sequence[ImageLike], texts: Sequence[str], prompts: Sequence[str | None] | None = None
    ) -> list[Score]:
        """Return how probable each text is after its image and prompt; raise GivenUp as `features`."""
        asked = zip(images, texts, prompts or [None] * len(texts), strict=True)
        return self._read([Wanted(self.image(i), Ask(text=text, prompt=p)) for i, text, p in asked])

    def _read(self, wanted: Sequence[Wanted]) -> list[Any]:
        for one in wanted:
            self._add(one)
        return [one.future.result() for one in wanted]

    def _add(self, wanted: Wanted) -> Future[Any]:
        with self._has_work:
            if self._is_closed:
                raise RuntimeError("the engine is closed; build a new one")
            if self._is_given_up:
                raise GivenUp
            self._num_requests += 1
            self._unfinished.add(wanted)
            self._queue.append(wanted)
            self._has_work.notify()
        wanted.future.add_done_callback(lambda _: self._unfinished.discard(wanted))
        return wanted.future

    def stats(self) -> EngineStats:
        """Return counters. Nothing counts as waiting: how long to wait is decided here, not by a watchdog."""
        return EngineStats(
            num_requests=self._num_requests, num_finished=self._num_finished, num_tokens=self._num_tokens
        )

    def close(self) -> None:
        """Finish what was accepted if the endpoint answers; refuse everything else."""
        with self._has_work:
            self._is_closed = True
            self._has_work.notify_all()
        self._ended.set()
        for thread in self._threads:
            if not self._is_given_up:  # otherwise it may be in a request that takes long
                thread.join()
        self._give_up()

    def __enter__(self) -> RemoteEngine:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is not None:
            self._give_up()
        self.close()

    # In the threads -------------------------------------------------------------------------------------

    def _run(self) -> None:
        connection = Connection(self._endpoint)
        while wanted := self._take():
            try:
                self._ask(connection, wanted)
            except Exception as error:  # goes to those who wait for the futures
                logger.exception("A request to the endpoint has failed")
                for one in wanted:
                    one.fail(error)
        connection.close()

    def _watch(self) -> None:
        """Give everything up when the job stops, whatever the other threads wait for."""
        while not self._ended.wait(TELL_EVERY_S):
            if self._unfinished and not self._outage.job_goes_on():
                self._give_up()
            error = EndpointError(f"{self._endpoint.url} has given no outcome for {ANSWER_S:g} s")
            for one in [] if self._waits else list(self._unfinished):
                if time.monotonic() > one.since_s + ANSWER_S:
                    one.fail(error)

    def _give_up(self) -> None:
        """End what has no outcome, and the threads."""
        with self._has_work:
            self._is_given_up = True
            self._has_work.notify_all()
        self._ended.set()
        # Without the lock: a done callback may take another lock, under which `submit` is called.
        for one in list(self._unfinished):
            one.fail(GivenUp())

    def _take(self) -> list[Wanted]:
        """Wait for work, and take all that goes with the first piece; none if the engine is closed."""
        with self._has_work:
            while not (self._drop_ended() or self._is_closed or self._is_given_up):
                self._has_work.wait()
            taken: list[Wanted] = []
            while not self._is_given_up and self._drop_ended() and len(taken) < self._max_images:
                if taken and not self._queue[0].goes_with(taken[0]):
                    break
                taken.append(self._queue.popleft())
            return taken

    def _drop_ended(self) -> bool:
        """Forget work whose future is done; return whether anything is left."""
        while self._queue and self._queue[0].future.done():
            self._queue.popleft()
        return bool(self._queue)

    def _put_back(self, wanted: Sequence[Wanted]) -> None:
        with self._has_work:
            self._queue.extendleft(reversed([one for one in wanted if not one.future.done()]))
            self._has_work.notify_all()

    def _ask(self, connection: Connection, wanted: list[Wanted]) -> None:
        """Send one request and deliver its results; work without a result is sent again after a pause."""
        kind, body = form_of([(one.image, one.ask) for one in wanted], self._model)
        try:
            with closing(connection.outcomes(kind, body, len(wanted), self._outage.end)) as outcomes:
                for found in outcomes:
                    if found is None and all(one.future.done() for one in wanted):
                        return  # each is answered or cancelled; the endpoint sees it by the closed connection
                    if found is not None:
                        self._deliver(wanted[found[0]], found[1])
            if not all(one.future.done() for one in wanted):
                raise BrokenOff("the answer lacks its end")
        except WorkRefused as refusal:
            self._after_refusal(wanted, refusal)
        except BrokenOff as end:
            self._after_break(wanted, end)
        except (OSError, http.client.HTTPException) as error:
            self._pause(wanted, f"gives no answer: {error or type(error).__name__}", PAUSE_S)

    def _deliver(self, wanted: Wanted, outcome: Outcome) -> None:
        with self._has_work:
            self._num_finished += 1
            completions = outcome.completions if isinstance(outcome, Result) else ()
            self._num_tokens += sum(len(one.token_ids) for one in completions)
        wanted.resolve(outcome)

    def _after_refusal(self, wanted: list[Wanted], refusal: WorkRefused) -> None:
        if refusal.code == 413 and len(wanted) > 1:
            self._max_images = max(1, len(wanted) // 2)
            self._put_back(wanted)
        elif refusal.code in REFUSALS and len(wanted) > 1:  # which may be for one of them
            for one in wanted:
                one.num_breaks = MAX_BREAKS
            self._put_back(wanted)
        elif refusal.code in REFUSALS:
            self._outage.end()
            wanted[0].resolve(wanted[0].ask.without(Status.REFUSED, f"the endpoint {refusal}"))
        elif refusal.type in BUSY:
            self._outage.end()
            if self._ended.wait(refusal.pause_s):
                self._give_up()
            self._put_back(wanted)
        elif refusal.code == 500:
            self._after_break(wanted, BrokenOff(str(refusal)))
        else:
            self._pause(wanted, str(refusal), refusal.pause_s, refuses_key=refusal.code in KEY_REFUSED)

    def _after_break(self, wanted: list[Wanted], end: BrokenOff) -> None:
        """Ask again. A text on which answers break off each time must not block the others for ever."""
        # The first text of a request is the first to have slots, and the last to lose them to other callers.
        suspects = {"unavailable": [], "timeout": wanted[:1]}.get(end.type, wanted)
        for one in (one for one in suspects if not one.future.done()):
            one.num_breaks += 1
            if one.num_breaks >= 2 * MAX_BREAKS:
                error = f"the endpoint has failed each time on this image: {end}"
                one.resolve(one.ask.without(Status.FAILED, error))
        self._pause([one for one in wanted if not one.future.done()], str(end), PAUSE_S)

    def _pause(self, wanted: list[Wanted], state: str, at_least_s: float, refuses_key: bool = False) -> None:
        if not self._waits:
            error = EndpointError(f"{self._endpoint.url} {state}")
            for one in wanted:
                one.fail(error)
        else:
            if not self._outage.wait(f"{self._endpoint.url} {state}", at_least_s, self._ended, refuses_key):
                self._give_up()
            self._put_back(wanted)
