"""Hidden states and attention maps of all parts of the model equal the reference's, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.testing import assert_close
from transformers import Blip2ForConditionalGeneration, Blip2Model

from blip2_actor import Engine, EngineConfig, Request, Status
from blip2_actor.testing import EOS_TOKEN_ID, IMAGE_TOKEN_ID, NUM_QUERIES, random_images, tiny_tokenizer

BOTH = {"output_hidden_states": True, "output_attentions": True}
PICTURES = random_images(2)


@pytest.fixture(scope="module", params=["opt", "t5"])
def language(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def engine(checkpoint_folder: Callable[..., Path], language: str) -> Iterator[Engine]:
    """Its linear layers are packed, as in engines of users."""
    config = EngineConfig(
        model=str(checkpoint_folder(language)), dtype="float32", device="cpu", num_threads=1
    )
    with Engine(config) as started:
        yield started


@pytest.fixture(scope="module")
def eager(checkpoint_folder: Callable[..., Path], language: str) -> Blip2ForConditionalGeneration:
    """The reference with eager attention: its faster ones return no maps."""
    return Blip2ForConditionalGeneration.from_pretrained(
        checkpoint_folder(language), attn_implementation="eager"
    ).eval()


def assert_equal(found: dict[str, np.ndarray] | None, expected: dict[str, Tensor]) -> None:
    assert found is not None and list(found) == list(expected)
    for name, wanted in expected.items():
        assert_close(torch.from_numpy(found[name]), wanted, atol=1e-5, rtol=1e-5)


def states_by_name(part: str, states: Sequence[Tensor], row: int = 0) -> dict[str, Tensor]:
    """Names of the stacks whose last state the reference returns without the final norm."""
    named = {f"{part}.layers.{i}": s[row] for i, s in enumerate(states[1:])}
    return {f"{part}.embeddings": states[0][row], **named}


def normed_states_by_name(part: str, states: Sequence[Tensor], row: int = 0) -> dict[str, Tensor]:
    """The reference returns the state after the final norm in place of the last layer's own."""
    return states_by_name(part, states[:-1], row) | {f"{part}.last_hidden_state": states[-1][row]}


def without_last_layers(states: dict[str, np.ndarray] | None) -> dict[str, np.ndarray]:
    """Leave out the state that the reference does not return: a stack's last layer before the final norm."""
    assert states is not None
    names = list(states)
    last = {before for before, name in pairwise(names) if "last_hidden" in name}
    return {name: value for name, value in states.items() if name not in last}


@torch.no_grad()
def test_both_encoders(engine, eager) -> None:
    vision = eager.vision_model(engine.model.normalizer(PICTURES, torch.float32), **BOTH)
    queries = eager.query_tokens.expand(2, -1, -1)
    qformer = eager.qformer(queries, encoder_hidden_states=vision.last_hidden_state, **BOTH)
    pictures = [*(picture.numpy() for picture in PICTURES), b"junk"]
    found = engine.features(pictures, with_hidden_states=True, with_attention_maps=True)
    bad = found.pop()
    assert bad.status is Status.UNDECODABLE and bad.hidden_states is bad.attention_maps is None
    for row, features in enumerate(found):
        expected = states_by_name("vision", vision.hidden_states, row)
        expected |= states_by_name("qformer", qformer.hidden_states, row)
        assert_equal(features.hidden_states, expected)
        maps = {f"vision.layers.{i}.self_attention": m[row] for i, m in enumerate(vision.attentions)}
        kinds = ("0.self", "0.cross", "1.self", "2.self", "2.cross", "3.self")
        names = [f"qformer.layers.{kind}" for kind in kinds]
        # The reference lists cross-attentions among the self-attentions too, in the order of computation.
        assert len(qformer.attentions) == len(names)
        maps |= {f"{n}_attention": m[row] for n, m in zip(names, qformer.attentions, strict=True)}
        assert_close(maps["qformer.layers.2.cross_attention"], qformer.cross_attentions[1][row])
        assert_equal(features.attention_maps, maps)


def test_maps_of_the_qformer_alone_take_one_pass_of_the_vision_encoder(engine: Engine) -> None:
    """The endpoint needs the maps for every answer that says where the model looked."""
    [expected] = engine.features([PICTURES[0].numpy()], with_attention_maps=True)
    num_passes = 0

    def count(*_: object) -> None:
        nonlocal num_passes
        num_passes += 1

    hook = engine.model.vision.register_forward_hook(count)
    try:
        image = engine.image(PICTURES[0].numpy())
        image.keeps_image_embeds = True
        engine.submit(Request(image=image)).result()
        [found] = engine.features([image], with_attention_maps="qformer.*.cross_attention")
    finally:
        hook.remove()
    assert num_passes == 1
    assert found.image_embeds is None and expected.attention_maps is not None
    cross = {name: torch.from_numpy(one) for name, one in expected.attention_maps.items() if "cross" in name}
    assert len(cross) == 2
    assert_equal(found.attention_maps, cross)


@torch.no_grad()
def test_the_language_model_reads_image_prompt_and_text(engine, eager, language) -> None:
    tokenizer = tiny_tokenizer(language)
    prompt_ids = tokenizer("Question: who? Answer:").input_ids
    text_ids = [*tokenizer("a cat", add_special_tokens=False).input_ids, EOS_TOKEN_ID]
    ids = [IMAGE_TOKEN_ID] * NUM_QUERIES + prompt_ids + (text_ids[:-1] if language == "opt" else [])
    outputs = eager(
        pixel_values=engine.model.normalizer(PICTURES[:1], torch.float32),
        input_ids=torch.tensor([ids]),
        labels=torch.tensor([ids if language == "opt" else text_ids]),
        **BOTH,
    ).language_model_outputs
    (score,) = engine.score(
        [PICTURES[0].numpy()],
        ["a cat"],
        ["Question: who? Answer:"],
        with_hidden_states=True,
        with_attention_maps=True,
    )
    if language == "opt":
        states = normed_states_by_name("language_model", outputs.hidden_states)
        maps = {f"language_model.layers.{i}.self_attention": m[0] for i, m in enumerate(outputs.attentions)}
    else:
        states = normed_states_by_name("language_model.encoder", outputs.encoder_hidden_states)
        states |= normed_states_by_name("language_model.decoder", outputs.decoder_hidden_states)
        encoder, decoder = "language_model.encoder.layers", "language_model.decoder.layers"
        maps = {f"{encoder}.{i}.self_attention": m[0] for i, m in enumerate(outputs.encoder_attentions)}
        pairs = zip(outputs.decoder_attentions, outputs.cross_attentions, strict=True)
        for i, (self_attention, cross_attention) in enumerate(pairs):
            maps[f"{decoder}.{i}.self_attention"] = self_attention[0]
            maps[f"{decoder}.{i}.cross_attention"] = cross_attention[0]
    assert_equal(without_last_layers(score.hidden_states), states)
    assert_equal(score.attention_maps, maps)
    plain = engine.score([PICTURES[0].numpy()], ["a cat"], ["Question: who? Answer:"])[0]
    assert plain.logprob == pytest.approx(score.logprob, abs=1e-5) and plain.hidden_states is None


@torch.no_grad()
@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_with_attention_masks(engine, checkpoint_folder, language, side) -> None:
    """The reference pads a batch of texts and masks the padding; the same ids and masks may be given here."""
    model = Blip2Model.from_pretrained(checkpoint_folder(language), attn_implementation="eager").eval()
    texts = ["a cat", "two dogs on a sofa"]
    tokenizer = tiny_tokenizer(language)
    tokenizer.padding_side = side
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    outputs = model.get_text_features(batch.input_ids, batch.attention_mask, **BOTH)
    part = "language_model" if language == "opt" else "language_model.encoder"
    found = engine.text_features(
        list(batch.input_ids),
        batch.attention_mask.tolist(),
        with_hidden_states=True,
        with_attention_maps=True,
    )
    by_text = engine.text_features(texts)
    for row, features in enumerate(found):
        kept = batch.attention_mask[row].bool()
        assert_close(torch.from_numpy(features.features), outputs.last_hidden_state[row, kept])
        states = normed_states_by_name(part, outputs.hidden_states, row)
        assert_equal(without_last_layers(features.hidden_states), {n: s[kept] for n, s in states.items()})
        maps = {f"{part}.layers.{i}.self_attention": m[row] for i, m in enumerate(outputs.attentions)}
        assert_equal(features.attention_maps, {name: m[:, kept][:, :, kept] for name, m in maps.items()})
        assert_close(features.features, by_text[row].features)


def test_only_what_is_named_is_returned(engine, language) -> None:
    """All maps of a large vision encoder take hundreds of megabytes per image."""
    picture = PICTURES[0].numpy()
    (features,) = engine.features(
        [picture], with_attention_maps=["qformer.*.cross_attention"], with_hidden_states="vision.layers.0"
    )
    assert list(features.attention_maps) == [f"qformer.layers.{i}.cross_attention" for i in (0, 2)]
    assert list(features.hidden_states) == ["vision.layers.0"] and features.image_embeds is None
    with pytest.raises(
        ValueError, match=r"with_attention_maps must be .* of vision\.layers\.0\.self_attention, .* got 'x'"
    ):
        engine.features([picture], with_attention_maps=["vision.*", "x"])
    with pytest.raises(TypeError, match="with_hidden_states must be true, false or a list of names, got int"):
        engine.text_features(["a"], with_hidden_states=3)
    assert engine.features([b"junk"], with_attention_maps=["x"])[0].status is Status.UNDECODABLE


@pytest.mark.parametrize(
    ("text", "mask", "message"),
    [
        ([5, 6, 7], [1, 0, 1], "zeros before and after the text"),
        ([5, 6, 7], [1, 1], "a 0 or 1 for each of the 3 tokens"),
        ([5, 6, 7], [1, 2, 1], "a 0 or 1 for each of the 3 tokens"),
        ([5], [0], "leave at least one token"),
        ([], None, "at least one token"),
        ([5, -1], None, "token ids from 0"),
        ([1 << 40], None, "only tokens that the model knows"),
        (b"abc", None, "must be a str or token ids"),
        (None, None, "must be a str or token ids"),
    ],
)
def test_a_bad_mask_or_bad_ids_are_an_entry_with_a_status(engine, text, mask, message) -> None:
    """Other texts in the same call are still read."""
    bad, good = engine.text_features([text, "a cat"], [mask, None])
    assert bad.status is Status.REFUSED and message in bad.error and good.features is not None
