"""Convert a loaded Pillow image to 8-bit RGB at the model's size, as a person sees it in a viewer.

The order is fixed: 8 bits, transparency onto white, the EXIF turn, then one bicubic resize. For a plain RGB
image the result is that of the checkpoint's own image processor, bit for bit; docs/preprocessing.md lists the
other kinds of image, for which the processor has no rule.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable
from typing import Any, cast

from PIL import Image, ImageChops, PngImagePlugin, TiffImagePlugin

_ORIENTATION = 0x0112  # EXIF tag
_BITS, _PHOTOMETRIC, _COLOR_MAP, _SAMPLE_FORMAT = 0x0102, 0x0106, 0x0140, 0x0153  # TIFF tags
_WHITE_IS_ZERO, _UNSIGNED, _SIGNED = 0, 1, 2
"""Values of `_PHOTOMETRIC` and `_SAMPLE_FORMAT`."""
_TO_8_BITS: dict[object, Callable[[Any], int]] = {
    "L;2": lambda value: value * 0x55,
    "L;4": lambda value: value * 0x11,
    "RGB;16B": lambda value: value >> 8,
}
"""What Pillow does to the pixels of a PNG when it loads them, by its names for how they are stored."""
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
SWAPS_WIDTH_AND_HEIGHT = (5, 6, 7, 8)
"""EXIF orientations of a picture that lies on its side."""


def orientation_of(image: Image.Image) -> int:
    """Return the EXIF orientation of a loaded image, 1 to 8; 1 (upright) if its EXIF block is damaged."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    except (ArithmeticError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error):
        return 1


def load(image: Image.Image) -> None:
    """Load an image, and scale the transparent color of a PNG as the pixels, which Pillow does not."""
    color = image.info.get("transparency")
    scale = None if color is None else _scale_of(image, color)
    image.load()
    if scale is not None:
        image.info["transparency"] = tuple(map(scale, color)) if isinstance(color, tuple) else scale(color)


def _scale_of(image: Image.Image, color: object) -> Callable[[Any], int] | None:
    """Return what scales a transparent color; None if it has 8 bits.

    An image that is already loaded no longer tells its depth. Then 16 bits show in the color, and 2 or 4 bits
    if all grays are multiples and one of them is the color's.
    """
    if tile := getattr(image, "tile", None):
        return _TO_8_BITS.get(tile[0][3]) if isinstance(image, PngImagePlugin.PngImageFile) else None
    if image.mode == "RGB" and isinstance(color, tuple) and max(color) > 255:
        return _TO_8_BITS["RGB;16B"]
    if image.mode == "L" and isinstance(color, int):
        grays = [gray for gray, count in enumerate(image.histogram()) if count]
        for scale in (_TO_8_BITS["L;2"], _TO_8_BITS["L;4"]):
            if scale(color) in grays and not any(gray % scale(1) for gray in grays):
                return scale
    return None


def upright_square(image: Image.Image, orientation: int, size_px: int) -> Image.Image:
    """Convert a loaded image to RGB, turn it by its EXIF orientation, and resize it to uint8[S, S, 3]."""
    image = opaque(image)
    if orientation in _TURNS:
        image = image.transpose(_TURNS[orientation])
    return resize_to_square(image, size_px)


def opaque(image: Image.Image) -> Image.Image:
    """Convert a loaded image to mode RGB, or to L if it is gray, with transparent parts in white."""
    image = _with_palette_of_8_bits(_gray_of_8_bits(image))
    if image.has_transparency_data and not _has_blank_alpha(image):
        return _lay_on_white(image)
    if image.mode in ("RGB", "L"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")


def resize_to_square(image: Image.Image, size_px: int) -> Image.Image:
    """Resize an image of mode RGB or L; returns mode RGB."""
    square = image.resize((size_px, size_px), Image.Resampling.BICUBIC)
    # A gray image is resized as one channel: the same bits as three channels, in half the time.
    return square if square.mode == "RGB" else square.convert("RGB")


def _gray_of_8_bits(image: Image.Image) -> Image.Image:
    """Convert gray of more than 8 bits, or with a sign, to mode L; other images stay as they are."""
    if image.mode.startswith("I;16"):
        gray = _keep_high_bytes(image)
    elif image.mode in ("I", "F"):
        gray = _stretch(image)
    elif image.mode == "L" and _tiff_tag(image, _SAMPLE_FORMAT) == _SIGNED:
        gray = _stretch(image.point([value ^ 0x80 for value in range(256)]))  # Pillow reads it as unsigned
    else:
        return image
    # Pillow inverts such files itself up to 8 bits.
    return ImageChops.invert(gray) if _tiff_tag(image, _PHOTOMETRIC) == _WHITE_IS_ZERO else gray


def _with_palette_of_8_bits(image: Image.Image) -> Image.Image:
    """Read the color map of a TIFF as colors of 8 bits if all its values are below 256.

    The format asks for 16 bits, but some programs write 8; libtiff reads them so too. Pillow takes the high
    bytes, and the picture is black.
    """
    tags = _tiff_tags(image)
    if image.mode not in ("P", "PA") or tags is None:
        return image
    colors = tags.get(_COLOR_MAP, ())  # Pillow needs one, but a caller can give a palette to a gray image
    if max(colors, default=0) in range(1, 256):
        image = image.copy()
        image.putpalette(bytes(colors), "RGB;L")
    return image


def _tiff_tag(image: Image.Image, tag: int, default: int | None = None) -> int | None:
    """Return a number in the header of a TIFF, or `default`; None for an image without one."""
    tags = _tiff_tags(image)
    value = None if tags is None else tags.get(tag, default)
    return value[0] if isinstance(value, tuple) else value


def _tiff_tags(image: Image.Image) -> TiffImagePlugin.ImageFileDirectory_v2 | None:
    """Return the header of a TIFF; None for an image of another kind, and for one that was pickled."""
    return getattr(image, "tag_v2", None) if isinstance(image, TiffImagePlugin.TiffImageFile) else None


def _keep_high_bytes(image: Image.Image) -> Image.Image:
    """Scale 16-bit gray as Pillow scales 16-bit color; Pillow's own conversion would clip at 255.

    A transparent color is white in the result. Gray of 12 bits, which Pillow reads as it is, is scaled too.
    """
    if _tiff_tag(image, _BITS) == 12:
        image = image.point(lambda value: value * 16)
    first = 0 if image.mode == "I;16B" else 1
    data = image.tobytes()
    high = Image.frombytes("L", image.size, data[first::2])
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        low = Image.frombytes("L", image.size, data[1 - first :: 2])
        is_it = [
            part.point([255 * (value == wanted) for value in range(256)])
            for part, wanted in ((high, transparent >> 8), (low, transparent & 0xFF))
        ]
        high.paste(255, mask=ImageChops.darker(*is_it))
    return high


def _stretch(image: Image.Image) -> Image.Image:
    """Map 32-bit integers or floats, whose range no format states, from their own range to 0 to 255.

    Raises:
        ValueError: a float is infinite or NaN, and so has no place in a range; or an integer is too large for
            Pillow.
    """
    if image.mode == "F":
        mean = cast("float", image.resize((1, 1), Image.Resampling.BOX).getpixel((0, 0)))
        if not math.isfinite(mean):  # one value is enough; the minimum and the maximum leave NaN out
            raise ValueError("gray floats must be finite")
    low, high = cast("tuple[float, float]", image.getextrema())
    if image.mode == "I" and low < 0 and _tiff_tag(image, _SAMPLE_FORMAT, _UNSIGNED) == _UNSIGNED:
        raise ValueError("integers must be below 2147483648")
    scale = 255.0 / (high - low) if high > low else 0.0
    return image.convert("F").point(lambda value: value * scale + (0.5 - low * scale)).convert("L")


def _has_blank_alpha(image: Image.Image) -> bool:
    """Return whether an image is a BMP whose alpha channel was left empty, which viewers show as opaque."""
    return image.format == "BMP" and image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)


def _lay_on_white(image: Image.Image) -> Image.Image:
    is_gray = image.mode in ("LA", "La")
    image = image.convert("LA" if is_gray else "RGBA")
    background = Image.new("L" if is_gray else "RGB", image.size, "white")
    background.paste(image.getchannel("L") if is_gray else image, mask=image.getchannel("A"))
    return background
