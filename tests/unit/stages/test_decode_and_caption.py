"""The two stages without Ray: what a call gives, piece by piece, and what it does when the engine fails."""

import hashlib
import threading
from contextlib import closing

import numpy as np
import pyarrow as pa
import pytest

from blip2_actor import GenerationOptions, ImageLimits, Status
from blip2_actor.testing.fake_engine import FakeEngineConfig, fake_caption
from pipeline.stages.caption import CaptionStage, EngineFault
from pipeline.stages.decode import BATCH_ROWS, PIXELS, DecodeStage
from tests.integration.inputs import BROKEN, SIZE_PX, png, right_caption


def decoded(num_rows: int, **columns) -> pa.Table:
    pixels = [np.full((SIZE_PX, SIZE_PX, 3), n, np.uint8).tobytes() for n in range(num_rows)]
    table = {
        "status": pa.array(["ok"] * num_rows),
        "error": pa.nulls(num_rows, pa.string()),
        "width": pa.array([1] * num_rows, pa.int32()),
        "height": pa.array([2] * num_rows, pa.int32()),
        "sha256": pa.array([b"x"] * num_rows, pa.binary()),
        PIXELS: pa.array(pixels, pa.binary()),
    }
    return pa.table(table | columns)


def stage(**engine) -> CaptionStage:
    return CaptionStage(FakeEngineConfig(**engine), GenerationOptions())


def caption_of(n: int) -> str:
    return fake_caption(np.full((SIZE_PX, SIZE_PX, 3), n, np.uint8))


def test_pieces_come_in_order_and_no_larger_than_asked():
    table = decoded(25)
    captioning = stage()
    pieces = list(captioning.finish_rows(table, range(25), piece_rows=10))
    assert [len(piece) for piece in pieces] == [10, 10, 5]
    assert [row for piece in pieces for row, _ in piece] == list(range(25))
    rows = captioning.with_results(table, pieces[1]).to_pylist()
    assert [row["caption"] for row in rows] == [caption_of(n) for n in range(10, 20)]
    assert all(PIXELS not in row for row in rows)


def test_what_is_finished_is_handed_on_while_a_row_takes_long(tmp_path):
    """Otherwise one slow row keeps the rest of its call from being safe."""
    gate = tmp_path / "gate"
    gate.touch()
    captioning = stage(gate=str(gate), holds_on=(caption_of(3),), max_batch=1)
    pieces = captioning.finish_rows(decoded(5), range(5), piece_s=0.05)
    first: list = []
    while len(first) < 3:
        first += next(pieces)
    assert [row for row, _ in first] == [0, 1, 2]
    gate.unlink()
    assert [row for piece in pieces for row, _ in piece] == [3, 4]


def test_a_row_that_failed_before_is_not_given_to_the_engine(tmp_path):
    table = decoded(2, status=pa.array(["ok", "too_large"]), error=pa.array([None, "too many pixels"]))
    captioning = stage(trace=str(tmp_path))
    rows = captioning(table).to_pylist()
    assert [(row["status"], row["error"]) for row in rows] == [("ok", None), ("too_large", "too many pixels")]
    assert captioning.actor.stats().num_requests == 1


def test_a_fault_of_the_engine_is_told_from_a_bad_row():
    rows = stage(refuses_on=(caption_of(1),))(decoded(3)).to_pylist()
    assert [row["status"] for row in rows] == ["ok", "refused", "ok"]
    with pytest.raises(EngineFault, match="the device is gone"):
        stage(faults_on=(caption_of(1),))(decoded(3))


def test_calls_of_several_threads_share_the_engine():
    captioning = stage(seconds_per_batch=0.01)
    results: dict[int, list] = {}

    def call(start: int) -> None:
        table = decoded(30).slice(start, 10)
        results[start] = captioning(table)["caption"].to_pylist()

    threads = [threading.Thread(target=call, args=(start,)) for start in (0, 10, 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {start: [caption_of(n) for n in range(start, start + 10)] for start in (0, 10, 20)}
    assert captioning.actor.stats().num_encode_calls < 30


def test_decoding_keeps_fates_that_reading_has_settled_and_drops_encoded_bytes():
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


def test_a_block_of_many_small_images_is_decoded_in_small_tables():
    table = pa.table({"image": [png(n % 3) for n in range(BATCH_ROWS + 2)]})
    with closing(DecodeStage(SIZE_PX, ImageLimits(), "image")) as decoding:
        sizes = [len(part) for part in decoding(table)]
    assert sizes == [BATCH_ROWS, 2]
