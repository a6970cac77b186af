"""Rows that are refused before they reach the device, and their results among those of the other rows."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from typing import ParamSpec, TypeVar

from blip2_actor.status import Status

logger = logging.getLogger(__name__)

RowT = TypeVar("RowT")
ResultT = TypeVar("ResultT")
ArgumentsT = ParamSpec("ArgumentsT")


class RequestRefused(ValueError):
    """The request cannot be served; `status` says which kind of problem, the message says why."""

    def __init__(self, status: Status, error: str) -> None:
        super().__init__(error)
        self.status = status


def or_refusal(
    prepare: Callable[ArgumentsT, RowT], *args: ArgumentsT.args, **kwargs: ArgumentsT.kwargs
) -> RowT | RequestRefused:
    """Return a prepared row; or why it is refused, with the status `refused` unless the error has its own."""
    try:
        return prepare(*args, **kwargs)
    except ValueError as error:
        logger.debug("a row is refused", exc_info=True)
        status = error.status if isinstance(error, RequestRefused) else Status.REFUSED
        return RequestRefused(status, str(error))  # a new one: the traceback of the other keeps the model


def with_refusals(
    rows: Sequence[RowT | RequestRefused],
    serve: Callable[[list[RowT]], Iterable[ResultT]],
    refused: Callable[..., ResultT],
) -> list[ResultT]:
    """Return one result per row, in order.

    Args:
        serve: takes the rows that are not refused, and returns one result per row.
        refused: makes the result of a refused row from its `status` and `error`.
    """
    served = iter(serve([row for row in rows if not isinstance(row, RequestRefused)]))
    return [
        refused(status=row.status, error=str(row)) if isinstance(row, RequestRefused) else next(served)
        for row in rows
    ]
