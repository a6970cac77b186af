"""A running endpoint exports one trace per request, from Serve's proxy to the steps of the engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.chaos.own_clusters.online.test_endpoint_lifecycle import CAPTION, ask, endpoint
from tests.integration.online.endpoint import wait_for
from tests.unit.deploy.otlp_collector import Collector, collecting

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="comes with the extra otel")

pytestmark = pytest.mark.timeout(400)
PARTS = {"queue", "decode", "engine", "encode", "decode_steps"}


def test_a_request_is_one_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with collecting() as collector:
        check(tmp_path, collector, monkeypatch)


def check(tmp_path: Path, collector: Collector, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_ENDPOINT", f"http://127.0.0.1:{collector.server_port}")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_COMPRESSION", "none")
    monkeypatch.setenv("OTEL_BSP_SCHEDULE_DELAY", "200")
    with endpoint(tmp_path) as (url, _):
        assert ask(url).json()["caption"] == CAPTION

        def trace() -> dict[str, Any]:
            """Return the spans of the trace of a caption, by name."""
            found = {span.trace_id for span in collector.spans if span.name == "decode_steps"}
            return {span.name: span for span in collector.spans if span.trace_id in found}

        def is_whole() -> bool:
            names = trace().keys()
            return names >= PARTS and any("proxy" in name for name in names)

        wait_for(is_whole, seconds=60)
        spans = trace()
        by_id = {span.span_id: span for span in collector.spans}

        def ancestors(name: str) -> list[str]:
            span, found = spans[name], []
            while span.parent_span_id in by_id:
                span = by_id[span.parent_span_id]
                found.append(span.name)
            return found

        print(ancestors("decode_steps"))
        assert "engine" in ancestors("decode_steps") and "proxy" in ancestors("decode_steps")[-1]
        for name in PARTS:
            assert CAPTION not in str(spans[name])
