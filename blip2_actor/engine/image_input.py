"""From an image in any form that callers have it to the pixels that the encoders take.

This is where a bad image becomes a status: whatever a decoder raises, the other requests do not notice.
"""

from __future__ import annotations

import numpy as np

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.refusal import RequestRefused
from blip2_actor.preprocessing.arrays import resize_image
from blip2_actor.preprocessing.images import decode_image
from blip2_actor.request import ImageLike
from blip2_actor.status import Status


def to_pixels(image: ImageLike | None, size_px: int) -> np.ndarray:
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
    if isinstance(image, bytes):
        decoded = decode_image(image, size_px)
        if decoded.status is not Status.OK:
            raise RequestRefused(decoded.status, decoded.error or decoded.status)
        return decoded.array(size_px)
    try:
        pixels = resize_image(image, size_px)
    except MemoryError as error:
        raise RequestRefused(
            Status.TOO_LARGE, "the image needs more memory than this process can get"
        ) from error
    except ValueError as error:
        raise RequestRefused(Status.UNDECODABLE, str(error)) from error
    return np.array(pixels, order="C") if pixels is image else pixels
