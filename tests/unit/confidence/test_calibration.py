"""A confidence is a probability: of the captions with 0.8, eight of ten must be right."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from pathlib import Path

import fsspec
import numpy as np
import pytest

from blip2_actor import Calibration, Completion, GenerationOptions, Result, Status, abstention_flags
from blip2_actor.confidence.features import FEATURES, features_of
from blip2_actor.confidence.fitting import auroc, expected_calibration_error, fit_calibration

OPTIONS = dataclasses.asdict(GenerationOptions().resolve())
STORED = {"format_version": 1, "model": "m", "intercept": 0.0, "coefficients": dict.fromkeys(FEATURES, 0.0)}
STORED["curve"] = [[0.0, 0.5]]


def drawn(number: int, seed: int = 0) -> tuple[list[tuple[float, int]], list[bool]]:
    """Return texts that are right with a probability that follows from two features, and the truth."""
    random = np.random.default_rng(seed)
    lengths = random.integers(3, 20, number)
    logprobs = -random.exponential(0.15, number) * lengths
    texts = [(float(logprob), int(length)) for logprob, length in zip(logprobs, lengths, strict=True)]
    values = np.array([features_of(*text) for text in texts])
    probability = 1 / (1 + np.exp(-(0.5 + 0.8 * values[:, 0] - 0.05 * values[:, 1])))
    return texts, (random.random(number) < probability).tolist()


def fit(number: int = 4000, seed: int = 0) -> Calibration:
    return fit_calibration(*drawn(number, seed), {"model": "m", "options": OPTIONS})


def test_the_fit_finds_what_the_truth_follows_from():
    found = fit(20_000)
    assert found.coefficients["log_odds"] == pytest.approx(0.8, abs=0.1)
    assert found.coefficients["num_tokens"] == pytest.approx(-0.05, abs=0.02)
    assert found.intercept == pytest.approx(0.5, abs=0.2)
    assert found.num_examples == 20_000 and 0.2 < found.accuracy < 0.8
    assert found.calibration_error < 0.02 and found.auroc > 0.7


def test_on_other_captions_the_confidence_is_the_share_that_is_right():
    found, (texts, right) = fit(), drawn(4000, seed=1)
    sure = np.array([found.probability(*text) for text in texts])
    assert expected_calibration_error(sure, np.array(right)) < 0.04
    assert auroc(sure, np.array(right)) == pytest.approx(found.auroc, abs=0.03)


def test_figures_of_known_cases():
    sure = np.array([0.1, 0.4, 0.35, 0.8])
    assert auroc(sure, np.array([False, False, True, True])) == 0.75
    assert auroc(np.ones(4), np.array([False, True, False, True])) == 0.5, "ties count half"
    right = np.repeat([True, False], [30, 70])
    assert expected_calibration_error(np.full(100, 0.3), right, 1) == pytest.approx(0)
    assert expected_calibration_error(np.full(100, 0.9), right, 1) == pytest.approx(0.6)


@pytest.mark.parametrize(
    ("number", "is_right"), [(10, [True, False] * 5), (60, [True] * 60), (60, [False] * 58 + [True] * 2)]
)
def test_too_little_to_fit_on_is_refused(number: int, is_right: list[bool]):
    with pytest.raises(ValueError, match="caption more images"):
        fit_calibration([(-1.0, 5)] * number, is_right, {"model": "m"})


@pytest.mark.parametrize("logprob", [None, math.nan, -math.inf])
def test_a_caption_without_a_log_probability_is_refused(logprob: float):
    """None used to raise TypeError, and for NaN the message said to fit again."""
    texts, right = drawn(60)
    with pytest.raises(ValueError, match=f"log-probabilities, got {logprob} at index 60; leave out"):
        fit_calibration([*texts, (logprob, 5)], [*right, True], {"model": "m"})


def test_each_caption_needs_a_truth():
    texts, right = drawn(60)
    with pytest.raises(ValueError, match=r"is_right must be one per example \(60\), got 59"):
        fit_calibration(texts, right[1:], {"model": "m"})


def test_captions_that_can_be_told_apart_give_finite_coefficients():
    texts = [(-0.1, 5)] * 40 + [(-9.0, 5)] * 40
    found = fit_calibration(texts, [True] * 40 + [False] * 40, {"model": "m"})
    assert found.probability(-0.1, 5) > 0.95 and found.probability(-9.0, 5) < 0.05
    for logprob in (0.0, -1e-9, -5000.0, -math.inf):
        assert 0 <= found.probability(logprob, 1) <= 1


def test_the_curve_is_interpolated_and_ends_level():
    found = dataclasses.replace(
        fit(), coefficients={"log_odds": 0.0, "num_tokens": 1.0}, intercept=0.0, curve=((2, 0.2), (4, 0.8))
    )
    sure = [found.probability(-1.0, number) for number in (1, 2, 3, 4, 5)]
    assert sure == pytest.approx([0.2, 0.2, 0.5, 0.8, 0.8])


def test_the_curve_never_falls_and_is_never_certain():
    probabilities = [probability for _, probability in fit(1000).curve]
    assert probabilities == sorted(probabilities) and probabilities[0] > 0 and probabilities[-1] < 1


def test_it_is_stored_and_read(tmp_path: Path):
    found = fit()
    found.save(tmp_path / "calibration.json")
    read = Calibration.load(tmp_path / "calibration.json")
    assert read == found and read.digest == found.digest
    assert dataclasses.replace(found, intercept=9.0).digest != found.digest


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"format_version": 2}',
        json.dumps(STORED | {"coefficients": {"length": 1}}),
        json.dumps(STORED | {"intercept": math.nan}),
        json.dumps(STORED | {"options": {"no_such_option": 1}}),
        json.dumps(STORED | {"curve": []}),
        json.dumps(STORED | {"curve": [[0.0, 0.5], [-1.0, 0.6]]}),
        json.dumps(STORED | {"curve": [[0.0, 1.5]]}),
        json.dumps(STORED | {"curve": [[0.0, 0.5], [math.inf, 0.6]]}),
        json.dumps(STORED | {"curve": [[math.nan, 0.5]]}),
    ],
)
def test_a_file_that_is_no_calibration_is_refused_by_name(content: str, tmp_path: Path):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=r"calibration must be a file of blip2 calibrate, got .*a\.json: \S"):
        Calibration.load(tmp_path / "a.json")
    with pytest.raises(ValueError, match="No such file"):
        Calibration.load(tmp_path / "none.json")


def test_it_holds_only_for_captions_like_those_of_the_fit():
    found, options = fit(), GenerationOptions().resolve()
    assert found.fits("m", None, options) and found.fits("m", "", options)
    assert found.misfit("n", None, options) == "model"
    assert found.misfit("m", "a photo of", options) == "prompt"
    assert found.misfit("m", None, GenerationOptions(num_beams=3).resolve()) == "options of generation"
    of_questions = dataclasses.replace(found, row_prompts=True)
    assert of_questions.fits("m", "what is it?", options)


def test_stored_options_are_read_back(tmp_path: Path):
    options = GenerationOptions(stop=("a", "b"), bad_words_ids=((5, 6),), num_beams=2).resolve()
    made = dataclasses.replace(fit(), options=dataclasses.asdict(options))
    made.save(tmp_path / "c.json")
    assert Calibration.load(tmp_path / "c.json").fits("m", None, options)


def test_the_best_text_of_a_result_counts_and_a_failed_one_has_no_confidence():
    best, other = (
        Completion(text="a", token_ids=(1,) * 5, logprob=logprob, finish_reason="stop")
        for logprob in (-0.5, -4.0)
    )
    found = fit()
    assert found.confidence(Result(completions=(best, other))) == found.probability(-0.5, 5)
    assert found.confidence(Result(status=Status.UNDECODABLE, error="damaged")) is None


def test_only_a_confidence_below_the_limit_abstains():
    assert abstention_flags(0.4, 0.5) == ["abstained"]
    assert abstention_flags(0.5, 0.5) == abstention_flags(None, 0.5) == abstention_flags(0.0, 0.0) == []


def test_a_file_in_a_bucket_is_read_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The gateways of an endpoint on a cluster share no disk."""
    fit(200).save(tmp_path / "c.json")
    fsspec.filesystem("memory").pipe("/calibrations/c.json", (tmp_path / "c.json").read_bytes())
    assert Calibration.load("memory://calibrations/c.json") == Calibration.load(tmp_path / "c.json")
    with pytest.raises(
        ValueError, match=r"^calibration must be .*: memory://calibrations/none\.json cannot be read"
    ):
        Calibration.load("memory://calibrations/none.json")
    with pytest.raises(ValueError, match=r"^calibration must hold no password .* s3://bucket/c\.json;"):
        Calibration.load("s3://key:S3CRET@bucket/c.json")
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(ValueError, match=r"run: pip install 'blip2-ray\[s3\]'$"):
        Calibration.load("s3://bucket/c.json")
