"""Secrets in URIs: credentials before the bucket, and options after `?`, either of which may hold a password.

A URI that is stored or shown must hold none. `without_secrets` removes them, `with_secrets_of` restores
them from the URI that the user has given, and `hide_secrets`, which the endpoint's command line also uses,
removes them from a text with URIs in it.
"""

from __future__ import annotations

import re

from blip2_actor.flags import hide_secrets

__all__ = ["hide_secrets", "with_secrets_of", "without_secrets"]

_CREDENTIALS = re.compile(r"(?<=://)[^/@:]*:[^/?]*@|(?<=https://)[^/?]*@|(?<=http://)[^/?]*@", re.IGNORECASE)
"""A user with a password; of a web server a user alone, which may be a token. In az:// it is a container."""


def without_secrets(uri: str) -> str:
    """Remove the credentials and the options of a URI; a local path stays as it is."""
    return _CREDENTIALS.sub("", uri.partition("?")[0]) if "://" in uri else uri


def with_secrets_of(given: str, uri: str) -> str:
    """Add the credentials and the options of the URI `given` to a URI without any."""
    credentials = _CREDENTIALS.search(given)
    scheme, _, path = uri.partition("://")
    _, mark, options = given.partition("?")
    return f"{scheme}://{credentials.group() if credentials else ''}{path}{mark}{options}"
