"""Our reader of files written by `torch.save`."""

from __future__ import annotations

import functools
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from blip2_actor.checkpoints.weights import pytorch_file
from blip2_actor.checkpoints.weights.load_weights import load_weights
from blip2_actor.checkpoints.weights.name_map import Rule
from blip2_actor.checkpoints.weights.pytorch_file import list_pytorch_tensors
from blip2_actor.checkpoints.weights.weight_files import list_weights


@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "before torch 1.6"])
def test_tensors_are_read_in_pieces(
    is_archive: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Transposed tensors and views of a larger one are stored as such; their elements come in order."""
    monkeypatch.setattr(pytorch_file, "PIECE_BYTES", 64)
    whole = torch.arange(96.0).view(8, 12)
    tensors = {
        "whole": whole,
        "transposed": whole.T,
        "view": whole[2:5, 1:],
        "half": whole.bfloat16(),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 3),
        "parameter": nn.Parameter(torch.ones(40)),
    }
    torch.save(tensors, tmp_path / "x.bin", _use_new_zipfile_serialization=is_archive)
    stored = list_pytorch_tensors(tmp_path / "x.bin")
    assert stored.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert stored[name].shape == tuple(tensor.shape)
        read = torch.full((tensor.numel(),), -1.0, dtype=tensor.dtype)
        for start, piece in stored[name].pieces():
            assert piece.dtype == tensor.dtype
            read[start : start + len(piece)] = piece
        torch.testing.assert_close(read.view(tensor.shape), tensor.detach(), rtol=0, atol=0)


class Runs:
    """If unpickled, it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize(
    "save", [torch.save, functools.partial(pickle.dump, protocol=2)], ids=["torch", "pickle"]
)
def test_a_pickle_that_runs_a_program_is_refused_and_runs_nothing(
    save: Callable[..., None], tmp_path: Path
) -> None:
    trace = tmp_path / "trace"
    with (tmp_path / "pytorch_model.bin").open("wb") as file:
        save({"a": torch.ones(1), "b": Runs(trace)}, file)
    with pytest.raises(ValueError, match=r"pytorch_model\.bin must hold only tensors, .*may run a program"):
        list_weights(tmp_path)
    assert not trace.exists()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: whole[:-100],
        lambda whole: whole[:300],
        lambda whole: b"",
        lambda whole: b"version https://git-lfs.github.com/spec/v1\n",
    ],
    ids=["cut", "cut early", "empty", "pointer of git lfs"],
)
@pytest.mark.parametrize("is_archive", [True, False], ids=["archive", "before torch 1.6"])
def test_an_incomplete_or_foreign_file_is_refused_by_name(
    spoil: Callable[[bytes], bytes], is_archive: bool, tmp_path: Path
) -> None:
    path = tmp_path / "x.bin"
    torch.save({"a": torch.ones(100)}, path, _use_new_zipfile_serialization=is_archive)
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(OSError, match=r"x\.bin must be a complete file of torch\.save"):
        list_pytorch_tensors(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"model": {"a": torch.ones(1)}, "epoch": 3}, "got entries model, epoch; save only"),
        ([torch.ones(1)], "got no names; save only"),
    ],
)
def test_a_training_checkpoint_is_refused(content: Any, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.bin")
    with pytest.raises(ValueError, match=message):
        list_pytorch_tensors(tmp_path / "x.bin")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="memory is read from Linux's /proc")
def test_loading_needs_no_second_copy_of_the_weights(tmp_path: Path) -> None:
    """Mapped pages belong to the operating system; the process's own memory must not grow by the weights."""
    model = nn.Linear(2048, 2048, bias=False).requires_grad_(False)
    torch.save({"weight": model.weight.clone()}, tmp_path / "pytorch_model.bin")
    tensors = list_weights(tmp_path)
    before = anonymous_bytes()
    load_weights(model, tensors, [Rule("weight", "weight")], "a test")
    assert anonymous_bytes() - before < model.weight.nbytes // 4
    assert sum(len(piece) for _, piece in tensors["weight"].pieces()) == model.weight.numel()


def anonymous_bytes() -> int:
    """Return the memory of this process that is not a mapped file."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:")) << 10
