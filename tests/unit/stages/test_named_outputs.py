"""A value in the wrong column or row, or an image encoded twice, would only show after a week of work."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from blip2_actor import EngineConfig, GenerationOptions, ImageLike, Request
from blip2_actor.demo.scenes import SceneSampler, draw
from blip2_actor.testing import FakeEngineConfig, fake_caption, fake_features, fake_score
from pipeline.endpoint.waiting import GivenUp
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.outputs import EmbedKind, Outputs
from pipeline.stages.caption import CaptionStage
from tests.unit.stages.decoded_tables import decoded, pixels_of

ASKS = {"color": "Question: what color? Answer:", "shape": "Question: what shape? Answer:"}
EMBEDS: dict[str, EmbedKind] = {"seen": "vision", "mean": "qformer", "all": "queries"}
DEMO = EngineConfig(model="demo", dtype="float32", num_threads=1, skip_self_test=True)


@pytest.fixture
def stage() -> Iterator[Callable[..., CaptionStage]]:
    """Makes stages, which end with the test."""
    with ExitStack() as made:

        def make(outputs: Outputs, engine: Any = FakeEngineConfig(), **spec: Any) -> CaptionStage:
            return made.enter_context(
                closing(CaptionStage(CaptionSpec(engine=engine, outputs=outputs, **spec)))
            )

        yield make


def vector(image: np.ndarray, kind: EmbedKind) -> list:
    """Return the expected vector of an image."""
    features = fake_features(image)
    assert features.pooler_output is not None and features.qformer_features is not None
    if kind == "vision":
        return features.pooler_output.tolist()
    queries = features.qformer_features
    return (queries if kind == "queries" else queries.mean(axis=0)).tolist()


def test_every_named_column_has_the_values_of_its_row_and_each_image_is_encoded_once(stage):
    outputs = Outputs.of(ASKS, EMBEDS, {"fit": "caption", "sure": "color", "alt": "text"})
    texts = ["a cat", None, "a dog"]
    captioning = stage(outputs, prompt="a photo of")
    rows = captioning(decoded(map(pixels_of, range(3)), text=pa.array(texts))).to_pylist()
    for n, (row, text) in enumerate(zip(rows, texts, strict=True)):
        image = pixels_of(n)
        assert row["caption"] == fake_caption(image, "a photo of")
        assert {name: row[name] for name in ASKS} == {k: fake_caption(image, p) for k, p in ASKS.items()}
        assert {name: row[name] for name in EMBEDS} == {k: vector(image, kind) for k, kind in EMBEDS.items()}
        assert row["fit"] == fake_score(image, row["caption"], "a photo of")
        assert row["sure"] == fake_score(image, row["color"], ASKS["color"])
        assert row["alt"] == (text and fake_score(image, text, "a photo of"))
    assert captioning.actor.stats().num_images_encoded == 3
    assert captioning.actor.stats().num_requests == 9


def test_the_real_engine_encodes_each_image_once(stage):
    outputs = Outputs.of(ASKS, {"mean": "qformer"}, {"fit": "caption"})
    images = np.asarray(draw(SceneSampler("held_out", 0).sample(3), 64))
    captioning = stage(outputs, engine=DEMO, options=GenerationOptions(max_new_tokens=30))
    rows = captioning(decoded(images)).to_pylist()
    assert captioning.actor.stats().num_images_encoded == 3
    for row in rows:
        assert row["status"] == "ok"
        assert abs(row["fit"] - row["logprob"]) < 1e-3, "the score of a caption is its log-probability"
        assert row["color"] is not None and any(row["mean"])


def test_images_are_released_with_their_piece(stage, monkeypatch):
    """An encoded image holds device memory, and a call has hundreds of them."""
    images = np.asarray(draw(SceneSampler("held_out", 0).sample(6), 64))
    outputs = Outputs.of(ASKS, {"mean": "qformer"})
    captioning = stage(outputs, engine=DEMO, options=GenerationOptions(max_new_tokens=3))
    references: list[weakref.ref] = []
    original = captioning.actor.engine.image

    def remember(image: ImageLike) -> ImageLike:
        handle = original(image)
        references.append(weakref.ref(handle))
        return handle

    monkeypatch.setattr(captioning.actor.engine, "image", remember)
    pieces = captioning.finish_rows(decoded(images), range(6), piece_rows=3)
    next(pieces)
    captioning.actor.close()
    assert [reference() is None for reference in references] == [True] * 3 + [False] * 3


def test_a_row_that_has_failed_has_no_named_values(stage):
    outputs = Outputs.of({"color": ASKS["color"]}, EMBEDS, {"alt": "text"})
    table = decoded(
        map(pixels_of, range(3)),
        text=["x" * 1000, "short", "short"],
        status=pa.array(["ok", "ok", "too_large"]),
    )
    rows = stage(outputs)(table).to_pylist()
    assert [row["status"] for row in rows] == ["refused", "ok", "too_large"]
    assert rows[0]["error"] == "alt: text is too long"
    for name in ("caption", *outputs.names):
        assert [row[name] is None for row in rows] == [True, False, True], name


def test_each_row_has_its_own_prompt_next_to_the_asks(stage):
    table = decoded(map(pixels_of, range(2)), own_prompt=["one", "two"])
    rows = stage(Outputs.of(ASKS), prompt_column="own_prompt")(table).to_pylist()
    assert [row["caption"] for row in rows] == [
        fake_caption(pixels_of(n), prompt) for n, prompt in enumerate(("one", "two"))
    ]
    assert [row["shape"] for row in rows] == [fake_caption(pixels_of(n), ASKS["shape"]) for n in range(2)]


def test_several_captions_are_made_but_one_text_per_answer(stage, monkeypatch):
    """More texts per answer would take slots and be discarded."""
    options = GenerationOptions(num_beams=3, num_return_sequences=3)
    captioning = stage(Outputs.of(ASKS), options=options)
    seen: list[GenerationOptions] = []
    submit = captioning.actor.submit

    def remember(request: Request):
        seen.append(request.options or options)
        return submit(request)

    monkeypatch.setattr(captioning.actor, "submit", remember)
    [row] = captioning(decoded([pixels_of(0)])).to_pylist()
    assert len(row["captions"]) == 3
    assert [row[name] for name in ASKS] == [fake_caption(pixels_of(0), prompt) for prompt in ASKS.values()]
    assert [(one.num_beams, one.num_return_sequences) for one in seen] == [(3, 3), (3, 1), (3, 1)]


def test_without_captions_no_text_is_requested(stage):
    captioning = stage(Outputs(caption=False, embed=("v=vision",)))
    table = captioning(decoded(map(pixels_of, range(4))))
    assert table["v"].to_pylist() == [vector(pixels_of(n), "vision") for n in range(4)]
    assert captioning.actor.stats().num_requests == 0
    assert not {"caption", "logprob", "finish_reason"} & set(table.column_names)
    assert {"flags", "status", "error", "width", "height", "sha256"} <= set(table.column_names)


def test_pieces_have_the_outputs_that_are_made_for_several_rows_at_once(stage):
    captioning = stage(Outputs.of(embeds=EMBEDS))
    table = decoded(map(pixels_of, range(5)))
    pieces = list(captioning.finish_rows(table, range(5), piece_rows=2))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    rows = [row for piece in pieces for row in captioning.with_results(table, piece).to_pylist()]
    assert [row["seen"] for row in rows] == [vector(pixels_of(n), "vision") for n in range(5)]


def test_rows_are_left_out_when_the_job_stops_while_its_endpoint_is_gone(stage, monkeypatch):
    """This is not an engine fault, which would end the process and count against these rows."""
    captioning = stage(Outputs.of(embeds=EMBEDS))
    table = decoded(map(pixels_of, range(4)))
    features = captioning.actor.engine.features
    num_calls = 0

    def stop_later(images):
        nonlocal num_calls
        num_calls += 1
        if num_calls > 1:
            raise GivenUp
        return features(images)

    monkeypatch.setattr(captioning.actor.engine, "features", stop_later)
    pieces = list(captioning.finish_rows(table, range(4), piece_rows=2))
    assert [position for piece in pieces for position, _ in piece] == [0, 1]


def test_only_captions_with_flags_are_generated_again(stage):
    table = decoded(map(pixels_of, range(2)), own_prompt=pa.array(["a photo of", None]))
    flagged = stage(Outputs(), prompt_column="own_prompt")(table).to_pylist()
    assert [row["flags"] for row in flagged] == [["echoes_prompt"], []]
    captioning = stage(Outputs(regenerate=True, score=("fit=caption",)), prompt_column="own_prompt")
    rows = captioning(table).to_pylist()
    assert [row["flags"] for row in rows] == [["regenerated"], []]
    assert [row["caption"] for row in rows] == [fake_caption(pixels_of(n)) for n in range(2)]
    assert rows[0]["fit"] == fake_score(pixels_of(0), rows[0]["caption"], "a photo of")
    assert captioning.actor.stats().num_requests == 3
    assert captioning.actor.stats().num_images_encoded == 2
