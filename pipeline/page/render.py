"""Render a page from its template: one file with its style and its script inside.

Captions, keys and errors come from untrusted data. Jinja escapes every value, and the page's
Content-Security-Policy lets only the style and the script with these hashes run, and nothing load.
"""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.progress import cut

TEMPLATES = Path(__file__).parent / "templates"
MAX_IMAGE_BYTES = 6_500_000
"""All images of a page together, so that it stays below 10 MB; as text they take a third more."""
MAX_TEXT_CHARS = 1_000
"""Maximum length of one text, for the same reason."""


def render(template: str, **values: Any) -> str:
    """Render a template of `pipeline/page/templates` as one complete page."""
    style, script = _read("page.css"), _read("sheet.js")
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_hash(style)}'; script-src '{_hash(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # Both are files of this package.
    inline = {"policy": policy, "style": Markup(style), "script": Markup(script)}
    return _environment().get_template(template).render(**inline, **values)


def data_uri(jpeg: bytes) -> str:
    """Return a JPEG file as a URI that holds it."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def whole_flags(text: str) -> Markup:
    """Return a text of ours as HTML in which no line ends within a flag."""
    return Markup(re.sub(r"--[\w-]+", r'<span class="flag">\g<0></span>', str(escape(text))))


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["number"] = lambda value: f"{value:,}"
    environment.filters["cut"] = cut
    environment.filters["whole_flags"] = whole_flags
    return environment


def _read(name: str) -> str:
    return (TEMPLATES / name).read_text(encoding="utf-8")


def _hash(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
