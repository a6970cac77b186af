"""URIs in settings: one that cannot be parsed is refused by name, without its secrets."""

from __future__ import annotations

import pytest

from blip2_actor.flags import split_uri


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("s3://[x/model", "s3://[x/model"),
        ("s3://me:pass@[x/model?secret=1", "s3://[x/model"),
        ("http://host:eighty/", "http://host:eighty/"),
    ],
)
def test_a_uri_that_cannot_be_taken_apart_is_refused_by_name(uri, shown):
    """The message used to be "Invalid IPv6 URL" alone."""
    with pytest.raises(ValueError, match=r"^model must be a URI whose host can be read, got ") as refusal:
        split_uri("model", uri)
    assert f"got {shown}; write %5B for [" in str(refusal.value)


def test_parts():
    parts = split_uri("model", "s3://key:word@bucket/a[1]/b?region=x")
    assert (parts.hostname, parts.path, parts.query) == ("bucket", "/a[1]/b", "region=x")
