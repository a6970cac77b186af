"""Every image column of Ray, Arrow and the datasets library is read, or refused by name."""

from __future__ import annotations

import datasets
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray.data.extensions import ArrowPythonObjectArray, ArrowTensorArray, ArrowVariableShapedTensorArray

from blip2_actor import DecodedImage, Status
from pipeline.stages.image_column import Address, digest_of, read_images, require_images, require_text

GRAY = np.arange(6, dtype=np.uint8).reshape(2, 3)
OTHER = np.arange(4, dtype=np.uint8).reshape(2, 2)


def datasets_arrays() -> pa.ChunkedArray:
    features = datasets.Features({"image": datasets.Array2D((2, 3), "uint8")})
    return datasets.Dataset.from_dict({"image": [GRAY.tolist()]}, features=features).data.table["image"]


ARRAYS = [
    ArrowTensorArray.from_numpy(GRAY[None]),
    ArrowVariableShapedTensorArray.from_numpy([GRAY, OTHER]),
    ArrowPythonObjectArray.from_objects([GRAY, None, b"bytes"]),
    pa.FixedShapeTensorArray.from_numpy_ndarray(np.stack([GRAY, GRAY])),
    pa.array([GRAY.tolist(), None], pa.list_(pa.list_(pa.uint8()))),
    pa.array([GRAY.tolist()], pa.large_list(pa.list_(pa.uint8(), 3))),
    datasets_arrays(),
]
BYTES = [
    pa.array([b"abc", None]),
    pa.array([b"abc"], pa.large_binary()),
    pa.array([b"abc"], pa.binary_view()),
    pa.array([b"abc"], pa.binary(3)),
    pa.array([b"abc"]).dictionary_encode(),
    pa.array([{"bytes": b"abc", "path": None}]),
    pa.array([{"bytes": b"abc"}], pa.struct([("bytes", pa.large_binary())])),
    ArrowPythonObjectArray.from_objects([bytearray(b"abc")]),
]


def read(column: pa.Array | pa.ChunkedArray) -> list:
    require_images("image", column.type)
    return read_images(column if isinstance(column, pa.ChunkedArray) else pa.chunked_array([column]))


@pytest.mark.parametrize("column", ARRAYS, ids=lambda column: str(column.type))
def test_arrays(column):
    images = read(column)
    assert images[0].dtype == np.uint8 and (images[0] == GRAY).all()
    assert len(images) == len(column) and all(image is None for image in images[1:2] if len(images) == 3)


@pytest.mark.parametrize("column", BYTES, ids=lambda column: str(column.type))
def test_bytes(column):
    assert read(column) == [b"abc", None][: len(column)]


@pytest.mark.parametrize(
    ("type", "reason"),
    [
        (
            pa.string(),
            "of type string; give fetch=FetchSettings() if it holds URLs or paths, or decode base64",
        ),
        (pa.string_view(), "of type string_view; give fetch"),
        (pa.int64(), "of type int64"),
        (pa.list_(pa.binary()), "make a row of each image with ds.flat_map"),
        (pa.list_(pa.struct([("bytes", pa.binary())])), "make a row of each image with ds.flat_map"),
        (pa.list_(pa.uint8()), "convert it to bytes with ds.map"),
        (pa.struct([("bytes", pa.string())]), "of type struct<bytes: string>"),
        (np.dtype(np.float64), "of type float64"),
        (ArrowTensorArray.from_numpy(np.zeros((1, 3, 8, 8), np.uint8)).type, "put its channels last"),
        (ArrowTensorArray.from_numpy(np.zeros((1, 8, 8, 3), np.int64)).type, "convert it to uint8"),
    ],
    ids=str,
)
def test_other_columns_are_refused_by_name(type, reason):
    """The job used to start, and end with the bytes of an image in its message."""
    with pytest.raises(ValueError, match="image") as error:
        require_images("image", type)
    assert reason in str(error.value)


@pytest.mark.parametrize("type", [pa.int64(), pa.binary(), np.dtype(np.int64)], ids=str)
def test_prompts_that_are_no_text_are_refused_by_name(type):
    """The job used to start, and end with "'int' object has no attribute 'lower'"."""
    with pytest.raises(ValueError, match=f"prompt_column must hold text, got 'p' of type {type}; convert it"):
        require_text("prompt_column", "p", type)


@pytest.mark.parametrize("type", [pa.string_view(), pa.null(), np.dtype(object)], ids=str)
def test_prompts_may_be_text_of_every_kind(type):
    require_text("prompt_column", "p", type)


def test_paths_and_texts_are_addresses_of_images():
    """Paths used to be opened while the column was read: one by one, and without the guard for URLs."""
    column = pa.array([{"bytes": None, "path": "http://a/b.png"}, {"bytes": b"abc", "path": "c.png"}, None])
    assert read(column) == [Address("http://a/b.png"), b"abc", None]
    texts = pa.array([" a.png\n", "", None], pa.string_view())
    require_images("image", texts.type, fetches=True)
    assert read_images(pa.chunked_array([texts])) == [Address("a.png"), None, None]
    private = pa.chunked_array([pa.array(["memory::http://10.0.0.1/a", "ftp://10.0.0.1/a"])])
    assert [cell.status for cell in read_images(private) if isinstance(cell, DecodedImage)] == ["refused"] * 2


def test_cells_that_hold_no_image_fail_alone():
    ragged = pa.array([GRAY.tolist(), [[1], [2, 3]]], pa.list_(pa.list_(pa.uint8())))
    good, bad = read(ragged)
    assert (good == GRAY).all() and isinstance(bad, DecodedImage)
    picture = Image.fromarray(GRAY)
    images = read(ArrowPythonObjectArray.from_objects([picture, "text", np.zeros((3, 8, 8), np.uint8)]))
    assert isinstance(images[0], Image.Image)
    assert [image.status.value for image in images[1:]] == ["undecodable"] * 2
    assert images[1].error.endswith("got str")


def test_the_digest_is_of_bytes_or_pixels():
    assert digest_of(b"abc") != digest_of(GRAY) == digest_of(Image.fromarray(GRAY))
    assert digest_of(None) is None


def test_the_digest_of_an_image_with_a_palette_is_of_its_colors():
    """Images of one shape and other colors used to have the same sha256, and so to be duplicates."""
    red, green = Image.fromarray(GRAY * 0).convert("P"), Image.fromarray(GRAY * 0).convert("P")
    red.putpalette([255, 0, 0])
    green.putpalette([0, 255, 0])
    assert digest_of(red) != digest_of(green) == digest_of(green.copy())


def test_the_path_of_a_struct_is_used_if_there_are_no_bytes():
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    cells = [
        {"bytes": b"abc", "path": "a.jpg"},
        {"bytes": b"", "path": " https://e.com/a.jpg "},
        {"bytes": None, "path": "webhdfs://10.0.0.1/a"},
        {"bytes": b"", "path": None},
    ]
    first, second, third, fourth = read_images(pa.chunked_array([pa.array(cells, kind)]))
    assert (first, second, fourth) == (b"abc", Address("https://e.com/a.jpg"), b"")
    assert isinstance(third, DecodedImage) and third.status is Status.REFUSED
