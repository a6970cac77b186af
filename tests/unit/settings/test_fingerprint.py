"""Fingerprints and stored settings: a missed difference mixes rows of two models in one output."""

import pytest

from pipeline.settings.fingerprint import Fingerprint, FingerprintMismatch
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings


def test_each_difference_of_a_fingerprint_is_named_and_equal_ones_pass():
    before = Fingerprint({"prompt": None, "options": {"num_beams": 1, "seed": 0}, "stop": []})
    before.require_same(Fingerprint(dict(before.parts)), "out")
    now = Fingerprint({"prompt": "x", "options": {"num_beams": 5, "seed": 0}, "stop": ["a"]})
    with pytest.raises(FingerprintMismatch) as refusal:
        now.require_same(before, "out")
    for difference in ("prompt: nothing -> 'x'", "options.num_beams: 1 -> 5", "stop: [] -> ['a']"):
        assert difference in str(refusal.value)
    assert "seed" not in str(refusal.value)
    assert now.digest != before.digest


def test_settings_survive_the_record():
    settings = CaptionSettings(input=("a", "b"), output="o", prompt="p", limit=3)
    assert from_dict(CaptionSettings, settings.to_dict()) == settings
    with pytest.raises(ValueError, match="unknown colour"):
        from_dict(CaptionSettings, {**settings.to_dict(), "colour": 1})


def test_a_refusal_fits_a_screen_and_says_nothing_for_none():
    """A thousand inputs from a shell glob, and one more the next day, used to fill the screen."""
    inputs = [f"/in/{n:06d}.tar" for n in range(1000)]
    ours = Fingerprint({"input": inputs, "prompt": None, **{f"f{n}": n for n in range(20)}})
    with pytest.raises(FingerprintMismatch) as refusal:
        ours.require_same(Fingerprint({"input": inputs[:-1], "prompt": "a"}), "out")
    said = str(refusal.value)
    assert len(said) < 1500 and "; and 12 more; run the first command again" in said and "None" not in said
