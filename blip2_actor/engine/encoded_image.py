"""An image and what the encoders compute of it.

Requests that hold the same `EncodedImage` share one pass through the vision encoder. The image does not know
these requests; `EncodeQueue` does.
"""

from __future__ import annotations

from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
    """Priority as in `Request`, for features and scores, which have no request of their own."""
    prefix: Tensor | None = field(default=None, repr=False)
    """float[Q, Dw], what the language model sees of the image."""
    qformer_features: Tensor | None = field(default=None, repr=False)
    """float[Q, Dq]."""
    pooler_output: Tensor | None = field(default=None, repr=False)
    """float[Dv]."""
    image_embeds: Tensor | None = field(default=None, repr=False)
    """float[P, Dv]."""
    _waited_for: list[Future[Any]] = field(default_factory=list, repr=False)
    _is_cancelled: bool = False

    def cancel(self) -> None:
        """Make calls that wait for its features or scores raise CancelledError. Thread-safe."""
        self._is_cancelled = True
        for future in list(self._waited_for):
            future.cancel()

    def note_wait(self, future: Future[Any]) -> None:
        """Have `cancel` end a wait for the encoders."""
        self._waited_for.append(future)
        future.add_done_callback(self._waited_for.remove)
        if self._is_cancelled:
            future.cancel()

    @property
    def is_encoded(self) -> bool:
        """True if every tensor that is wanted is there."""
        return self.prefix is not None and not (self.keeps_image_embeds and self.image_embeds is None)
