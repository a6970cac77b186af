"""Take apart a URI that a setting names; hide the secrets of URIs in a text."""

from __future__ import annotations

import re
from urllib.parse import SplitResult, urlsplit

_URI_WITH_SECRETS = re.compile(
    r"\b([a-z][a-z0-9+.-]*:/{1,2})(?:[^\s/?'\"]*@)?([^\s?'\"]*)(\?[^\s'\",;)\]]*)?", re.IGNORECASE
)
"""One slash is left where a URI was taken for a path."""


def split_uri(name: str, uri: str) -> SplitResult:
    """Return the parts of a URI.

    Args:
        name: of the setting, for the message.

    Raises:
        ValueError: it cannot be taken apart. The message holds no secret of it.
    """
    try:
        parts = urlsplit(uri)
        _ = parts.port
        return parts
    except ValueError:
        scheme, _, rest = uri.partition("://")
        place = rest.partition("?")[0].rpartition("@")[2]
        raise ValueError(
            f"{name} must be a URI whose host can be read, got {scheme}://{place}; write %5B for [ and "
            "%5D for ] in a name, and a port as a number"
        ) from None


def hide_secrets(text: str) -> str:
    """Remove the credentials and the options of every URI in a text."""
    return _URI_WITH_SECRETS.sub(r"\1\2", text)
