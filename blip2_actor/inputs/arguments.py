"""Normalize the arguments of an engine's calls, in all forms in which people write them.

A wrong type is a `TypeError` that names the argument; only a bad image or text becomes a status instead.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeGuard, cast

import numpy as np
import torch
from PIL import Image

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.options import GenerationOptions
from blip2_actor.request import ImageLike, Request

Names = bool | str | Sequence[str]
"""Which hidden states or attention maps are wanted: all or none of them, or names and patterns of names."""
_ONE_IMAGE = (bytes, bytearray, memoryview, str, Path, Image.Image, EncodedImage)


def to_request(asked: Request | ImageLike | None, prompt: str | None, changes: Mapping[str, Any]) -> Request:
    """Return a request; a bare image gets the prompt, and options of the request's own are changed.

    Raises:
        TypeError: a request and a prompt are given, the prompt is no str, or a changed option does not exist.
        ValueError: as from `GenerationOptions`.
    """
    if not isinstance(prompt, str | None):
        raise TypeError(
            f"prompt must be one text for all images, got {_described(prompt)}; with a prompt for each, give "
            "Request(image=..., prompt=...) for each image"
        )
    if not isinstance(asked, Request):
        return Request(image=asked, prompt=prompt)
    if prompt is not None:
        raise TypeError("prompt must be left out with a Request, which has its own; set Request.prompt")
    if asked.options is None or not changes:
        return asked
    return replace(asked, options=to_options(asked.options, changes))


def to_requests(
    asked: Request | ImageLike | Iterable[Request | ImageLike | None],
    prompt: str | None,
    changes: Mapping[str, Any],
) -> list[Request]:
    """Return a list of requests, of one if `asked` is one request or image.

    Raises:
        TypeError: it is neither a request, an image nor a list of them; or as from `to_request`.
        ValueError: as from `to_request`.
    """
    if isinstance(asked, Request) or _is_one_image(asked):
        return [to_request(cast("Request | ImageLike", asked), prompt, changes)]
    if not _is_list(asked):
        raise TypeError(
            f"requests must be a Request, an image or a list of them, got {type(asked).__name__}; an image "
            "is bytes, a path, a PIL image, an array or a tensor"
        )
    return [to_request(one, prompt, changes) for one in cast("Iterable[Request | ImageLike | None]", asked)]


def to_images(values: Iterable[Any]) -> list[Any]:
    """Return images as a list.

    Raises:
        TypeError: it is a single image, or not a list.
    """
    return _to_list("images", values, _is_one_image(values))


def to_texts(name: str, values: Iterable[Any]) -> list[Any]:
    """Return texts, or the token ids or attention masks of texts, as a list.

    Raises:
        TypeError: it is a single text, or not a list.
    """
    is_one = values.ndim < 2 if _has_numbers(values) else isinstance(values, str | bytes)
    return _to_list(name, values, is_one)


def require_one_per_image(name: str, texts: list[Any], images: list[Any]) -> None:
    """Raise ValueError if a list does not have as many texts as there are images."""
    if len(texts) != len(images):
        raise ValueError(
            f"{name} must be one per image ({len(images)}), got {len(texts)}; give an image once for each of "
            f"its {name}"
        )


def to_names(name: str, wanted: Names) -> tuple[str, ...]:
    """Return the names, or patterns of names, that a call asks for: none for False, all for True.

    Raises:
        TypeError: it is neither a truth value, a text nor a list of texts.
    """
    if isinstance(wanted, bool):
        return ("*",) if wanted else ()
    names = (wanted,) if isinstance(wanted, str) else tuple(wanted) if _is_list(wanted) else (None,)
    if not all(isinstance(one, str) for one in names):
        raise TypeError(f"{name} must be true, false or a list of names, got {_described(wanted)}")
    return cast("tuple[str, ...]", names)


def to_options(options: GenerationOptions, changes: Mapping[str, Any]) -> GenerationOptions:
    """Return options with some of them changed, as in `generate(image, max_new_tokens=30)`.

    Raises:
        TypeError: `options` is of another type, or a name is unknown.
        ValueError: as from `GenerationOptions`.
    """
    if not isinstance(options, GenerationOptions):
        raise TypeError(f"options must be GenerationOptions, got {type(options).__name__}")
    return replace(options, **changes) if changes else options


def _is_list(value: object) -> bool:
    """False for an open file, whose lines are not images, and for an array without axes."""
    is_iterable = isinstance(value, Iterable) and getattr(value, "ndim", 1) > 0
    return is_iterable and not isinstance(value, Mapping) and not hasattr(value, "read")


def _to_list(name: str, values: Iterable[Any], is_one: bool) -> list[Any]:
    if not _is_list(values) or is_one:
        raise TypeError(f"{name} must be a list, got {_described(values)}; put a single one into a list")
    return list(values)


def _is_one_image(value: object) -> bool:
    """Whether a value is one image; an array or tensor with four axes is a batch."""
    return value.ndim != 4 if _has_numbers(value) else isinstance(value, _ONE_IMAGE)


def _has_numbers(value: object) -> TypeGuard[np.ndarray | torch.Tensor]:
    """False for arrays of texts, such as paths, and of objects; these count as lists."""
    return isinstance(value, torch.Tensor) or (isinstance(value, np.ndarray) and value.dtype.kind in "biufc")


def _described(value: object) -> str:
    shape = getattr(value, "shape", None)
    return type(value).__name__ + (f" of shape {list(shape)}" if isinstance(shape, Sequence) else "")
