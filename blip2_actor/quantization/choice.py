"""`QuantizationChoice`: which parts of a model are quantized, and in how many bits.

It is made once, by a measurement (`measurement.py`). All engines of one job take the same choice, so that the
rows of all machines are of one precision. This module imports no torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

PARTS = ("vision", "qformer", "language_projection", "language_model")
"""The parts of a model, by the names of their modules, in the order in which an image runs through them."""


@dataclass(frozen=True, kw_only=True)
class QuantizationChoice:
    """What `quantize` means on the machine that was asked first."""

    method: str
    """As in `EngineConfig.quantize`."""
    parts: tuple[str, ...]
    """The parts of `PARTS` that are quantized."""
    weight_bits: int
    """Bits of a weight: 7 if products of 8 bits saturate with these instructions."""
    instructions: str
    """The CPU's instructions for products of bytes, or the name of the GPU."""
    time_fractions: tuple[float, ...] = ()
    """Time of each of `parts` over its time before; empty if it was not measured."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read what `to_dict` has made, also after it has been in JSON."""
        plain: dict[str, Any] = {n: tuple(x) if isinstance(x, list) else x for n, x in values.items()}
        return cls(**plain)

    def __str__(self) -> str:
        """Return one line for people."""
        parts = ", ".join(part.replace("_", " ") for part in self.parts) or "no part"
        return f"{self.method}: {parts}, in {self.weight_bits} bits ({self.instructions})"
