"""Second chances for files that viewers show and Pillow refuses.

Only a file that cannot be decoded as it is comes here, so that the pixels of all others stay what they are.
"""

from __future__ import annotations

import struct
import zlib

_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_JPEG_SIGNATURE = b"\xff\xd8"
_JPEG_END = b"\xff\xd9"
_PIXEL_CHUNKS = (b"tRNS", b"acTL", b"fcTL", b"fdAT", b"eXIf")
"""Ancillary chunks that say what the picture looks like."""
_ORIENTATION_TEXTS = (b"XML:com.adobe.xmp\0", b"Raw profile type exif\0", b"Raw profile type APP1\0")
"""Beginnings of text chunks that may hold the orientation."""
_TEXT_CHUNKS = (b"tEXt", b"zTXt", b"iTXt")
_MAX_TEXT_BYTES = 1 << 20


def without_metadata(data: bytes) -> bytes | None:
    """Return a PNG without chunks that do not change its picture, such as long texts and color profiles.

    Pillow refuses a PNG for a text or a profile that is long, or whose checksum is wrong. An ancillary chunk
    with a wrong checksum is left out in any case, as libpng does.

    Returns:
        None if the file is no PNG, or has nothing to leave out.
    """
    if not data.startswith(_PNG_SIGNATURE):
        return None
    kept = [_PNG_SIGNATURE]
    start = len(_PNG_SIGNATURE)
    while len(data) - start >= 12:
        end = start + 12 + int.from_bytes(data[start : start + 4], "big")
        chunk = data[start:end]
        if _is_needed(chunk):
            kept.append(chunk)
        start = end
    kept.append(data[start:])
    repaired = b"".join(kept)
    return repaired if len(repaired) < len(data) else None


def _is_needed(chunk: bytes) -> bool:
    kind, body, checksum = chunk[4:8], chunk[8:-4], chunk[-4:]
    if kind[0] < ord("a"):  # critical; Pillow checks it
        return True
    if struct.pack(">I", zlib.crc32(kind + body)) != checksum:
        return False
    if kind in _TEXT_CHUNKS:
        return body.startswith(_ORIENTATION_TEXTS) and len(body) <= _MAX_TEXT_BYTES
    return kind in _PIXEL_CHUNKS


def with_end(data: bytes) -> bytes | None:
    """Return a JPEG with an end marker, so that what is missing before it is gray; None for other files."""
    return data + _JPEG_END if data.startswith(_JPEG_SIGNATURE) else None
