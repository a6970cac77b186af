"""Decoded images give the same pixels as their bytes, and no layout is guessed."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from blip2_actor import Status, array_to_rgb, decode_image, require_image_layout, resize_image
from tests.unit.preprocessing.image_corpus import encode, noise

SIZE = 32


def pixels(image: Image.Image, image_format: str = "TIFF") -> np.ndarray:
    return decode_image(encode(image, image_format), SIZE).array(SIZE)


def test_arrays_and_pil_images_get_the_same_pixels_as_bytes() -> None:
    image = noise(40, 30)
    expected = pixels(image)
    array = np.asarray(image)
    assert (resize_image(image, SIZE) == expected).all()
    assert (resize_image(array, SIZE) == expected).all()
    assert (resize_image(np.asfortranarray(array), SIZE) == expected).all()
    assert (resize_image(image.convert("RGBA"), SIZE) == expected).all()
    assert resize_image(expected, SIZE) is expected


@pytest.mark.parametrize("mode", ["1", "L", "LA", "RGB", "RGBA", "I;16", "I;16B", "I", "F"])
def test_the_array_of_a_pil_image_has_the_pixels_of_its_bytes(mode: str) -> None:
    """`ray.data.read_images` gives such arrays; a job over them must not differ from a job over files."""
    gray = noise(40, 30).convert("I").point(lambda value: value * 257)
    image = gray.convert(mode) if mode in ("I", "F", "I;16", "I;16B") else noise(40, 30).convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(noise(40, 30, seed=1).convert("L"))
    array = np.asarray(image)

    assert (resize_image(array, SIZE) == pixels(image)).all()
    whole = array_to_rgb(array)
    assert (whole.shape, whole.dtype) == ((30, 40, 3), np.uint8)
    if mode not in ("LA", "RGB", "RGBA"):
        assert (resize_image(array[..., None], SIZE) == pixels(image)).all()
        assert (array_to_rgb(array[..., None]) == whole).all()
    elif mode != "RGB":
        assert (resize_image(whole, SIZE) == pixels(image)).all()


@pytest.mark.parametrize("shape", [(SIZE, SIZE), (SIZE, SIZE, 2), (SIZE, SIZE, 4), (40, 30), (40, 30, 4)])
def test_results_are_in_memory_of_their_own(shape: tuple[int, ...]) -> None:
    array = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    expected = resize_image(array.copy(), SIZE), array_to_rgb(array.copy())
    results = resize_image(array, SIZE), array_to_rgb(array)
    array[:] = 0
    for result, one in zip(results, expected, strict=True):
        assert (result == one).all()


def test_alpha_is_laid_on_white() -> None:
    assert array_to_rgb(np.array([[[255, 0, 0, 128]]], np.uint8)).tolist() == [[[255, 127, 127]]]
    assert array_to_rgb(np.array([[[0, 51]]], np.uint8)).tolist() == [[[204, 204, 204]]]


def test_16_bit_color_keeps_its_high_byte() -> None:
    array = np.array([[[0x1234, 0xFF00, 0x00FF]]], np.uint16)
    assert array_to_rgb(array).tolist() == [[[0x12, 0xFF, 0]]]
    assert array_to_rgb(array.astype(">u2")).tolist() == [[[0x12, 0xFF, 0]]]


def test_float_color_goes_from_0_to_1() -> None:
    """Colors are not stretched: a dark picture must stay dark."""
    array = np.array([[[0, 0.25, 0.5]]])
    for dtype in (np.float16, np.float32, np.float64):
        assert array_to_rgb(array.astype(dtype)).tolist() == [[[0, 64, 128]]]
    for wrong in (array * 255, array - 1, array * np.nan):
        with pytest.raises(ValueError, match="must have values from 0 to 1, got"):
            array_to_rgb(wrong)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e300])
@pytest.mark.parametrize("place", [(0, 0), (5, 3)])
def test_gray_floats_have_a_range(value: float, place: tuple[int, int]) -> None:
    """A single value that is not finite in float32 used to make the whole picture black, with status ok."""
    array = np.linspace(-3, 7, 80).reshape(10, 8)
    resize_image(array, SIZE)
    array[place] = value
    with pytest.raises(ValueError, match="gray floats must be finite"):
        resize_image(array, SIZE)
    with np.errstate(over="ignore"):
        data = encode(Image.fromarray(array.astype(np.float32)), "TIFF")
    decoded = decode_image(data, SIZE)
    assert decoded.status is Status.UNDECODABLE and "must be finite" in str(decoded.error)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (Image.new("RGB", (0, 4)), "must have pixels, got 0 x 4"),
        (np.zeros((4, 0, 3), np.uint8), r"got uint8\[4, 0, 3\]$"),
        (np.zeros((3, 4, 40), np.uint8), r"got uint8\[3, 4, 40\]; put its channels last"),
        (np.zeros((4, 4, 40), np.uint8), r"got uint8\[4, 4, 40\]; put its channels last"),
        (np.zeros((40, 4, 5), np.uint8), r"got uint8\[40, 4, 5\]; convert it to RGB"),
        (np.zeros((8, 4, 4, 3), np.uint8), r"got uint8\[8, 4, 4, 3\]; give its images one by one"),
        (np.zeros(4, np.uint8), r"got uint8\[4\]$"),
        (np.zeros((4, 4, 4), np.float32), r"got float32\[4, 4, 4\]; convert it to RGB"),
        (np.zeros((4, 4, 3), np.int64), r"got int64\[4, 4, 3\]; convert it to uint8"),
        (np.zeros((4, 4, 3), bool), r"got bool\[4, 4, 3\]; convert it to uint8"),
        (np.zeros((4, 4), complex), r"got complex128\[4, 4\]$"),
        ("picture.jpg", "got str"),
    ],
)
def test_what_is_no_image_is_refused(image: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resize_image(image, SIZE)  # type: ignore[arg-type]  # what it refuses


def test_a_layout_is_checked_before_any_image_is_there() -> None:
    """A dataset whose type states its layout is refused at the call, not row by row."""
    require_image_layout(np.dtype("uint8"), (None, None, 3))
    require_image_layout(np.dtype("uint8"), (None, None, None))
    require_image_layout(np.dtype("float32"), (224, 224))
    with pytest.raises(ValueError, match=r"got uint8\[\?, \?, 7\]"):
        require_image_layout(np.dtype("uint8"), (None, None, 7))
    with pytest.raises(ValueError, match=r"got int64\[\?, \?, \?\]; convert it to uint8"):
        require_image_layout(np.dtype("int64"), (None, None, None))
