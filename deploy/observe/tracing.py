"""Traces for OpenTelemetry, if the environment names a collector (`OTEL_EXPORTER_OTLP_ENDPOINT`).

Serve makes a span for each of its parts and hands the trace from one to the next; it calls `span_processors`
in each of them. The phases of a request are spans below these. Without a collector, nothing of OpenTelemetry
is imported here.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import SpanProcessor

COLLECTOR = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")
"""Environment variables of OpenTelemetry; either one switches traces on."""
EXPORTER = "opentelemetry.exporter.otlp"
"""What the extra `otel` adds to the packages of Serve."""
_TRACER = "blip2"


def is_tracing() -> bool:
    return any(os.environ.get(name) for name in COLLECTOR)


def serve_environment() -> dict[str, str]:
    """Return what tells Serve's processes to export traces; empty without a collector."""
    if not is_tracing():
        return {}
    return {
        "RAY_SERVE_TRACING_EXPORTER_IMPORT_PATH": f"{__name__}:{span_processors.__name__}",
        "RAY_SERVE_TRACING_SAMPLING_RATIO": os.environ.get("OTEL_TRACES_SAMPLER_ARG", "1.0"),
        "OTEL_SERVICE_NAME": os.environ.get("OTEL_SERVICE_NAME", "blip2"),
    }


def span_processors() -> list[SpanProcessor]:
    """Return what exports the spans of a process over OTLP and HTTP; the exporter reads its environment."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    return [BatchSpanProcessor(OTLPSpanExporter())] if is_tracing() else []


@contextmanager
def span(name: str) -> Iterator[None]:
    """Make a block a span below the current one."""
    if not is_tracing():
        yield
        return
    from opentelemetry import trace

    with trace.get_tracer(_TRACER).start_as_current_span(name):
        yield


class TextSpans:
    """The spans of one text in the engine: `encode` until its first token, then `decode_steps`.

    `encode` includes the wait in the engine. Texts that are not reported as they grow have one span,
    `generate`.
    """

    def __init__(self, on_text: Callable[[str], None] | None) -> None:
        self._on_text = on_text
        self._began_ns = time.time_ns()
        self._first_ns: int | None = None

    def on_text(self, text: str) -> None:
        if self._first_ns is None:
            self._first_ns = time.time_ns()
        if self._on_text is not None:
            self._on_text(text)

    def end(self, attributes: Mapping[str, Any]) -> None:
        """Export the spans, below the current one."""
        now_ns = time.time_ns()
        if self._first_ns is None:
            _add("generate", self._began_ns, now_ns, attributes)
        else:
            _add("encode", self._began_ns, self._first_ns, {})
            _add("decode_steps", self._first_ns, now_ns, attributes)


def _add(name: str, began_ns: int, ended_ns: int, attributes: Mapping[str, Any]) -> None:
    from opentelemetry import trace

    made = trace.get_tracer(_TRACER).start_span(name, start_time=began_ns, attributes=attributes)
    made.end(ended_ns)
