"""The formats that are read, and the plugins of Pillow that read them.

The content decides, never a file's extension. Pillow's other plugins stay unused, because some of them run
other programs.
"""

from __future__ import annotations

import io
from functools import cache

# Importing a plugin registers it, so that Image.open does not load Pillow's other forty plugins.
from PIL import (  # noqa: F401
    AvifImagePlugin,
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    Jpeg2KImagePlugin,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    WebPImagePlugin,
)

from blip2_actor.installation import pip_install

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000")
"""Names as Pillow knows them; HEIF is read too if pillow-heif is installed."""

_HEIF_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
_AVIF_BRANDS = {b"avif", b"avis"}
_MAX_BRANDS_BYTES = 256
_JPEG_XL_SIGNATURES = (b"\xff\x0a", b"\0\0\0\x0cJXL \r\n\x87\n")


def open_image(data: bytes) -> Image.Image:
    """Read the header of an image.

    Raises:
        UnidentifiedImageError: the bytes are of another format; `describe_unreadable` says more.
        Exception: whatever Pillow raises for damaged bytes.
    """
    reads_heif = bool(_brands(data) & _HEIF_BRANDS) and _register_heif()
    return Image.open(io.BytesIO(data), formats=("HEIF",) if reads_heif else FORMATS)


def describe_unreadable(data: bytes) -> str:
    """Return one sentence on bytes that `open_image` cannot identify."""
    brands = _brands(data)
    if brands & _HEIF_BRANDS and not _register_heif():
        return f"the image is HEIC, which needs pillow-heif; run: {pip_install('heic')}"
    if brands & _AVIF_BRANDS and not AvifImagePlugin.SUPPORTED:
        return "the image is AVIF, which the installed Pillow is built without; install another build of it"
    if data.startswith(_JPEG_XL_SIGNATURES):
        return "the image is JPEG XL, which is not supported; convert it"
    return "the bytes are not a readable JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or HEIC file"


def prepare_for_sandbox() -> None:
    """Import all that reading takes, since files are soon out of reach; decode with one thread.

    A decoding child has one core, and limits of CPU time that hold for all its threads together.
    """
    Image.preinit()
    from PIL import ImageCms, ImageColor, ImagePalette, MpoImagePlugin  # noqa: F401

    AvifImagePlugin.DEFAULT_MAX_THREADS = 1
    if _register_heif():
        import pillow_heif

        pillow_heif.options.DECODE_THREADS = 1


@cache
def _register_heif() -> bool:
    """Make Pillow read HEIC if pillow-heif is installed; return whether it is."""
    try:
        import pillow_heif
    except ImportError:
        return False
    pillow_heif.register_heif_opener()
    return True


def _brands(data: bytes) -> set[bytes]:
    """Return what a file of the ISO container, such as HEIC, says that it holds; nothing for other files."""
    if data[4:8] != b"ftyp":
        return set()
    box = data[8 : min(int.from_bytes(data[:4], "big"), _MAX_BRANDS_BYTES)]
    return {box[start : start + 4] for start in range(0, len(box), 4)}
