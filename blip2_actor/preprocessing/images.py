"""Image decoding: encoded bytes to uint8[S, S, 3] at the model's size, the project's only preprocessing.

The rule: bad bytes are a status with a reason, never an exception, because one bad file must not stop a job
of millions. Which picture is seen (EXIF turns, transparency, 16-bit gray) is decided in `rgb`; normalization
comes later, in the engine, on its device.

`decode_image` works in this process. Untrusted bytes can crash or hang a decoder, so both hosts decode them
in child processes, with `DecodePool`. Decode workers import this module, so it imports Pillow and the
standard library only.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from PIL import Image, JpegImagePlugin, UnidentifiedImageError

from blip2_actor.inputs.field_types import require_types
from blip2_actor.preprocessing.formats import describe_unreadable, open_image
from blip2_actor.preprocessing.repair import with_end, without_metadata
from blip2_actor.preprocessing.rgb import SWAPS_WIDTH_AND_HEIGHT, load, orientation_of, upright_square
from blip2_actor.status import Status

if TYPE_CHECKING:
    import numpy as np

_MAX_ERROR_CHARS = 200
_MOST = {"cpu_s": 1_000_000_000, "wall_s": 2_000_000, "memory_bytes": (1 << 63) - 1}
"""The largest limits that the timers and resource limits of a decoding process take."""


@dataclass(frozen=True, kw_only=True)
class ImageLimits:
    """What one image may cost. Only the child processes of `DecodePool` enforce time and memory."""

    max_pixels: int = 89_478_485
    """Maximum number of pixels, read from the header before any pixel is decoded. The default is Pillow's own
    limit."""
    max_file_bytes: int = 128 << 20
    """Maximum number of encoded bytes."""
    cpu_s: float = 20.0
    """Maximum CPU seconds for decoding and resizing one image; independent of the machine's load."""
    wall_s: float = 120.0
    """Maximum wall-clock seconds for one image, for decoders that sleep; large, so that a loaded machine
    changes no status."""
    memory_bytes: int = 2 << 30
    """Maximum address space of a decoding process in bytes; the process itself needs up to 80 MB
    (Linux only)."""
    jpeg_draft: bool = False
    """Decode large JPEGs at a half, a quarter or an eighth of their size, but at least at twice the model's
    size: faster, with slightly different pixels (see docs/preprocessing.md)."""

    accept_truncated: bool = False
    """Read JPEGs that lack their end, with gray in place of the missing part; such a row gets the flag
    truncated. Without it they are undecodable."""

    def __post_init__(self) -> None:
        for name in ("max_pixels", "max_file_bytes", "memory_bytes"):
            if isinstance(value := getattr(self, name), float) and value.is_integer():  # such as 2e9
                object.__setattr__(self, name, int(value))
        require_types(self)
        for name in ("max_pixels", "max_file_bytes", "cpu_s", "wall_s", "memory_bytes"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0 and finite, got {getattr(self, name)}")
        for name, most in _MOST.items():
            if getattr(self, name) > most:
                raise ValueError(f"{name} must be at most {most:,}, got {getattr(self, name)}")


@dataclass(frozen=True, kw_only=True)
class DecodedImage:
    """The outcome of decoding one image: its pixels, or a status other than ok and the reason."""

    status: Status = Status.OK
    error: str | None = None
    """One sentence; None if the status is ok."""
    pixels: bytes | None = None
    """uint8[S, S, 3], RGB, row-major; None unless the status is ok."""
    width: int | None = None
    """Width of the original image in pixels, after its EXIF turn; None unless the status is ok."""
    height: int | None = None
    """Height, likewise."""
    is_truncated: bool = False
    """Whether the file lacks its end, and the pixels are those of the part that is there."""

    def array(self, size_px: int) -> np.ndarray:
        """View the pixels as read-only uint8[S, S, 3].

        Raises:
            ValueError: there are no pixels, or they have another size.
        """
        import numpy as np

        if self.pixels is None:
            raise ValueError(f"the image must have pixels, got none: {self.status.value}, {self.error}")
        return np.frombuffer(self.pixels, np.uint8).reshape(size_px, size_px, 3)


def decode_image(data: bytes | None, size_px: int, limits: ImageLimits = ImageLimits()) -> DecodedImage:
    """Decode and resize one image in this process; use `DecodePool` for untrusted bytes.

    Args:
        data: the encoded image; None or no bytes give the status `missing_image`.
        size_px: side S of the model's square.
        limits: those of time and memory have no effect in this process.
    """
    refused = refuse_unopened(data, limits)
    if refused is not None:
        return refused
    assert data is not None
    try:
        return decode_or_exhaust(data, size_px, limits)
    except MemoryError:
        return DecodedImage(
            status=Status.TOO_LARGE, error="decoding needs more memory than this process can get"
        )


def refuse_unopened(data: bytes | None, limits: ImageLimits) -> DecodedImage | None:
    """Return the outcome for bytes that are missing or too many, or None for bytes that are worth opening."""
    if not data:
        return DecodedImage(status=Status.MISSING_IMAGE, error="there are no image bytes")
    if len(data) > limits.max_file_bytes:
        error = f"the file has {len(data)} bytes, more than max_file_bytes ({limits.max_file_bytes})"
        return DecodedImage(status=Status.TOO_LARGE, error=error)
    return None


def decode_or_exhaust(data: bytes, size_px: int, limits: ImageLimits) -> DecodedImage:
    """Do the work of `decode_image`, but raise `MemoryError`: only the caller knows whose memory is used up.

    Raises:
        MemoryError: the process cannot get the memory that decoding needs.
    """
    image = _attempt(data, size_px, limits)
    if image.status is not Status.UNDECODABLE:
        return image
    if repaired := without_metadata(data):
        second = _attempt(repaired, size_px, limits)
    elif limits.accept_truncated and (ended := with_end(data)):
        second = replace(_attempt(ended, size_px, limits), is_truncated=True)
    else:
        return image
    # The first error says more about the file as it is.
    return image if second.status is Status.UNDECODABLE else second


def _attempt(data: bytes, size_px: int, limits: ImageLimits) -> DecodedImage:
    try:
        return _decode(data, size_px, limits)
    except MemoryError:
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, which `decode_child` switches off
        assert Image.MAX_IMAGE_PIXELS is not None
        reason = (
            f"the image has more pixels than Pillow allows in this process ({2 * Image.MAX_IMAGE_PIXELS})"
        )
        return DecodedImage(status=Status.TOO_LARGE, error=reason)
    except UnidentifiedImageError:
        return DecodedImage(status=Status.UNDECODABLE, error=describe_unreadable(data))
    except Exception as error:  # a row's failure becomes a row here: damaged bytes make Pillow raise anything
        if "out of memory" in str(error):  # Pillow's codecs report it as an OSError
            raise MemoryError from error
        return DecodedImage(status=Status.UNDECODABLE, error=describe_error(error))


def _decode(data: bytes, size_px: int, limits: ImageLimits) -> DecodedImage:
    image = open_image(data)
    width, height = image.size
    if width * height > limits.max_pixels:
        error = f"the image has {width} x {height} pixels, more than max_pixels ({limits.max_pixels})"
        return DecodedImage(status=Status.TOO_LARGE, error=error)
    is_jpeg = isinstance(image, JpegImagePlugin.JpegImageFile)  # the draft of a HEIC file is its thumbnail
    is_draft = is_jpeg and limits.jpeg_draft and image.draft(None, (2 * size_px, 2 * size_px)) is not None
    load(image)
    if not is_draft:
        width, height = image.size  # Pillow turns a TIFF itself when it loads it
    orientation = orientation_of(image)
    if orientation in SWAPS_WIDTH_AND_HEIGHT:
        width, height = height, width
    square = upright_square(image, orientation, size_px)
    return DecodedImage(pixels=square.tobytes(), width=width, height=height)


def describe_error(error: Exception) -> str:
    """Return one printable line; Pillow's message may quote bytes of the file, so it is cleaned and cut."""
    text = " ".join(str(error).split()) or type(error).__name__
    printable = "".join(c if c.isprintable() else "?" for c in text)
    return f"the image cannot be decoded: {printable[:_MAX_ERROR_CHARS]}"
