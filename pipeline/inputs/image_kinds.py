"""Tell images from other files, by the ending of the name or by the first bytes."""

from __future__ import annotations

IMAGE_EXTENSIONS_V1 = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tiff", "tif")
"""Extensions that were images in version 1 of the row contract; a tar of such a run is still read so."""
IMAGE_EXTENSIONS = (*IMAGE_EXTENSIONS_V1, "jpe", "jfif", "avif", "heic", "heif", "jp2", "jxl")
"""Extensions of image files, in upper or lower case. Those that cannot be decoded are rows that say so."""
HEAD_BYTES = 16
"""How much of a file `looks_like_image` needs."""

_BEGINNINGS = (
    b"\xff\xd8\xff",  # JPEG
    b"\x89PNG\r\n\x1a\n",
    b"GIF87a",
    b"GIF89a",
    b"II*\x00",  # TIFF
    b"MM\x00*",
    b"\x00\x00\x00\x0cjP  ",  # JPEG 2000
    b"\xff\x4f\xff\x51",
    b"\x00\x00\x00\x0cJXL ",  # JPEG XL
    b"\xff\x0a",
)
_BRANDS = (b"avif", b"avis", b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1")
"""Brands of ISO media files that hold images: AVIF and HEIF."""


def looks_like_image(head: bytes) -> bool:
    """Return whether a file is an image, by its first `HEAD_BYTES` bytes."""
    return (
        head.startswith(_BEGINNINGS)
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS)
        or (head[:2] == b"BM" and head[6:10] == bytes(4))  # BMP: a size, then four reserved bytes
    )
