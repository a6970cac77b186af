"""The vision encoder gets exactly the pixels of the checkpoint's own image processor."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

from blip2_actor import decode_image, resize_image
from blip2_actor.models.vision import PixelNormalizer
from tests.unit.preprocessing.image_corpus import encode, noise


def reference(size_px: int) -> BlipImageProcessorPil:
    return BlipImageProcessorPil(size={"height": size_px, "width": size_px})


def reference_pixels(image: Image.Image, size_px: int) -> np.ndarray:
    """Return the reference's uint8[S, S, 3] before rescaling and normalizing."""
    pixel_values = reference(size_px)(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
    return np.asarray(pixel_values).transpose(1, 2, 0)


@pytest.mark.parametrize("size", [(640, 480), (100, 333), (50, 20), (224, 224)])
@pytest.mark.parametrize("size_px", [64, 224])
@pytest.mark.parametrize("image_format", ["PNG", "JPEG", "WEBP"])
def test_pixels_of_an_rgb_image(size: tuple[int, int], size_px: int, image_format: str) -> None:
    data = encode(noise(*size), image_format)
    expected = reference_pixels(Image.open(io.BytesIO(data)), size_px)
    assert (decode_image(data, size_px).array(size_px) == expected).all()
    assert (resize_image(Image.open(io.BytesIO(data)), size_px) == expected).all()
    assert (resize_image(np.asarray(Image.open(io.BytesIO(data))), size_px) == expected).all()


@pytest.mark.parametrize("mode", ["L", "1", "P", "CMYK"])
def test_pixels_of_other_opaque_modes(mode: str) -> None:
    """The one-channel shortcut for gray images must be exact, and palette indices must not be averaged."""
    data = encode(noise(300, 200).convert(mode), "TIFF")
    expected = reference_pixels(Image.open(io.BytesIO(data)), 224)
    assert (decode_image(data, 224).array(224) == expected).all()


def test_pixels_of_a_turned_photograph() -> None:
    """The picture is first turned, then resized; the other order rounds differently."""
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encode(noise(320, 200), "JPEG", exif=exif)
    expected = reference_pixels(ImageOps.exif_transpose(Image.open(io.BytesIO(data))), 224)
    assert (decode_image(data, 224).array(224) == expected).all()


def test_normalized_values() -> None:
    """All 256 levels: multiplying by a float32 1/255 would change the last bit of half of them."""
    image = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).convert("RGB")
    processor = reference(16)
    expected = torch.as_tensor(np.asarray(processor(image)["pixel_values"]))
    normalizer = PixelNormalizer(
        list(processor.image_mean), list(processor.image_std), processor.rescale_factor
    )
    ours = normalizer(torch.from_numpy(resize_image(image, 16))[None], torch.float32)
    assert expected.dtype == torch.float32
    assert torch.equal(ours, expected)
