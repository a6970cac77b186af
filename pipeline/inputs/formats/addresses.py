"""Addresses of images in the cells of a table: URLs, URIs of stores, data URIs, and paths.

A relative path is relative to the folder of the file that names it.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re

from pipeline.storage.filesystems import WEB_SCHEMES

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)


def scheme_of(address: str) -> str:
    """Return the scheme of an address in lower case: "" for a path, "data" for a data URI."""
    if address[:5].lower() == "data:":
        return "data"
    found = _SCHEME.match(address)
    return found[1].lower() if found else ""


def is_web(address: str) -> bool:
    """Return whether an address is that of a web server."""
    return scheme_of(address) in WEB_SCHEMES


def key_of(address: str) -> str:
    """Return the key of a row that has only the address of its image; a data URI is as long as its image."""
    if scheme_of(address) != "data":
        return address
    return f"data:{hashlib.sha256(address.encode()).hexdigest()[:32]}"


def folder_of(root: str, file: str) -> str:
    """Return the URI of the folder of a file, which is named by its path below a root."""
    folder, mark, query = root.partition("?") if "://" in root else (root, "", "")
    if mark and is_web(folder):
        mark = query = ""  # The query signs one file.
    return posixpath.join(folder, posixpath.dirname(file)).rstrip("/") + mark + query


def resolve(address: str, folder: str) -> str:
    """Return an address that does not depend on where it is written.

    Args:
        address: a URL, a URI or a path.
        folder: URI of the folder that relative paths are relative to; options after `?` hold for these too.
    """
    if scheme_of(address) or address.startswith("/"):
        return address
    if "://" not in folder:
        return os.path.normpath(os.path.join(folder, address))
    scheme, _, rest = folder.partition("://")
    path, mark, query = rest.partition("?")
    return f"{scheme}://{posixpath.normpath(posixpath.join(path, address))}{mark}{query}"
