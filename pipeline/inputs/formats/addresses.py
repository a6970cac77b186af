"""Addresses of images in the cells of a table: URLs, URIs of stores, data URIs, and paths.

A relative path is relative to the folder of the file that names it. Whoever has written the cells may be
unknown to the user of a run, so `refusal` says which of them must not be followed.
"""

from __future__ import annotations

import hashlib
import os
import posixpath
import re
from urllib.parse import parse_qsl

from pipeline.storage.filesystems import ARROW_SCHEMES, WEB_SCHEMES
from pipeline.storage.secrets import hide_secrets

_SCHEME = re.compile(r"([a-z][a-z0-9+.-]*)://", re.IGNORECASE)
_BUCKET = re.compile(r"([^/@]*@)?[\w.-]+", re.ASCII)
_AZURE = re.compile(r"([\w$-]+@)?[\w$-]+(\.(blob|dfs)\.core\.windows\.net)?", re.ASCII | re.IGNORECASE)
"""A container, an account, or both. Arrow takes any other host for a server of its own."""
_STORES = dict.fromkeys(("s3", "gs", "gcs", "hf"), _BUCKET) | dict.fromkeys(("abfs", "abfss", "az"), _AZURE)
"""Stores whose servers an address cannot choose, and what may stand for a bucket in it."""
_SIGNATURE = re.compile(r"s[a-z]{1,2}|sdd|spr|sk(oid|tid|[tesv])|rsc[cdelt]")
"""The fields of a shared access signature of Azure."""


def scheme_of(address: str) -> str:
    """Return the scheme of an address in lower case: "" for a path, "data" for a data URI."""
    if address[:5].lower() == "data:":
        return "data"
    found = _SCHEME.match(address)
    return found[1].lower() if found else ""


def is_web(address: str) -> bool:
    """Return whether an address is that of a web server."""
    return scheme_of(address) in WEB_SCHEMES


def refusal(address: str, folder: str = "") -> str | None:
    """Say why the image at an address must not be loaded; None if it may be.

    An address must lead to no server of the network of this machine, and fsspec knows many ways there. So it
    may name the stores whose servers it cannot choose, and the store of the file that it is in. Whether a web
    server may be asked is checked when it is.

    Args:
        address: as a row has it.
        folder: URI of the folder that relative paths are relative to.
    """
    scheme = scheme_of(address)
    place, mark, options = address.partition("?")
    if scheme in ("data", "file", *WEB_SCHEMES):
        return None
    if not scheme and "://" not in address:
        if mark and "://" in folder and not (is_web(folder) or address.startswith("/")):
            hint = "; write %3F for each ?" if scheme_of(folder) in ARROW_SCHEMES else ""
            return f"a path in a store must be without ?, got {address[:200]!r}{hint}"
        return None
    if scheme and not mark and "::" not in address and _store_of(address) == _store_of(folder):
        return None
    names = _STORES.get(scheme)
    if names is not None and "::" not in address and names.fullmatch(_store_of(place)[1]):
        given = parse_qsl(options, keep_blank_values=True)
        if all(_names_no_server(scheme, option, value) for option, value in given):
            return None
    return (
        "the address must be a path, an http or https URL, a URI in the store of its table, or one of s3, "
        "gs, abfs, az or hf with no option but region (s3) or a signature (abfs), "
        f"got {hide_secrets(address)[:200]}"
    )


def _names_no_server(scheme: str, option: str, value: str) -> bool:
    if scheme == "s3":
        return option == "region" and re.fullmatch(r"[a-z0-9-]+", value) is not None
    return scheme in ("abfs", "abfss") and _SIGNATURE.fullmatch(option) is not None


def _store_of(uri: str) -> tuple[str, str]:
    """Return the scheme of a URI, and its server, bucket or container."""
    scheme, _, rest = uri.partition("://")
    return scheme.lower(), rest.partition("?")[0].partition("/")[0]


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
    store, _, path = path.partition("/")
    inside = posixpath.normpath(f"/{path}/{address}").lstrip("/")  # `..` does not lead to another store.
    return f"{scheme}://{store}/{inside}{mark}{query}"
