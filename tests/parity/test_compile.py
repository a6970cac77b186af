"""Compiled encoders give what the plain ones give."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blip2_actor import Engine, EngineConfig, GenerationOptions, Request
from tests.parity.tiny import images


@pytest.mark.timeout(600)
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for a CPU needs a C++ compiler")
def test_compiled_encoders_give_the_same_captions(checkpoint_folder: Callable[..., Path], caplog) -> None:
    """Five images in batches of four: the first batch is compiled, the second is not. The engine goes on
    where compiling fails, which must not be what is tested here."""
    asked = [Request(image=image.numpy()) for image in images(5)]
    found = []
    for compiled in (False, True):
        config = EngineConfig(
            model=str(checkpoint_folder()),
            dtype="float32",
            device="cpu",
            num_threads=1,
            encode_batch=4,
            compile=compiled,
        )
        torch.compiler.reset()
        with Engine(config) as engine:
            found.append([r.token_ids for r in engine.generate(asked, GenerationOptions(max_new_tokens=8))])
    assert found[0] == found[1]
    assert not any("could not be compiled" in record.message for record in caplog.records)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


def test_encoders_that_cannot_be_compiled_run_all_the_same(
    checkpoint_folder: Callable[..., Path], caplog, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ "auto" compiles on machines nobody has seen: a broken compiler must cost speed, not the job."""

    def broken(*_: object, **__: object) -> Callable[..., object]:
        def fail(*_: object) -> object:
            raise RuntimeError("no working compiler")

        return fail

    monkeypatch.setattr(torch, "compile", broken)
    config = EngineConfig(
        model=str(checkpoint_folder()),
        dtype="float32",
        device="cpu",
        num_threads=1,
        encode_batch=4,
        compile=True,
    )
    with Engine(config) as engine:
        assert all(r.text is not None for r in engine.generate([Request(image=i.numpy()) for i in images(9)]))
    assert sum("no working compiler" in record.message for record in caplog.records) == 1
