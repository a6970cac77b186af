"""Encoded bytes to RGB to uint8[S, S, 3] at the model's size: the only preprocessing of the project.

For a plain RGB image the pixels are those of the checkpoint's own image processor before it rescales
and normalises, bit for bit (`Image.resize` with the bicubic filter). What the processor leaves to chance is
settled as a person would see the picture; docs/preprocessing.md lists it. Normalisation is the
engine's, on its device.

`decode_image` runs here and now; `DecodePool` runs it in processes that may crash.
"""

from __future__ import annotations

import io
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

# The plugins register themselves, so that Image.open need not load the other forty.
from PIL import (  # noqa: F401
    BmpImagePlugin,
    GifImagePlugin,
    Image,
    JpegImagePlugin,
    PngImagePlugin,
    TiffImagePlugin,
    UnidentifiedImageError,
    WebPImagePlugin,
)

from blip2_actor.status import Status

if TYPE_CHECKING:
    import numpy as np

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
"""What is tried, by content and never by a file's extension; Pillow's other plugins stay unused."""

_ORIENTATION = 0x0112  # EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_ON_ITS_SIDE = (5, 6, 7, 8)
_MAX_ERROR_CHARS = 200


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What one image may cost. Time and memory are enforced by `DecodePool`'s children alone."""

    max_pixels: int = 89_478_485
    """Most pixels, judged by the header before any is decoded. The default is Pillow's own mark."""
    max_file_bytes: int = 128 << 20
    """Most encoded bytes."""
    cpu_s: float = 20.0
    """Most CPU seconds for decoding and resizing one image; does not grow with the machine's load."""
    wall_s: float = 120.0
    """Most seconds by the clock: for decoders that sleep, generous so that load changes no status."""
    memory_bytes: int = 2 << 30
    """Address space of a decoding process, 30 MB of which are its own (Linux only)."""
    jpeg_draft: bool = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size, at least twice the model's:
    faster, and the pixels differ slightly (docs/preprocessing.md has the measure)."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_file_bytes", "cpu_s", "wall_s", "memory_bytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """What became of one encoded image: pixels, or a status that is not ok and its reason."""

    status: Status = Status.OK
    error: str | None = None
    """One sentence; None when ok."""
    pixels: bytes | None = None
    """uint8[S, S, 3], RGB, row-major; None unless ok."""
    width: int | None = None
    """Of the original image as a person sees it, turned as its EXIF says; None unless ok."""
    height: int | None = None

    def array(self, size_px: int) -> np.ndarray:
        """View the pixels as read-only uint8[S, S, 3].

        Raises:
            ValueError: there are no pixels, or not of this size.
        """
        import numpy as np

        if self.pixels is None:
            raise ValueError(f"pixels must be there, got none: {self.status.value}, {self.error}")
        return np.frombuffer(self.pixels, np.uint8).reshape(size_px, size_px, 3)


def decode_image(data: bytes | None, size_px: int, limits: ImageLimits = ImageLimits()) -> DecodedImage:
    """Decode and resize in this process; bad bytes are a status, never an exception.

    Only `max_pixels`, `max_file_bytes` and `jpeg_draft` hold here: for bytes from strangers use `DecodePool`.
    """
    refused = refuse_unopened(data, limits)
    if refused is not None:
        return refused
    assert data is not None
    try:
        return decode_or_exhaust(data, size_px, limits)
    except MemoryError:
        return DecodedImage(status=Status.TOO_LARGE, error="decoding needs more memory than there is")


def refuse_unopened(data: bytes | None, limits: ImageLimits) -> DecodedImage | None:
    """Give the fate of bytes that need not be opened to know it, or None for the others."""
    if not data:
        return DecodedImage(status=Status.MISSING_IMAGE, error="there are no image bytes")
    if len(data) > limits.max_file_bytes:
        error = f"the file has {len(data)} bytes, more than max_file_bytes ({limits.max_file_bytes})"
        return DecodedImage(status=Status.TOO_LARGE, error=error)
    return None


def decode_or_exhaust(data: bytes, size_px: int, limits: ImageLimits) -> DecodedImage:
    """Do the work of `decode_image`, but let `MemoryError` out: only the caller knows whose memory it is."""
    try:
        return _decode(data, size_px, limits)
    except MemoryError:
        raise
    except Image.DecompressionBombError:  # in this process Pillow's own limit holds too
        assert Image.MAX_IMAGE_PIXELS is not None
        reason = f"the image has more pixels than Pillow allows here ({2 * Image.MAX_IMAGE_PIXELS})"
        return DecodedImage(status=Status.TOO_LARGE, error=reason)
    except UnidentifiedImageError:
        reason = f"the bytes are no readable {', '.join(FORMATS[:-1])} or {FORMATS[-1]} file"
        return DecodedImage(status=Status.UNDECODABLE, error=reason)
    except Exception as error:  # the row boundary: Pillow raises almost anything for damaged bytes
        if "out of memory" in str(error):  # Pillow's codecs say so in an OSError
            raise MemoryError from error
        return DecodedImage(status=Status.UNDECODABLE, error=_sentence(error))


def _decode(data: bytes, size_px: int, limits: ImageLimits) -> DecodedImage:
    image: Image.Image = Image.open(io.BytesIO(data), formats=FORMATS)
    width, height = image.size
    if width * height > limits.max_pixels:
        error = f"the image has {width} x {height} pixels, more than max_pixels ({limits.max_pixels})"
        return DecodedImage(status=Status.TOO_LARGE, error=error)
    drafted = limits.jpeg_draft and image.draft(None, (2 * size_px, 2 * size_px)) is not None
    image.load()
    if not drafted:
        width, height = image.size  # of a TIFF, only loading turns it
    orientation = _orientation(image)
    if orientation in _ON_ITS_SIDE:
        width, height = height, width
    square = _square(image, orientation, size_px)
    return DecodedImage(pixels=square.tobytes(), width=width, height=height)


def resize_image(image: Image.Image | np.ndarray, size_px: int) -> np.ndarray:
    """Bring an image that is already decoded to the model's size, by the same rules as encoded bytes.

    Args:
        image: a PIL image, or uint8[H, W, 3] in RGB.

    Returns:
        uint8[S, S, 3] in RGB; the given array itself when it has that shape.

    Raises:
        ValueError: the image has no pixels, cannot be read, or is of another type or shape.
    """
    import numpy as np

    if isinstance(image, Image.Image):
        if 0 in image.size:
            raise ValueError(f"image must have pixels, got {image.width} x {image.height}")
        try:
            image.load()
        except (OSError, SyntaxError) as error:
            raise ValueError(f"image must be readable, got {_sentence(error)}") from error
        return np.array(_square(image, _orientation(image), size_px))
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image must be bytes, a PIL image or uint8[H, W, 3], got {type(image).__name__}")
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or image.size == 0:
        raise ValueError(
            f"image must be uint8[H, W, 3] with pixels, got {image.dtype}{list(image.shape)}; "
            "give floats or other layouts as a PIL image"
        )
    if image.shape[:2] == (size_px, size_px):
        return image
    return np.array(_resize(Image.fromarray(image), size_px))


def _orientation(image: Image.Image) -> int:
    """Read how a loaded image is to be turned; a damaged EXIF block turns nothing."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1


def _square(image: Image.Image, orientation: int, size_px: int) -> Image.Image:
    image = _opaque(image)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    return _resize(image, size_px)


def _resize(image: Image.Image, size_px: int) -> Image.Image:
    square = image.resize((size_px, size_px), Image.Resampling.BICUBIC)
    # Grey is resized as one channel: the same bits as three, in half the time.
    return square if square.mode == "RGB" else square.convert("RGB")


def _opaque(image: Image.Image) -> Image.Image:
    """Show a loaded image in 8 bits on white paper: mode RGB, or L where it is grey."""
    if image.mode.startswith("I;16"):
        image = _high_bytes(image)
    elif image.mode in ("I", "F"):
        image = _stretched(image)
    if image.has_transparency_data:
        return _on_white(image)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def _high_bytes(image: Image.Image) -> Image.Image:
    """Scale 16-bit grey as Pillow scales 16-bit colour; its own conversion would clip at 255."""
    first = 0 if image.mode == "I;16B" else 1
    return Image.frombytes("L", image.size, image.tobytes()[first::2])


def _stretched(image: Image.Image) -> Image.Image:
    """Map 32-bit integers or floats, whose range no format states, from least to most onto 0 to 255."""
    least, most = cast("tuple[float, float]", image.getextrema())
    scale = 255.0 / (most - least) if most > least else 0.0
    return image.convert("F").point(lambda value: value * scale + (0.5 - least * scale)).convert("L")


def _on_white(image: Image.Image) -> Image.Image:
    grey = image.mode in ("LA", "La")
    image = image.convert("LA" if grey else "RGBA")
    paper = Image.new("L" if grey else "RGB", image.size, "white")
    paper.paste(image.getchannel("L") if grey else image, mask=image.getchannel("A"))
    return paper


def _sentence(error: Exception) -> str:
    """One printable line of at most 200 characters: the message may quote what the file says."""
    text = " ".join(str(error).split()) or type(error).__name__
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return f"the image cannot be decoded: {printable[:_MAX_ERROR_CHARS]}"
