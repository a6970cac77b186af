"""The OpenAPI description of routes that read their own bodies and choose their own content types."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel, ConfigDict
from pydantic.json_schema import models_json_schema

from deploy.http.request_body import FILE_FIELDS, FORM, JSON, PLAIN_TEXTS

_KEY = {"type": "http", "scheme": "bearer", "description": "A key, if the callers of the service have keys."}
_REF = "#/components/schemas/{model}"
_documented: dict[str, type[BaseModel]] = {}
"""Models that routes refer to and FastAPI does not see."""

CODES = {
    400: "the body or a field is wrong, or a URL or the Host is not allowed; the message names the field",
    401: "the key is missing or wrong",
    403: "the page that sent the request is not allowed, or the key has no right to send batch work",
    404: "the service has another model, or no such route",
    408: "the body came too slowly",
    409: "the service has another model than the job",
    413: "the body or an image has more bytes or pixels than the limits allow",
    415: "the content type is not one that the route reads",
    422: "the image cannot be decoded, or the model cannot serve the request; the type is the row status, or "
    "url_unreadable",
    429: "this caller has too much in flight; Retry-After says when to try again",
    500: "the service failed on this request; its log has the reason",
    503: "too much is being served, or there is no engine; Retry-After says when to try again",
    504: "no answer within timeout_s",
}
_ANYWHERE = {400, 403, 503}
"""Codes that even a route without a body can answer with."""


class Problem(BaseModel):
    """What went wrong."""

    model_config = ConfigDict(use_attribute_docstrings=True)

    type: str
    """A stable name, such as bad_request, undecodable or overloaded."""
    message: str
    """One sentence for a person."""
    param: None
    code: str
    """The type once more, where clients of OpenAI look for it."""


class ErrorAnswer(BaseModel):
    """Every answer that is not a success."""

    error: Problem


def errors(*codes: int) -> dict[int | str, dict[str, Any]]:
    """Return the error answers of a route: those of every route that has work done, or only some."""
    documented = _ANYWHERE.union(codes) if codes else CODES.keys() - {409}
    return {code: {"model": ErrorAnswer, "description": CODES[code]} for code in sorted(documented)}


def body_of(
    body_type: type[BaseModel], *, json: bool = True, forms: bool = False, raw: bool = False
) -> dict[str, Any]:
    """Return the description of a body that the route reads itself.

    Args:
        json: it may be JSON.
        forms: it may be a form too, whose fields are JSON except for images, the prompt and the model.
        raw: it may be the bytes of an image too, with the other fields in the query.
    """
    content: dict[str, Any] = {JSON: {"schema": _reference(body_type)}} if json else {}
    if forms:
        described = {name: one.description for name, one in body_type.model_fields.items()}
        fields = {
            name: _in_form(name) | ({"description": text} if text else {}) for name, text in described.items()
        }
        required = [name for name in FILE_FIELDS if name in fields]
        content[FORM] = {"schema": {"type": "object", "required": required, "properties": fields}}
    if raw:
        binary = {"schema": {"type": "string", "format": "binary"}}
        content |= {"image/*": binary, "application/octet-stream": binary}
    return {"requestBody": {"required": True, "content": content}}


def answer_in(media_types: Sequence[str], *models: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """Return the description of a successful answer in other content types than JSON."""
    schema = {"anyOf": [_reference(model) for model in models]}
    content = {media: {"schema": schema} for media in media_types}
    return {200: {"description": "Successful Response", "content": content}}


def document(api: FastAPI) -> None:
    """Add keys, and the models of bodies and streams, to the schema of an application."""
    build = api.openapi

    def openapi() -> dict[str, Any]:
        if api.openapi_schema is None:
            schema = build()
            models = [(model, "validation") for model in _documented.values()]
            _, definitions = models_json_schema(models, ref_template=_REF)  # type: ignore[arg-type]
            components = schema["components"]
            components["schemas"].update(definitions["$defs"])
            components["securitySchemes"] = {"key": _KEY}
            for operations in schema["paths"].values():
                for operation in operations.values():
                    _say_what_a_key_does(operation)
            # FastAPI's own answer to a wrong parameter, which every text satisfies.
            for name in ("HTTPValidationError", "ValidationError"):
                components["schemas"].pop(name, None)
            api.openapi_schema = schema
        return api.openapi_schema

    api.openapi = openapi  # type: ignore[method-assign]


def _say_what_a_key_does(operation: dict[str, Any]) -> None:
    """Say of an operation whether it takes a key, which its 401 tells; and drop what FastAPI adds."""
    answers = operation["responses"]
    if "401" in answers:
        operation["security"] = [{"key": []}] if "admin" in operation["tags"] else [{"key": []}, {}]
    if "HTTPValidationError" in str(answers.get("422")):
        del answers["422"]


def _reference(model: type[BaseModel]) -> dict[str, str]:
    _documented[model.__name__] = model
    return {"$ref": _REF.format(model=model.__name__)}


def _in_form(name: str) -> dict[str, Any]:
    binary = {"type": "string", "format": "binary"}
    if name in ("image", "pixels"):
        return binary
    if name == "images":
        return {"type": "array", "items": binary}
    return {"type": "string"} if name in PLAIN_TEXTS else {"type": "string", "contentMediaType": JSON}
