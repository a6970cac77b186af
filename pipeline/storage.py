"""URIs to filesystems: local paths, file://, s3://, gs:// through Arrow, everything else through fsspec."""

from __future__ import annotations

import pyarrow.fs as pafs


def open_filesystem(uri: str) -> tuple[pafs.FileSystem, str]:
    """The filesystem of a URI or local path, and the path inside it.

    Raises:
        InputError: the scheme is unknown or its package is not installed, or the bucket cannot be reached.
    """
    raise NotImplementedError
