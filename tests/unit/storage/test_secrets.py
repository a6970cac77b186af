"""Passwords in URIs, which must be neither stored nor shown."""

from __future__ import annotations

import pytest

from pipeline.storage.secrets import hide_secrets, with_secrets_of, without_secrets


@pytest.mark.parametrize(
    ("uri", "plain"),
    [
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
        ("s3://key:se@cret@bucket/x", "s3://bucket/x"),
        ("https://to@ken@host/x", "https://host/x"),
        ("s3://bucket/a:b@c/x", "s3://bucket/a:b@c/x"),
        ("https://host/a@b", "https://host/a@b"),
        ("https://host?mail=a@b", "https://host"),
    ],
)
def test_no_part_of_a_password_stays(uri: str, plain: str) -> None:
    assert without_secrets(uri) == plain
    assert with_secrets_of(uri, plain) == uri
    assert hide_secrets(f"it is {uri}, which fails") == f"it is {plain}, which fails"


def test_a_uri_that_was_taken_for_a_path_is_recognized() -> None:
    assert hide_secrets("no file 'https:/user:secret@host/x?sig=secret'") == "no file 'https:/host/x'"
