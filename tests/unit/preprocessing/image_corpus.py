"""Images for tests: good ones of every supported format, and seeded damage to them."""

from __future__ import annotations

import io
import random
from collections.abc import Callable, Iterator

import pillow_heif
from PIL import Image

FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "AVIF", "JPEG2000", "HEIF")
_MODES = {
    "JPEG": ("RGB", "L", "CMYK"),
    "PNG": ("RGB", "RGBA", "LA", "P", "1", "I;16"),
    "WEBP": ("RGB", "RGBA"),
    "BMP": ("RGB", "P", "1"),
    "GIF": ("P", "L"),
    "TIFF": ("RGB", "RGBA", "CMYK", "I;16", "F"),
    "AVIF": ("RGB", "RGBA"),
    "JPEG2000": ("RGB", "RGBA", "L", "LA", "I;16"),
    "HEIF": ("RGB", "RGBA", "L"),
}
pillow_heif.register_heif_opener()


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    """Return RGB noise, in which every wrong resize, turn or channel order is visible."""
    return Image.frombytes("RGB", (width, height), random.Random(seed).randbytes(width * height * 3))


def encode(image: Image.Image, image_format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, image_format, **options)
    return buffer.getvalue()


def good_images() -> Iterator[tuple[str, bytes]]:
    """Yield (name, bytes) for every format in every mode that cameras, browsers or scanners write."""
    picture = noise(40, 30)
    for image_format in FORMATS:
        for mode in _MODES[image_format]:
            image = picture.convert("I").convert(mode) if mode == "I;16" else picture.convert(mode)
            yield f"{image_format}-{mode}", encode(image, image_format)
    frames = [noise(40, 30, seed) for seed in range(3)]
    for image_format in ("GIF", "WEBP", "PNG", "TIFF"):
        yield (
            f"{image_format}-frames",
            encode(frames[0], image_format, save_all=True, append_images=frames[1:]),
        )
    yield "TIFF-jpeg", encode(picture, "TIFF", compression="jpeg")
    yield "TIFF-lzw", encode(picture, "TIFF", compression="tiff_lzw")
    yield "JPEG-progressive", encode(picture, "JPEG", progressive=True)
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "maker"
    yield "JPEG-exif", encode(picture, "JPEG", exif=exif)


def malformed_images(count: int, seed: int) -> Iterator[tuple[str, bytes]]:
    """Yield (description, bytes) for `count` damaged files, of each format in turn."""
    rng = random.Random(seed)
    good = list(good_images())
    for number in range(count):
        name, data = good[number % len(good)]
        damage = rng.choice(_DAMAGES)
        yield f"{number}: {damage.__name__[1:]} of {name}", damage(data, rng)


def _cut_short(data: bytes, rng: random.Random) -> bytes:
    return data[: rng.randrange(1, len(data))]


def _bits_flipped(data: bytes, rng: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(rng.choice((1, 4, 32))):
        broken[rng.randrange(len(broken))] ^= 1 << rng.randrange(8)
    return bytes(broken)


def _header_garbled(data: bytes, rng: random.Random) -> bytes:
    broken = bytearray(data)
    for _ in range(rng.randrange(1, 6)):
        broken[rng.randrange(min(64, len(broken)))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
    return bytes(broken)


def _range_blanked(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    length = min(rng.randrange(1, 200), len(data) - start)
    return data[:start] + rng.choice((b"\x00", b"\xff")) * length + data[start + length :]


def _range_lost(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    return data[:start] + data[start + rng.randrange(1, 200) :]


def _range_repeated(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(data))
    end = start + rng.randrange(1, 400)
    return data[:end] + data[start:end] * rng.randrange(1, 5) + data[end:]


def _number_made_huge(data: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(max(1, min(256, len(data) - 4)))
    return (
        data[:start] + rng.choice((b"\xff\xff\xff\x7f", b"\x7f\xff\xff\xff", b"\xff\xff")) + data[start + 4 :]
    )


def _head_of_another(data: bytes, rng: random.Random) -> bytes:
    other = rng.choice(
        (b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"GIF89a", b"BM", b"II*\x00", b"RIFF\x10\0\0\0WEBP")
    )
    return other + data[rng.choice((0, len(other))) :]


_DAMAGES: tuple[Callable[[bytes, random.Random], bytes], ...] = (
    _cut_short,
    _bits_flipped,
    _header_garbled,
    _range_blanked,
    _range_lost,
    _range_repeated,
    _number_made_huge,
    _head_of_another,
)
