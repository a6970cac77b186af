"""The self-test finds the faults that it is meant to find, and accepts healthy engines."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from blip2_actor import Engine
from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.engine.model_runner import ModelRunner
from blip2_actor.engine.self_test import SelfTestFailure, SelfTestRecord, check, compare_with_last
from tests.engines import cpu_config
from tests.parity.engine.tape import Tape


@pytest.fixture(scope="module")
def engine(checkpoint_folder: Callable[..., Path]) -> Iterator[Engine]:
    config = cpu_config(checkpoint_folder())
    with Engine(config) as started:
        yield started


def test_a_healthy_engine_starts_and_gives_the_same_digest_again(engine) -> None:
    again = check(engine._core.runner, engine.prompts.empty_ids, engine.image_size_px)
    assert engine.self_test == again


@pytest.mark.parametrize("max_slots", [1, 2])
def test_an_engine_with_few_slots_is_tested_too(
    engine, monkeypatch, caplog, tmp_path, max_slots: int
) -> None:
    """Such an engine used to start untested, silently, and its encoders compiled at the first request.

    The test has fewer captions for it, which does not count as a change of those stored by a larger engine.
    """
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for num_slots in (3, max_slots):
        with replace(engine.config, max_slots=num_slots).build() as started:
            assert started.self_test is not None
    assert "have changed" not in caplog.text


def test_without_the_self_test_the_weights_are_not_hashed(engine, monkeypatch) -> None:
    """The digest of a folder covers its weights, which are gigabytes; only the self-test needs it."""
    monkeypatch.setattr(Checkpoint, "digest", lambda checkpoint: pytest.fail("the weights were hashed"))
    with replace(engine.config, skip_self_test=True).build() as started:
        assert started.self_test is None


def test_rows_that_leak_into_each_other_are_refused(engine, monkeypatch) -> None:
    """The fault resembles a kernel that reads another row's memory if the batch is larger than one."""
    real = engine.model.qformer_features

    def leaking(image_embeds: torch.Tensor) -> torch.Tensor:
        features = real(image_embeds)
        return features + 0.5 * features.roll(1, dims=0) if len(features) > 1 else features

    monkeypatch.setattr(engine.model, "qformer_features", leaking)
    with pytest.raises(SelfTestFailure, match="alone and in a batch"):
        check(engine._core.runner, engine.prompts.empty_ids, engine.image_size_px)


def test_nan_is_refused(engine, monkeypatch) -> None:
    """A damaged checkpoint used to be reported as a difference of nan, with the advice to change torch."""
    monkeypatch.setattr(
        engine.model, "project", lambda features: features.new_full((*features.shape[:2], 32), torch.nan)
    )
    with pytest.raises(SelfTestFailure, match=r"NaN or infinity; .* fetch the checkpoint again"):
        check(engine._core.runner, engine.prompts.empty_ids, engine.image_size_px)


class Stuck(Tape):
    """Its replays do nothing, as with a graph that was captured on other buffers."""

    def capture(self, step: Callable[[], None]) -> Callable[[], None]:
        super().capture(step)
        return lambda: None


def test_replayed_steps_are_compared_with_eager_ones(engine, caplog) -> None:
    """Single images and batches are both replayed, so wrong graphs could agree with each other."""
    tape = Tape()
    with caplog.at_level(logging.INFO):
        runner = ModelRunner(engine.model, 5, capturer=tape)
        assert check(runner, engine.prompts.empty_ids, engine.image_size_px) == engine.self_test
    assert tape.num_captured > 0
    assert "eager and replayed differ by" in caplog.text
    stuck = ModelRunner(engine.model, 5, capturer=Stuck())
    with pytest.raises(SelfTestFailure, match="eager and replayed"):
        check(stuck, engine.prompts.empty_ids, engine.image_size_px)


def test_changed_captions_are_reported_with_what_changed(tmp_path) -> None:
    first = SelfTestRecord(digest="aaaa", torch="2.11", transformers="5.17", device="cpu")
    assert compare_with_last(first, tmp_path, "c", torch.float32) is None
    assert compare_with_last(first, tmp_path, "c", torch.float32) is None
    upgraded = replace(first, digest="bbbb", torch="2.13")
    assert compare_with_last(upgraded, tmp_path, "other checkpoint", torch.float32) is None
    message = compare_with_last(upgraded, tmp_path, "c", torch.float32)
    assert message is not None
    assert "torch 2.11 -> 2.13" in message
    assert "transformers" not in message.split("changed since")[1]


FIRST = SelfTestRecord(digest="aaaa", torch="2.11", transformers="5.17", device="cpu")


@pytest.mark.parametrize("content", ["", "{", "[1]", '{"digest": "aaaa"}'])
def test_a_record_that_cannot_be_read_does_not_keep_an_engine_from_starting(tmp_path, content) -> None:
    """A truncated file would make every later start on this machine fail."""
    compare_with_last(FIRST, tmp_path, "c", torch.float32)
    (path,) = tmp_path.iterdir()
    path.write_text(content)
    assert compare_with_last(FIRST, tmp_path, "c", torch.float32) is None
    assert json.loads(path.read_text())["digest"] == "aaaa"


def test_a_record_that_cannot_be_written_does_not_keep_an_engine_from_starting(tmp_path, caplog) -> None:
    (tmp_path / "file").touch()
    assert compare_with_last(FIRST, tmp_path / "file" / "canary", "c", torch.float32) is None
    assert "cannot be written" in caplog.text


def test_a_process_that_ends_while_it_writes_leaves_the_last_record_whole(tmp_path, monkeypatch) -> None:
    """A concurrent reader also finds the whole file, because the engines of a machine start together.
    together."""
    compare_with_last(FIRST, tmp_path, "c", torch.float32)
    (path,) = tmp_path.iterdir()

    def cut(file: Path, _: str) -> None:
        file.open("w").close()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", cut)
    with pytest.raises(KeyboardInterrupt):
        compare_with_last(replace(FIRST, digest="bbbb"), tmp_path, "c", torch.float32)
    assert json.loads(path.read_text())["digest"] == "aaaa"
