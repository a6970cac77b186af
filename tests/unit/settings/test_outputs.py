"""Named outputs: wrong names, a mixed-up row or a second encode would show only in a week's results."""

import io
import threading
import weakref
from concurrent.futures import Future

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from blip2_actor import EngineConfig, GenerationOptions, Result, Status
from blip2_actor.demo.scenes import SceneSampler, draw
from blip2_actor.testing.fake_engine import FakeEngineConfig, fake_caption, fake_features, fake_score
from pipeline.settings.outputs import Outputs
from pipeline.settings.settings import CaptionSettings, EmbedSettings, ScoreSettings, from_dict
from pipeline.stages.caption import CaptionStage
from pipeline.stages.decode import PIXELS
from pipeline.stages.result_cache import ResultCache
from pipeline.stages.row_result import fixed_lists

ASKS = {"colour": "Question: what colour? Answer:", "shape": "Question: what shape? Answer:"}
EMBEDS = {"seen": "vision", "mean": "qformer", "all": "queries"}
SIZE_PX = FakeEngineConfig().image_size_px


def pixels_of(n: int) -> np.ndarray:
    return np.full((SIZE_PX, SIZE_PX, 3), n, np.uint8)


def decoded(images, **columns) -> pa.Table:
    images = list(images)
    table = {
        "status": pa.array(["ok"] * len(images)),
        "error": pa.nulls(len(images), pa.string()),
        "width": pa.array([1] * len(images), pa.int32()),
        "height": pa.array([2] * len(images), pa.int32()),
        "sha256": pa.array([image.tobytes()[:32] for image in images], pa.binary()),
        PIXELS: pa.array([image.tobytes() for image in images], pa.binary()),
    }
    return pa.table(table | columns)


def stage(outputs: Outputs, engine=None, options=GenerationOptions(), **others) -> CaptionStage:
    return CaptionStage(engine or FakeEngineConfig(), options, outputs=outputs, **others)


def test_every_named_column_has_its_own_rows_values_and_one_encode_serves_them_all():
    outputs = Outputs.of(ASKS, EMBEDS, {"fit": "caption", "sure": "colour", "alt": "text"})
    texts = ["a cat", None, "a dog"]
    table = decoded(map(pixels_of, range(3)), text=pa.array(texts))
    making = stage(outputs, prompt="a photo of")
    rows = making(table).to_pylist()
    for n, (row, text) in enumerate(zip(rows, texts, strict=True)):
        image = pixels_of(n)
        features = fake_features(image)
        assert row["caption"] == fake_caption(image, "a photo of")
        assert {name: row[name] for name in ASKS} == {k: fake_caption(image, p) for k, p in ASKS.items()}
        assert row["seen"] == features.pooler_output.tolist()
        assert row["mean"] == features.qformer_features.mean(axis=0).tolist()
        assert row["all"] == features.qformer_features.tolist()
        assert row["fit"] == fake_score(image, row["caption"], "a photo of")
        assert row["sure"] == fake_score(image, row["colour"], ASKS["colour"])
        assert row["alt"] == (text and fake_score(image, text, "a photo of"))
    assert making.actor.stats().num_images_encoded == 3
    assert making.actor.stats().num_requests == 9


def test_the_real_engine_encodes_each_image_once():
    outputs = Outputs.of(ASKS, {"mean": "qformer"}, {"fit": "caption"})
    images = np.asarray(draw(SceneSampler("held_out", 0).sample(3), 64))
    engine = EngineConfig(model="demo", dtype="float32", num_threads=1, skip_self_test=True)
    making = stage(outputs, engine, GenerationOptions(max_new_tokens=30))
    rows = making(decoded(images)).to_pylist()
    assert making.actor.stats().num_images_encoded == 3
    making.actor.close()
    for row in rows:
        assert row["status"] == "ok"
        assert abs(row["fit"] - row["logprob"]) < 1e-3, "the caption, scored, is as probable as it was"
        assert row["colour"] is not None and any(row["mean"])


def test_images_are_let_go_with_their_piece():
    """An encoded image holds memory of the device, and a call has hundreds."""
    images = np.asarray(draw(SceneSampler("held_out", 0).sample(6), 64))
    engine = EngineConfig(model="demo", dtype="float32", num_threads=1, skip_self_test=True)
    making = stage(Outputs.of(ASKS, {"mean": "qformer"}), engine, GenerationOptions(max_new_tokens=3))
    held = []
    real = making.actor.engine.image
    making.actor.engine.image = lambda image: held.append(weakref.ref(made := real(image))) or made
    pieces = making.finish_rows(decoded(images), range(6), piece_rows=3)
    next(pieces)
    making.actor.close()
    assert [ref() is None for ref in held] == [True] * 3 + [False] * 3


def test_a_row_that_has_failed_has_no_named_values():
    outputs = Outputs.of({"colour": ASKS["colour"]}, EMBEDS, {"alt": "text"})
    table = decoded(map(pixels_of, range(3)), text=["x" * 1000, "short", "short"])
    table = table.set_column(0, "status", pa.array(["ok", "ok", "too_large"]))
    rows = stage(outputs)(table).to_pylist()
    assert [row["status"] for row in rows] == ["refused", "ok", "too_large"]
    assert rows[0]["error"] == "alt: text is too long"
    for name in ("caption", *outputs.names):
        assert [row[name] is None for row in rows] == [True, False, True], name


def test_each_row_has_its_own_prompt_beside_the_asks():
    table = decoded(map(pixels_of, range(2)), ask=["one", "two"])
    rows = stage(Outputs.of(ASKS), prompt_column="ask")(table).to_pylist()
    assert [row["caption"] for row in rows] == [
        fake_caption(pixels_of(n), p) for n, p in enumerate(("one", "two"))
    ]
    assert [row["shape"] for row in rows] == [fake_caption(pixels_of(n), ASKS["shape"]) for n in range(2)]


def test_several_captions_are_made_and_of_each_answer_one_text():
    """The others would take slots and be thrown away."""
    options = GenerationOptions(num_beams=3, num_return_sequences=3)
    making = stage(Outputs.of(ASKS), options=options)
    asked = []
    submit = making.actor.submit
    making.actor.submit = lambda request: asked.append(request.options or options) or submit(request)
    [row] = making(decoded([pixels_of(0)])).to_pylist()
    assert len(row["captions"]) == 3
    assert [row[name] for name in ASKS] == [fake_caption(pixels_of(0), prompt) for prompt in ASKS.values()]
    assert [(one.num_beams, one.num_return_sequences) for one in asked] == [(3, 3), (3, 1), (3, 1)]


def test_without_captions_no_text_is_asked_for():
    making = stage(Outputs(caption=False, embed=("v=vision",)))
    table = making(decoded(map(pixels_of, range(4))))
    assert table["v"].to_pylist() == [fake_features(pixels_of(n)).pooler_output.tolist() for n in range(4)]
    assert making.actor.stats().num_requests == 0
    assert not {"caption", "logprob", "finish_reason"} & set(table.column_names)
    assert {"flags", "status", "error", "width", "height", "sha256"} <= set(table.column_names)


def test_pieces_have_what_is_made_of_several_rows_at_once():
    making = stage(Outputs.of(embeds=EMBEDS))
    table = decoded(map(pixels_of, range(5)))
    pieces = list(making.finish_rows(table, range(5), piece_rows=2))
    assert [len(piece) for piece in pieces] == [2, 2, 1]
    rows = [row for piece in pieces for row in making.with_results(table, piece).to_pylist()]
    assert [row["seen"] for row in rows] == [
        fake_features(pixels_of(n)).pooler_output.tolist() for n in range(5)
    ]


def test_marked_captions_are_made_again_on_request_and_only_those():
    table = decoded(map(pixels_of, range(2)), ask=pa.array(["a photo of", None]))
    marked = stage(Outputs(), prompt_column="ask")(table).to_pylist()
    assert [row["flags"] for row in marked] == [["echoes_prompt"], []]
    making = stage(Outputs(regenerate=True, score=("fit=caption",)), prompt_column="ask")
    rows = making(table).to_pylist()
    assert [row["flags"] for row in rows] == [["regenerated"], []]
    assert [row["caption"] for row in rows] == [fake_caption(pixels_of(n)) for n in range(2)]
    assert rows[0]["fit"] == fake_score(pixels_of(0), rows[0]["caption"], "a photo of")
    assert making.actor.stats().num_requests == 3
    assert making.actor.stats().num_images_encoded == 2


def test_identical_images_are_captioned_once_on_request():
    table = decoded(pixels_of(n % 3) for n in range(12))
    for reuse, num_requests in ((False, 24), (True, 6)):
        making = stage(Outputs.of({"colour": ASKS["colour"]}), reuse_identical=reuse)
        rows = [*making(table).to_pylist(), *making(table.slice(0, 3)).to_pylist()][:12]
        assert making.actor.stats().num_requests == num_requests + (0 if reuse else 6)
        assert [row["caption"] for row in rows] == [fake_caption(pixels_of(n % 3)) for n in range(12)]
        assert [row["colour"] for row in rows] == [
            fake_caption(pixels_of(n % 3), ASKS["colour"]) for n in range(12)
        ]


def test_identical_bytes_of_other_shapes_or_prompts_are_other_images():
    table = decoded([pixels_of(0)] * 3, ask=["one", "two", "two"])
    table = table.set_column(2, "width", pa.array([1, 1, 7], pa.int32()))
    making = stage(Outputs(), prompt_column="ask", reuse_identical=True)
    making(table)
    assert making.actor.stats().num_requests == 3


def test_what_is_remembered_is_bounded_shared_in_flight_and_never_a_fault():
    made: list[Future[Result]] = []

    def submit() -> Future[Result]:
        made.append(Future())
        return made[-1]

    shared = ResultCache(most=2)
    first = shared.get("a", submit)
    assert shared.get("a", submit) is first and len(made) == 1
    result = Result()
    made[0].set_result(result)
    assert shared.get("a", submit) is result, "the future is let go"
    shared.get("b", submit)
    shared.get("a", submit)
    shared.get("c", submit)
    assert len(made) == 3
    shared.get("a", submit)
    assert len(made) == 3, "what was used last is kept"
    shared.get("b", submit)
    assert len(made) == 4, "what was not used is forgotten"
    made[3].set_exception(RuntimeError("the device is gone"))
    shared.get("b", submit)
    assert len(made) == 5
    made[4].set_result(Result(status=Status.FAILED, error="out of memory"))
    shared.get("b", submit)
    assert len(made) == 6, "what failed is tried again"
    made[5].set_result(Result(status=Status.REFUSED, error="too long"))
    shared.get("b", submit)
    assert len(made) == 6


def test_calls_of_several_threads_share_one_request(tmp_path):
    gate = tmp_path / "gate"
    gate.touch()
    making = stage(Outputs(), FakeEngineConfig(gate=str(gate)), reuse_identical=True)
    table = decoded([pixels_of(1)])
    captions: list[str] = []
    threads = [
        threading.Thread(target=lambda: captions.append(making(table)["caption"][0].as_py()))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    gate.unlink()
    for thread in threads:
        thread.join()
    assert captions == [fake_caption(pixels_of(1))] * 4
    assert making.actor.stats().num_requests == 1


@pytest.mark.parametrize("shape", [(5,), (2, 3)])
def test_vectors_and_their_nulls_survive_parquet_and_arrows_own_files(shape):
    kind = pa.float32()
    for size in reversed(shape):
        kind = pa.list_(kind, size)
    vectors = [np.random.default_rng(n).random(shape, np.float32) if n % 3 else None for n in range(7)]
    table = pa.table({"v": fixed_lists(vectors, kind)}).take(pa.array(range(7))).combine_chunks()
    assert table["v"].type == kind
    file = io.BytesIO()
    pq.write_table(table, file)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table)
    for read in (pq.read_table(file), pa.ipc.open_file(sink.getvalue()).read_all()):
        assert read.schema == table.schema
        again = pa.concat_tables([read, read]).combine_chunks().take(pa.array([8, 0, 3, 2]))["v"].to_pylist()
        assert again == [vectors[1].tolist(), None, None, vectors[2].tolist()]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"ask": ("colour",)}, "ask must be NAME=PROMPT, got 'colour'"),
        ({"ask": ("caption=what?",)}, "ask must not name columns that the output has itself, got caption"),
        ({"ask": ("a=x",), "embed": ("a=vision",)}, "embed must not name columns .* got a;"),
        ({"score": ("a=x", "a=y")}, "score must name each column once, got a more than once"),
        ({"embed": ("a=pixels",)}, "embed must be NAME=KIND with one of vision, qformer, queries"),
        ({"caption": False}, "outputs must name at least one column"),
        ({"caption": False, "embed": ("a=vision",), "regenerate": True}, "regenerate must be left out"),
    ],
)
def test_outputs_that_cannot_be_are_refused_by_name(values, said):
    with pytest.raises(ValueError, match=said):
        Outputs(**values)


def test_a_kept_column_and_a_named_one_cannot_share_a_name():
    with pytest.raises(ValueError, match="ask must not name columns that the output has itself, got url"):
        CaptionSettings(
            input=("i",),
            output="o",
            outputs=Outputs(ask=("url=what?",)),
            reading=CaptionSettings(input=("i",), output="o").reading.__class__(keep=("url",)),
        )


def test_every_output_is_in_the_fingerprint_and_what_only_saves_work_is_not():
    info = FakeEngineConfig().info()

    def fingerprint(**changes):
        return CaptionSettings(input=("i",), output="o", **changes).fingerprint(info)

    plain = fingerprint()
    assert fingerprint(reuse_identical=True) == plain
    asked = fingerprint(outputs=Outputs(ask=("colour=what?",)))
    assert "outputs.ask.colour: 'nothing' -> 'what?'" in asked.differences(plain)
    seen = {
        fingerprint(outputs=outputs).digest
        for outputs in (
            Outputs(),
            Outputs(regenerate=True),
            Outputs(ask=("a=x", "b=y")),
            Outputs(ask=("b=y", "a=x")),
            Outputs(embed=("a=vision",)),
            Outputs(embed=("a=queries",)),
            Outputs(caption=False, embed=("a=vision",)),
            Outputs(score=("a=caption",)),
            Outputs(score=("a=alt",)),
        )
    }
    assert len(seen) == 9


@pytest.mark.parametrize(
    "command",
    [
        EmbedSettings(input=("i",), output="o", limit=3),
        ScoreSettings(input=("i",), output="o", text_column="caption", prompt="a photo of"),
    ],
)
def test_the_other_commands_are_the_same_job(command):
    job = command.job()
    assert (job.input, job.output, job.limit) == (("i",), "o", command.limit)
    assert not job.outputs.caption
    assert from_dict(CaptionSettings, job.to_dict()) == job


def test_an_inputs_own_captions_can_be_scored():
    """`caption` means the one just made, where one is made."""
    assert ScoreSettings(input=("i",), output="o", text_column="caption").job().read_options.text_columns == (
        "caption",
    )
    made = CaptionSettings(input=("i",), output="o", outputs=Outputs(score=("fit=caption",)))
    assert made.read_options.text_columns == ()
