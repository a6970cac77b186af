"""An image and what the encoders compute of it.

Requests that hold the same `EncodedImage` share one pass through the vision encoder. The image does not know
these requests; `EncodeQueue` does.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor


@dataclass(eq=False)
class EncodedImage:
    """One image before, during and after its pass through the encoders.

    The tensors are None until the encoders have run. They live as long as this object is held.
    """

    pixels: np.ndarray = field(repr=False)
    """uint8[S, S, 3]."""
    owner: object = field(default=None, repr=False)
    """Identifies the engine that made it. The tensors of another engine belong to another model."""
    keeps_image_embeds: bool = False
    """Also keep the output of the vision encoder. It is large, so it is kept only on demand."""
    low_priority: bool = False
    """As in `Request`, for features and scores, which have no request of their own."""
    prefix: Tensor | None = field(default=None, repr=False)
    """float[Q, Dw], what the language model sees of the image."""
    qformer_features: Tensor | None = field(default=None, repr=False)
    """float[Q, Dq]."""
    pooler_output: Tensor | None = field(default=None, repr=False)
    """float[Dv]."""
    image_embeds: Tensor | None = field(default=None, repr=False)
    """float[P, Dv]."""

    @property
    def is_encoded(self) -> bool:
        """True if every tensor that is wanted is there."""
        return self.prefix is not None and not (self.keeps_image_embeds and self.image_embeds is None)
