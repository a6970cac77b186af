"""Texts of a table that are not UTF-8: a Parquet file may hold them, but no program reads them as text."""

from __future__ import annotations

import pyarrow as pa

from pipeline.storage.secrets import hide_secrets

MAX_SHOWN_CHARS = 60


def escape_texts(column: pa.Array) -> tuple[pa.Array, list[int]]:
    r"""Return a column as strings, with bytes that are not UTF-8 as `\xff`, and the rows that have any."""
    texts = column.cast(pa.string())
    try:
        texts.validate(full=True)
        return texts, []
    except pa.ArrowInvalid:
        cells = texts.cast(pa.binary()).to_pylist()
    escaped = [None if cell is None else cell.decode(errors="backslashreplace") for cell in cells]
    rows = [row for row, text in enumerate(escaped) if text is not None and text.encode() != cells[row]]
    return pa.array(escaped, pa.string()), rows


def valid_texts(column: pa.Array) -> tuple[pa.Array, bool]:
    r"""Return a column of any type whose texts are UTF-8, and whether some were not.

    Texts have escapes like `\xff`, and a nested value with such a text is null.
    """
    try:
        column.validate(full=True)
        return column, False
    except pa.ArrowInvalid:
        if not pa.types.is_nested(column.type):
            return escape_texts(column)[0], True
    values = []
    for row in range(len(column)):
        try:
            values.append(column[row].as_py())
        except UnicodeDecodeError:
            values.append(None)
    return pa.array(values, column.type), True


def not_utf8(what: str, text: str) -> str:
    """Return the sentence for a row with a text that is not UTF-8; the text has escapes."""
    shown = hide_secrets(text)[:MAX_SHOWN_CHARS]
    return f"{what} must be UTF-8, got {shown}; write the table again with texts in UTF-8"
