"""CUDA graphs without a GPU: the shapes that are captured, and a capture that fails."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from blip2_actor.engine.cuda_graphs import CudaGraphs, DecodeReplay, EagerRunner, round_rows


def test_rows_round_up_to_few_sizes() -> None:
    sizes = [round_rows(count) for count in range(1, 513)]
    assert all(size >= count for count, size in enumerate(sizes, start=1))
    assert sizes[:5] == [1, 2, 4, 4, 8]
    assert len(set(sizes)) == 21


class BrokenGraph:
    """A CUDA graph whose capture the driver has aborted."""

    def capture_begin(self, **_: object) -> None:
        pass

    def capture_end(self) -> None:
        raise RuntimeError("operation failed due to a previous error during capture")


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("capture")])
def test_a_capture_that_cannot_be_ended_releases_the_allocator(
    monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    """Otherwise the thread would allocate from a pool that is not kept, and the next `empty_cache` would
    fail. The error of the step itself must be raised, because it says whether memory is short."""
    pools, ended = iter([(0, 1), (0, 2)]), []
    stream = SimpleNamespace(device=None, device_index=3, wait_stream=lambda _: None)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", BrokenGraph)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _, **__: stream)
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: stream)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(pools))
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *x: ended.append(x), raising=False)
    capturer = CudaGraphs(torch.device("cuda", 3))
    calls: list[None] = []

    def step() -> None:
        calls.append(None)
        if error is not None and len(calls) == 2:
            raise error

    with pytest.raises(RuntimeError, match=str(error or "previous error")):
        capturer.capture(step)
    assert ended == [(3, (0, 1))]
    assert capturer._pool == (0, 2)


class LanguageModelThatEchoes:
    lm_head = torch.nn.Linear(1, 2)

    def decode(self, token_ids: torch.Tensor, lengths: torch.Tensor, *_: object) -> torch.Tensor:
        return torch.stack([token_ids, lengths], 1).float()


def test_the_inputs_of_a_step_stay_on_the_host_until_the_step_after_the_next() -> None:
    """A GPU may copy them only after the host has already prepared the next step."""
    slots: Any = SimpleNamespace(num_slots=3, max_length=9, reads_counts=True, step_shape=lambda rows: rows)
    replay = DecodeReplay(LanguageModelThatEchoes(), EagerRunner(), torch.device("cpu"))  # type: ignore[arg-type]
    seen = []
    for step in range(3):
        logits = replay.decode([step, -1], [7 + step] * 2, slots, torch.tensor([4, 5 + step, 6]))
        assert logits.tolist() == [[step, 7 + step], [5 + step, 7 + step]]
        assert replay._buffers is not None
        (staged,) = [both for both in replay._buffers.staged if both[1, 0] == 7 + step]
        seen.append((staged, staged.clone()))
        for before, content in seen[-2:]:
            assert torch.equal(before, content)
