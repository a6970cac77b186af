"""URIs to filesystems: local paths, file://, s3://, gs:// through Arrow, all others through fsspec."""

from __future__ import annotations

import os

import pyarrow as pa
import pyarrow.fs as pafs
from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from pipeline.shards import InputError

ARROW_SCHEMES = ("file", "s3", "gs", "gcs", "hdfs", "viewfs", "abfs", "abfss")


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path in it.

    Raises:
        InputError: the scheme is unknown, its package is not installed, or its server cannot be reached.
    """
    scheme, separator, _ = uri.partition("://")
    if not separator:
        return pafs.LocalFileSystem(), os.path.abspath(os.path.expanduser(uri))
    try:
        if scheme in ARROW_SCHEMES:
            try:
                return pafs.FileSystem.from_uri(uri)
            except (pa.ArrowNotImplementedError, pa.ArrowInvalid) as error:
                # Not in this build of Arrow, or a form that only fsspec knows.
                if scheme == "file" or scheme not in known_implementations:
                    raise InputError(f"{uri} is not a URI that can be opened: {error}") from error
        filesystem, path = url_to_fs(uri)
    except ImportError as error:
        raise InputError(f"{scheme}:// needs a package that is not installed: {error}") from error
    except OSError as error:
        hint = "; name the bucket's region: ?region=us-east-1" if scheme == "s3" else ""
        raise InputError(f"{uri} cannot be reached: {error}{hint}") from error
    except InputError:
        raise
    except ValueError as error:
        raise InputError(
            f"{uri} has a scheme that is not known ({error}); use a local path, s3://, gs:// "
            "or any scheme of fsspec"
        ) from error
    return pafs.PyFileSystem(pafs.FSSpecHandler(filesystem)), path


def join(folder: str, name: str) -> str:
    """The path of a name below a folder, in any filesystem."""
    return f"{folder.rstrip('/')}/{name}"
