"""Turn an image, in any form that callers may have, into the pixels that the encoders take.

This is where a bad image becomes a status: whatever a decoder, a disk or a server does, the other requests do
not notice.
"""

from __future__ import annotations

import stat
from pathlib import Path

import numpy as np
import torch

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.refusal import RequestRefused
from blip2_actor.inputs.fetch_policy import FetchError, FetchPolicy
from blip2_actor.inputs.fetching import fetch_image
from blip2_actor.preprocessing.arrays import resize_image
from blip2_actor.preprocessing.images import ImageLimits, decode_image
from blip2_actor.request import ImageLike
from blip2_actor.status import Status

_MAX_SHOWN_CHARS = 200


def to_pixels(image: ImageLike | None, size_px: int, allow_urls: bool = False) -> np.ndarray:
    """Return an image as uint8[S, S, 3], in memory of its own: the caller may overwrite the image at once.

    Raises:
        RequestRefused: there is no image, it cannot be read, or it belongs to another engine.
    """
    if image is None:
        raise RequestRefused(Status.MISSING_IMAGE, "there is no image, got None")
    if isinstance(image, EncodedImage):
        raise RequestRefused(
            Status.REFUSED,
            "image must be bytes, an array or a PIL image, got an image of another engine; give the image "
            "itself",
        )
    if isinstance(image, str) and ("://" in image or image.startswith("data:")):
        image = _fetch(image, allow_urls)
    elif isinstance(image, str | Path):
        image = _read(image)
    if isinstance(image, bytes | bytearray | memoryview):
        decoded = decode_image(bytes(image), size_px)
        if decoded.status is not Status.OK:
            raise RequestRefused(decoded.status, decoded.error or decoded.status)
        return decoded.array(size_px)
    try:
        own = _to_array(image) if isinstance(image, torch.Tensor) else image
        pixels = resize_image(own, size_px)
    except MemoryError as error:
        raise RequestRefused(
            Status.TOO_LARGE, "the image needs more memory than this process can get"
        ) from error
    except ValueError as error:
        raise RequestRefused(Status.UNDECODABLE, str(error)) from error
    return np.array(pixels, order="C") if pixels is own else pixels


def _fetch(url: str, allow_urls: bool) -> bytes:
    if not url.lower().startswith(("http://", "https://")):
        raise RequestRefused(
            Status.REFUSED,
            f"image must be a file or an http(s) URL, got {_shown(url)}; read it yourself and give its bytes",
        )
    if not allow_urls:
        raise RequestRefused(
            Status.REFUSED,
            f"image must not be a URL, got {_shown(url)}; build the engine with allow_urls=True",
        )
    try:
        return fetch_image(url, FetchPolicy(max_bytes=ImageLimits().max_file_bytes))
    except FetchError as error:
        raise RequestRefused(error.status, str(error)) from error


def _read(place: str | Path) -> bytes:
    """Return the bytes of a file; devices and pipes may have no end."""
    path, limit = Path(place), ImageLimits().max_file_bytes
    try:
        status = path.stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= limit:
            return path.read_bytes()
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise RequestRefused(
            Status.UNREADABLE, f"image must be a file that can be read, got {_shown(place)}: {reason}"
        ) from error
    if not stat.S_ISREG(status.st_mode):
        raise RequestRefused(Status.UNREADABLE, f"image must be a regular file, got {_shown(place)}")
    raise RequestRefused(
        Status.TOO_LARGE, f"the file has {status.st_size} bytes, more than max_file_bytes ({limit})"
    )


def _to_array(tensor: torch.Tensor) -> np.ndarray:
    """Return a tensor with its channels last; torch has them first, and [3, H, 3] is read so.

    Raises:
        ValueError: it is not uint8, or is not a dense tensor.
    """
    if tensor.dtype is not torch.uint8:
        raise ValueError(
            f"image must be uint8 if it is a tensor, got {tensor.dtype}; scale floats to 0 to 255 and convert"
        )
    try:
        array = tensor.detach().cpu().numpy()
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"image must be a dense tensor, got {tensor.layout} on {tensor.device}") from error
    return array.transpose(1, 2, 0) if array.ndim == 3 and array.shape[0] in (1, 3) else array


def _shown(place: str | Path) -> str:
    """Return a path or a URL as it may stand in a message."""
    return repr(str(place)[:_MAX_SHOWN_CHARS])
