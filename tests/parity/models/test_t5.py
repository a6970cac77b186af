"""T5 in slots against transformers' T5, piece by piece, in float32; and that float16 stays finite."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Blip2ForConditionalGeneration, T5ForConditionalGeneration

from blip2_actor.checkpoints.checkpoint import Checkpoint
from blip2_actor.checkpoints.loading import load_model
from blip2_actor.models.t5 import T5
from blip2_actor.models.t5_kv_cache import T5KVCache

VARIANTS: dict[str, dict[str, Any]] = {
    "flan": {},
    "tied heads, plain ReLU": {"tie_word_embeddings": True, "feed_forward_proj": "relu"},
    "heads narrower than the model, fewer decoder layers": {"d_kv": 4, "num_decoder_layers": 2},
}
LENGTHS = [6, 40, 6, 150]
"""Prefixes of several lengths; the longest reaches every range of the relative position bias."""
START = 1


def load(folder: Path, dtype: torch.dtype = torch.float32) -> T5:
    language_model = load_model(Checkpoint(folder), torch.device("cpu"), dtype).language_model
    assert isinstance(language_model, T5)
    return language_model


@pytest.fixture(params=VARIANTS, scope="module")
def models(
    request: pytest.FixtureRequest,
    checkpoint_folder: Callable[..., Path],
    reference: Callable[..., Blip2ForConditionalGeneration],
) -> tuple[T5, T5ForConditionalGeneration]:
    options = VARIANTS[request.param]
    return load(checkpoint_folder("t5", **options)), reference("t5", **options).language_model


def make_prefixes(lengths: list[int], width: int = 32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(length, width, generator=generator) for length in lengths]


@torch.no_grad()
def expected_logits(reference: T5ForConditionalGeneration, prefix: Tensor, token_ids: list[int]) -> Tensor:
    """float[U + 1, V]: behind the start token and behind each of `token_ids`."""
    decoder_ids = torch.tensor([[START, *token_ids]])
    return reference(inputs_embeds=prefix[None], decoder_input_ids=decoder_ids).logits[0]


@torch.no_grad()
def step(t5: T5, slots: T5KVCache, texts: list[list[int]]) -> Tensor:
    """Decode the last token of each text; slot i holds text i."""
    token_ids, lengths = (torch.tensor(x) for x in zip(*((t[-1], len(t)) for t in texts), strict=True))
    return t5.decode(token_ids, lengths, slots, max(len(t) for t in texts) + 1)


@torch.no_grad()
def test_encoder_of_packed_prefixes(models: tuple[T5, T5ForConditionalGeneration]) -> None:
    """A prefix that saw its neighbours in the packing, or a bias of the wrong range, would differ."""
    t5, reference = models
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(5, 260, (length,), generator=generator) for length in LENGTHS]
    for text, features in zip(texts, t5.text_features(texts), strict=True):
        expected = reference.get_encoder()(input_ids=text[None]).last_hidden_state[0]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_in_slots(models: tuple[T5, T5ForConditionalGeneration]) -> None:
    """Mixed prefixes that join at different steps give the reference's ids and logits at every step."""
    t5, reference = models
    prefixes = make_prefixes(LENGTHS)
    slots = t5.new_kv_cache(4, 150, 12)
    texts: list[list[int]] = [[], [], [], []]
    first = [t5.prefill(prefixes[:2], [1, 0], slots), None]
    first[1] = t5.prefill(prefixes[2:], [2, 3], slots)
    for i, slot in enumerate([1, 0, 2, 3]):
        row = torch.cat(first)[i]
        torch.testing.assert_close(row, expected_logits(reference, prefixes[i], [])[0], rtol=1e-4, atol=1e-4)
        texts[slot].append(int(row.argmax()))
    for _ in range(7):
        for text, row in zip(texts, step(t5, slots, texts), strict=True):
            text.append(int(row.argmax()))
    for i, slot in enumerate([1, 0, 2, 3]):
        ids = reference.generate(
            inputs_embeds=prefixes[i][None],
            min_new_tokens=8,
            max_new_tokens=8,
            do_sample=False,
            eos_token_id=263,
        )
        assert texts[slot] == ids[0, 1:].tolist()


@torch.no_grad()
def test_forks_reorders_and_growth(models: tuple[T5, T5ForConditionalGeneration]) -> None:
    """A text moved between slots takes its prefix, its length and its tokens along."""
    t5, reference = models
    short, long = make_prefixes([6, 70])
    slots = t5.new_kv_cache(4, 6, 4)
    assert slots.holds(6, 4) and not slots.holds(6, 5) and not slots.holds(7, 4)
    t5.prefill([short], [0], slots)
    slots.grow(70, 4)
    assert slots.holds(70, 4)
    t5.prefill([long], [1], slots)
    step(t5, slots, [[7], [8]])
    slots.grow(6, 20)
    assert slots.holds(70, 20)
    slots.copy_slots([0, 1, 1], [1, 0, 2], 2)  # swap, and one more of the long text: now long, short, long
    step(t5, slots, [[8, 9], [7, 10], [8, 11]])
    slots.copy_positions([2], [0], 2, 3)  # texts 0 and 2 differ from position 2 on
    logits = step(t5, slots, [[8, 11, 12], [7, 10, 13], [8, 11, 14]])
    expected = [(long, [8, 11, 12]), (short, [7, 10, 13]), (long, [8, 11, 14])]
    for row, (prefix, ids) in zip(logits, expected, strict=True):
        torch.testing.assert_close(row, expected_logits(reference, prefix, ids)[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_given_texts_of_mixed_lengths(models: tuple[T5, T5ForConditionalGeneration]) -> None:
    """Texts longer than the bias has ranges for, several per length of prefix, an empty one among them."""
    t5, reference = models
    prefixes = make_prefixes([6, 40, 6, 6, 40, 6])
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(5, 260, (n,), generator=generator) for n in (150, 3, 3, 3, 5, 0)]
    for prefix, text, logits in zip(prefixes, texts, t5.predict(prefixes, texts), strict=True):
        expected = expected_logits(reference, prefix, text.tolist())[: len(text)]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_long_decode_equals_given_text(checkpoint_folder: Callable[..., Path]) -> None:
    """The bias of one step at a time is that of the whole text, beyond its last exact distance too."""
    t5 = load(checkpoint_folder("t5"))
    (prefix,) = make_prefixes([6])
    text = torch.randint(5, 260, (140,), generator=torch.Generator().manual_seed(4))
    slots = t5.new_kv_cache(1, 6, 140)
    rows = [t5.prefill([prefix], [0], slots)]
    rows += [step(t5, slots, [text[: i + 1].tolist()]) for i in range(139)]
    torch.testing.assert_close(torch.cat(rows), t5.predict([prefix], [text])[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_float16_survives_large_activations(checkpoint_folder: Callable[..., Path]) -> None:
    """Flan-T5's feed-forward leaves float16's range: a plain cast gives NaN, ours the float32 answer."""
    folder = checkpoint_folder("t5")
    exact, ours, plain = load(folder), load(folder, torch.float16), load(folder, torch.float16)
    for model in (exact, ours):
        enlarge(model)
    enlarge(plain.float()).half()
    prefixes = make_prefixes([6, 40])
    expected, got, naive = (
        model.prefill([p.to(dtype) for p in prefixes], [0, 1], model.new_kv_cache(2, 40, 4))
        for model, dtype in ((exact, torch.float32), (ours, torch.float16), (plain, torch.float16))
    )
    assert naive.isnan().any(), "the scale is too small to show the trouble"
    assert got.dtype is torch.float16
    torch.testing.assert_close(got.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def enlarge(model: T5) -> T5:
    for layer in (*model.encoder, *model.decoder):
        layer.wi.weight.mul_(60)
        layer.wo.weight.mul_(200)
    return model


@torch.no_grad()
def test_float16_attention_that_overflows_stays_finite(checkpoint_folder: Callable[..., Path]) -> None:
    """One infinite channel would make the norm behind it NaN, and with it the whole text."""
    t5 = load(checkpoint_folder("t5"), torch.float16)
    for layer in (*t5.encoder, *t5.decoder):
        layer.out_proj.weight.fill_(60000)
    (prefix,) = make_prefixes([6])
    assert t5.prefill([prefix.half()], [0], t5.new_kv_cache(1, 6, 4)).isfinite().all()


@torch.no_grad()
def test_bfloat16_is_close(checkpoint_folder: Callable[..., Path]) -> None:
    exact, rounded = load(checkpoint_folder("t5")), load(checkpoint_folder("t5"), torch.bfloat16)
    prefixes = make_prefixes(LENGTHS)
    expected = exact.prefill(prefixes, [0, 1, 2, 3], exact.new_kv_cache(4, 150, 4))
    got = rounded.prefill(
        [p.bfloat16() for p in prefixes], [0, 1, 2, 3], rounded.new_kv_cache(4, 150, 4)
    ).float()
    torch.testing.assert_close(got, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_head_is_shared_unless_the_checkpoint_stores_one(checkpoint_folder: Callable[..., Path]) -> None:
    """The configuration cannot tell: transformers 5 writes tie_word_embeddings=true for every T5."""
    own = load(checkpoint_folder("t5"))
    assert own.lm_head.weight is not own.embed_tokens.weight
    shared = load(checkpoint_folder("t5", tie_word_embeddings=True))
    assert shared.lm_head.weight is shared.embed_tokens.weight


def test_stored_copies_of_the_embeddings_must_agree(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Older checkpoints store the embeddings up to three times, and a bias table that nothing reads."""
    folder = checkpoint_folder("t5")
    for file in folder.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["language_model.encoder.embed_tokens.weight"] = tensors["language_model.shared.weight"].clone()
    unread = "language_model.decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    tensors[unread] = torch.zeros(32, 4)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    load(tmp_path)
    tensors["language_model.encoder.embed_tokens.weight"] += 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="differs from the tensor that it should equal"):
        load(tmp_path)
