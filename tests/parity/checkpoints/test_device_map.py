"""A model that is split over devices gives the same tokens as a whole one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from blip2_actor import EngineConfig, GenerationOptions, Request
from blip2_actor.checkpoints import device_map as splitting
from blip2_actor.testing import random_images
from tests.engines import cpu_config

LAYERS = {"opt": "language_model.layers", "t5": "language_model.decoder"}


def captions(folder: Path, device_map: str | None) -> tuple[list[tuple[int, ...]], list[float | None]]:
    """Return token ids and scores; check that parameters are offloaded exactly if there is a device map."""
    config = cpu_config(folder, device_map=device_map)
    pictures = [image.numpy() for image in random_images(4)]
    with config.build() as engine:
        requests = [Request(image=p, prompt=t) for p in pictures for t in (None, "what is it?")]
        results = engine.generate(requests, GenerationOptions(max_new_tokens=12))
        scores = engine.score(pictures, ["a cat"] * 4)
        placed = {name: parameter.device.type for name, parameter in engine.model.named_parameters()}
        assert ("meta" in placed.values()) is (device_map is not None)
    return [result.token_ids for result in results], [score.logprob for score in scores]


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_layers_on_disk_give_the_same_tokens(
    language: str, checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The map names parts, single layers and one linear layer; the KV cache stays on the main device."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    layers = LAYERS[language]
    device_map = {"vision.layers.1": "disk", "qformer": "disk", layers: "disk", f"{layers}.1": "cpu"}
    device_map[f"{layers}.1.out_proj"] = "disk"
    device_map["language_projection"] = "cpu:0"  # the split needs another name than "cpu"
    folder = checkpoint_folder(language)
    whole_ids, whole_scores = captions(folder, None)
    split_ids, split_scores = captions(folder, json.dumps(device_map))
    assert split_ids == whole_ids
    assert len(set(whole_ids)) > 1
    assert split_scores == pytest.approx(whole_scores, abs=1e-4)
    assert list((tmp_path / "blip2" / "offload").iterdir()) == [], (
        "the files must be unnamed, so that they never outlive the process"
    )


@pytest.mark.parametrize("language", ["opt", "t5"])
def test_automatic_plan_fills_the_device_and_puts_the_rest_on_disk(
    language: str, checkpoint_folder: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """accelerate's plan uses our module names, and does not split a layer."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = checkpoint_folder(language)
    whole = captions(folder, None)[0]
    size = (folder / "model.safetensors").stat().st_size
    monkeypatch.setattr(splitting, "get_max_memory", lambda: {0: 10 * size, "cpu": size // 2})
    assert captions(folder, "auto")[0] == whole


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "all over"}, "device_map must be auto, balanced, sequential or a JSON object"),
        ({"device_map": '{"vision": null}'}, "device_map must be"),
        ({"device_map": "auto", "compile": True}, "compile must not be true"),
    ],
)
def test_an_invalid_device_map_is_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        EngineConfig(**options)


def test_a_device_map_with_names_of_another_model_is_refused(checkpoint_folder: Callable[..., Path]) -> None:
    """Otherwise names such as those of transformers would have no effect."""
    for device_map, message in (
        (
            '{"language_model.model.decoder": "disk"}',
            r"got language_model\.model\.decoder; the model has vision",
        ),
        ('{"vision": 9}', "device must exist on this machine"),
    ):
        with pytest.raises(ValueError, match=message):
            EngineConfig(model=str(checkpoint_folder("opt")), device="cpu", device_map=device_map).build()
    assert torch.get_default_device().type == "cpu"
