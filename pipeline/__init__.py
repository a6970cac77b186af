"""BLIP-2 on Ray Data: a resumable captioning job, and `caption`, the stage that it is built on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pipeline.dataset import caption

__all__ = ["caption"]


def __getattr__(name: str) -> Any:
    # caption brings Ray: the command line prints its help without it.
    if name == "caption":
        from pipeline.dataset import caption

        return caption
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
