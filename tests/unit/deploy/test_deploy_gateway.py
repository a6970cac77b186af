"""How a gateway turns the engine's answers into its own, with a handle whose answers the test chooses."""

from __future__ import annotations

import asyncio
import io
import logging
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any

import numpy as np
import pytest
from PIL import Image
from ray.exceptions import ActorDiedError, RpcError
from ray.serve.exceptions import DeploymentUnavailableError
from ray.util.metrics import Metric

from blip2_actor import DecodedImage, GenerationOptions, ModelInfo, Result, Status
from deploy import gateway as gateway_module
from deploy.calls.remote_captioner import Models, RemoteCaptioner
from deploy.gateway import Gateway
from deploy.guard.cost import Cost
from deploy.http.errors import ApiError
from deploy.observe import fleet
from deploy.settings import Settings
from deploy.work import BatchWork, ImageOutputs, ImageWork, OtherModel, TextPiece, TextToGenerate

NEVER = object()
"""The answer of a call that never ends."""


class Response:
    """Like Serve's response: to stop waiting does not stop the work; only `cancel` does."""

    def __init__(self, answer: Any) -> None:
        self.answer = answer
        self.cancelled = False

    def __await__(self) -> Any:
        if self.answer is NEVER:
            yield from asyncio.Event().wait().__await__()
        if isinstance(self.answer, Exception):
            raise self.answer
        return self.answer

    def cancel(self) -> None:
        self.cancelled = True


class Stream(Response):
    """The response of a streaming method: pieces, then the answer."""

    async def __aiter__(self) -> Any:
        yield TextPiece(index=0, text="a")
        yield await self


class Method:
    def __init__(self, response: Response) -> None:
        self.response = response

    def remote(self, *_: Any) -> Response:
        return self.response


class Handle:
    app_name = "app"
    deployment_name = "Captioner"

    def __init__(self, answer: Any) -> None:
        info = ModelInfo(model="m", image_size_px=8, dtype="float32", digest="d", vocab_size=100)
        self.info = Method(Response(info))
        self.matching_info = Method(Response(None))
        self.run = Method(Response(answer))
        self.streaming = Method(Stream(answer))

    def options(self, method_name: str, stream: bool) -> Method:
        assert method_name in ("stream", "run_batch") and stream
        return self.streaming


class StartingHandle(Handle):
    """A further model whose engines answer when the test allows it, but never finish an image."""

    def __init__(self) -> None:
        super().__init__(NEVER)
        self.has_started = asyncio.Event()
        self.num_asked = 0
        starting, info = self, self.info.response.answer

        class Late(Response):
            def __await__(self) -> Any:
                starting.num_asked += 1
                yield from starting.has_started.wait().__await__()
                return info

        self.info = Method(Late(None))


class Store(dict[str, str]):
    """Stands for the state that is stored in the cluster."""

    def _internal_kv_get(self, key: str, namespace: str) -> str | None:
        if "is away" in self:
            raise RpcError("the head is away")
        return self.get(key)

    def _internal_kv_put(self, key: str, value: str, namespace: str) -> None:
        self[key] = value

    def _internal_kv_del(self, key: str, namespace: str) -> None:
        self.pop(key, None)


@asynccontextmanager
async def gateway(handle: Handle, store: Store | None = None, **settings: Any) -> AsyncIterator[Gateway]:
    made = Gateway.__new__(Gateway)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fleet, "internal_kv", Store() if store is None else store)
        await made.__init__(handle, Settings(decode_children=1, **settings))  # type: ignore[misc]
        try:
            yield made
        finally:
            made.__del__()
            del made._decoding  # already closed


WORK = ImageWork(texts=(TextToGenerate(prompt=None, options=GenerationOptions()),))


def encoded() -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (10, 6)).save(file, "PNG")
    return file.getvalue()


IMAGE = encoded()


async def picture(gateway: Gateway) -> DecodedImage:
    return await gateway.decode(gateway.first, IMAGE)


def test_a_calibration_is_read_once_and_stops_no_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """It may be in a bucket, and used to be read at the first request for a further model."""
    readers: list[threading.Thread] = []
    monkeypatch.setattr(Settings, "read_calibration", lambda _: readers.append(threading.current_thread()))

    async def run() -> None:
        first, other = (RemoteCaptioner(Handle(None)) for _ in range(2))
        models = Models(first, {"other": other}, Settings())
        await models.start()
        await models.get("other")

    asyncio.run(run())
    [reader] = readers
    assert reader is not threading.main_thread()


def test_a_further_model_keeps_its_name_when_its_engines_are_updated() -> None:
    """A model named like its checkpoint used to take the new name, and the first model's engines answered."""

    async def run() -> None:
        first, other = (RemoteCaptioner(Handle(None)) for _ in range(2))
        models = Models(first, {"m-tuned": other}, Settings())
        other._handle.info = Method(Response(described("m-tuned")))
        await models.start()
        before, new = models.first, described("m-tuned-v2")
        models.update(await models.get("m-tuned"), new)
        updated = await models.get("m-tuned")
        assert (updated.name, updated.info, updated.is_first) == ("m-tuned", new, False)
        assert models.captioner(updated) is other and models.first is before

    asyncio.run(run())


def test_a_first_model_that_gets_the_name_of_a_further_one_stays_the_first() -> None:
    async def run() -> None:
        first, other = (RemoteCaptioner(Handle(None)) for _ in range(2))
        models = Models(first, {"tuned": other}, Settings())
        await models.start()
        models.update(models.first, described("tuned"))
        assert models.first.is_first and models.captioner(models.first) is first
        assert models.names == ["tuned"]
        await models.get("tuned")
        assert (found := models.find("tuned")) is not None and models.captioner(found) is other

    asyncio.run(run())


def described(model: str) -> ModelInfo:
    return ModelInfo(model=model, image_size_px=8, dtype="float32", digest=model, vocab_size=100)


def refusals(answers: list[Any]) -> list[tuple[int, str]]:
    """Return the refusal of a gateway, which is the same in a plain answer and in a stream."""

    async def ask() -> list[tuple[int, str]]:
        said = []
        async with gateway(handle := Handle(NEVER)) as made:
            image = await picture(made)
            for answer in answers:
                handle.run, handle.streaming = Method(Response(answer)), Method(Stream(answer))
                with pytest.raises(ApiError) as caught:
                    await made.run(made.first, image, WORK)
                with pytest.raises(ApiError) as streamed:
                    [item async for item in made.stream(made.first, IMAGE, WORK)]
                assert (streamed.value.code, streamed.value.type) == (caught.value.code, caught.value.type)
                said.append((caught.value.code, caught.value.type))
        return said

    return asyncio.run(ask())


async def test_a_gateway_with_options_that_no_request_can_have_does_not_start() -> None:
    with pytest.raises(ValueError, match="suppress_tokens must be token ids below 100, got 100"):
        await gateway(Handle(None), options=GenerationOptions(suppress_tokens=(100,))).__aenter__()


def test_the_log_says_what_the_decode_sandbox_is(caplog: pytest.LogCaptureFixture) -> None:
    async def start() -> None:
        async with gateway(Handle(None)):
            pass

    with caplog.at_level(logging.INFO, "ray.serve"):
        asyncio.run(start())
    assert "decode sandbox: " in caplog.text


def test_a_timeout_cancels_the_work() -> None:
    handle = Handle(NEVER)

    async def ask() -> None:
        async with gateway(handle) as made:
            image = await picture(made)
            assert (image.width, image.height) == (10, 6)
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await made.run(made.first, image, WORK)
            items = []
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(None) as limit:
                    async for item in made.stream(made.first, IMAGE, WORK):
                        items.append(item)
                        limit.reschedule(asyncio.get_running_loop().time() + 0.05)
            assert items == [TextPiece(index=0, text="a")]

    asyncio.run(ask())
    assert handle.run.response.cancelled and handle.streaming.response.cancelled


def test_a_stream_that_ends_is_not_cancelled() -> None:
    answer = ImageOutputs(texts=(Result(),))
    handle = Handle(answer)

    async def ask() -> list[Any]:
        async with gateway(handle) as made:
            return [item async for item in made.stream(made.first, IMAGE, WORK)]

    assert asyncio.run(ask())[-1].outputs is answer
    assert not handle.streaming.response.cancelled


def test_an_engine_that_has_died_is_503() -> None:
    gone = [ActorDiedError(), DeploymentUnavailableError("Captioner")]
    assert refusals(gone) == [(503, "overloaded")] * 2


@pytest.mark.parametrize("streams", [False, True])
def test_another_engine_answers_in_place_of_one_that_dies(streams: bool) -> None:
    """During each update and each death, current callers used to get 503."""
    right = ImageOutputs(texts=(Result(),))
    answers = [ActorDiedError(), right]

    class Dying(Stream):
        def __aiter__(self) -> Any:
            return self._items()

        async def _items(self) -> Any:
            yield await self

    class Methods(Method):
        def remote(self, *_: Any) -> Response:
            return Dying(answers.pop(0))

    async def ask() -> Any:
        async with gateway(handle := Handle(None)) as made:
            image = await picture(made)
            handle.run = handle.streaming = Methods(Response(None))
            if streams:
                items: list[Any] = [item async for item in made.stream(made.first, IMAGE, WORK)]
                return [item.outputs for item in items]
            return [await made.run(made.first, image, WORK)]

    assert asyncio.run(ask()) == [right] and not answers


def test_a_gateway_that_started_before_its_engines_were_updated_says_what_answers() -> None:
    """It asks for the model once, but an engine may be replaced a minute later."""
    new = ModelInfo(model="new", image_size_px=8, dtype="float32", digest="e", vocab_size=100)

    async def run() -> None:
        async with gateway(handle := Handle(None)) as made:
            before = made.first
            handle.run = Method(Response(ImageOutputs(texts=(Result(),), model=new)))
            outputs = await made.run(before, await picture(made), WORK)
            assert before.made_by(outputs.model).name == "new"
            assert (made.first.name, made.first.info, made.model_names) == ("new", new, ["new"])
            async with made.model("new") as named:
                assert named is made.first
            handle.streaming = Method(Stream(OtherModel()))
            with pytest.raises(ApiError) as caught:
                [
                    item
                    async for item in made.run_batch(
                        made.first, np.zeros((1, 8, 8, 3), np.uint8), BatchWork()
                    )
                ]
            assert (caught.value.code, caught.value.type) == (503, "unavailable")

    asyncio.run(run())


def test_a_request_whose_time_is_over_without_any_engine_is_503(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> list[tuple[int, str]]:
        said = []
        async with gateway(Handle(NEVER), timeout_s=0.02) as made:
            image = await picture(made)
            for is_ready in (True, False):
                monkeypatch.setattr(made._readiness, "_is_ready", is_ready)
                with pytest.raises(ApiError) as caught:
                    async with made.admit(Cost(slots=1, steps=30)):
                        await made.run(made.first, image, WORK)
                said.append((caught.value.code, caught.value.type))
        return said

    assert asyncio.run(run()) == [(504, "timeout"), (503, "not_ready")]


def test_every_status_but_ok_is_an_error_of_its_name() -> None:
    statuses = [status for status in Status if status is not Status.OK]
    codes = {Status.FAILED: 500, Status.TOO_LARGE: 413}
    answers = [ImageOutputs(texts=(Result(), Result(status=status, error="why"))) for status in statuses]
    assert refusals(answers) == [(codes.get(status, 422), status.value) for status in statuses]


async def test_a_retrieval_model_for_other_images_is_refused() -> None:
    """An image is decoded once; resizing it twice would change it."""
    handle = Handle(NEVER)
    other = ModelInfo(model="r", image_size_px=9, dtype="float32", digest="d")
    handle.matching_info = Method(Response(other))
    with pytest.raises(ValueError, match="8 px"):
        await Gateway.__new__(Gateway).__init__(handle, Settings())  # type: ignore[misc]


async def test_a_full_gateway_is_ready_and_a_draining_one_is_not() -> None:
    """If an orchestrator removed a busy gateway, the others would only become busier."""
    async with gateway(Handle(None), max_in_flight=1) as made:
        cost = Cost(slots=1, steps=30)
        async with made.admit(cost):
            with pytest.raises(ApiError) as refused:
                async with made.admit(cost):
                    pass
            assert (refused.value.code, refused.value.type) == (503, "overloaded")
            await made.check_ready()
        await made.drain()
        for call in (made.check_ready(), made.admit(cost).__aenter__()):
            with pytest.raises(ApiError) as ending:
                await call
            assert (ending.value.code, ending.value.type) == (503, "unavailable")


async def test_who_waits_for_the_engines_of_a_model_is_in_flight() -> None:
    """Requests for a model scaled to zero used to wait before admission, unbounded, holding their bodies."""
    async with gateway(Handle(None), max_in_flight=2) as made:
        made._models._others = {"b": RemoteCaptioner(handle := StartingHandle())}
        cost = Cost(slots=1, steps=30)

        async def ask() -> int:
            async with made.model("b"), made.admit(cost):
                await asyncio.sleep(0)
            return 200

        made.set_draining(True)
        with pytest.raises(ApiError) as ending:
            await ask()
        assert (ending.value.type, handle.num_asked) == ("unavailable", 0)
        made.set_draining(False)
        waiting = [asyncio.create_task(ask()) for _ in range(2)]
        while not handle.num_asked:
            await asyncio.sleep(0)
        assert made.stats()["num_in_flight"] == 2
        with pytest.raises(ApiError) as refused:
            await ask()
        assert (refused.value.code, refused.value.type) == (503, "overloaded")
        draining = asyncio.create_task(made.drain())
        await asyncio.sleep(0)
        assert not draining.done()
        handle.has_started.set()
        assert await asyncio.gather(*waiting) == [200, 200]
        await draining
        assert made.stats()["num_in_flight"] == made.stats()["slots_held"] == 0


async def test_the_wait_for_engines_is_part_of_the_time_of_a_request() -> None:
    """The test moves the clock, so that no request is late on a busy machine."""
    async with gateway(Handle(None), timeout_s=60.0) as made:
        made._models._others = {"b": RemoteCaptioner(handle := StartingHandle())}
        image = await picture(made)
        loop, later_s = asyncio.get_running_loop(), 0.0
        clock_s = loop.time
        loop.time = lambda: clock_s() + later_s  # type: ignore[method-assign]

        async def ask() -> ApiError:
            with pytest.raises(ApiError) as caught:
                async with made.model("b") as model, made.admit(Cost(slots=1, steps=30)):
                    await made.run(model, image, WORK)
            return caught.value

        asking = asyncio.create_task(ask())
        while not handle.num_asked:
            await asyncio.sleep(0)
        later_s += 61
        error = await asking
        assert (error.code, error.type) == (503, "unavailable")
        assert "the engines of b are starting" in error.message

        asking = asyncio.create_task(ask())
        while not made.stats()["num_in_flight"]:
            await asyncio.sleep(0)
        later_s += 40
        handle.has_started.set()
        while not made.stats()["slots_held"]:
            await asyncio.sleep(0)
        later_s += 21
        await asyncio.wait([asking], timeout=10)
        error = asking.result()
        assert (error.code, error.type) == (504, "timeout")


def test_what_a_gateway_holds_is_shown_while_nothing_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray drops a gauge that is not set for 20 s: long requests, and an idle cache, used to disappear."""
    shown: list[str] = []
    monkeypatch.setattr(Metric, "_record", lambda metric, *_: shown.append(metric.info["name"]))

    async def run() -> None:
        async with gateway(Handle(None), Store()) as made:
            shown.clear()
            await made.check_health()

    asyncio.run(run())
    assert shown == ["blip2_requests_in_flight", "blip2_cache_bytes"]


def test_while_the_head_is_away_a_gateway_loses_no_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each health check used to leave a thread behind, until requests that needed one had no answer."""
    monkeypatch.setattr(gateway_module, "STORE_WITHIN_S", 0.01)
    is_back = threading.Event()
    asked: list[str] = []

    class Hanging(Store):
        def _internal_kv_get(self, key: str, namespace: str) -> str | None:
            if "hangs" in self:
                asked.append(key)
                is_back.wait()
            return super()._internal_kv_get(key, namespace)

    async def run() -> None:
        store = Hanging()
        async with gateway(Handle(None), store) as made:
            asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
            store["hangs"] = "yes"
            for _ in range(4):
                await made.check_health()
            assert len(asked) == 1
            assert await asyncio.wait_for(asyncio.to_thread(str, 1), 5) == "1"
            del store["hangs"]
            is_back.set()
            store[made.fleet._drained] = "1"
            monkeypatch.setattr(gateway_module, "STORE_WITHIN_S", 5)
            await made.check_health()
            await made.check_health()
            assert made.stats()["is_draining"]

    try:
        asyncio.run(run())
    finally:
        is_back.set()


async def test_gateways_that_start_during_a_drain_are_drained(monkeypatch: pytest.MonkeyPatch) -> None:
    """A replacement gateway used to accept requests again in the middle of an operator's drain."""

    async def reach_none(*_: Any) -> list[Any]:
        return []

    monkeypatch.setattr(fleet.Fleet, "_everywhere", reach_none)
    store = Store()
    async with gateway(Handle(None), store) as old:
        await old.fleet.set_draining(True)
        await old.check_health()  # as if the call to all replicas had missed this one
        async with gateway(Handle(None), store) as new:
            for made in (old, new):
                with pytest.raises(ApiError):
                    await made.check_ready()
            await new.fleet.set_draining(False)
            store["is away"] = "yes"
            await new.check_health()
            assert new.stats()["is_draining"]
            del store["is away"]
            await new.check_health()
            await new.check_ready()
            await new.drain()
            await new.check_health()  # the end of the service is not an operator's drain
            assert new.stats()["is_draining"]
            new.set_draining(False)  # as /admin/resume makes every gateway do
            assert new.stats()["is_draining"]


async def test_what_was_read_before_the_operators_word_does_not_undo_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A health check that read the store just before a drain used to open the gateway until the next one."""
    async with gateway(Handle(None)) as made:
        reading, may_answer = asyncio.Event(), asyncio.Event()

        async def read() -> bool:
            reading.set()
            await may_answer.wait()
            return False

        monkeypatch.setattr(made.fleet, "is_draining", read)
        checking = asyncio.create_task(made.check_health())
        await reading.wait()
        made.set_draining(True)
        may_answer.set()
        await checking
        assert made.stats()["is_draining"]
        await made.check_health()  # reads the present state
        assert not made.stats()["is_draining"]
