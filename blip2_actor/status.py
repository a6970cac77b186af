"""The fate of a row: the closed list of what can become of one image.

Every row of every output carries one of these. Adding a member changes the output schema
and is therefore frozen by a test in `tests/contracts`.
"""

from __future__ import annotations

from enum import StrEnum


class Status(StrEnum):
    """What became of one image; `OK` is the only success."""

    OK = "ok"
    MISSING_IMAGE = "missing_image"
    """The row has no image: a null cell, an empty file, or a sample without an image member."""
    UNREADABLE = "unreadable"
    """Storage did not give the bytes: a file that vanished, a damaged row group, a link inside a tar."""
    UNDECODABLE = "undecodable"
    """The bytes are not an image that can be read: damaged, truncated, or no known format."""
    TOO_LARGE = "too_large"
    """The image has more pixels, or the file more bytes, than the limits allow."""
    DECODER_CRASHED = "decoder_crashed"
    """The decoding process died on this image."""
    DECODER_TIMED_OUT = "decoder_timed_out"
    """Decoding this image took more time than the limits allow."""
    REFUSED = "refused"
    """The request cannot be served: its prompt is too long, or its options contradict the model."""
    FAILED = "failed"
    """Inference on this row failed repeatedly, also when it ran alone."""
