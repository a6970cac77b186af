"""Our T5 against transformers' T5, part by part, in float32; float16 stays finite."""

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
"""Lengths of prefixes; the longest uses every range of the relative position bias."""
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
    """float[U + 1, V]: the logits after the start token and after each of `token_ids`."""
    decoder_ids = torch.tensor([[START, *token_ids]])
    return reference(inputs_embeds=prefix[None], decoder_input_ids=decoder_ids).logits[0]


@torch.no_grad()
def decode_step(t5: T5, cache: T5KVCache, texts: list[list[int]]) -> Tensor:
    """Append the last token of each text to its slot; slot i holds text i."""
    token_ids, lengths = (torch.tensor(x) for x in zip(*((t[-1], len(t)) for t in texts), strict=True))
    return t5.decode(token_ids, lengths, cache, max(len(t) for t in texts) + 1)


@torch.no_grad()
def test_encoder_of_packed_prefixes(models: tuple[T5, T5ForConditionalGeneration]) -> None:
    """A prefix that attended to others in the packing, or a wrong bias range, would change the features."""
    t5, reference = models
    generator = torch.Generator().manual_seed(2)
    texts = [torch.randint(5, 260, (length,), generator=generator) for length in LENGTHS]
    for text, features in zip(texts, t5.text_features(texts), strict=True):
        expected = reference.get_encoder()(input_ids=text[None]).last_hidden_state[0]
        torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_greedy_search_in_slots(models: tuple[T5, T5ForConditionalGeneration]) -> None:
    """Prefixes of different lengths, prefilled in two calls, give the reference's ids and first logits."""
    t5, reference = models
    prefixes = make_prefixes(LENGTHS)
    cache = t5.new_kv_cache(4, 150, 12)
    texts: list[list[int]] = [[], [], [], []]
    first_logits = torch.cat(
        [t5.prefill(prefixes[:2], [1, 0], cache), t5.prefill(prefixes[2:], [2, 3], cache)]
    )
    for i, slot in enumerate([1, 0, 2, 3]):
        row = first_logits[i]
        torch.testing.assert_close(row, expected_logits(reference, prefixes[i], [])[0], rtol=1e-4, atol=1e-4)
        texts[slot].append(int(row.argmax()))
    for _ in range(7):
        for text, row in zip(texts, decode_step(t5, cache, texts), strict=True):
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
def test_slots_are_copied_swapped_and_grown(models: tuple[T5, T5ForConditionalGeneration]) -> None:
    """A text copied to another slot keeps its prefix, length and tokens."""
    t5, reference = models
    short, long = make_prefixes([6, 70])
    cache = t5.new_kv_cache(4, 6, 4)
    assert cache.holds(6, 4) and not cache.holds(6, 5) and not cache.holds(7, 4)
    t5.prefill([short], [0], cache)
    cache.grow(70, 4)
    assert cache.holds(70, 4)
    t5.prefill([long], [1], cache)
    decode_step(t5, cache, [[7], [8]])
    cache.grow(6, 20)
    assert cache.holds(70, 20)
    cache.copy_slots([0, 1, 1], [1, 0, 2], 2)  # swap two and copy the long text: now long, short, long
    decode_step(t5, cache, [[8, 9], [7, 10], [8, 11]])
    cache.copy_positions([2], [0], 2, 3)  # texts 0 and 2 differ from position 2 on
    logits = decode_step(t5, cache, [[8, 11, 12], [7, 10, 13], [8, 11, 14]])
    expected = [(long, [8, 11, 12]), (short, [7, 10, 13]), (long, [8, 11, 14])]
    for row, (prefix, ids) in zip(logits, expected, strict=True):
        torch.testing.assert_close(row, expected_logits(reference, prefix, ids)[-1], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_given_texts_of_mixed_lengths(models: tuple[T5, T5ForConditionalGeneration]) -> None:
    """Some texts are longer than the last range of the bias, some have equal lengths, and one is empty."""
    t5, reference = models
    prefixes = make_prefixes([6, 40, 6, 6, 40, 6])
    generator = torch.Generator().manual_seed(3)
    texts = [torch.randint(5, 260, (n,), generator=generator) for n in (150, 3, 3, 3, 5, 0)]
    for prefix, text, logits in zip(prefixes, texts, t5.predict(prefixes, texts), strict=True):
        expected = expected_logits(reference, prefix, text.tolist())[: len(text)]
        torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_many_decode_steps_equal_one_given_text(checkpoint_folder: Callable[..., Path]) -> None:
    """Decode steps use the same bias as a whole text, even beyond the last exact distance."""
    t5 = load(checkpoint_folder("t5"))
    (prefix,) = make_prefixes([6])
    text = torch.randint(5, 260, (140,), generator=torch.Generator().manual_seed(4))
    cache = t5.new_kv_cache(1, 6, 140)
    rows = [t5.prefill([prefix], [0], cache)]
    rows += [decode_step(t5, cache, [text[: i + 1].tolist()]) for i in range(139)]
    torch.testing.assert_close(torch.cat(rows), t5.predict([prefix], [text])[0], rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_float16_is_close_for_large_activations(checkpoint_folder: Callable[..., Path]) -> None:
    """Flan-T5's feed-forward exceeds float16: a plain cast gives NaN, ours is close to float32."""
    folder = checkpoint_folder("t5")
    exact, ours, plain = load(folder), load(folder, torch.float16), load(folder, torch.float16)
    for model in (exact, ours):
        enlarge(model)
    enlarge(plain.float()).half()
    prefixes = make_prefixes([6, 40])
    expected, logits, plain_logits = (
        model.prefill([p.to(dtype) for p in prefixes], [0, 1], model.new_kv_cache(2, 40, 4))
        for model, dtype in ((exact, torch.float32), (ours, torch.float16), (plain, torch.float16))
    )
    assert plain_logits.isnan().any(), "the weights are too small to overflow float16"
    assert logits.dtype is torch.float16
    torch.testing.assert_close(logits.float(), expected, rtol=0.02, atol=0.02 * float(expected.abs().max()))


def enlarge(model: T5) -> T5:
    for layer in (*model.encoder, *model.decoder):
        layer.wi.weight.mul_(60)
        layer.wo.weight.mul_(200)
    return model


@torch.no_grad()
def test_float16_attention_that_overflows_stays_finite(checkpoint_folder: Callable[..., Path]) -> None:
    """One infinite channel would make the next norm NaN, and with it the whole text."""
    t5 = load(checkpoint_folder("t5"), torch.float16)
    for layer in (*t5.encoder, *t5.decoder):
        layer.out_proj.weight.fill_(60000)
    (prefix,) = make_prefixes([6])
    assert t5.prefill([prefix.half()], [0], t5.new_kv_cache(1, 6, 4)).isfinite().all()


@torch.no_grad()
def test_bfloat16_is_close_to_float32(checkpoint_folder: Callable[..., Path]) -> None:
    exact, rounded = load(checkpoint_folder("t5")), load(checkpoint_folder("t5"), torch.bfloat16)
    prefixes = make_prefixes(LENGTHS)
    expected = exact.prefill(prefixes, [0, 1, 2, 3], exact.new_kv_cache(4, 150, 4))
    logits = rounded.prefill(
        [p.bfloat16() for p in prefixes], [0, 1, 2, 3], rounded.new_kv_cache(4, 150, 4)
    ).float()
    torch.testing.assert_close(logits, expected, rtol=0, atol=0.05 * float(expected.abs().max()))


def test_head_is_shared_unless_the_checkpoint_stores_one(checkpoint_folder: Callable[..., Path]) -> None:
    """The configuration does not say: transformers 5 writes tie_word_embeddings=true for every T5."""
    own = load(checkpoint_folder("t5"))
    assert own.lm_head.weight is not own.embed_tokens.weight
    shared = load(checkpoint_folder("t5", tie_word_embeddings=True))
    assert shared.lm_head.weight is shared.embed_tokens.weight


def test_stored_copies_of_the_embeddings_must_agree(
    checkpoint_folder: Callable[..., Path], tmp_path: Path
) -> None:
    """Older checkpoints store the embeddings up to three times, and an unused bias table."""
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
