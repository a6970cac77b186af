"""Which column of a Parquet table is what: the image, the key, texts, and those that are kept.

An image is a column of bytes, or the `datasets` library's struct of bytes and path.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pyarrow as pa

from pipeline.inputs.reader import PROMPT, ReadOptions
from pipeline.inputs.shards import InputError

USUAL_IMAGE_COLUMNS = (
    "image",
    "jpg",
    "jpeg",
    "png",
    "webp",
    "img",
    "image_bytes",
    "bytes",
    "content",
    "data",
)
"""Where several columns hold bytes, the first of these is the image."""
USUAL_KEY_COLUMNS = ("__key__", "key")


@dataclass(frozen=True)
class Columns:
    """What each column that is read is for."""

    image: pa.Field
    key: pa.Field | None
    texts: dict[str, pa.Field]
    """The prompt and what is scored, by the name between the stages."""
    kept: dict[str, pa.Field]
    """By the name in the output."""

    @classmethod
    def find(cls, schema: pa.Schema, options: ReadOptions) -> Columns:
        """Find the columns that the options name, and those that they leave open.

        Raises:
            InputError: a column is not there, cannot be what it was named for, or is not the only one.
        """
        image = (
            _named(schema, "image_column", options.image_column)
            if options.image_column is not None
            else _find_image(schema)
        )
        if not _holds_images(image.type):
            raise InputError(
                f"image_column must hold bytes, or a struct with bytes, "
                f"got {image.name!r} of type {image.type}"
            )
        usual_key = next((name for name in USUAL_KEY_COLUMNS if name in schema.names), None)
        key_name = options.key_column or usual_key
        key = _named(schema, "key_column", key_name) if key_name else None
        if key is not None and not (_is_text(key.type) or pa.types.is_integer(key.type)):
            if options.key_column is not None:
                raise InputError(
                    f"key_column must hold text or integers, got {key.name!r} of type {key.type}"
                )
            key = None
        texts = {}
        for name, source in options.texts.items():
            texts[name] = text = _named(schema, option_of(name), source)
            if not _is_text(text.type):
                raise InputError(f"{option_of(name)} must hold text, got {text.name!r} of type {text.type}")
        kept = {name: _named(schema, "keep", source) for name, source in options.kept.items()}
        return cls(image, key, texts, kept)

    @property
    def to_read(self) -> list[str]:
        fields = [self.image, self.key, *self.texts.values(), *self.kept.values()]
        return list(dict.fromkeys(field.name for field in fields if field is not None))


def option_of(text: str) -> str:
    """What users call a text of `ReadOptions.texts`."""
    return "prompt_column" if text == PROMPT else "text to score"


def _named(schema: pa.Schema, option: str, name: str) -> pa.Field:
    if schema.names.count(name) != 1:
        raise InputError(f"{option} must be one of the columns {', '.join(schema.names)}, got {name!r}")
    return schema.field(name)


def _find_image(schema: pa.Schema) -> pa.Field:
    features = (
        json.loads((schema.metadata or {}).get(b"huggingface", b"{}")).get("info", {}).get("features", {})
    )
    declared = [
        field
        for field in schema
        if isinstance(features.get(field.name), dict) and features[field.name].get("_type") == "Image"
    ]
    found = declared or [field for field in schema if _holds_images(field.type)]
    if len(found) == 1:
        return found[0]
    for usual in USUAL_IMAGE_COLUMNS:
        for field in found:
            if field.name.lower() == usual:
                return field
    if not found:
        raise InputError(
            f"the table has no column of image bytes, only {', '.join(schema.names)}; "
            "if it is a list of metadata beside tars, say --format webdataset"
        )
    names = ", ".join(field.name for field in found)
    raise InputError(f"the image could be in any of the columns {names}; name one with --image-column")


def _holds_images(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return any(field.name == "bytes" and _is_bytes(field.type) for field in type)
    return _is_bytes(type)


def _is_bytes(type: pa.DataType) -> bool:
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)


def _is_text(type: pa.DataType) -> bool:
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
