"""From what the user names as input to a sorted list of shards, once, before Ray starts."""

from __future__ import annotations

from collections.abc import Sequence

from pipeline.shards import InputError, Shard

__all__ = ["InputError", "list_shards"]


def list_shards(
    input_uri: str | Sequence[str], *, format: str = "auto", limit: int | None = None
) -> list[Shard]:
    """The shards of one or several inputs, sorted by name; the same input gives the same list.

    Args:
        input_uri: files, folders, globs (`*`, `**`, `[ab]`; `?` in local paths only) and braces
            (`{00000..01023}.tar`, `{train,val}`), each local or a URI.
        format: "auto", or "webdataset", "parquet" or "folder" to settle doubt.
        limit: only the first so many rows, over the shards in their order.

    Raises:
        InputError: nothing is there, nothing in it is an input, or it could be read in two ways.
    """
    raise NotImplementedError
