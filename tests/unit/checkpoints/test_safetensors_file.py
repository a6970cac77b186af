"""The reader of safetensors files, against the library that writes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from blip2_actor.checkpoints import safetensors_file as tensor_file
from blip2_actor.checkpoints.name_map import Rule
from blip2_actor.checkpoints.safetensors_file import DTYPES, list_tensors
from blip2_actor.checkpoints.weights import load_weights


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
def test_every_dtype_comes_back_in_pieces(
    dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pieces that end inside a tensor, a scalar, an empty tensor, and neighbours that must not be read."""
    monkeypatch.setattr(tensor_file, "PIECE_BYTES", 64)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        name: torch.randint(0, 100, shape, generator=generator).to(dtype)
        for name, shape in {"a": (7, 11), "b": (), "c": (0, 3), "d": (129,)}.items()
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    found = list_tensors(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (found[name].dtype, found[name].shape) == (dtype, tuple(tensor.shape))
        read = torch.full((tensor.numel(),), 101).to(dtype)
        for start, piece in found[name].pieces():
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
def test_what_is_no_whole_file_is_refused_by_name(spoil: Callable[[bytes], bytes], tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4)}, path)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(OSError, match=r"x\.safetensors must be a complete safetensors file"):
        list_tensors(path)


def test_a_dtype_that_is_not_loaded_is_named(tmp_path: Path) -> None:
    """A checkpoint in float8 is whole: fetching it again gives the same one."""
    path = tmp_path / "x.safetensors"
    save_file({"a": torch.ones(4), "b": torch.ones(4).to(torch.float8_e4m3fn)}, path)
    with pytest.raises(ValueError, match=r"dtypes of .*x\.safetensors must be .*, got F8_E4M3; convert it"):
        list_tensors(path)


def status_bytes(field: str) -> int:
    """A line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) << 10


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_loading_takes_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """A mapped file counts as memory of the process: 2.7 billion parameters would need twice their size."""
    model = nn.Linear(4096, 4096, bias=False).requires_grad_(False)
    save_file({"weight": model.weight.clone()}, tmp_path / "model.safetensors")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = status_bytes("VmRSS")
    load_weights(model, tmp_path, [Rule("weight", "weight")])
    assert status_bytes("VmHWM") - before < model.weight.numel() * 4 // 4
