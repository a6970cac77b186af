"""Pixels are those that a person sees, and everything that is not a picture has a status."""

from __future__ import annotations

import io
import pickle
import struct
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from blip2_actor import DecodedImage, ImageLimits, Status, decode_image, resize_image
from blip2_actor.preprocessing import formats
from tests.unit.preprocessing.image_corpus import encode, good_images, noise

SIZE = 32


def pixels(data: bytes, size_px: int = SIZE, limits: ImageLimits = ImageLimits()) -> np.ndarray:
    image = decode_image(data, size_px, limits)
    assert image.status is Status.OK, image.error
    return image.array(size_px)


def resized(image: Image.Image, size_px: int = SIZE) -> np.ndarray:
    return np.asarray(image.convert("RGB").resize((size_px, size_px), Image.Resampling.BICUBIC))


def flat(image: Image.Image, image_format: str, **options: object) -> list[int]:
    """Return the color of an image that has only one."""
    colors = pixels(encode(image, image_format, **options)).reshape(-1, 3)
    assert (colors == colors[0]).all()
    return colors[0].tolist()


# --- Pixels


@pytest.mark.parametrize("size", [(40, 30), (7, 300), (1, 1), (SIZE, SIZE)])
def test_plain_rgb_is_a_bicubic_resize(size: tuple[int, int]) -> None:
    """Thumbnails, reducing gaps or another order of steps would give other pixels than the reference."""
    image = noise(*size)
    assert (pixels(encode(image, "PNG")) == resized(image)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "TIFF", "AVIF", "HEIF"])
def test_exif_turns_the_picture_once(image_format: str, orientation: int) -> None:
    """Pictures from phones must not lie on their side, and TIFF and HEIC, which are turned when they are
    loaded, must not turn twice."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(noise(48, 20), image_format, exif=exif.tobytes())
    upright = ImageOps.exif_transpose(Image.open(io.BytesIO(data)))

    image = decode_image(data, SIZE)

    assert (image.array(SIZE) == resized(upright)).all()
    assert (image.width, image.height) == upright.size == ((48, 20) if orientation < 5 else (20, 48))
    assert (resize_image(Image.open(io.BytesIO(data)), SIZE) == image.array(SIZE)).all()


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
@pytest.mark.parametrize(
    "block", [b"", b"no TIFF at all", b"II*\0\xff\xff\xff\xff", b"MM\0*\0\0\0\x08\0\x02\x01\x12"]
)
def test_damaged_exif_only_loses_the_turn(block: bytes) -> None:
    image = noise(40, 30)
    data = encode(image, "JPEG", quality=95, exif=b"Exif\0\0" + block)
    assert (pixels(data) == resized(Image.open(io.BytesIO(encode(image, "JPEG", quality=95))))).all()


def test_alpha_is_laid_on_white() -> None:
    """Dropping alpha would show the hidden color of transparent pixels, mostly black."""
    half_red = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert flat(half_red, "PNG") == [255, 127, 127]
    assert flat(half_red, "TIFF") == [255, 127, 127]
    assert flat(Image.new("LA", (8, 8), (0, 51)), "PNG") == [204, 204, 204]
    assert flat(Image.new("RGBA", (8, 8), (10, 20, 30, 0)), "WEBP") == [255, 255, 255]
    assert flat(Image.new("RGBA", (8, 8), (10, 20, 30, 255)), "PNG") == [10, 20, 30]
    for image_format in ("AVIF", "HEIF", "JPEG2000"):
        assert flat(Image.new("RGBA", (64, 64), (10, 20, 30, 0)), image_format) == [255, 255, 255]


def bmp_with_alpha(colors: Sequence[tuple[int, int, int, int]]) -> bytes:
    """Return a BMP of one row that names an alpha channel, which Pillow does not write."""
    row = b"".join(bytes([blue, green, red, alpha]) for red, green, blue, alpha in colors)
    header = struct.pack("<IiiHHIIiiII", 124, len(colors), 1, 1, 32, 3, len(row), 0, 0, 0, 0)
    header = (header + struct.pack("<IIII", 0xFF0000, 0xFF00, 0xFF, 0xFF000000)).ljust(124, b"\0")
    return b"BM" + struct.pack("<III", 138 + len(row), 0, 138) + header + row


def test_a_bmp_without_a_visible_pixel_is_opaque() -> None:
    """Programs name an alpha channel and leave it 0: such a picture used to be white, with status ok."""
    assert pixels(bmp_with_alpha([(10, 20, 30, 0)]), 1).tolist() == [[[10, 20, 30]]]
    partly = pixels(bmp_with_alpha([(10, 20, 30, 0), (40, 50, 60, 255)]), 2)
    assert partly[0].tolist() == [[255, 255, 255], [40, 50, 60]]


def test_transparency_without_an_alpha_channel_is_laid_on_white_too() -> None:
    """A color, a palette index or a palette's own alpha can be transparent."""
    palette = Image.new("P", (8, 8), 3)
    palette.putpalette([9, 9, 9] * 256)
    assert flat(palette, "PNG", transparency=3) == [255, 255, 255]
    assert flat(palette, "PNG", transparency=bytes([255, 255, 255, 51])) == [206, 206, 206]
    assert flat(palette, "PNG", transparency=4) == [9, 9, 9]
    assert flat(palette, "GIF", transparency=3) == [255, 255, 255]
    assert flat(Image.new("RGB", (8, 8), (1, 2, 3)), "PNG", transparency=(1, 2, 3)) == [255, 255, 255]
    assert flat(Image.new("L", (8, 8), 7), "PNG", transparency=7) == [255, 255, 255]
    assert flat(Image.new("1", (8, 8), 0), "PNG", transparency=0) == [255, 255, 255]


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def raw_png(width: int, height: int, *chunks: bytes, bits: int = 8, color_type: int = 2) -> bytes:
    """Return a PNG of these chunks, which Pillow may refuse or does not write."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, color_type, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + chunk(b"IEND", b"")


def png_with_color(bits: int, color_type: int, row: bytes, size: int, transparent: Sequence[int]) -> bytes:
    """Return a PNG with a transparent color, of a kind that Pillow does not write; all rows are the same."""
    color = chunk(b"tRNS", struct.pack(f">{len(transparent)}H", *transparent))
    rows = chunk(b"IDAT", zlib.compress((b"\0" + row) * size))
    return raw_png(size, size, color, rows, bits=bits, color_type=color_type)


@pytest.mark.parametrize(
    ("bits", "color_type", "row", "transparent", "seen"),
    [
        (2, 0, b"\x1b", [1], [0, 255, 170, 255]),
        (4, 0, b"\x05\x5f", [5], [0, 255, 255, 255]),
        (4, 0, b"\x05\x5f", [0], [255, 85, 85, 255]),
        (16, 0, b"\x10\x05\x10\x06\x05\x10", [0x1005], [255, 16, 5]),
        (16, 2, b"\x10\x05" * 3 + b"\x05\x10" * 3, [0x1005] * 3, [255, 5]),
    ],
    ids=["2 bits", "4 bits", "4 bits, black", "16 bits", "color of 16 bits"],
)
def test_a_transparent_color_of_other_than_8_bits_is_laid_on_white(
    bits: int, color_type: int, row: bytes, transparent: list[int], seen: list[int]
) -> None:
    """Pillow leaves it unscaled: small icons used to have a gray ground, or other pixels were white."""
    size = len(seen)
    data = png_with_color(bits, color_type, row, size, transparent)
    assert pixels(data, size)[0, :, 0].tolist() == seen
    assert resize_image(Image.open(io.BytesIO(data)), size)[0, :, 0].tolist() == seen
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    for image in (loaded.copy(), loaded, loaded):  # the second call finds the scaled color
        assert resize_image(image, size)[0, :, 0].tolist() == seen


def test_a_transparent_gray_of_8_bits_is_not_scaled() -> None:
    """Grays of 4 bits would have 85 in its place."""
    data = png_with_color(8, 0, b"\x05\x55", 2, [5])
    assert pixels(data, 2)[0, :, 0].tolist() == [255, 85]
    loaded = Image.open(io.BytesIO(data))
    loaded.load()
    assert resize_image(loaded, 2)[0, :, 0].tolist() == [255, 85]
    assert pixels(png_with_color(8, 0, b"\x55\xaa", 2, [5]), 2)[0, :, 0].tolist() == [85, 170]


@pytest.mark.parametrize("image_format", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_of_an_animation_is_read(image_format: str) -> None:
    colors = [(200, 0, 0), (0, 200, 0), (0, 0, 200)]
    first, *others = (Image.new("RGB", (16, 16), color) for color in colors)
    lossless: dict[str, dict[str, Any]] = {"WEBP": {"lossless": True}, "AVIF": {"quality": 100}}
    options = lossless.get(image_format, {})
    red, green, blue = flat(first, image_format, save_all=True, append_images=others, **options)
    assert abs(red - 200) <= 2 and green <= 2 and blue <= 2


@pytest.mark.parametrize("image_format", ["PNG", "TIFF", "JPEG2000"])
def test_16_bit_gray_is_scaled(image_format: str) -> None:
    """Pillow's own conversion clips at 255, which makes nearly all of such a picture white."""
    values = np.linspace(0, 65535, SIZE * SIZE).astype(np.uint16).reshape(SIZE, SIZE)
    data = encode(Image.fromarray(values), image_format)
    assert (pixels(data)[..., 1] == values >> 8).all()


def test_16_bit_gray_of_the_other_byte_order_is_scaled() -> None:
    values = np.linspace(0, 65535, SIZE * SIZE).astype(">u2").reshape(SIZE, SIZE)
    data = encode(Image.frombytes("I;16B", (SIZE, SIZE), values.tobytes()), "TIFF")
    assert (pixels(data)[..., 1] == values >> 8).all()


@pytest.mark.parametrize("dtype", ["int32", "float32"])
def test_32_bit_gray_is_stretched_from_minimum_to_maximum(dtype: str) -> None:
    values = np.linspace(-3000, 90000, SIZE * SIZE).astype(dtype).reshape(SIZE, SIZE)
    gray = pixels(encode(Image.fromarray(values), "TIFF"))[..., 0].astype(float)
    assert np.abs(gray - (values + 3000.0) * 255 / 93000).max() <= 1


def gray_tiff(bits: int, photometric: int, sample_format: int, data: bytes, size: int) -> bytes:
    """Return a gray TIFF of a kind that Pillow does not write."""
    tags = {
        256: size,
        257: size,
        258: bits,
        259: 1,
        262: photometric,
        273: 8 + 2 + 12 * 9 + 4,
        277: 1,
        279: len(data),
        339: sample_format,
    }
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


@pytest.mark.parametrize(
    ("bits", "sample_format", "dtype"),
    [(8, 1, "u1"), (16, 1, "<u2"), (32, 3, "<f4")],
    ids=["8", "16", "float"],
)
def test_a_tiff_in_which_white_is_zero_is_no_negative(bits: int, sample_format: int, dtype: str) -> None:
    """Scanners write such files; Pillow inverts them up to 8 bits only."""
    ramp = np.linspace(0, 255 << (bits - 8) if bits < 32 else 1, SIZE).astype(dtype)
    data = np.broadcast_to(ramp, (SIZE, SIZE)).tobytes()
    black_is_zero, white_is_zero = (
        pixels(gray_tiff(bits, photometric, sample_format, data, SIZE)) for photometric in (1, 0)
    )
    assert black_is_zero[0, 0, 0] == 0 and black_is_zero[0, -1, 0] == 255
    assert (white_is_zero == 255 - black_is_zero).all()
    loaded = Image.open(io.BytesIO(gray_tiff(bits, 0, sample_format, data, SIZE)))
    loaded.load()
    assert (resize_image(loaded, SIZE) == white_is_zero).all()


def test_12_bit_gray_is_scaled() -> None:
    """Pillow keeps its values in 16 bits, where the brightest is nearly black."""
    values = np.arange(SIZE * SIZE) * 4
    bits = "".join(f"{value:012b}" for value in values)
    data = gray_tiff(12, 1, 1, int(bits, 2).to_bytes(len(bits) // 8, "big"), SIZE)
    assert (pixels(data)[..., 1] == (values >> 4).reshape(SIZE, SIZE)).all()


def test_signed_gray_of_8_bits_is_stretched_like_that_of_16_bits() -> None:
    """Pillow reads it as unsigned, so -1 used to become white and 0 black."""
    values = np.broadcast_to(np.linspace(-100, 100, SIZE).astype(np.int8), (SIZE, SIZE))
    gray = pixels(gray_tiff(8, 1, 2, values.tobytes(), SIZE))[..., 0].astype(float)
    assert np.abs(gray - (values + 100.0) * 255 / 200).max() <= 1


def test_a_color_map_of_8_bits_keeps_its_colors() -> None:
    """Some programs write 8 bits, not 16; Pillow took the high byte of each, so all used to be black."""
    data = encode(noise(SIZE, SIZE).convert("P"), "TIFF")
    colors = TiffImagePlugin.TiffImageFile(io.BytesIO(data)).tag_v2[320]
    narrow = data.replace(
        struct.pack("<768H", *colors), struct.pack("<768H", *(color >> 8 for color in colors))
    )
    assert narrow != data
    assert (pixels(narrow) == pixels(data)).all()
    opened = Image.open(io.BytesIO(narrow))
    assert (resize_image(opened, SIZE) == pixels(data)).all()
    assert opened.getpalette() == [0] * 768  # the caller's image is unchanged


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I", "F", "RGB"])
def test_a_pickled_tiff_is_read_without_its_header(mode: str) -> None:
    """Pillow pickles only the pixels, and Ray all images of a dataset: gray ones used to be undecodable."""
    image = noise(SIZE, SIZE).convert("L" if mode == "I;16" else mode)
    data = encode(image.convert(mode), "TIFF")
    pickled = pickle.loads(pickle.dumps(Image.open(io.BytesIO(data))))
    assert (resize_image(pickled, SIZE) == pixels(data)).all()
    negative = gray_tiff(32, 1, 2, np.arange(-2, 2).astype("<i4").tobytes(), 2)
    pickled = pickle.loads(pickle.dumps(Image.open(io.BytesIO(negative))))
    assert (resize_image(pickled, SIZE) == pixels(negative)).all()


def test_a_gray_tiff_may_have_been_given_a_palette() -> None:
    image = Image.open(io.BytesIO(encode(Image.new("L", (8, 8), 3), "TIFF")))
    image.putpalette([9, 9, 9] * 256)
    assert (resize_image(image, SIZE) == 9).all()


def test_32_bit_integers_that_pillow_cannot_hold_are_refused() -> None:
    """They used to become negative, which changed the picture."""
    values = np.linspace(0, 4e9, SIZE * SIZE).astype("<u4")
    image = decode_image(gray_tiff(32, 1, 1, values.tobytes(), SIZE), SIZE)
    assert image.status is Status.UNDECODABLE and "must be below 2147483648" in str(image.error)
    half = pixels(gray_tiff(32, 1, 1, (values // 2).tobytes(), SIZE))
    assert (half[0, 0, 0], half[-1, -1, 0]) == (0, 255)


def test_cmyk_jpegs_keep_their_colors() -> None:
    """Adobe inverts CMYK JPEGs: without a second inversion, red becomes its complement."""
    red, green, blue = flat(Image.new("RGB", (16, 16), (220, 30, 40)).convert("CMYK"), "JPEG", quality=95)
    assert abs(red - 220) < 8 and abs(green - 30) < 8 and abs(blue - 40) < 8


@pytest.mark.parametrize(("name", "data"), list(good_images()))
def test_every_format_and_mode_is_read(name: str, data: bytes) -> None:
    image = decode_image(data, SIZE)
    assert (image.status, image.error) == (Status.OK, None)
    assert sorted((image.width or 0, image.height or 0)) == [30, 40]


def test_draft_reads_large_jpegs_smaller_and_others_exactly() -> None:
    """On a smooth picture the mean difference is below 2 of 255, and the original size is still reported."""
    ramp = np.linspace(0, 255, 512).astype(np.uint8)
    smooth = Image.fromarray(np.stack(np.broadcast_arrays(ramp[None], ramp[:384, None], ramp[None]), -1))
    draft = ImageLimits(jpeg_draft=True)
    jpeg, png = encode(smooth, "JPEG", quality=95), encode(smooth, "PNG")

    image = decode_image(jpeg, SIZE, draft)

    assert (image.width, image.height) == (512, 384)
    difference = np.abs(image.array(SIZE).astype(int) - pixels(jpeg).astype(int))
    assert difference.max() > 0 and difference.mean() < 2
    assert (pixels(png, limits=draft) == pixels(png)).all()
    assert (pixels(jpeg, 200, draft) == pixels(jpeg, 200)).all()  # below twice the size there is no draft


# --- Second chances


def with_chunks(png: bytes, *chunks: bytes) -> bytes:
    """Insert chunks behind the header of a PNG."""
    return png[:33] + b"".join(chunks) + png[33:]


LONG_TEXT = chunk(b"zTXt", b"parameters\0\0" + zlib.compress(b"x" * (2 << 20)))
BAD_CHECKSUM = chunk(b"tEXt", b"Title\0hello")[:-4] + b"\0\0\0\0"


@pytest.mark.parametrize(
    "chunks",
    [
        [LONG_TEXT],
        [chunk(b"iCCP", b"profile\0\0" + zlib.compress(bytes(2 << 20)))],
        [chunk(b"zTXt", b"key\0\0" + zlib.compress(b"y" * 1_000_000))] * 80,
        [BAD_CHECKSUM],
        [chunk(b"iTXt", b"Title\0\1\0\0\0" + b"this is not compressed")],
    ],
    ids=["long text", "long profile", "many texts", "checksum of a text", "damaged text"],
)
def test_metadata_of_a_png_does_not_cost_the_picture(chunks: list[bytes]) -> None:
    """Image generators write their whole workflow into a text; every viewer shows these images."""
    png = encode(noise(40, 30), "PNG")
    assert (pixels(with_chunks(png, *chunks)) == pixels(png)).all()


def test_what_decides_the_picture_of_a_png_stays() -> None:
    palette = Image.new("P", (16, 8), 3)
    palette.putpalette([9, 9, 9] * 256)
    exif = Image.Exif()
    exif[0x0112] = 6
    png = encode(palette, "PNG", transparency=3, exif=exif)
    image = decode_image(with_chunks(png, LONG_TEXT, BAD_CHECKSUM), SIZE)
    assert (image.width, image.height) == (8, 16)
    assert (image.array(SIZE) == 255).all()
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="6"/></x:xmpmeta>'
    turned = chunk(b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp)
    image = decode_image(with_chunks(encode(noise(16, 8), "PNG"), LONG_TEXT, turned), SIZE)
    assert (image.width, image.height) == (8, 16)


def test_damaged_pixels_of_a_png_get_no_second_chance() -> None:
    png = encode(noise(64, 64), "PNG")
    for damaged in (png[: len(png) // 2], png.replace(b"IDAT", b"IDAT\0", 1), png[:-40] + b"\0" * 40):
        assert decode_image(with_chunks(damaged, LONG_TEXT), SIZE).status is Status.UNDECODABLE


@pytest.mark.parametrize("progressive", [False, True])
@pytest.mark.parametrize("num_lost", [2, 20, 400])
def test_a_jpeg_without_its_end_is_read_if_that_is_accepted(num_lost: int, progressive: bool) -> None:
    whole = encode(noise(64, 64), "JPEG", quality=95, progressive=progressive)
    cut = whole[:-num_lost]
    accept = ImageLimits(accept_truncated=True)
    assert decode_image(cut, SIZE).status is Status.UNDECODABLE

    image = decode_image(cut, SIZE, accept)

    assert (image.status, image.is_truncated, image.width, image.height) == (Status.OK, True, 64, 64)
    if not progressive:
        assert (image.array(SIZE)[: SIZE // 2] == pixels(whole)[: SIZE // 2]).all()
    assert decode_image(whole, SIZE, accept) == decode_image(whole, SIZE)


def test_a_jpeg_without_any_pixels_is_undecodable_in_any_case() -> None:
    data = encode(noise(64, 64), "JPEG")
    for cut in (data[:2], data[:100], data[: data.index(b"\xff\xda")]):
        assert decode_image(cut, SIZE, ImageLimits(accept_truncated=True)).status is Status.UNDECODABLE


# --- Statuses


def test_no_bytes_are_a_missing_image() -> None:
    assert decode_image(None, SIZE).status is decode_image(b"", SIZE).status is Status.MISSING_IMAGE


@pytest.mark.parametrize("image_format", ["JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF"])
def test_half_a_file_is_undecodable(image_format: str) -> None:
    """A picture with a gray lower half must not be captioned as if it were complete."""
    data = encode(noise(64, 64), image_format)
    image = decode_image(data[: len(data) // 2], SIZE)
    assert image.status is Status.UNDECODABLE
    assert image.pixels is None and image.error


def test_other_formats_are_not_opened() -> None:
    """Pillow would run Ghostscript on a PostScript file, so the list of formats is closed."""
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n"
    for data in (
        encode(noise(8, 8), "PPM"),
        encode(noise(8, 8), "TGA"),
        postscript,
        b"<svg/>",
        b"plain text",
    ):
        image = decode_image(data, SIZE)
        assert (image.status, image.error) == (
            Status.UNDECODABLE,
            "the bytes are not a readable JPEG, PNG, WebP, GIF, BMP, TIFF, AVIF, JPEG 2000 or HEIC file",
        )


def test_a_format_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "_register_heif", lambda: False)
    image = decode_image(encode(noise(40, 30), "HEIF"), SIZE)
    assert (image.status, image.error) == (
        Status.UNDECODABLE,
        "the image is HEIC, which needs pillow-heif; run: pip install 'blip2-ray[heic]'",
    )
    monkeypatch.setattr(formats.AvifImagePlugin, "SUPPORTED", False)
    with pytest.warns(UserWarning, match="AVIF support not installed"):
        image = decode_image(encode(noise(40, 30), "AVIF"), SIZE)
    assert "the image is AVIF, which the installed Pillow is built without" in (image.error or "")
    assert "JPEG XL, which is not supported" in (decode_image(b"\xff\x0a1234", SIZE).error or "")


def test_the_draft_of_a_heic_file_is_not_its_thumbnail() -> None:
    data = encode(noise(200, 150), "HEIF", thumbnails=[100])
    assert (pixels(data, limits=ImageLimits(jpeg_draft=True)) == pixels(data)).all()


def png_header(width: int, height: int) -> bytes:
    """Return a PNG that claims this size and has no pixels at all."""
    return raw_png(width, height, chunk(b"IDAT", b""))


@pytest.mark.parametrize("side", [101, 20_000, 2**31 - 1])
def test_a_decompression_bomb_is_recognized_by_its_header(side: int) -> None:
    """It must not be decoded: these files have no pixels, so an attempt would give another status."""
    assert (
        decode_image(png_header(side, side), SIZE, ImageLimits(max_pixels=10_000)).status is Status.TOO_LARGE
    )


def test_an_image_at_the_pixel_limit_is_allowed() -> None:
    limits = ImageLimits(max_pixels=1200)
    assert decode_image(encode(noise(40, 30), "PNG"), SIZE, limits).status is Status.OK
    image = decode_image(encode(noise(41, 30), "PNG"), SIZE, limits)
    assert (image.status, image.error) == (
        Status.TOO_LARGE,
        "the image has 41 x 30 pixels, more than max_pixels (1200)",
    )


def test_too_many_bytes_are_not_opened() -> None:
    data = encode(noise(40, 30), "PNG")
    assert decode_image(data, SIZE, ImageLimits(max_file_bytes=len(data))).status is Status.OK
    image = decode_image(data, SIZE, ImageLimits(max_file_bytes=len(data) - 1))
    assert image.status is Status.TOO_LARGE
    assert "max_file_bytes" in (image.error or "")


def test_an_image_without_area_is_undecodable() -> None:
    for size in ((0, 0), (0, 5), (5, 0)):
        assert decode_image(png_header(*size), SIZE).status is Status.UNDECODABLE


@pytest.mark.parametrize("name", ["max_pixels", "max_file_bytes", "cpu_s", "wall_s", "memory_bytes"])
@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_impossible_limits_are_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{name} must be (above 0|a whole number, got (nan|inf))"):
        ImageLimits(**{name: value})


def test_limits_of_wrong_types_are_refused_and_whole_floats_are_taken() -> None:
    """They used to end the decoding children, whose message does not mention them."""
    given: Any = {"memory_bytes": 2e9, "max_pixels": np.int64(5)}
    limits = ImageLimits(**given)
    assert (limits.memory_bytes, type(limits.memory_bytes), type(limits.max_pixels)) == (
        2_000_000_000,
        int,
        int,
    )
    wrong: list[tuple[str, Any]] = [
        ("max_pixels", "5"),
        ("max_file_bytes", None),
        ("memory_bytes", 1e9 + 0.5),
    ]
    for name, value in wrong:
        with pytest.raises(TypeError, match=f"{name} must be a whole number, got {value!r}"):
            ImageLimits(**{name: value})


def test_an_image_without_pixels_has_no_array() -> None:
    with pytest.raises(ValueError, match="undecodable, no"):
        DecodedImage(status=Status.UNDECODABLE, error="no").array(SIZE)
