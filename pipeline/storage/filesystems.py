"""Resolve URIs to filesystems: local paths, file://, s3://, gs:// by Arrow, all others by fsspec.

`files_below` lists the files of a folder in any of them.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar
from urllib.parse import quote

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.core import url_to_fs

from blip2_actor.flags import split_uri
from blip2_actor.installation import install_hint
from pipeline.errors import InputError
from pipeline.storage.fsspec_errors import MISTAKES, HandlerWithOSErrors
from pipeline.storage.secrets import hide_secrets, without_secrets

BUCKET_SCHEMES = ("s3", "gs", "gcs")
AZURE_SCHEMES = ("abfs", "abfss")
ARROW_SCHEMES = ("file", *BUCKET_SCHEMES, "hdfs", "viewfs", *AZURE_SCHEMES)
WEB_SCHEMES = ("http", "https")
ONE_SLASH = re.compile(rf"(?:{'|'.join((*ARROW_SCHEMES, *WEB_SCHEMES, 'az', 'hf'))}):(?=/)")
"""Begins a URI that lacks a slash; it would be a folder below the working folder."""
EMPTY = "the name of a file or folder must not be empty, got ''; write . for the working folder"
MAX_CONCURRENT_REQUESTS = 16
"""Requests to a store at the same time: it answers each one after tens of milliseconds."""
MAX_WAITING_REQUESTS = 4096
"""Requests that are prepared: each takes a kilobyte or two, and an input may need one for each file."""
Item = TypeVar("Item")
Answer = TypeVar("Answer")


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """Return the filesystem of a URI or local path, and the path inside it.

    Raises:
        InputError: the name is empty, the scheme is unknown, its package is not installed, or its server
            cannot be reached.
    """
    if not uri:  # Python takes it for the working folder.
        raise InputError(EMPTY)
    scheme, separator, place = uri.partition("://")
    if not separator:
        if (typed := ONE_SLASH.match(uri)) and not os.path.lexists(typed[0]):
            raise InputError(
                f"{uri} must have two slashes after {typed[0]}, or ./ before it if it is a folder"
            )
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    if scheme in BUCKET_SCHEMES:
        if not place:
            raise InputError(f"{uri} must name a bucket, as in {uri}bucket/folder")
        _require_plain_names(uri, place)
    if scheme == "hf" and not place:
        raise InputError(f"{uri} must name a repository, as in {uri}datasets/NAMESPACE/NAME")
    try:
        split_uri("a file or folder", uri)
    except ValueError as error:
        raise InputError(str(error)) from None
    shown = without_secrets(uri)
    if scheme in ARROW_SCHEMES and "#" in uri:  # Arrow leaves out what follows, options too.
        raise InputError(f"{shown} must be a URI without #, which ends its path; write %23 for each #")
    try:
        if scheme in ARROW_SCHEMES:
            with contextlib.suppress(pa.ArrowNotImplementedError):  # This build of Arrow lacks the scheme.
                return _open_in_arrow(scheme, uri)
        filesystem, path = url_to_fs(uri)
        path, query = _split_query(scheme, path)
    except ImportError as error:
        hint = install_hint(scheme)
        raise InputError(f"{scheme}:// needs a package that is not installed: {error}{hint}") from error
    except OSError as error:
        hint = "; name the bucket's region: ?region=us-east-1" if scheme == "s3" else ""
        raise InputError(f"{shown} cannot be reached: {hide_secrets(str(error))}{hint}") from None
    except (ValueError, *MISTAKES) as error:  # fsspec may raise anything if a scheme needs more than a URI.
        reason = hide_secrets(str(error))
        hint = _how_to_write(uri)
        raise InputError(
            f"{shown} must be a local path, s3://, gs:// or a URI that fsspec knows: {reason}{hint}"
        ) from None
    return pafs.PyFileSystem(HandlerWithOSErrors(filesystem, query)), path


def _open_in_arrow(scheme: str, uri: str) -> tuple[pafs.FileSystem, str]:
    filesystem, path = pafs.FileSystem.from_uri(_with_single_puts(uri) if scheme == "s3" else uri)
    if scheme in AZURE_SCHEMES:
        path = path.lstrip("/")  # With an account as the host, Arrow returns a path that it does not take.
        try:
            # Without credentials, Arrow aborts the process when it opens a file. This request only raises.
            filesystem.get_file_info(join(path or "x", "x"))
        except pa.ArrowInvalid:
            raise
        except OSError:
            pass  # The credentials are there. Whoever reads a file is told what is wrong, or tries again.
        except pa.ArrowException as error:
            raise PermissionError(
                "no credentials were found; give the machine an identity, or the URI a shared access "
                f"signature after ? ({' '.join(str(error).split())})"
            ) from error
    return filesystem, path


def _require_plain_names(uri: str, place: str) -> None:
    """Refuse names that are not themselves in a bucket: what is written below `a/../b` is listed nowhere."""
    _, *names = place.partition("?")[0].rstrip("/").split("/")
    if not {"", ".", ".."}.isdisjoint(names):
        raise InputError(f"{without_secrets(uri)} must name its folders without //, . and .. between them")


def _how_to_write(uri: str) -> str:
    """Return how to write blanks and letters that a URI cannot hold, as the end of a sentence."""
    odd = sorted({letter for letter in without_secrets(uri) if letter == " " or not letter.isascii()})
    written = [f"{quote(letter)} for each {'blank' if letter == ' ' else letter}" for letter in odd]
    return f"; write {', '.join(written)}" if written else ""


def _split_query(scheme: str, path: str) -> tuple[str, str]:
    """Split the query off a path of a web server, where it is not the end of a folder's name."""
    if scheme not in WEB_SCHEMES:
        return path, ""
    path, mark, query = path.partition("?")
    return path, mark + query


def _with_single_puts(uri: str) -> str:
    """Make Arrow write a small object in one request instead of the three of a multipart upload."""
    return f"{uri}{'&' if '?' in uri else '?'}allow_delayed_open=true"


def at_once(request: Callable[[Item], Answer], items: Iterable[Item]) -> list[Answer]:
    """Make a request for each item, several at the same time, and return the answers in order."""
    rest, answers = iter(items), list[Answer]()
    with ThreadPoolExecutor(MAX_CONCURRENT_REQUESTS) as pool:
        while part := list(islice(rest, MAX_WAITING_REQUESTS)):
            answers += pool.map(request, part)
    return answers


def infos_of(filesystem: pafs.FileSystem, paths: Sequence[str]) -> list[pafs.FileInfo]:
    """Return what is known of files; Arrow would ask a store for one after the other."""
    if isinstance(filesystem, pafs.LocalFileSystem):
        return filesystem.get_file_info(list(paths))
    return at_once(filesystem.get_file_info, paths)


def join(folder: str, name: str) -> str:
    """Return the path of a name below a folder, in any filesystem."""
    return f"{folder.rstrip('/')}/{name}"


def files_below(filesystem: pafs.FileSystem, folder: str) -> Iterator[tuple[str, int, int]]:
    """Yield path, size and time of writing of all files below a folder, in no order; none if it is not there.

    The time is in nanoseconds since 1970; 0 if the store does not tell. A name on a disk need not be UTF-8.
    An empty file in abfs:// is not there yet: Arrow makes one before it uploads the content.
    """
    if isinstance(filesystem, pafs.LocalFileSystem):
        yield from _on_disk(folder)  # Arrow lists no folder with a name that is not UTF-8.
        return
    for info in filesystem.get_file_info(pafs.FileSelector(folder, recursive=True, allow_not_found=True)):
        if info.type == pafs.FileType.File and (info.size or filesystem.type_name != "abfs"):
            yield info.path, info.size, info.mtime_ns or 0


def _on_disk(folder: str) -> Iterator[tuple[str, int, int]]:
    folders = [folder]
    while folders:
        try:
            with os.scandir(folders.pop()) as entries:
                found = list(entries)
        except FileNotFoundError:
            continue
        for entry in found:
            try:
                status = entry.stat()
            except OSError as error:
                if error.errno in (errno.ENOENT, errno.ELOOP):  # gone meanwhile, or a link that leads nowhere
                    continue
                raise
            if stat.S_ISDIR(status.st_mode):
                folders.append(entry.path)
            elif stat.S_ISREG(status.st_mode):
                yield entry.path, status.st_size, status.st_mtime_ns
