"""Each stage of the model against transformers, with the same random weights, loaded by the real loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from blip2_actor import EngineConfig, GenerationOptions, Request
from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.checkpoints.weights.safetensors_file import SafetensorsTensor
from blip2_actor.models.blip2 import Blip2
from blip2_actor.testing import IMAGE_TOKEN_ID, NUM_QUERIES, random_images, tiny_tokenizer

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model(checkpoint_folder: Callable[..., Path]) -> Blip2:
    return load_model(Checkpoint(checkpoint_folder()), CPU, torch.float32)


@pytest.fixture(scope="module")
def pixel_values(model: Blip2) -> torch.Tensor:
    return model.normalizer(random_images(3), torch.float32)


@torch.no_grad()
def test_vision_output_equals_the_reference(model, reference, pixel_values) -> None:
    expected = reference().vision_model(pixel_values)
    image_embeds = model.image_features(pixel_values)
    assert_close(image_embeds, expected.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert_close(model.vision.pool(image_embeds), expected.pooler_output, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_qformer_and_projection_equal_the_reference(model, reference, pixel_values) -> None:
    expected = reference().get_image_features(pixel_values)
    features = model.qformer_features(model.image_features(pixel_values))
    assert_close(features, expected.qformer_outputs.last_hidden_state, atol=1e-5, rtol=1e-5)
    assert_close(model.project(features), expected.pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("prompt", [None, "Question: how many? Answer:"])
@torch.no_grad()
def test_first_logits_equal_the_reference(model, reference, pixel_values, prompt) -> None:
    """Checks packed prefill, positions and the head in isolation, without a search."""
    text = tiny_tokenizer("opt")(prompt).input_ids if prompt else [2]
    input_ids = torch.tensor([[IMAGE_TOKEN_ID] * NUM_QUERIES + text]).expand(3, -1)
    expected = reference()(pixel_values=pixel_values, input_ids=input_ids).logits[:, -1]
    prefix = model.project(model.qformer_features(model.image_features(pixel_values)))
    embeds = model.language_model.embed_tokens(torch.tensor(text)).expand(3, -1, -1)
    cache = model.language_model.new_kv_cache(4, prefix.shape[1] + len(text), 5)
    logits = model.language_model.prefill(list(torch.cat([prefix, embeds], 1)), [2, 0, 3], cache)
    assert_close(logits, expected, atol=1e-5, rtol=1e-5)


def test_images_of_another_size_are_refused(model) -> None:
    """The reference fails with a shape error (or interpolates on request); ours names the field."""
    with pytest.raises(ValueError, match=r"pixel_values must be \[B, 3, 28, 28\].*resize"):
        model.image_features(torch.zeros(1, 3, 42, 42))


def test_queries_without_an_image_are_an_error(model) -> None:
    """A Q-Former that skipped its cross-attentions would return meaningless numbers."""
    with pytest.raises(AssertionError, match="queries need an image"):
        model.qformer(model.query_tokens)


def test_both_checkpoint_layouts_give_the_same_captions(tmp_path, checkpoint_folder) -> None:
    """Checkpoints older than transformers 4.47 have no image token; their weights are the same."""
    newer = checkpoint_folder()
    older = tmp_path / "older"
    shutil.copytree(newer, older)
    config = (older / "config.json").read_text()
    older.joinpath("config.json").write_text(
        "\n".join(line for line in config.splitlines() if "image_token_index" not in line)
    )
    requests = [Request(image=i.numpy(), prompt=p) for i in random_images(3) for p in (None, "what is it")]
    token_ids = []
    for folder in (newer, older):
        with EngineConfig(model=str(folder), dtype="float32").build() as engine:
            results = engine.generate(requests, GenerationOptions(max_new_tokens=10))
            token_ids.append([r.token_ids for r in results])
    assert token_ids[0] == token_ids[1]
    assert len(set(token_ids[0])) > 1


def test_a_checkpoint_with_other_tensors_is_refused_by_name(tmp_path, checkpoint_folder, monkeypatch) -> None:
    """transformers fills missing tensors with random numbers and only logs it.

    The names come from the file headers, so the error comes before 15 GB are read.
    """
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_folder(), broken)
    tensors = load_file(broken / "model.safetensors")
    del tensors["vision_model.encoder.layers.1.mlp.fc1.bias"], tensors["query_tokens"]
    tensors["surprise.weight"] = torch.zeros(2)
    tensors["language_projection.bias"] = torch.zeros(7)
    query = "qformer.encoder.layer.0.attention.attention.query.weight"
    tensors[query] = tensors[query][:0].clone()  # this tensor fills a part of a fused weight
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    monkeypatch.setattr(SafetensorsTensor, "pieces", lambda self: pytest.fail("a tensor was read"))
    with pytest.raises(ValueError, match="do not match its config") as refusal:
        load_model(Checkpoint(broken), CPU, torch.float32)
    for name in (
        "3 missing, 1 unexpected, 1 of another shape",
        "missing: qformer.layers.0.qkv.weight",
        "missing: vision.layers.1.fc1.bias",
        "missing: query_tokens",
        "unexpected: surprise.weight",
        "of another shape: language_projection.bias ([7], which does not fit [32])",
    ):
        assert name in str(refusal.value)


def test_a_truncated_weights_file_is_refused_by_name(tmp_path, checkpoint_folder) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(checkpoint_folder(), broken)
    weights = broken / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(OSError, match=r"model.safetensors must be a complete safetensors file"):
        load_model(Checkpoint(broken), CPU, torch.float32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "./no/such/folder"}, "the model must be an existing folder"),
        ({"model": "demo", "device": "cuda:7"}, "device must exist on this machine"),
        ({"model": "demo", "device": "meta"}, "device must be .*got 'meta'"),
        ({"model": "demo", "device": "gpu"}, "device must be .*got 'gpu'"),
        (
            {"model": "demo", "dtype": "float16", "device": "cpu"},
            "dtype must be float32 or bfloat16 on a CPU",
        ),
    ],
)
def test_a_configuration_that_cannot_run_is_refused_before_loading(options, message) -> None:
    with pytest.raises((ValueError, OSError), match=message):
        EngineConfig(**options).info()


@pytest.mark.parametrize(
    ("model_type", "message"),
    [("gpt2", "language model must be opt or t5, got 'gpt2'"), ("llama", "must be opt or t5, got 'llama'")],
)
def test_another_language_model_is_refused_before_loading(
    tmp_path, checkpoint_folder, model_type, message
) -> None:
    config = json.loads((checkpoint_folder() / "config.json").read_text())
    config["text_config"] = {"model_type": model_type}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=message):
        EngineConfig(model=str(tmp_path), device="cpu").info()
