"""Tell images from other files, by the ending of the name or by the first bytes."""

from __future__ import annotations

from collections.abc import Iterable
from importlib.util import find_spec

import pyarrow as pa
import pyarrow.fs as pafs

from blip2_actor.installation import pip_install
from pipeline.errors import InputError
from pipeline.inputs.shards import Shard
from pipeline.progress import count
from pipeline.storage.retrying import is_final
from pipeline.storage.retrying_file import open_input

IMAGE_EXTENSIONS_V1 = ("jpg", "jpeg", "png", "webp", "bmp", "gif", "tiff", "tif")
"""Extensions that were images in version 1 of the row contract; a tar of such a run is still read so."""
IMAGE_EXTENSIONS = (*IMAGE_EXTENSIONS_V1, "jpe", "jfif", "avif", "heic", "heif", "jp2", "jxl")
"""Extensions of image files, in upper or lower case. Those that cannot be decoded are rows that say so."""
HEAD_BYTES = 16
"""How much of a file is needed to tell whether it is an image."""

_BEGINNINGS = {
    b"\xff\xd8\xff": "jpg",
    b"\x89PNG\r\n\x1a\n": "png",
    b"GIF87a": "gif",
    b"GIF89a": "gif",
    b"II*\x00": "tiff",
    b"MM\x00*": "tiff",
    b"\x00\x00\x00\x0cjP  ": "jp2",
    b"\xff\x4f\xff\x51": "jp2",
    b"\x00\x00\x00\x0cJXL ": "jxl",
    b"\xff\x0a": "jxl",
}
_BRANDS = {b"avif": "avif", b"avis": "avif"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "heic"
)
"""Brands of ISO media files that hold images: AVIF and HEIF."""


def extension_by_content(head: bytes) -> str | None:
    """Return the extension for an image, by its first `HEAD_BYTES` bytes; None if it is no image."""
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "webp"
    if head[4:8] == b"ftyp":
        return _BRANDS.get(head[8:12])
    if head[:2] == b"BM" and head[6:10] == bytes(4):  # a size, then four reserved bytes
        return "bmp"
    return next((kind for start, kind in _BEGINNINGS.items() if head.startswith(start)), None)


def looks_like_image(head: bytes) -> bool:
    """Return whether a file is an image, by its first `HEAD_BYTES` bytes."""
    return extension_by_content(head) is not None


def head_of(filesystem: pafs.FileSystem, path: str) -> bytes:
    """Return the first bytes of a file; none if it cannot be read.

    Raises:
        InputError: the store fails, so it is not known whether the file is an image.
    """
    try:
        with open_input(filesystem, path) as file:
            return file.read(HEAD_BYTES) or b""
    except pa.ArrowInvalid:  # The store's client takes no such name, such as one with an empty part.
        return b""
    except (OSError, pa.ArrowException) as error:
        if isinstance(error, OSError) and (isinstance(filesystem, pafs.LocalFileSystem) or is_final(error)):
            return b""
        raise InputError(f"{path} cannot be read, whose name does not tell its format: {error}") from error


def notes_on_formats(shards: Iterable[Shard]) -> list[str]:
    """Return a sentence for each format that images of a folder have by their names, and that nothing here
    decodes: hours later these are failed rows."""
    num_heic = num_jpeg_xl = 0
    for shard in shards:
        if shard.format == "folder":  # There may be 10^8 names: do not look at each.
            names = "\0".join((*shard.files, "")).lower()
            num_heic += names.count(".heic\0") + names.count(".heif\0")
            num_jpeg_xl += names.count(".jxl\0")
    notes = []
    if num_heic and find_spec("pillow_heif") is None:
        are = "is" if num_heic == 1 else "are"
        notes.append(
            f"{count(num_heic, 'image')} {are} HEIC, which needs pillow-heif; run: {pip_install('heic')}"
        )
    if num_jpeg_xl:
        are, them = ("is", "it") if num_jpeg_xl == 1 else ("are", "them")
        notes.append(f"{count(num_jpeg_xl, 'image')} {are} JPEG XL, which is not supported; convert {them}")
    return notes
