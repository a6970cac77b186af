"""Loading a model."""

from __future__ import annotations

import sys

import pytest
import torch

from blip2_actor.checkpoints.checkpoint import resolve
from blip2_actor.checkpoints.loading import load_model


def test_loading_imports_no_symbolic_shapes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They import sympy, which used to take longer than the rest of the start of a small engine."""
    monkeypatch.setitem(sys.modules, "torch.fx.experimental.symbolic_shapes", None)
    model = load_model(resolve("demo"), torch.device("cpu"), torch.float32)
    assert {tensor.device.type for tensor in model.parameters()} == {"cpu"}
