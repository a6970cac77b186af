"""Images that are already decoded, PIL images and arrays, by the rules of encoded bytes.

The layout of an array, its dtype and shape, says what its numbers mean, as the mode of a Pillow image does.
docs/preprocessing.md lists the layouts. A layout that has no one meaning is refused, never guessed: a CMYK
array, for example, has the shape of RGBA and is read as RGBA. Give CMYK as a PIL image.
"""

from __future__ import annotations

import threading

import numpy as np
from PIL import Image

from blip2_actor.preprocessing.images import describe_error
from blip2_actor.preprocessing.rgb import (
    SWAPS_WIDTH_AND_HEIGHT,
    load,
    opaque,
    orientation_of,
    resize_to_square,
    upright_square,
)

LAYOUTS = (
    "uint8 or uint16 of [H, W], [H, W, 1] (gray), [H, W, 2] (gray, alpha), [H, W, 3] (RGB) or [H, W, 4] "
    "(RGBA), bool, int32 or float of [H, W] or [H, W, 1], or float of [H, W, 3]"
)
"""What `array_to_rgb` and `resize_image` read, for messages."""

_LOCKS = tuple(threading.Lock() for _ in range(64))
"""One is held while a PIL image is read. Pillow decodes an opened file when its pixels are first asked for,
and two threads that ask at once get parts of each other's pixels, or an error."""
_CHANNELS = {"bool": (1,), "uint8": (1, 2, 3, 4), "uint16": (1, 2, 3, 4), "int32": (1,), "float": (1, 3)}
"""Kinds of dtypes, each with the numbers of channels that it may have."""


def resize_image(image: Image.Image | np.ndarray, size_px: int) -> np.ndarray:
    """Resize an image that is already decoded to the model's size, by the same rules as encoded bytes.

    Args:
        image: a PIL image, which other threads may give at the same time, or an array of one of the layouts
            of `array_to_rgb`.
        size_px: side S of the model's square.

    Returns:
        uint8[S, S, 3] in RGB; the given array itself if it has that shape and dtype.

    Raises:
        ValueError: the image has no pixels, cannot be read, or has another type or layout.
    """
    if isinstance(image, Image.Image):
        return _resize_pil(image, size_px)
    if not isinstance(image, np.ndarray):
        raise ValueError(f"image must be bytes, a PIL image or an array, got {type(image).__name__}")
    if image.dtype == np.uint8 and image.shape == (size_px, size_px, 3):
        return image
    return np.array(resize_to_square(opaque(_as_pil(image)), size_px))


def _resize_pil(image: Image.Image, size_px: int) -> np.ndarray:
    if 0 in image.size:
        raise ValueError(f"image must have pixels, got {image.width} x {image.height}")
    try:
        with _lock_of(image):
            load(image)
            return np.array(upright_square(image, orientation_of(image), size_px))
    except MemoryError:
        raise
    except Exception as error:  # a closed or damaged image raises errors of any class
        hint = "; its file must be open until it is loaded" if isinstance(error, AssertionError) else ""
        raise ValueError(f"{describe_error(error)}{hint}") from error


def upright_size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """Return width and height of an image that `resize_image` takes, after its EXIF turn."""
    if isinstance(image, np.ndarray):
        return image.shape[1], image.shape[0]
    width, height = image.size
    with _lock_of(image):  # a PNG is loaded to find its EXIF
        is_turned = orientation_of(image) in SWAPS_WIDTH_AND_HEIGHT
    return (height, width) if is_turned else (width, height)


def _lock_of(image: Image.Image) -> threading.Lock:
    return _LOCKS[hash((id(image),)) % len(_LOCKS)]  # of a tuple: ids are multiples of the same number


def array_to_rgb(array: np.ndarray) -> np.ndarray:
    """Convert an image array of any layout to RGB, by the same rules as encoded bytes of that kind.

    Args:
        array: uint8 or uint16 of [H, W], [H, W, 1] (gray), [H, W, 2] (gray, alpha), [H, W, 3] (RGB) or
            [H, W, 4] (RGBA); bool, int32 or float of [H, W] or [H, W, 1] (gray); float of [H, W, 3] (RGB from
            0 to 1).

    Returns:
        uint8[H, W, 3] in RGB, with transparent parts in white.

    Raises:
        ValueError: the array has another layout, no pixels, or float color that is not from 0 to 1.
    """
    image = opaque(_as_pil(array))
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def require_image_layout(dtype: np.dtype, shape: tuple[int | None, ...]) -> None:
    """Raise ValueError, which names the layout, unless arrays of this dtype and shape are images.

    Args:
        dtype: of any byte order.
        shape: (H, W) or (H, W, C); None is a size that is not known yet.
    """
    kind = "float" if dtype.kind == "f" else dtype.name
    num_channels = 1 if len(shape) == 2 else shape[-1] if len(shape) == 3 else 0
    allowed = _CHANNELS.get(kind, ())
    has_area = 0 not in shape[:2]
    if has_area and (num_channels in allowed or (allowed and num_channels is None)):
        return
    remedy = _remedy(kind, shape, num_channels) if has_area else ""
    sizes = ", ".join("?" if size is None else str(size) for size in shape)
    raise ValueError(f"image must be {LAYOUTS}, with pixels, got {dtype.name}[{sizes}]{remedy}")


def _remedy(kind: str, shape: tuple[int | None, ...], num_channels: int | None) -> str:
    """Return what to do about the most frequent other layouts."""
    if len(shape) == 4:
        return "; give its images one by one"
    if num_channels == 0:
        return ""
    if num_channels not in (None, 1, 2, 3, 4) and shape[0] in (1, 3, 4):
        return "; put its channels last"
    if kind in ("bool", "int8", "int16", "int32", "int64", "uint32", "uint64"):
        return "; convert it to uint8"
    return "; convert it to RGB" if kind in _CHANNELS else ""


def _as_pil(array: np.ndarray) -> Image.Image:
    """Return the PIL image of the mode that an array of this layout has."""
    require_image_layout(array.dtype, array.shape)
    array = np.ascontiguousarray(array, array.dtype.newbyteorder("="))
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    if array.dtype == np.uint16:
        array = array >> 8  # the high byte, as `rgb` reads 16-bit gray and Pillow 16-bit color
    elif array.dtype == np.bool_:
        array = array * np.uint8(255)
    elif array.dtype.kind == "f" and array.ndim == 3:
        array = _from_unit_range(array)
    elif array.dtype.kind == "f":
        with np.errstate(over="ignore"):  # what is beyond float32 becomes infinite, and `opaque` refuses it
            return Image.fromarray(array.astype(np.float32))
    elif array.dtype == np.int32:
        return Image.fromarray(array)
    return Image.fromarray(array.astype(np.uint8, copy=False))


def _from_unit_range(array: np.ndarray) -> np.ndarray:
    low, high = array.min(), array.max()
    if not (low >= 0 and high <= 1):  # also if either is NaN
        raise ValueError(
            f"float image of [H, W, 3] must have values from 0 to 1, got {low:g} to {high:g}; "
            "scale it, or convert it to uint8"
        )
    return np.rint(array * 255)
