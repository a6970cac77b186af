"""With a collector in the environment, a request's phases and the steps of its text are spans."""

from __future__ import annotations

import json
import sys

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter

from blip2_actor import GenerationOptions
from deploy.command import main
from deploy.observe import tracing
from deploy.observe.request_record import timed
from tests.engines import cpu_config
from tests.unit.deploy.otlp_collector import collecting
from tests.unit.deploy.routes.engine_service import EngineService, ask, png

COLLECTOR = "http://127.0.0.1:4318"


@pytest.fixture
def exporter(monkeypatch: pytest.MonkeyPatch) -> InMemorySpanExporter:
    """Return the exported spans; this process keeps its provider, because it can be set only once."""
    found = InMemorySpanExporter()
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(found))
    monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
    return found


def by_name(exporter: InMemorySpanExporter) -> dict[str, ReadableSpan]:
    return {span.name: span for span in exporter.get_finished_spans()}


def test_the_parts_of_a_request_are_spans(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tracing.COLLECTOR[0], COLLECTOR)
    demo = cpu_config("demo")
    service = EngineService(demo, GenerationOptions(max_new_tokens=5))
    prompt = "Question: what is this? Answer:"
    answer = ask(service, "POST", "/v1/caption", content=png(), params={"prompt": prompt}).json()
    service.captioner._actor.close()
    spans = by_name(exporter)
    assert {"engine", "encode", "decode_steps"} <= spans.keys()
    for name in ("encode", "decode_steps"):
        span, parent = spans[name], spans["engine"].context
        assert span.parent is not None and parent is not None and span.context is not None
        assert (span.parent.span_id, span.context.trace_id) == (parent.span_id, parent.trace_id)
    assert spans["encode"].end_time == spans["decode_steps"].start_time
    attributes = spans["decode_steps"].attributes
    assert attributes == {"blip2.status": "ok", "blip2.num_tokens": answer["num_tokens"]}
    exported = " ".join(span.to_json() for span in spans.values())
    assert prompt not in exported and json.dumps(answer["caption"]) not in exported


def test_a_text_that_is_not_reported_as_it_grows_has_one_span(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(tracing.COLLECTOR[1], COLLECTOR)
    with timed("engine"):
        tracing.TextSpans(None).end({})
    assert list(by_name(exporter)) == ["generate", "engine"]


def test_without_a_collector_there_are_no_spans(
    exporter: InMemorySpanExporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in tracing.COLLECTOR:
        monkeypatch.delenv(name, raising=False)
    with timed("engine"):
        pass
    assert not exporter.get_finished_spans()
    assert tracing.serve_environment() == {}


def test_spans_reach_a_collector_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(f"{tracing.EXPORTER}.proto.http", reason="comes with the extra otel")
    with collecting() as collector:
        monkeypatch.setenv(tracing.COLLECTOR[0], f"http://127.0.0.1:{collector.server_port}")
        provider = TracerProvider(shutdown_on_exit=False)
        for processor in tracing.span_processors():
            provider.add_span_processor(processor)
        monkeypatch.setattr(trace, "get_tracer", lambda name: provider.get_tracer(name))
        with timed("engine"):
            tracing.TextSpans(None).end({"blip2.num_tokens": 3})
        provider.shutdown()
    generate, engine = sorted(collector.spans, key=lambda span: span.name == "engine")
    assert (generate.name, engine.name) == ("generate", "engine")
    assert (generate.parent_span_id, generate.trace_id) == (engine.span_id, engine.trace_id)
    assert [(one.key, one.value.int_value) for one in generate.attributes] == [("blip2.num_tokens", 3)]


def test_serve_exports_every_trace_unless_a_ratio_is_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Serve's own default is one in a hundred."""
    monkeypatch.setenv(tracing.COLLECTOR[0], COLLECTOR)
    assert tracing.serve_environment()["RAY_SERVE_TRACING_SAMPLING_RATIO"] == "1.0"
    monkeypatch.setenv("OTEL_TRACES_SAMPLER_ARG", "0.1")
    assert tracing.serve_environment()["RAY_SERVE_TRACING_SAMPLING_RATIO"] == "0.1"


def test_a_collector_without_the_exporter_is_refused_by_the_name_of_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(tracing.COLLECTOR[0], COLLECTOR)
    monkeypatch.setitem(sys.modules, tracing.EXPORTER, None)
    assert main(["--model", "demo"]) == 3
    assert "pip install 'blip2-ray[otel]'" in capsys.readouterr().err
