"""Compiled encoders give the same results as uncompiled ones."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch._dynamo.exc import FailOnRecompileLimitHit

from blip2_actor import Engine, GenerationOptions, Request
from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.engine.encoders import Encoders
from blip2_actor.testing import random_images
from tests.engines import cpu_config


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_encoders_give_the_same_captions(checkpoint_folder: Callable[..., Path], caplog) -> None:
    """Five images in batches of four: the first batch runs compiled, the second does not. The engine also
    goes on if compiling fails, so the test checks that it did not."""
    asked = [Request(image=image.numpy()) for image in random_images(5)]
    found = []
    for compiled in (False, True):
        config = cpu_config(checkpoint_folder(), encode_batch=4, compile=compiled)
        torch.compiler.reset()
        with Engine(config) as engine:
            found.append([r.token_ids for r in engine.generate(asked, GenerationOptions(max_new_tokens=8))])
    assert found[0] == found[1]
    assert not any("could not be compiled" in record.message for record in caplog.records)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@pytest.mark.parametrize(("of_user", "expected"), [("", "AVX2"), ("mine", "mine")])
def test_code_for_other_instructions_is_not_taken_from_the_cache(
    of_user: str, expected: str, checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process with AVX512 that found code for AVX2 in torch's cache died of a corrupted heap."""
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    model = load_model(resolve(str(checkpoint_folder())), torch.device("cpu"), torch.float32)
    config: Any = importlib.import_module("torch.compiler.config")  # `patch` is added when it is imported
    with config.patch(cache_key_tag=of_user):
        Encoders(model, full_batch=2, compiles=True)
        assert config.cache_key_tag == expected


@pytest.mark.parametrize("kind", [RuntimeError, AssertionError, FailOnRecompileLimitHit])
def test_encoders_that_cannot_be_compiled_run_uncompiled(
    kind: type[Exception], checkpoint_folder: Callable[..., Path], caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" compiles on unknown machines, where a broken compiler must cost speed, not the job. It may
    raise anything: AssertionError for an unexpected stride, or an error about too many shapes."""

    def broken(*_: object, **__: object) -> Callable[..., object]:
        def fail(*_: object) -> object:
            raise kind("no working compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    config = cpu_config(checkpoint_folder(), encode_batch=4, compile=True)
    with Engine(config) as engine:
        assert all(
            r.text is not None for r in engine.generate([Request(image=i.numpy()) for i in random_images(9)])
        )
    assert sum("no working compiler" in record.message for record in caplog.records) == 1


def test_a_batch_that_is_too_large_is_not_a_broken_compiler(
    checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The batch would not fit uncompiled either, so the caller makes it smaller."""

    def exhausted(*_: object) -> object:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr(torch, "compile", lambda *_, **__: exhausted)
    model = load_model(resolve(str(checkpoint_folder())), torch.device("cpu"), torch.float32)
    encoders = Encoders(model, full_batch=2, compiles=True)
    with pytest.raises(torch.OutOfMemoryError):
        encoders(random_images(2))
    assert encoders.compiled_batch == 2
