"""`/v1/score`, `/v1/match`, `/v1/rerank` and `/v1/embed`, with and without a retrieval model."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest

from blip2_actor import EngineConfig, MatchingConfig
from blip2_actor.testing import (
    fake_features,
    fake_score,
    save_tiny_checkpoint,
    save_tiny_retrieval_checkpoint,
)
from tests.unit.deploy.routes.engine_service import (
    EngineService,
    ask,
    base64_of,
    data_uri,
    error_of,
    pixels_of,
    png,
    post,
)

IMAGE = png(1)
LARGE = png(1, 64)
TEXTS = ["a dog", "a red circle", "two cats"]


@pytest.fixture(scope="module")
def captioning() -> EngineService:
    return EngineService()


@pytest.fixture(scope="module")
def retrieval(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EngineService]:
    folder = tmp_path_factory.mktemp("checkpoints")
    engine = EngineConfig(
        model=str(save_tiny_checkpoint(folder / "captioning")),
        device="cpu",
        dtype="float32",
        skip_self_test=True,
    )
    matching = MatchingConfig(
        model=str(save_tiny_retrieval_checkpoint(folder / "retrieval")), device="cpu", dtype="float32"
    )
    service = EngineService(engine, matching=matching)
    yield service
    service.captioner.__del__()


def test_scores_are_those_of_the_engine(captioning: EngineService) -> None:
    answer = post(captioning, "/v1/score", image=base64_of(IMAGE), texts=TEXTS, prompt="a photo of").json()
    expected = [fake_score(pixels_of(IMAGE), text, "a photo of") for text in TEXTS]
    assert [score["logprob"] for score in answer["scores"]] == expected
    assert [score["text"] for score in answer["scores"]] == TEXTS
    form = ask(
        captioning, "POST", "/v1/score", files={"image": ("x.png", IMAGE)}, data={"texts": '["a dog"]'}
    )
    assert form.json()["scores"][0]["logprob"] == fake_score(pixels_of(IMAGE), "a dog")


def test_texts_are_ranked_for_an_image_and_images_for_a_text(captioning: EngineService) -> None:
    answer = post(
        captioning,
        "/v1/rerank",
        query={"image": base64_of(IMAGE)},
        documents=[TEXTS[0], {"text": TEXTS[1]}, TEXTS[2]],
        top_n=2,
        return_documents=True,
    ).json()
    expected = {index: math.exp(fake_score(pixels_of(IMAGE), text)) for index, text in enumerate(TEXTS)}
    best = sorted(expected, key=lambda index: -expected[index])[:2]
    assert [(one["index"], one["relevance_score"]) for one in answer["results"]] == [
        (index, expected[index]) for index in best
    ]
    assert [one["document"] for one in answer["results"]] == [{"text": TEXTS[index]} for index in best]
    assert answer["scored_by"] == "likelihood"
    images = [png(seed) for seed in range(3)]
    documents = [data_uri(images[0]), {"image": base64_of(images[1])}, {"image": data_uri(images[2])}]
    answer = post(captioning, "/v1/rerank", query="a dog", documents=documents).json()
    scores = [math.exp(fake_score(pixels_of(image), "a dog")) for image in images]
    assert [one["relevance_score"] for one in answer["results"]] == sorted(scores, reverse=True)
    assert captioning.costs[-1].slots == 3


def test_the_error_of_one_of_several_images_names_its_place(captioning: EngineService) -> None:
    good, bad = data_uri(IMAGE), data_uri(b"no image")
    for path, field, others in (
        ("/v1/rerank", "documents", {"query": "a dog"}),
        ("/v1/embeddings", "input", {"model": "demo"}),
    ):
        code, kind, message = error_of(post(captioning, path, **others, **{field: [good, good, bad]}))
        assert (code, kind) == (422, "undecodable") and message.startswith(f"{field}.2: ")
        message = error_of(post(captioning, path, **others, **{field: [good, bad[:-1]]}))[2]
        assert message.startswith(f"{field}.1 must be base64")
        assert not error_of(post(captioning, path, **others, **{field: [bad]}))[2].startswith(field)


@pytest.mark.parametrize(
    ("query", "documents"),
    [
        ("a dog", ["a cat"]),
        ({"image": base64_of(IMAGE)}, ["a cat", {"image": base64_of(IMAGE)}]),
        ({"image": base64_of(IMAGE), "text": "both"}, ["a cat"]),
        ("a dog", []),
    ],
)
def test_only_texts_and_images_are_compared(captioning: EngineService, query, documents) -> None:
    response = post(captioning, "/v1/rerank", query=query, documents=documents)
    assert error_of(response)[:2] == (400, "bad_request")


def test_an_image_that_is_a_plain_text_by_mistake_is_refused(captioning: EngineService) -> None:
    """Its base64 used to be ranked as a text, with a meaningless score."""
    for fields in (
        {"query": "a dog", "documents": [base64_of(IMAGE)]},
        {"query": base64_of(IMAGE), "documents": ["a dog"]},
        {"query": "a dog", "documents": [base64_of(LARGE)]},
    ):
        code, kind, message = error_of(post(captioning, "/v1/rerank", **fields))
        assert (code, kind) == (400, "bad_request") and 'pass {"image": "..."}' in message


def test_a_large_image_may_be_a_plain_data_uri_and_a_text_may_not_be_as_long(
    captioning: EngineService,
) -> None:
    """Data URIs used to have the maximum length of a text, which most photographs exceed."""
    answer = post(captioning, "/v1/rerank", query=data_uri(LARGE), documents=["a dog"])
    assert answer.status_code == 200, answer.text
    answer = post(captioning, "/v1/rerank", query=data_uri(LARGE), documents=["a dog" * 2_000])
    assert error_of(answer) == (
        400,
        "bad_request",
        "documents.0 must have at most 8192 characters, got 10000",
    )


def test_a_captioning_model_says_what_it_cannot_do(captioning: EngineService) -> None:
    for path, fields in (
        ("/v1/match", {"image": base64_of(IMAGE), "texts": TEXTS}),
        ("/v1/embed", {"texts": TEXTS}),
        ("/v1/embed", {"image": base64_of(IMAGE), "embed": ["contrastive"]}),
    ):
        code, kind, message = error_of(post(captioning, path, **fields))
        assert (code, kind) == (400, "unsupported") and "--score-model" in message


def test_vectors_are_those_of_the_engine(captioning: EngineService) -> None:
    answer = post(captioning, "/v1/embed", image=base64_of(IMAGE)).json()
    features = fake_features(pixels_of(IMAGE))
    assert features.qformer_features is not None
    assert answer["embeddings"] == {"qformer": features.qformer_features.mean(axis=0).tolist()}
    assert (answer["width"], answer["height"]) == (32, 32)
    for fields in ({}, {"image": base64_of(IMAGE), "texts": TEXTS}, {"image": base64_of(IMAGE), "embed": []}):
        assert error_of(post(captioning, "/v1/embed", **fields))[:2] == (400, "bad_request")


@pytest.mark.parametrize("path", ["/v1/embed", "/v1/caption"])
def test_a_vector_is_not_asked_for_again_and_again(captioning: EngineService, path: str) -> None:
    """Each used to become a list of numbers on the event loop: 90,000 stopped all other requests for 1 s."""
    asked = ["queries", "vision", "qformer"]
    assert post(captioning, path, image=base64_of(IMAGE), embed=asked).status_code == 200
    refused = post(captioning, path, image=base64_of(IMAGE), embed=["queries"] * 5)
    assert error_of(refused)[:2] == (400, "bad_request") and "embed must have at most 4" in refused.text


def test_a_retrieval_model_matches_ranks_and_embeds(retrieval: EngineService) -> None:
    matches = post(retrieval, "/v1/match", image=base64_of(IMAGE), texts=TEXTS).json()["matches"]
    assert [match["text"] for match in matches] == TEXTS
    assert retrieval.first.matching is not None
    side_px = retrieval.first.matching.image_size_px
    image = png(5, side_px)
    with_everything = post(
        retrieval,
        "/v1/caption",
        image=base64_of(image),
        match=TEXTS,
        score=TEXTS,
        embed=["contrastive", "queries"],
    ).json()
    expected = retrieval.captioner._matcher.score([pixels_of(image)] * 3, TEXTS)
    assert [(m["itm"], m["itc"]) for m in with_everything["matches"]] == [(m.itm, m.itc) for m in expected]
    texts = np.array(post(retrieval, "/v1/embed", texts=TEXTS).json()["embeddings"])
    cosines = (np.array(with_everything["embeddings"]["contrastive"]) @ texts.T).max(axis=0)
    assert cosines == pytest.approx([match.itc for match in expected], abs=1e-5)
    ranked = post(retrieval, "/v1/rerank", query={"image": base64_of(image)}, documents=TEXTS).json()
    assert ranked["scored_by"] == "itm"
    assert [one["relevance_score"] for one in ranked["results"]] == sorted(
        (match.itm for match in expected), reverse=True
    )
    ignored = post(retrieval, "/v1/embed", texts=TEXTS, embed=["qformer"])
    assert error_of(ignored)[2].startswith("embed must be left out with texts")
    too_long = post(retrieval, "/v1/embed", texts=["a dog", "a dog " * 1000])
    assert error_of(too_long)[:2] == (422, "refused")
    model = ask(retrieval, "GET", "/v1/model").json()
    assert model["score_model"] == retrieval.first.matching.model
