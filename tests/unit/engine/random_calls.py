"""Seeded random calls of an engine, with extreme arguments."""

from __future__ import annotations

import io
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from blip2_actor import Engine, GenerationOptions, Request, Result, Status

CALLS = ("generate", "submit", "stream", "score", "features", "text_features", "image")


def call_at_random(engine: Engine, num_calls: int, seed: int, folder: Path) -> list[str]:
    """Make calls and return the outcome of each: a status, or the name of the error that it raised.

    Two kinds of errors are correct: `TypeError` for a wrong type or name of an argument, and `ValueError` for
    options or lengths that contradict each other, or for a stream or an image that was refused.
    """
    choose = random.Random(seed)
    outcomes: list[str] = []
    for _ in range(num_calls):
        method = choose.choice(CALLS)
        try:
            outcomes += map(str, statuses(method, call(engine, method, choose, folder)))
        except (TypeError, ValueError) as error:
            assert str(error), f"{method} raised {error!r}, which says nothing"
            outcomes.append(type(error).__name__)
    return outcomes


def call(engine: Engine, method: str, choose: random.Random, folder: Path) -> Any:
    count = choose.choice([0, 1, 1, 2, 5])
    images = [image_of(choose, folder) for _ in range(count)]
    asked: Any = [choose.choice([image, request_of(choose, image)]) for image in images]
    if choose.random() < 0.2:
        asked = choose.choice([image_of(choose, folder), request_of(choose, image_of(choose, folder)), {}, 7])
    if method == "generate":
        return engine.generate(asked, **arguments_of(choose))
    if method == "submit":
        return engine.submit(asked, **arguments_of(choose)).result(60)
    if method == "stream":
        return list(engine.stream(asked, **arguments_of(choose)))
    if method == "score":
        return engine.score(images, [prompt_of(choose) for _ in range(count + (choose.random() < 0.1))])
    if method == "features":
        return engine.features(asked, choose.random() < 0.3, choose.random() < 0.3)
    if method == "text_features":
        return engine.text_features([prompt_of(choose) for _ in range(count)])
    return engine.image(image_of(choose, folder))


def statuses(method: str, answer: Any) -> Iterator[Status]:
    if method == "stream":
        assert all(isinstance(piece, str) and piece for piece in answer)
    elif method != "image":
        for one in [answer] if isinstance(answer, Result) else answer:
            assert (one.error is None) is (one.status is Status.OK)
            yield one.status


def request_of(choose: random.Random, image: Any) -> Request:
    options = None if choose.random() < 0.7 else GenerationOptions(max_new_tokens=choose.randint(1, 4))
    return Request(image=image, prompt=prompt_of(choose), options=options)


def prompt_of(choose: random.Random) -> Any:
    return choose.choice(
        [
            None,
            "",
            " ",
            "a",
            "what is it?",
            "é☃\U0001f600",
            "\ud800",
            "\x00",
            "a" * 500,
            5,
            b"a",
            ["a"],
            "<image>",
        ]
    )


def arguments_of(choose: random.Random) -> dict[str, Any]:
    arguments: dict[str, Any] = {"max_new_tokens": 3}
    edges: dict[str, list[Any]] = {
        "max_new_tokens": [1, 2, 0, -1, 10**9, "3", 2.5, None, np.int64(2)],
        "num_beams": [1, 2, 3, 100, True],
        "do_sample": [True, False, "yes"],
        "temperature": [0, 0.0, 0.7, -1, float("nan"), "hot"],
        "top_k": [1, 5, 10**9],
        "stop": ["a", ("a", "b"), [], "", 5, [5]],
        "num_return_sequences": [1, 2, 50],
        "repetition_penalty": [1.2, 0, float("inf")],
        "prompt": [prompt_of(choose)],
        "options": [GenerationOptions(num_beams=2, max_new_tokens=2), None, {}],
        "max_tokens": [5],
    }
    for name, values in edges.items():
        if choose.random() < 0.12:
            arguments[name] = choose.choice(values)
    return arguments


def image_of(choose: random.Random, folder: Path) -> Any:
    size = choose.choice([(1, 1), (3, 3), (64, 64), (2, 90), (33, 20)])
    pixels = np.random.default_rng(choose.randrange(9)).integers(0, 256, (*size, 3), dtype=np.uint8)
    data = encoded(pixels, choose.choice(["PNG", "JPEG", "GIF", "TIFF", "WEBP", "BMP"]))
    cut, flipped = data[: choose.randrange(len(data))], bytearray(data)
    flipped[choose.randrange(len(data))] ^= 1 << choose.randrange(8)
    (folder / "a.png").write_bytes(choose.choice([data, cut, b""]))
    return choose.choice(
        [
            *(pixels, pixels[..., ::-1], pixels[..., 0], pixels[..., :1], pixels[..., :2], pixels[None]),
            *(pixels.astype(dtype) for dtype in (np.float32, np.float64, np.int64, np.uint16, bool, object)),
            *(
                pixels / 255,
                pixels * np.nan,
                pixels[:0],
                np.uint8(3),
                np.array("a"),
                pixels.transpose(2, 0, 1),
            ),
            *(torch.from_numpy(pixels), torch.from_numpy(pixels).permute(2, 0, 1), torch.zeros(2, 2)),
            torch.zeros(3, 4, 4, dtype=torch.uint8, device="meta"),
            torch.zeros(3, 4, 4, dtype=torch.uint8).to_sparse(),
            *(data, cut, bytes(flipped), flipped, memoryview(data), b"", None),
            *(Image.open(io.BytesIO(cut or data)) if is_image(cut) else None, Image.new("P", size)),
            *(Image.new(mode, size) for mode in ("L", "LA", "RGBA", "CMYK", "I;16", "F", "1", "HSV", "LAB")),
            *(Image.new("RGB", (0, 5)), closed(data)),
            *(
                folder / "a.png",
                str(folder / "a.png"),
                folder,
                folder / "none",
                "",
                "\x00",
                "\ud800",
                "a" * 9999,
            ),
            *(
                "/dev/zero",
                "http://127.0.0.1:1/",
                "https://[::1",
                "s3://bucket/a.png",
                "data:image/png;base64,",
            ),
            *(5, 2.5, object(), [1], {}, (), pixels.tolist(), True),
        ]
    )


def encoded(pixels: np.ndarray, format: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, format)
    return file.getvalue()


def is_image(data: bytes) -> bool:
    try:
        Image.open(io.BytesIO(data))
    except Exception:  # damaged bytes may raise anything
        return False
    return True


def closed(data: bytes) -> Image.Image:
    file = io.BytesIO(data)
    image = Image.open(file)
    file.close()
    return image
