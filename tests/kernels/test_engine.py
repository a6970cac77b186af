"""The engine with its GPU kernels on a CPU: the arguments that the models pass to them, slot by slot.

Only triton's interpreter allows this; `tests/parity/models/test_engine_gpu.py` is the test on a GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.sides.engine_sides import EngineSide, ReferenceSide, Work
from blip2_actor.engine import core
from blip2_actor.models import kv_cache, residual, vision
from blip2_actor.models.residual import normalize
from blip2_actor.testing import save_tiny_checkpoint
from tests.engines import cpu_config

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels run on the GPU")
PROMPTS = (None, "a", "Question: what is it? Answer:", None)
WORK: Work = [(i, PROMPTS[i % 4], 2 + 3 * i % 5) for i in range(6)]
"""Texts of 2 to 6 tokens: more than slots, so that some wait, and slots move."""


@pytest.fixture(autouse=True)
def kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[set[str]]:
    """Make a CPU run every kernel; return the purposes of the kernels that were used."""
    found: set[str] = set()

    def find_kernel(device: torch.device, purpose: str, load: Callable[[], Any]) -> Any:
        found.add(purpose)
        return load()

    for module in (kv_cache, residual, vision):
        monkeypatch.setattr(module, "find_kernel", find_kernel)
        module._find_kernel.cache_clear()
    for module in (residual, vision):
        monkeypatch.setattr(module, "runs_kernels", lambda input: True)
    yield found
    for module in (kv_cache, residual, vision):
        module._find_kernel.cache_clear()


@pytest.mark.parametrize(
    ("language", "num_beams", "queued_ahead"), [("opt", 1, True), ("opt", 2, False), ("t5", 1, True)]
)
def test_tokens_are_those_of_the_reference(
    language: str,
    num_beams: int,
    queued_ahead: bool,
    kernels: set[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(core, "reads_late", lambda device: queued_ahead)
    folder = save_tiny_checkpoint(tmp_path, language)
    config = cpu_config(folder, max_slots=4)
    found = EngineSide(config, WORK, num_beams).run()
    assert kernels == {"Attention of decode steps"}, (
        "kernels replace torch's other operations in half precision"
    )
    assert found == ReferenceSide(folder, "float32", "cpu", WORK, num_beams).run(1)


def test_operations_in_half_precision_hand_their_rows_over(kernels: set[str]) -> None:
    norm = torch.nn.LayerNorm(48).half()
    torch.nn.init.normal_(norm.weight)
    hidden, update = torch.randn(2, 3, 5, 48).half().transpose(1, 2).unbind(0)
    total, normed = normalize(norm, hidden, update)
    qkv = torch.randn(2, 129, 3 * 48).half()  # one full block and one position more
    attended = vision._attend_to_all(qkv, 3)
    assert kernels == {"Adding and normalizing", "Attention of the vision encoder"}
    assert torch.equal(total, hidden + update)
    torch.testing.assert_close(normed.float(), norm.float()(total.float()), rtol=2e-3, atol=2e-3)
    query, key, value = (x.unflatten(-1, (3, -1)).transpose(1, 2) for x in qkv.float().chunk(3, -1))
    expected = torch.nn.functional.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
    torch.testing.assert_close(attended.float(), expected, rtol=2e-3, atol=2e-3)
