"""Settings of fetching: checked before work, stored with the run, changed by a retry."""

from __future__ import annotations

from typing import Any

import pytest

from blip2_actor.testing import FakeEngineConfig
from pipeline.fetching.fetch_settings import FetchSettings
from pipeline.inputs.reader import ReadOptions
from pipeline.settings.from_dict import from_dict
from pipeline.settings.job_settings import CaptionSettings
from pipeline.settings.retry_settings import RetrySettings

INFO = FakeEngineConfig().info()


def settings(**changes: Any) -> CaptionSettings:
    return CaptionSettings(input=("in",), output="out", **changes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"fetch_timeout_s": 0.0}, "fetch_timeout_s must be above 0 and finite, got 0.0"),
        ({"fetch_timeout_s": float("inf")}, "fetch_timeout_s must be above 0 and finite, got inf"),
        ({"fetch_patience_s": -1.0}, "fetch_patience_s must be at least 0, got -1.0"),
        ({"fetch_per_host": 0}, "fetch_per_host must be at least 1, got 0"),
        ({"allow_private_hosts": ("http://a/b",)}, "allow_private_hosts must name hosts"),
    ],
)
def test_wrong_values_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FetchSettings(**values)
    if "fetch_per_host" not in values:
        with pytest.raises(ValueError, match=message):
            RetrySettings(output="out", **values)


def test_they_are_stored_and_are_no_part_of_the_fingerprint() -> None:
    """A resume may be more patient, and may fetch from another private host."""
    changed = settings(fetching=FetchSettings(fetch_per_host=2, allow_private_hosts=("10.0.0.1",)))
    assert from_dict(CaptionSettings, changed.to_dict()) == changed
    assert changed.fingerprint(INFO) == settings().fingerprint(INFO)
    assert "fetching" not in settings().to_dict(), "version 0.1.0 does not know it"


def test_where_the_images_are_is_a_part_of_the_fingerprint() -> None:
    plain = settings().fingerprint(INFO)
    fetching = settings(reading=ReadOptions(fetch=True)).fingerprint(INFO)
    assert fetching.differences(plain) == ["columns.fetch: nothing -> True"]
    base64 = settings(reading=ReadOptions(image_encoding="base64")).fingerprint(INFO)
    assert base64.differences(plain) == ["columns.encoding: nothing -> 'base64'"]
    with pytest.raises(ValueError, match="image_encoding must be left out with fetch"):
        ReadOptions(fetch=True, image_encoding="base64")


def test_a_retry_may_have_more_patience_and_further_hosts() -> None:
    before = FetchSettings(fetch_timeout_s=5.0, allow_private_hosts=("a",))
    retry = RetrySettings(output="out", fetch_patience_s=600.0, allow_private_hosts=("b", "a"))
    assert retry.fetching(before) == FetchSettings(
        fetch_timeout_s=5.0, fetch_patience_s=600.0, allow_private_hosts=("a", "b")
    )
    assert RetrySettings(output="out").fetching(before) == before
