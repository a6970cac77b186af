"""How many pixels an image claims to have, from fixed places of its header, before anything is decoded.

The claim decides when the image is decoded, and a claim above the limit refuses what no lane would decode. It
never decides what the image is: a claim that is too small is found out by the decoding process, which has
limits. So this reads no more of the untrusted bytes than a few numbers.
"""

from __future__ import annotations

from struct import unpack_from

_JPEG_SIZE_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_MAX_JPEG_SEGMENTS = 1000


def claimed_pixels(image: bytes) -> int | None:
    """Return width times height by the header, or None if it does not say so in a known place."""
    size = _claimed_size(image)
    return None if size is None else size[0] * size[1]


def _claimed_size(image: bytes) -> tuple[int, int] | None:
    if len(image) < 32:
        return None
    if image.startswith(b"\x89PNG\r\n\x1a\n"):
        return unpack_from(">II", image, 16) if image[12:16] == b"IHDR" else None
    if image.startswith(b"\xff\xd8"):
        return _jpeg_size(image)
    if image.startswith(b"GIF8"):
        return unpack_from("<HH", image, 6)
    if image.startswith(b"RIFF") and image[8:12] == b"WEBP":
        return _webp_size(image)
    if image.startswith(b"BM"):
        if image[14] == 12:  # the header of OS/2 has shorter numbers
            return unpack_from("<HH", image, 18)
        width, height = unpack_from("<ii", image, 18)
        return abs(width), abs(height)
    return None


def _jpeg_size(image: bytes) -> tuple[int, int] | None:
    """Walk from segment to segment to the one that begins the frame."""
    at = 2
    for _ in range(_MAX_JPEG_SEGMENTS):
        if at + 9 > len(image) or image[at] != 0xFF:
            return None
        if image[at + 1] in _JPEG_SIZE_MARKERS:
            height, width = unpack_from(">HH", image, at + 5)
            return width, height
        if image[at + 1] == 0xFF:  # padding before a marker
            at += 1
        else:
            at += 2 + unpack_from(">H", image, at + 2)[0]
    return None


def _webp_size(image: bytes) -> tuple[int, int] | None:
    kind = image[12:16]
    if kind == b"VP8X":
        return 1 + int.from_bytes(image[24:27], "little"), 1 + int.from_bytes(image[27:30], "little")
    if kind == b"VP8L":
        bits = int.from_bytes(image[21:25], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    if kind == b"VP8 ":
        width, height = unpack_from("<HH", image, 26)
        return width & 0x3FFF, height & 0x3FFF
    return None
