"""What a checkpoint's image processor does to pixels, read from its file: every field is honored or refused.

transformers 4 stores the processor in `preprocessor_config.json`, version 5 in `processor_config.json`; if
both are there, version 5 reads the latter. A field that is missing or null has the default of
`BlipImageProcessor`, except `size`, whose default is the size that the vision encoder takes, and the switches
(`do_…`), of which null means false.

Images are resized with Pillow's bicubic filter to a square (see `blip2_actor/preprocessing/`), then rescaled
and normalized on the device (`PixelNormalizer`). A processor that does something else is refused by name.
`do_convert_rgb` has no effect: transformers fails without it unless an image is RGB already.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import Blip2VisionConfig

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
"""CLIP's, the defaults of `BlipImageProcessor`."""
RESCALE_FACTOR = 1 / 255
BICUBIC = 3
"""Pillow's number of its bicubic filter."""
_TYPES = ("BlipImageProcessor", "BlipImageProcessorFast", "BlipImageProcessorPil")


@dataclass(frozen=True)
class ImageProcessor:
    """A processor that resizes to a square, rescales and normalizes."""

    mean: tuple[float, ...]
    std: tuple[float, ...]
    rescale_factor: float
    size_px: int | None
    """Side of the square; None if the file does not say."""

    @classmethod
    def of(cls, stored: Mapping[str, Any], file: object) -> ImageProcessor:
        """Read a processor.

        Args:
            stored: content of the file, or of its part for images.
            file: name of the file, for messages.

        Raises:
            ValueError: the processor changes pixels in a way that is not supported; the message names the
                field.
        """
        fields = {n: value for n, value in stored.items() if value is not None or n.startswith("do_")}

        def require(holds: bool, name: str, rule: str) -> None:
            if not holds:
                raise ValueError(
                    f"{name} in {file} must be {rule}, got {fields[name]!r}; the images would not be those "
                    "that the model was made for"
                )

        require(fields.get("image_processor_type", _TYPES[0]) in _TYPES, "image_processor_type", _TYPES[0])
        require(fields.get("do_resize", True) is True, "do_resize", "true")
        resample = fields.get("resample", BICUBIC)
        is_bicubic = type(resample) is int and resample == BICUBIC  # transformers reads 3.0 as bilinear
        require(is_bicubic, "resample", f"{BICUBIC} (bicubic)")
        size_px = None
        if "size" in fields:
            size_px = _side(fields["size"], fields.get("default_to_square", True))
            require(size_px is not None, "size", "a square, such as 224 or {'height': 224, 'width': 224}")
        if fields.get("do_center_crop"):
            is_whole = size_px is not None and _side(fields.get("crop_size"), True) == size_px
            require(is_whole, "do_center_crop", "false, or crop_size must be equal to size")
        require(not fields.get("do_pad"), "do_pad", "false")
        rescale_factor = fields.get("rescale_factor", RESCALE_FACTOR)
        if fields.get("do_rescale", True):
            require(_is_exact(rescale_factor), "rescale_factor", "1 divided by a whole number, such as 1/255")
        else:
            rescale_factor = 1.0
        mean = _per_channel(fields.get("image_mean", MEAN))
        std = _per_channel(fields.get("image_std", STD))
        require(mean is not None, "image_mean", "a number or three numbers")
        require(std is not None and 0 not in std, "image_std", "a number or three numbers other than 0")
        if not fields.get("do_normalize", True):
            mean, std = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
        assert mean is not None and std is not None
        return cls(mean, std, rescale_factor, size_px)

    def image_size(self, vision: Blip2VisionConfig, asked_px: int | None = None) -> int:
        """Return the side of the square that the vision encoder takes, in pixels.

        Args:
            vision: configuration of the vision encoder.
            asked_px: size for which its positions are interpolated; None takes the checkpoint's own.

        Raises:
            ValueError: the asked size does not consist of whole patches, or no size is asked and the
                processor makes another one than the checkpoint's.
        """
        if asked_px is None:
            if self.size_px not in (None, vision.image_size):
                raise ValueError(
                    f"size of the image processor must be the image_size of the vision encoder, "
                    f"{vision.image_size}, got {self.size_px}; set image_size_px to the size that you want"
                )
            return int(vision.image_size)
        if asked_px % vision.patch_size:
            nearest_px = max(round(asked_px / vision.patch_size), 1) * vision.patch_size
            raise ValueError(
                f"image_size_px must be a multiple of the model's patch size, {vision.patch_size}, got "
                f"{asked_px}; the nearest is {nearest_px}"
            )
        return asked_px


def _side(size: object, is_square: bool) -> int | None:
    """Return the side of a square as transformers reads `size`; None if it is no square."""
    if isinstance(size, Mapping):
        known = {name: side for name, side in size.items() if side is not None}
        sides: Sequence[Any] = list(known.values()) if known.keys() == {"height", "width"} else ()
    elif isinstance(size, Sequence):
        sides = size
    else:
        sides = [size, size] if is_square else ()
    is_whole = len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)
    return sides[0] if is_whole and sides[0] == sides[1] else None


def _per_channel(value: Any) -> tuple[float, ...] | None:
    numbers = list(value) if isinstance(value, Sequence) else [value] * 3
    are_numbers = len(numbers) == 3 and all(type(number) in (int, float) for number in numbers)
    return tuple(float(number) for number in numbers) if are_numbers else None


def _is_exact(rescale_factor: Any) -> bool:
    """Does division in float32 (see `PixelNormalizer`) give what the reference's float64 product gives?"""
    if type(rescale_factor) not in (int, float) or rescale_factor <= 0:
        return False
    levels = torch.arange(256)
    quotients = levels.to(torch.float32) / torch.tensor(1 / rescale_factor)
    return torch.equal(quotients, (levels.to(torch.float64) * rescale_factor).to(torch.float32))
