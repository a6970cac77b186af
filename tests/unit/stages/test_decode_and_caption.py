"""The decode and the caption stage without Ray: the pieces of a call, and a failing engine."""

import hashlib
import io
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from ray.data.extensions import ArrowPythonObjectArray

from blip2_actor import ImageLimits, Status
from blip2_actor.testing import FakeEngineConfig, fake_caption
from pipeline.settings.caption_spec import CaptionSpec
from pipeline.settings.outputs import Outputs
from pipeline.stages.caption import CaptionStage
from pipeline.stages.decode import BATCH_ROWS, PIXELS, DecodeStage
from pipeline.stages.engine_fault import EngineFault
from tests.integration.inputs import BROKEN, SIZE_PX, png, right_caption
from tests.unit.preprocessing.image_corpus import encode, noise
from tests.unit.preprocessing.test_images import png_with_color
from tests.unit.stages.decoded_tables import decoded, pixels_of


def table_of(num_rows: int, **columns) -> pa.Table:
    return decoded(map(pixels_of, range(num_rows)), **columns)


@pytest.fixture
def stage() -> Iterator[Callable[..., CaptionStage]]:
    """Makes stages, which end with the test."""
    with ExitStack() as made:

        def make(outputs: Outputs = Outputs(), **engine: Any) -> CaptionStage:
            spec = CaptionSpec(engine=FakeEngineConfig(**engine), outputs=outputs)
            return made.enter_context(closing(CaptionStage(spec)))

        yield make


def caption_of(n: int) -> str:
    return fake_caption(pixels_of(n))


def test_pieces_come_in_order_and_are_no_larger_than_requested(stage):
    table = table_of(25)
    captioning = stage()
    pieces = list(captioning.finish_rows(table, range(25), piece_rows=10))
    assert [len(piece) for piece in pieces] == [10, 10, 5]
    assert [row for piece in pieces for row, _ in piece] == list(range(25))
    rows = captioning.with_results(table, pieces[1]).to_pylist()
    assert [row["caption"] for row in rows] == [caption_of(n) for n in range(10, 20)]
    assert all(PIXELS not in row for row in rows)


def test_columns_of_views_are_kept(stage):
    """Arrow takes no rows of a view, which is how Polars writes strings, so the job used to end."""
    views = {"text": pa.array(["a", "b"], pa.string_view()), "jpg": pa.array([b"1", b"2"], pa.binary_view())}
    table = stage()(table_of(2, **views))
    assert (table["text"].to_pylist(), table["jpg"].to_pylist()) == (["a", "b"], [b"1", b"2"])


def test_a_kept_column_may_be_larger_than_a_chunk_of_arrow(stage):
    """All rows of such a call used to fail: offset overflow while concatenating arrays."""
    offsets = pa.py_buffer(np.array([0, 140 << 20], np.int32))
    large = pa.Array.from_buffers(pa.binary(), 1, [None, offsets, pa.py_buffer(bytes(140 << 20))])
    captioning = stage()
    table = table_of(16, jpg=pa.chunked_array([large] * 16))
    (piece,) = captioning.finish_rows(table, [5])
    assert len(captioning.with_results(table, piece)["jpg"][0].as_buffer()) == 140 << 20


def test_finished_rows_are_yielded_while_another_row_takes_long(stage, tmp_path):
    """Otherwise the finished rows of a call are lost if it dies in its slow row."""
    gate = tmp_path / "gate"
    gate.touch()
    captioning = stage(gate=str(gate), holds_on=(caption_of(3),), max_batch=1)
    pieces = captioning.finish_rows(table_of(5), range(5), piece_s=0.05)
    first: list = []
    while len(first) < 3:
        first += next(pieces)
    assert [row for row, _ in first] == [0, 1, 2]
    gate.unlink()
    assert [row for piece in pieces for row, _ in piece] == [3, 4]


def test_a_row_that_failed_before_is_not_given_to_the_engine(stage, tmp_path):
    table = table_of(2, status=pa.array(["ok", "too_large"]), error=pa.array([None, "too many pixels"]))
    captioning = stage(trace=str(tmp_path))
    rows = captioning(table).to_pylist()
    assert [(row["status"], row["error"]) for row in rows] == [("ok", None), ("too_large", "too many pixels")]
    assert captioning.actor.stats().num_requests == 1


def test_a_fault_of_the_engine_is_not_a_bad_row(stage):
    rows = stage(refuses_on=(caption_of(1),))(table_of(3)).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "refused", "ok"]
    with pytest.raises(EngineFault, match="the device is gone"):
        stage(faults_on=(caption_of(1),))(table_of(3))


def test_calls_of_several_threads_share_the_engine(stage):
    captioning = stage(seconds_per_batch=0.01)
    results: dict[int, list] = {}

    def call(start: int) -> None:
        table = table_of(30).slice(start, 10)
        results[start] = captioning(table)["caption"].to_pylist()

    threads = [threading.Thread(target=call, args=(start,)) for start in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {start: [caption_of(n) for n in range(start, start + 10)] for start in (0, 10, 20)}
    assert captioning.actor.stats().num_encode_calls < 30


def test_decoding_keeps_the_failures_of_reading_and_drops_encoded_bytes(stage):
    table = pa.table(
        {
            "key": list("abcd"),
            "image": [png(0), None, BROKEN, None],
            "status": pa.array([None, "unreadable", None, None], pa.string()),
            "error": pa.array([None, "the file vanished", None, None], pa.string()),
        }
    )
    with closing(DecodeStage(SIZE_PX, ImageLimits(), "image")) as decoding:
        [out] = decoding(table)
    assert "image" not in out.column_names
    assert out["status"].to_pylist() == ["ok", "unreadable", "undecodable", "missing_image"]
    assert out["error"].to_pylist()[:2] == [None, "the file vanished"]
    assert [pixels is None for pixels in out[PIXELS].to_pylist()] == [False, True, True, True]
    assert out["sha256"].to_pylist()[0] == hashlib.sha256(png(0)).digest()
    [row, *_] = stage()(out).to_pylist()
    assert (row["caption"], row["status"]) == (right_caption(png(0)), Status.OK)


@pytest.mark.parametrize("regenerate", [False, True])
def test_rows_of_truncated_images_are_flagged_if_these_are_accepted(stage, regenerate):
    """Regenerating a caption computes its flags again, and must keep this one."""
    jpeg = encode(noise(64, 64), "JPEG")
    table = pa.table({"image": [jpeg, jpeg[:-20], BROKEN]})
    captioning = stage(outputs=Outputs(regenerate=regenerate))
    rows = []
    for accepts in (False, True):
        with closing(DecodeStage(SIZE_PX, ImageLimits(accept_truncated=accepts), "image")) as decoding:
            [decoded] = decoding(table)
        rows.append([(row["status"], row["flags"]) for row in captioning(decoded).to_pylist()])
    assert rows[0] == [("ok", []), ("undecodable", []), ("undecodable", [])]
    assert rows[1] == [("ok", []), ("ok", ["truncated"]), ("undecodable", [])]


def test_a_pil_image_has_the_size_and_the_pixels_of_its_file():
    """Ray pickles it: its size used to ignore the EXIF turn, and a color of 16 bits was not transparent."""
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encode(noise(48, 20), "PNG", exif=exif)
    see_through = png_with_color(16, 2, b"\x10\x05" * 3 * SIZE_PX, SIZE_PX, [0x1005] * 3)
    files = [turned, see_through]
    cells = ArrowPythonObjectArray.from_objects([Image.open(io.BytesIO(data)) for data in files])
    with closing(DecodeStage(SIZE_PX, ImageLimits(), "image")) as decoding:
        [of_files] = decoding(pa.table({"image": files}))
        [of_cells] = decoding(pa.table({"image": cells}))
    for name in ("status", "width", "height", PIXELS):
        assert of_cells[name] == of_files[name], name


def test_a_block_of_many_small_images_is_decoded_in_small_tables():
    table = pa.table({"image": [png(n % 3) for n in range(BATCH_ROWS + 2)]})
    with closing(DecodeStage(SIZE_PX, ImageLimits(), "image")) as decoding:
        sizes = [len(part) for part in decoding(table)]
    assert sizes == [BATCH_ROWS, 2]
