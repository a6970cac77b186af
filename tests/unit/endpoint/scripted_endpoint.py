"""An endpoint that answers as a test says, with the captions of the fake engine."""

from __future__ import annotations

import base64
import email.parser
import email.policy
import io
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

from blip2_actor import Completion
from blip2_actor.testing import FakeEngineConfig, fake_caption, fake_features, fake_score

MODEL = FakeEngineConfig(model="demo", image_size_px=8).info()

Answer = Callable[["Exchange"], None]


class Exchange:
    """One batch request, and the methods to answer it."""

    def __init__(self, handler: BaseHTTPRequestHandler, number: int) -> None:
        body = handler.rfile.read(int(handler.headers["Content-Length"]))
        head = f"Content-Type: {handler.headers['Content-Type']}\r\n\r\n".encode()
        parser = email.parser.BytesParser(policy=email.policy.HTTP)
        parts = {
            p["Content-Disposition"].params["name"]: p for p in parser.parsebytes(head + body).iter_parts()
        }
        content: dict[str, Any] = {name: part.get_payload(decode=True) for name, part in parts.items()}
        self.images: np.ndarray = np.load(io.BytesIO(content.pop("pixels")))
        self.fields: dict[str, Any] = {name: json.loads(text) for name, text in content.items()}
        self.texts: list[dict] = self.fields.get("texts", [])
        self.scores: list[dict] = self.fields.get("scores", [])
        self.features: list[int] = self.fields.get("features", [])
        self.key = handler.headers["Authorization"]
        self.number = number
        self._handler = handler

    def refuse(self, code: int, type: str, message: str = "no", retry_after: str = "0") -> None:
        self.refuse_with({"type": type, "message": message}, code, retry_after)

    def refuse_with(self, error: object, code: int, retry_after: str = "0") -> None:
        """Refuse with any error, such as that of a proxy in front of the endpoint."""
        document = json.dumps({"error": error}).encode()
        self._handler.send_response(code)
        self._handler.send_header("Retry-After", retry_after)
        self._handler.send_header("Content-Length", str(len(document)))
        self._handler.end_headers()
        self._handler.wfile.write(document)

    def begin(self) -> None:
        self._handler.send_response(200)
        self._handler.send_header("Transfer-Encoding", "chunked")
        self._handler.end_headers()
        self.send(b"\n")

    def answer(self, *indices: int) -> None:
        """Answer the texts with these positions."""
        for index in indices:
            text = self.texts[index]
            completion = Completion(
                text=fake_caption(self.images[text["image"]], text["prompt"]),
                token_ids=(1, 2, 3),
                logprob=-0.1 - 0.2,
                finish_reason="stop",
                token_logprobs=(-0.1, -0.2, 0.0),
            )
            known = {"index": index, "status": "ok", "error": None, "num_prompt_tokens": 1}
            self.send(json.dumps(known | {"completions": [asdict(completion)]}).encode() + b"\n")

    def answer_readings(self) -> None:
        """Answer all scores and features."""
        for index, one in enumerate(self.scores):
            logprob = fake_score(self.images[one["image"]], one["text"], one["prompt"])
            score = {"index": index, "status": "ok", "error": None, "logprob": logprob, "num_tokens": 1}
            self.send(json.dumps(score).encode() + b"\n")
        for index, image in enumerate(self.features):
            features = fake_features(self.images[image])
            vectors = {
                "qformer_features": _npy_in_base64(features.qformer_features),
                "pooler_output": _npy_in_base64(features.pooler_output),
            }
            line = {"index": index, "status": "ok", "error": None} | vectors
            self.send(json.dumps(line).encode() + b"\n")

    def break_off(self, type: str) -> None:
        self.send(json.dumps({"status": type, "error": type}).encode() + b"\n")
        self.end()

    def end(self) -> None:
        self.send(b"")

    def hang_up(self) -> None:
        self._handler.connection.close()
        self._handler.close_connection = True

    def answer_all(self) -> None:
        self.begin()
        self.answer(*range(len(self.texts)))
        self.answer_readings()
        self.end()

    def send(self, piece: bytes) -> None:
        self._handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        self._handler.wfile.flush()


def _npy_in_base64(vectors: np.ndarray | None) -> str:
    assert vectors is not None
    file = io.BytesIO()
    np.save(file, vectors)
    return base64.b64encode(file.getvalue()).decode()


@contextmanager
def endpoint(answer: Answer) -> Iterator[str]:
    """Run an endpoint; yield its URL."""
    lock = threading.Lock()
    numbers = iter(range(1_000_000))

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            document = json.dumps(asdict(MODEL) | {"options": {}}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(document)))
            self.end_headers()
            self.wfile.write(document)

        def do_POST(self) -> None:
            with lock:
                exchange = Exchange(self, next(numbers))
            answer(exchange)

        def log_message(self, *_: object) -> None: ...

    class Server(ThreadingHTTPServer):
        allow_reuse_address = True
        daemon_threads = True

        def handle_error(self, *_: object) -> None: ...

    server = Server(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
