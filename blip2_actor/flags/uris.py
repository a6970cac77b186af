"""Take apart a URI that a setting names."""

from __future__ import annotations

from urllib.parse import SplitResult, urlsplit


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
