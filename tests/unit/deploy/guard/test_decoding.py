"""Large pictures do not hold up small ones, whatever their headers claim."""

from __future__ import annotations

import asyncio
import io
import struct
import threading
from collections.abc import Iterator

import psutil
import pytest
from PIL import Image

from blip2_actor import ImageLimits, Status
from deploy.guard import decoding
from deploy.guard.decoding import LARGE_NICENESS, Decoding
from deploy.guard.image_header import claimed_pixels


def picture(width: int, height: int, format: str = "PNG", **options: object) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height)).save(file, format, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    ("format", "options"),
    [
        ("PNG", {}),
        ("JPEG", {}),
        ("JPEG", {"progressive": True, "exif": b"Exif\0\0" + bytes(1000), "comment": b"a" * 5000}),
        ("GIF", {}),
        ("BMP", {}),
        ("WEBP", {}),
        ("WEBP", {"lossless": True}),
        ("WEBP", {"exif": b"Exif\0\0" + bytes(50)}),
    ],
)
def test_the_header_tells_the_pixels(format: str, options: dict[str, object]) -> None:
    assert claimed_pixels(picture(333, 77, format, **options)) == 333 * 77


def test_the_header_of_os2_tells_the_pixels_too() -> None:
    """Read like Windows' header, it claims millions, and a picture that claims too many is refused."""
    image = b"BM" + struct.pack("<IHHI", 26 + 8, 0, 0, 26) + struct.pack("<IHHHH", 12, 1, 2, 1, 24) + bytes(8)
    assert Image.open(io.BytesIO(image)).size == (1, 2)
    assert claimed_pixels(image) == 2


def test_other_bytes_claim_nothing() -> None:
    for image in (b"", b"\x89PNG\r\n\x1a\n" + bytes(40), b"\xff\xd8" + bytes(40), b"RIFF" + bytes(40)):
        assert claimed_pixels(image) is None
    assert claimed_pixels(picture(9, 9, "TIFF")) is None
    assert claimed_pixels(b"\xff\xd8" + b"\xff\xe1\x00\x02" * 5000) is None


def test_a_header_that_is_cut_off_claims_nothing() -> None:
    """An upload may end anywhere."""
    image = picture(50, 40, "JPEG", comment=b"a" * 100)
    found = [claimed_pixels(image[:end]) for end in range(len(image))]
    begin = found.index(50 * 40)
    assert begin > 32 and found == [None] * begin + [50 * 40] * (len(found) - begin)


@pytest.fixture
def lanes(monkeypatch: pytest.MonkeyPatch) -> Iterator[Decoding]:
    """Pictures above 10 000 pixels are large."""
    monkeypatch.setattr(decoding, "LARGE_PIXELS", 10_000)
    made = Decoding(8, ImageLimits(max_pixels=1_000_000), 1)
    yield made
    made.close()


def test_only_the_usual_processes_start_with_the_service(lanes: Decoding) -> None:
    """A first request should not wait for a process to start; most services never get a large picture."""
    assert all(process.sandbox for process in lanes._usual._pool._processes)
    assert not any(process.sandbox for process in lanes._large._pool._processes)


async def test_large_and_small_are_decoded_alike(lanes: Decoding) -> None:
    for width, height in ((10, 6), (200, 100)):
        decoded = await lanes.decode(picture(width, height))
        assert (decoded.status, decoded.width, decoded.height) == (Status.OK, width, height)
    assert (await lanes.decode(picture(1001, 1000))).status is Status.TOO_LARGE


def test_large_pictures_leave_the_cpus_to_small_ones(lanes: Decoding) -> None:
    others = set(psutil.Process().children())
    asyncio.run(lanes.decode(picture(200, 100)))
    [child] = set(psutil.Process().children()) - others
    assert child.nice() == psutil.Process().nice() + LARGE_NICENESS


def test_a_small_picture_passes_large_ones_and_ones_that_hide_their_size(lanes: Decoding) -> None:
    busy = threading.Event()
    decode_large = lanes._large._pool.decode

    def held(images: list[bytes]) -> object:
        busy.wait(10)
        return decode_large(images)

    lanes._large._pool.decode = held  # type: ignore[method-assign,assignment]

    async def run() -> None:
        large = [asyncio.create_task(lanes.decode(picture(200, 100, "PNG"))) for _ in range(3)]
        hidden = [asyncio.create_task(lanes.decode(picture(200, 100, "TIFF"))) for _ in range(3)]
        await asyncio.sleep(0)
        async with asyncio.timeout(5):
            assert (await lanes.decode(picture(10, 6))).status is Status.OK
        assert not any(task.done() for task in large + hidden)
        busy.set()
        decoded = await asyncio.gather(*large, *hidden)
        assert [image.status for image in decoded] == [Status.OK] * 6

    asyncio.run(run())


async def test_a_picture_above_the_limit_does_not_wait_behind_large_ones(lanes: Decoding) -> None:
    leave = await lanes._large._gate.enter(1, 1, "somebody with a large picture")
    async with asyncio.timeout(5):
        decoded = await lanes.decode(picture(1001, 1000))
    assert decoded.status is Status.TOO_LARGE
    assert decoded.error == "the image has 1001000 pixels, more than max_pixels (1000000)"
    leave()


async def test_small_pictures_have_a_process_that_no_other_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SMALL_PIXELS", 100)
    made = Decoding(8, ImageLimits(), 2)
    leave = await made._usual._gate.enter(1, 200, "somebody with a picture of the usual size")
    async with asyncio.timeout(5):
        assert (await made.decode(picture(10, 6))).status is Status.OK
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.1):
            await made.decode(picture(20, 10))
    leave()
    made.close()


async def test_a_large_picture_does_not_wait_behind_small_ones(lanes: Decoding) -> None:
    leave = await lanes._usual._gate.enter(1, 1, "somebody with a small picture")
    async with asyncio.timeout(5):
        assert (await lanes.decode(picture(200, 100))).status is Status.OK
    leave()


def test_a_process_stays_taken_while_it_decodes_for_a_caller_that_has_left(lanes: Decoding) -> None:
    started, busy = threading.Event(), threading.Event()
    decode = lanes._usual._pool.decode

    def held(images: list[bytes]) -> object:
        started.set()
        busy.wait(10)
        return decode(images)

    lanes._usual._pool.decode = held  # type: ignore[method-assign,assignment]

    async def run() -> None:
        left = asyncio.create_task(lanes.decode(picture(10, 6)))
        await asyncio.to_thread(started.wait, 5)
        left.cancel()
        second = asyncio.create_task(lanes.decode(picture(10, 6)))
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert lanes._usual._gate._waiting
        busy.set()
        assert (await second).status is Status.OK

    asyncio.run(run())
