"""Find the columns of a Parquet table: the image, the key, the texts, and the kept ones.

An image column holds bytes, the `datasets` library's struct of bytes and path, or base64 as text; with
`--fetch`, addresses as text, or a struct with a path. Each element of a list of these is a row. If the user
names no image column, the one that the `datasets` library has declared is taken, else the only one with
bytes, else the one with a usual name. In doubt the table is refused: a guess could caption the wrong images.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

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
    "images",
    "image_base64",
)
"""If several columns hold bytes, the first of these names decides which one is the image. A column of text
must have one of these names, or be named by the user."""
USUAL_ADDRESS_COLUMNS = (
    "url",
    "image_url",
    "uri",
    "image_uri",
    "path",
    "image_path",
    "file_name",
    "filename",
    "file",
    "image",
    "images",
)
"""With `--fetch`, the first of these names decides which column of text holds the addresses."""
USUAL_KEY_COLUMNS = ("__key__", "key")
MAX_NAMED_CHARS = 500
"""Maximum length of the list of column names in a message."""


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
    """Input names of kept columns that the table lacks; they are null in the output."""
    all_names: tuple[str, ...] = ()
    """Names of all columns of the table."""

    @classmethod
    def find(cls, schema: pa.Schema, options: ReadOptions) -> Columns:
        """Find the columns that the options name, and choose image and key if they name none.

        A table may lack kept columns.

        Raises:
            InputError: a column does not exist, occurs twice or has the wrong type, or the image column is in
                doubt.
        """
        image = _image_column(schema, options)
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
        return cls(image, key, texts, kept, lacking, tuple(schema.names))

    @property
    def names(self) -> list[str]:
        """Names of the columns in the file, each once."""
        fields = [self.image, self.key, *self.texts.values(), *self.kept.values()]
        return list(dict.fromkeys(field.name for field in fields if field is not None))

    def note(self, where: str) -> str | None:
        """Say that a file lacks kept columns, if it does.

        Args:
            where: what the file is.
        """
        if not self.lacking:
            return None
        lacking = ", ".join(map(repr, self.lacking))
        return f"{lacking} is no column of the {where}, so it is null in the output"

    @property
    def has_lists(self) -> bool:
        """Whether the image column holds lists of images."""
        return element_type(self.image.type) != self.image.type

    @property
    def image_type(self) -> pa.DataType:
        """The type of one image."""
        return element_type(self.image.type)


def option_name(text: str) -> str:
    """Return the name of the option that a column of `ReadOptions.texts` comes from, for messages."""
    return "prompt_column" if text == PROMPT else "text to score"


def _named(columns: pa.Schema) -> str:
    """Return the names of columns for a message; a file without a header may have a long first line."""
    return _cut(", ".join(columns.names))


def _typed(columns: pa.Schema) -> str:
    """Return the names of columns with their types, which say why none of them will do."""
    return _cut(", ".join(f"{field.name} ({field.type})" for field in columns))


def _cut(names: str) -> str:
    return names if len(names) <= MAX_NAMED_CHARS else f"{names[:MAX_NAMED_CHARS]}..."


def _require_column(schema: pa.Schema, option: str, name: str) -> pa.Field:
    if schema.names.count(name) > 1:
        raise InputError(f"{option} must be one column, got {name!r}, the name of several; rename the others")
    if name not in schema.names:
        raise InputError(f"{option} must be one of the columns {_named(schema)}, got {name!r}")
    return schema.field(name)


def _image_column(schema: pa.Schema, options: ReadOptions) -> pa.Field:
    if options.image_column is None:
        return _require_column(schema, "image_column", _find_image(schema, options).name)
    field = _require_column(schema, "image_column", options.image_column)
    if _holds_images(field.type, options):
        return field
    found = f"got {field.name!r} of type {field.type}"
    if options.fetch:
        raise InputError(f"image_column must hold text, or a struct with a path, to be fetched, {found}")
    raise InputError(f"image_column must hold bytes, or a struct with bytes, {found}")


def _find_image(schema: pa.Schema, options: ReadOptions) -> pa.Field:
    usual_names = USUAL_ADDRESS_COLUMNS if options.fetch else USUAL_IMAGE_COLUMNS
    found = [field for field in schema if _holds_images(field.type, options)]
    if not options.fetch:
        found = [field for field in _declared_images(schema) if field in found] or found
    candidates = found
    bytes_or_paths = [field for field in found if not is_text(element_type(field.type))]
    found = bytes_or_paths or [field for field in found if field.name.lower() in usual_names]
    found = [field for field in found if element_type(field.type) == field.type] or found
    if len(found) == 1:
        return found[0]
    for usual in usual_names:
        for field in found:
            if field.name.lower() == usual:
                return field
    if options.fetch and candidates and not found:
        raise InputError(
            f"none of the columns {_named(schema)} has a usual name for addresses, such as url or "
            "path; choose one with --image-column"
        )
    if found:
        names = _named(pa.schema(found))
        raise InputError(f"several columns could hold the image: {names}; choose one with --image-column")
    if options.fetch:
        raise InputError(
            f"the table has no column of text, which could hold addresses, only {_typed(schema)}"
        )
    raise InputError(
        f"the table has no column of image bytes, only {_typed(schema)}; if one of them holds URLs "
        "or paths, use --image-column and --fetch; if it holds metadata of tars next to it, use --format "
        "webdataset"
    )


def _declared_images(schema: pa.Schema) -> list[pa.Field]:
    """Return the columns that the `datasets` library calls images; none if its metadata is damaged."""
    try:
        metadata = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    except ValueError:
        return []
    features = _value(_value(metadata, "info"), "features")
    return [field for field in schema if _is_image_feature(_value(features, field.name))]


def _value(mapping: Any, name: str) -> Any:
    return mapping.get(name) if isinstance(mapping, Mapping) else None


def _is_image_feature(feature: Any) -> bool:
    """Return whether a feature is an image or a list of images."""
    if isinstance(feature, Sequence) and not isinstance(feature, str):
        return len(feature) == 1 and _value(feature[0], "_type") == "Image"
    if _value(feature, "_type") in ("Sequence", "List", "LargeList"):
        feature = _value(feature, "feature")
    return _value(feature, "_type") == "Image"


def _holds_images(type: pa.DataType, options: ReadOptions) -> bool:
    """Return whether a column of this type may hold images, or with `--fetch` their addresses."""
    if options.schema_version == 1:
        return not options.fetch and (_has_field(type, "bytes", is_bytes) or is_bytes(type))
    type = element_type(type)
    if options.fetch:
        return is_text(type) or _has_field(type, "path", is_text)
    return is_bytes(type) or is_text(type) or _has_field(type, "bytes", is_bytes)


def _has_field(type: pa.DataType, name: str, fits: Any) -> bool:
    return pa.types.is_struct(type) and any(field.name == name and fits(field.type) for field in type)


def element_type(type: pa.DataType) -> pa.DataType:
    """Return the type of a list's elements, or the type itself if it is not a list."""
    types = pa.types
    is_list = types.is_list(type) or types.is_large_list(type) or types.is_fixed_size_list(type)
    return type.value_type if is_list or types.is_list_view(type) or types.is_large_list_view(type) else type


def is_bytes(type: pa.DataType) -> bool:
    """Return whether a column of this type holds bytes."""
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_binary(type) or pa.types.is_large_binary(type) or pa.types.is_binary_view(type)


def is_text(type: pa.DataType) -> bool:
    """Return whether a column of this type holds text."""
    type = type.value_type if pa.types.is_dictionary(type) else type
    return pa.types.is_string(type) or pa.types.is_large_string(type) or pa.types.is_string_view(type)
