"""The status of a row: the closed list of what can happen to one image.

Every row of every output has one of these. A new member changes the output schema, so a test freezes the
list.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What happened to one image; `OK` is the only success."""

    OK = "ok"
    MISSING_IMAGE = "missing_image"
    """The row has no image: a null cell, an empty file, or a sample without an image member."""
    UNREADABLE = "unreadable"
    """Storage did not deliver the bytes: the file vanished, the row group is damaged, or it is a link in a
    tar."""
    FETCH_FAILED = "fetch_failed"
    """The server of the image's URL did not deliver it: it cannot be reached, is too slow, or answers with an
    error."""
    UNDECODABLE = "undecodable"
    """The bytes are not a readable image: they are damaged, truncated, or of an unknown format."""
    TOO_LARGE = "too_large"
    """The image has more pixels, or the file more bytes, than the limits allow."""
    DECODER_CRASHED = "decoder_crashed"
    """The image decoding process died on this image."""
    DECODER_TIMED_OUT = "decoder_timed_out"
    """Decoding this image took more time than the limits allow."""
    REFUSED = "refused"
    """The request cannot be served: its prompt is too long, or its options contradict the model."""
    FAILED = "failed"
    """Inference on this row failed repeatedly, also when it ran alone."""
