"""Our reader of safetensors files against the library that writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from blip2_actor.checkpoints.weights import safetensors_file
from blip2_actor.checkpoints.weights.load_weights import load_weights
from blip2_actor.checkpoints.weights.name_map import Rule
from blip2_actor.checkpoints.weights.safetensors_file import DTYPES, list_safetensors
from blip2_actor.checkpoints.weights.weight_files import list_weights


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_is_read_in_pieces(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces end inside a tensor; a scalar and an empty tensor are read; bytes of other tensors are not."""
    monkeypatch.setattr(safetensors_file, "PIECE_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 100, shape, generator=generator).to(dtype)
        for name, shape in {"a": (7, 11), "b": (), "c": (0, 3), "d": (129,)}.items()
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    stored = list_safetensors(tmp_path / "x.safetensors")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (stored[name].dtype, stored[name].shape) == (dtype, tuple(tensor.shape))
        read = torch.full((tensor.numel(),), 101).to(dtype)
        for start, piece in stored[name].pieces():
            read[start : start + len(piece)] = piece
        torch.testing.assert_close(read.view(tensor.shape), tensor, rtol=0, atol=0)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: whole[:-1],
        lambda whole: whole[:20],
        lambda whole: b"",
        lambda whole: b"<html>not found</html>" * 9,
    ],
    ids=["cut", "cut header", "empty", "html"],
)
def test_an_incomplete_or_foreign_file_is_refused_by_name(
    spoil: Callable[[bytes], bytes], tmp_path: Path
) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(OSError, match=r"x\.safetensors must be a complete safetensors file"):
        list_safetensors(path)


def test_an_unsupported_dtype_is_named(tmp_path: Path) -> None:
    """A checkpoint in float8 is complete, so the error must not advise to fetch it again."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match=r"dtypes of .*x\.safetensors must be .*, got F8_E4M3; convert it"):
        list_safetensors(path)


def status_bytes(field: str) -> int:
    """Return a field of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_loading_needs_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """A mapped file counts as memory of the process: loading would need twice the size of the weights."""
    model = nn.Linear(4096, 4096, bias=False).requires_grad_(False)
    save_file({"weight": model.weight.clone()}, tmp_path / "model.safetensors")
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = status_bytes("VmRSS")
    load_weights(model, list_weights(tmp_path), [Rule("weight", "weight")], "a test")
    assert status_bytes("VmHWM") - before < model.weight.numel() * 4 // 4
