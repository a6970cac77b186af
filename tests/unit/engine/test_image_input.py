"""Images in the forms that callers have: read, owned, or refused with a status."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier
from typing import Any

import numpy as np
import pytest
from PIL import Image

from blip2_actor import Request, Status
from blip2_actor.engine.refusal import RequestRefused
from blip2_actor.inputs.image_input import to_pixels
from blip2_actor.testing import FakeEngineConfig, fake_caption
from tests.engines import cpu_config
from tests.unit.preprocessing.image_corpus import encode, noise

SIZE_PX = 64
PIXELS = np.random.default_rng(0).integers(0, 256, (60, 70, 3), dtype=np.uint8)


def encoded(format: str, **options: object) -> bytes:
    return encode(Image.fromarray(PIXELS), format, **options)


LAYOUTS = {"plain": lambda a: a, "bgr": lambda a: a[..., ::-1], "flipped": lambda a: a[::-1]}


@pytest.mark.parametrize("side_px", [SIZE_PX, SIZE_PX + 1])
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS.keys())
def test_an_array_may_be_overwritten_as_soon_as_it_is_handed_over(
    side_px: int, layout: Callable[[np.ndarray], np.ndarray]
) -> None:
    """An array that needs no resize used to be kept: a camera's reused buffer gave wrong captions."""
    buffer = np.random.default_rng(1).integers(0, 256, (side_px, side_px, 3), dtype=np.uint8)
    expected = to_pixels(layout(buffer).copy(), SIZE_PX)
    pixels = to_pixels(layout(buffer), SIZE_PX)
    buffer[:] = 0
    np.testing.assert_array_equal(pixels, expected)
    assert not np.shares_memory(pixels, buffer)


@pytest.mark.parametrize("format", ["PNG", "GIF", "JPEG"])
def test_threads_may_share_a_pil_image_that_is_not_loaded(format: str) -> None:
    """Pillow decodes an opened file at first use: threads used to get mixed pixels, or an error."""
    data = encode(noise(700, 700), format)
    expected = to_pixels(data, SIZE_PX)
    with ThreadPoolExecutor(6) as threads:
        for _ in range(5):
            image, together = Image.open(io.BytesIO(data)), Barrier(6)

            def read(image: Image.Image = image, together: Barrier = together) -> np.ndarray:
                together.wait()
                return to_pixels(image, SIZE_PX)

            for future in [threads.submit(read) for _ in range(6)]:
                np.testing.assert_array_equal(future.result(), expected)


def test_a_camera_that_fills_one_buffer_gets_the_captions_of_its_frames() -> None:
    frames = np.random.default_rng(2).integers(0, 256, (8, 64, 64, 3), dtype=np.uint8)
    buffer = np.empty_like(frames[0])
    config = cpu_config("demo", skip_self_test=True)
    with config.build() as engine:
        expected = [result.text for result in engine.generate([Request(image=frame) for frame in frames])]
        futures = []
        for frame in frames:
            buffer[:] = frame
            futures.append(engine.submit(Request(image=buffer)))
        assert [future.result().text for future in futures] == expected


def test_the_fake_engine_owns_its_images_too() -> None:
    engine = FakeEngineConfig(seconds_per_batch=0.05).build()
    buffer = PIXELS.copy()
    future = engine.submit(Request(image=buffer))
    buffer[:] = 0
    assert future.result().text == fake_caption(PIXELS)
    engine.close()


def closed(folder: Path) -> Image.Image:
    (folder / "a.png").write_bytes(encoded("PNG"))
    with Image.open(folder / "a.png") as image:
        return image


def of_a_closed_file(folder: Path) -> Image.Image:
    file = io.BytesIO(encoded("PNG"))
    image = Image.open(file)
    file.close()
    return image


def half_read(folder: Path) -> Image.Image:
    return Image.open(io.BytesIO(encoded("JPEG")[:900]))


def with_floats_for_rows(folder: Path) -> Image.Image:
    """Pillow uses the stored rows per strip of a TIFF unchecked, and fails with a TypeError."""
    data = bytearray(encoded("TIFF"))
    (directory,) = struct.unpack_from("<I", data, 4)
    for entry in range(directory + 2, directory + 2 + 12 * struct.unpack_from("<H", data, directory)[0], 12):
        if struct.unpack_from("<H", data, entry)[0] == 278:
            struct.pack_into("<HIf", data, entry + 2, 11, 1, 60.0)
    return Image.open(io.BytesIO(data))


def whose_load_fails(error: BaseException) -> Callable[[Path], Image.Image]:
    def make(folder: Path) -> Image.Image:
        class Broken(Image.Image):
            size = (4, 4)

            def load(self) -> Any:
                raise error

        return Broken()

    return make


@pytest.mark.parametrize(
    "make",
    [
        closed,
        of_a_closed_file,
        half_read,
        with_floats_for_rows,
        whose_load_fails(RuntimeError("Failed to decode frame 0: Invalid codestream")),
        whose_load_fails(KeyError(3)),
        whose_load_fails(AssertionError()),
    ],
    ids=lambda make: make.__name__,
)
def test_an_image_that_cannot_be_loaded_is_undecodable(
    make: Callable[[Path], Image.Image], tmp_path: Path
) -> None:
    """Pillow may raise anything: for a closed file AssertionError or ValueError, for AVIF a RuntimeError."""
    with pytest.raises(RequestRefused, match="the image cannot be decoded: ") as refused:
        to_pixels(make(tmp_path), SIZE_PX)
    assert refused.value.status is Status.UNDECODABLE
    assert str(refused.value).isprintable()


def test_an_image_beyond_memory_is_too_large() -> None:
    with pytest.raises(RequestRefused) as refused:
        to_pixels(whose_load_fails(MemoryError())(Path()), SIZE_PX)
    assert refused.value.status is Status.TOO_LARGE


def test_no_image_is_a_missing_image() -> None:
    """A row of a table whose cell is null."""
    with pytest.raises(RequestRefused) as refused:
        to_pixels(None, SIZE_PX)
    assert refused.value.status is Status.MISSING_IMAGE
