"""Identical images share their texts on request; a text of another image or prompt would be wrong."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, closing
from typing import Any

import pyarrow as pa
import pytest

from blip2_actor import Result, Status
from blip2_actor.testing import FakeEngineConfig, fake_caption
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.outputs import Outputs
from pipeline.stages.caption import CaptionStage
from pipeline.stages.result_cache import ResultCache
from tests.unit.stages.decoded_tables import decoded, pixels_of

QUESTION = "Question: what color? Answer:"


@pytest.fixture
def stage() -> Iterator[Callable[..., CaptionStage]]:
    """Makes stages, which end with the test."""
    with ExitStack() as made:

        def make(engine: Any = FakeEngineConfig(), **spec: Any) -> CaptionStage:
            return made.enter_context(closing(CaptionStage(CaptionSpec(engine=engine, **spec))))

        yield make


def test_identical_images_are_captioned_once_on_request(stage):
    table = decoded(pixels_of(n % 3) for n in range(12))
    for reuse, num_requests in ((False, 24 + 6), (True, 6)):
        captioning = stage(outputs=Outputs.of({"color": QUESTION}), reuse_identical=reuse)
        rows = captioning(table).to_pylist()
        captioning(table.slice(0, 3))
        assert captioning.actor.stats().num_requests == num_requests
        assert [row["caption"] for row in rows] == [fake_caption(pixels_of(n % 3)) for n in range(12)]
        assert [row["color"] for row in rows] == [fake_caption(pixels_of(n % 3), QUESTION) for n in range(12)]


def test_identical_bytes_with_other_pixels_or_another_prompt_are_another_image(stage):
    """Images of one palette index used to get the first one's caption, whatever color their palettes give."""
    images, prompts = [pixels_of(0), pixels_of(0), pixels_of(1)], ["one", "two", "two"]
    table = decoded(images, own_prompt=prompts, sha256=pa.array([b"same"] * 3))
    captioning = stage(prompt_column="own_prompt", reuse_identical=True)
    captions = captioning(table)["caption"].to_pylist()
    assert captions == [fake_caption(*pair) for pair in zip(images, prompts, strict=True)]
    assert captioning.actor.stats().num_requests == 3


def test_calls_of_several_threads_share_one_request(stage, tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    captioning = stage(engine=FakeEngineConfig(gate=str(gate)), reuse_identical=True)
    table = decoded([pixels_of(1)])
    captions: list[str] = []
    threads = [
        threading.Thread(target=lambda: captions.append(captioning(table)["caption"][0].as_py()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    gate.unlink()
    for thread in threads:
        thread.join()
    assert captions == [fake_caption(pixels_of(1))] * 4
    assert captioning.actor.stats().num_requests == 1


class Submissions:
    """Records requests instead of submitting them to an engine; a test sets their results."""

    def __init__(self) -> None:
        self.futures: list[Future[Result]] = []

    def __call__(self) -> Future[Result]:
        self.futures.append(Future())
        return self.futures[-1]


def test_a_running_request_is_shared_and_its_result_is_kept_without_the_future():
    cache, submit = ResultCache(), Submissions()
    future = cache.get("a", submit)
    assert cache.get("a", submit) is future
    result = Result()
    submit.futures[0].set_result(result)
    assert cache.get("a", submit) is result
    assert len(submit.futures) == 1


def test_the_result_used_longest_ago_is_dropped_first():
    cache, submit = ResultCache(max_results=2), Submissions()
    cache.get("a", submit)
    cache.get("b", submit)
    cache.get("a", submit)
    cache.get("c", submit)
    cache.get("a", submit)
    assert len(submit.futures) == 3, "a is still there"
    cache.get("b", submit)
    assert len(submit.futures) == 4, "b is not"


def test_a_request_that_might_end_otherwise_is_submitted_again():
    cache, submit = ResultCache(), Submissions()
    cache.get("a", submit)
    submit.futures[0].set_exception(RuntimeError("the device is gone"))
    cache.get("a", submit)
    submit.futures[1].set_result(Result(status=Status.FAILED, error="out of memory"))
    cache.get("a", submit)
    submit.futures[2].set_result(Result(status=Status.REFUSED, error="too long"))
    cache.get("a", submit)
    assert len(submit.futures) == 3, "a request that was refused once is refused again"
