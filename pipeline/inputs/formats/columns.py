"""Find the columns of a Parquet table: the image, the key, the texts, and the kept ones.

An image column holds bytes, or the `datasets` library's struct of bytes and path. If the user names no
image column, the one that the `datasets` library has declared is taken, else the only one with bytes, else
the one with a usual name. In doubt the table is refused: a guess could caption the wrong images.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pyarrow as pa

from pipeline.errors import InputError
from pipeline.inputs.reader import PROMPT, ReadOptions

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
"""If several columns hold bytes, the first of these names decides which one is the image."""
USUAL_KEY_COLUMNS = ("__key__", "key")


@dataclass(frozen=True)
class Columns:
    """The columns that are read, by their purpose."""

    image: pa.Field
    key: pa.Field | None
    texts: dict[str, pa.Field]
    """The prompt and the scored texts, by the name of the column in the reader's tables."""
    kept: dict[str, pa.Field]
    """The kept columns that the table has, by their name in the output."""
    lacking: tuple[str, ...] = ()
    """Names in the input of kept columns that the table lacks; they are null in the output."""

    @classmethod
    def find(cls, schema: pa.Schema, options: ReadOptions) -> Columns:
        """Find the columns that the options name, and choose image and key if they name none.

        A table may lack kept columns.

        Raises:
            InputError: a column does not exist or has the wrong type, or the image column is in doubt.
        """
        image = (
            _require_column(schema, "image_column", options.image_column)
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
        key = _require_column(schema, "key_column", key_name) if key_name else None
        if key is not None and not (is_text(key.type) or pa.types.is_integer(key.type)):
            if options.key_column is not None:
                raise InputError(
                    f"key_column must hold text or integers, got {key.name!r} of type {key.type}"
                )
            key = None
        texts = {}
        for name, source in options.texts.items():
            texts[name] = text = _require_column(schema, option_name(name), source)
            if not is_text(text.type):
                raise InputError(f"{option_name(name)} must hold text, got {text.name!r} of type {text.type}")
        lacking = tuple(source for source in options.kept.values() if source not in schema.names)
        kept = {
            name: _require_column(schema, "keep", source)
            for name, source in options.kept.items()
            if source not in lacking
        }
        return cls(image, key, texts, kept, lacking)

    @property
    def names(self) -> list[str]:
        """Names of the columns in the file, each once."""
        fields = [self.image, self.key, *self.texts.values(), *self.kept.values()]
        return list(dict.fromkeys(field.name for field in fields if field is not None))


def option_name(text: str) -> str:
    """Return the name of the option that a column of `ReadOptions.texts` comes from, for messages."""
    return "prompt_column" if text == PROMPT else "text to score"


def _require_column(schema: pa.Schema, option: str, name: str) -> pa.Field:
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
            "if it holds metadata of tars next to it, use --format webdataset"
        )
    names = ", ".join(field.name for field in found)
    raise InputError(f"several columns could hold the image: {names}; choose one with --image-column")


def _holds_images(type: pa.DataType) -> bool:
    if pa.types.is_struct(type):
        return any(field.name == "bytes" and is_bytes(field.type) for field in type)
    return is_bytes(type)


def is_bytes(type: pa.DataType) -> bool:
    """Return whether a column of this type holds bytes."""
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)


def is_text(type: pa.DataType) -> bool:
    """Return whether a column of this type holds text."""
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
