"""Which files of a folder are read, and which ones its digest covers."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from blip2_actor.checkpoints.checkpoint import Checkpoint, resolve
from blip2_actor.checkpoints.download import select_files
from blip2_actor.checkpoints.weights.weight_files import list_weights

INDEX = "model.safetensors.index.json"
PICKLE_INDEX = "pytorch_model.bin.index.json"


def write(folder: Path, name: str, value: float) -> None:
    """Write a file of weights with one tensor, whose value tells which file was read."""
    tensors = {"w": torch.tensor([value])}
    if name.endswith(".json"):
        shard = name.removesuffix(".index.json").replace(".", "-00001-of-00001.")
        (folder / name).write_text(json.dumps({"weight_map": {"w": shard}}))
        write(folder, shard, value)
    elif name.endswith(".bin"):
        torch.save(tensors, folder / name)
    else:
        save_file(tensors, folder / name)


def read(folder: Path) -> float:
    return next(list_weights(folder)["w"].pieces())[1].item()


def test_the_order_is_that_of_transformers(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A fine-tune copied over the shards of its base used to be ignored, because the index came first."""
    kinds = [PICKLE_INDEX, "pytorch_model.bin", INDEX, "model.safetensors"]
    for value, name in enumerate(kinds):
        write(tmp_path, name, value)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert read(tmp_path) == value
        assert len(caplog.messages) == (value > 0), "what is not read is said once"
    assert "read model.safetensors, but not model-00001-of-00001.safetensors, " in caplog.messages[0]
    assert "and 2 more; delete" in caplog.messages[0]


def test_an_index_without_its_shards_counts_only_alone(tmp_path: Path) -> None:
    """`save_pretrained` into the folder of a sharded base leaves the old index and deletes the shards."""
    write(tmp_path, INDEX, 1)
    (tmp_path / "model-00001-of-00001.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"00001\.safetensors, which .*index\.json names"):
        read(tmp_path)
    write(tmp_path, "pytorch_model.bin", 2)
    with pytest.raises(FileNotFoundError):
        read(tmp_path)
    write(tmp_path, "model.safetensors", 3)
    assert read(tmp_path) == 3


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": 3}', '{"weight_map": {"w": "../x.bin"}}'])
def test_an_index_that_is_none_is_refused_by_name(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(OSError, match=r"index\.json must list the files of the weights"):
        read(tmp_path)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "model.", "module._orig_mod."])
@pytest.mark.parametrize("suffix", ["safetensors", "bin"])
def test_the_prefix_of_a_wrapper_is_left_out(prefix: str, suffix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}a": torch.ones(1), f"{prefix}model.b": torch.ones(1)}
    if suffix == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
    else:
        save_file(tensors, tmp_path / "model.safetensors")
    assert list_weights(tmp_path).keys() == {"a", "model.b"}


def test_a_prefix_of_some_names_is_kept(tmp_path: Path) -> None:
    save_file({"module.a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "model.safetensors")
    assert list_weights(tmp_path).keys() == {"module.a", "b"}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("blip2_pretrained_opt2.7b.pth", r"got none of these, but blip2_.*\.pth; .* --adapter to the file"),
        ("adapter_config.json", "but an adapter; set --model to"),
        ("readme.md", "fetch the checkpoint again"),
    ],
)
def test_a_folder_without_weights_says_what_it_holds(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(FileNotFoundError, match=message):
        list_weights(tmp_path)


def test_a_file_in_the_place_of_a_folder_is_refused(tmp_path: Path) -> None:
    """LAVIS publishes single files."""
    (tmp_path / "blip2.pth").touch()
    with pytest.raises(
        NotADirectoryError,
        match=r"model must be a folder .*blip2\.pth; name its folder, or .* --adapter to the file",
    ):
        resolve(str(tmp_path / "blip2.pth"))


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_of_git_lfs_is_named(name: str, tmp_path: Path) -> None:
    """A clone without Git LFS has a pointer instead of the weights, and a second clone has one again."""
    (tmp_path / name).write_text("version https://git-lfs.example/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(OSError, match=rf"{name} must hold the weights, got a pointer .* run git lfs pull"):
        list_weights(tmp_path)


def test_a_link_without_its_file_is_named(tmp_path: Path) -> None:
    """In the hub's cache, a commit's folder holds links to other folders; all of it used to seem missing."""
    (tmp_path / "config.json").symlink_to("../../blobs/1f")
    with pytest.raises(FileNotFoundError, match=r"config\.json must be a file, got a link to .*blobs/1f"):
        resolve(str(tmp_path))
    (tmp_path / "config.json").unlink()
    write(tmp_path, "model.safetensors", 1)
    (tmp_path / "pytorch_model.bin").symlink_to("nowhere")  # which is not read
    assert resolve(str(tmp_path)).folder == tmp_path


def test_a_folder_inside_is_no_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "runs.json").mkdir()
    write(tmp_path, "model.safetensors", 1)
    assert Checkpoint(tmp_path).digest()


def test_files_that_are_not_read_are_not_content() -> None:
    """The content of folders that earlier versions read must keep its digest: the same files count."""
    described = ["config.json", PICKLE_INDEX, "tokenizer.json"]
    assert select_files([*described, "model.safetensors", "pytorch_model.bin", "readme.md"]) == sorted(
        [*described, "model.safetensors"]
    )
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert set(select_files([*shards, INDEX])) == {*shards, INDEX}
    assert set(select_files([*shards, INDEX, "model.safetensors"])) == {INDEX, "model.safetensors"}
    assert select_files(["pytorch_model.bin", "optimizer.bin"]) == ["pytorch_model.bin"]
    assert select_files(["adapter_model.bin", "adapter_model.safetensors"]) == ["adapter_model.safetensors"]


def test_the_digest_follows_the_weights_that_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder, "pytorch_model.bin", 1)
    older = Checkpoint(folder).digest()
    write(folder, INDEX, 2)
    sharded = Checkpoint(folder).digest()
    shutil.copy(folder / "pytorch_model.bin", folder / "unrelated.bin")
    assert Checkpoint(folder).digest() == sharded != older
    write(folder, "model.safetensors", 3)
    assert Checkpoint(folder).digest() not in (older, sharded)
