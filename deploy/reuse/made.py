"""The outputs of one image, without the image: what equal requests may share."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, replace

from blip2_actor import DecodedImage
from deploy.work import ImageOutputs

_BYTES_PER_ANSWER = 4 << 10
_BYTES_PER_TOKEN = 64
"""Memory of an answer without its arrays, about: Python's objects for a short text, and for each token."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Made:
    """The outputs of one image."""

    sha256: str
    """SHA-256 of the encoded image, in hexadecimal."""
    image: DecodedImage
    """The image without its pixels: its size, and whether it is truncated."""
    outputs: ImageOutputs
    num_tokens: int | None = None
    """Tokens of the caption, if it comes from a finished run, which stores no token ids."""

    @classmethod
    def of(cls, sha256: str, image: DecodedImage, outputs: ImageOutputs) -> Made:
        return cls(sha256=sha256, image=replace(image, pixels=None), outputs=outputs)

    @property
    def num_bytes(self) -> int:
        """Approximate memory of the outputs."""
        outputs = self.outputs
        features, contrastive = outputs.features, outputs.contrastive
        arrays = [] if features is None else [features.pooler_output, features.qformer_features]
        arrays += [outputs.attention, None if contrastive is None else contrastive.vectors]
        num_tokens = sum(len(completion.token_ids) for completion in outputs.completions)
        num_parts = len(outputs.completions) + len(outputs.scores) + len(outputs.matches) + 1
        in_arrays = sum(array.nbytes for array in arrays if array is not None)
        return num_parts * _BYTES_PER_ANSWER + num_tokens * _BYTES_PER_TOKEN + in_arrays


def sha256_of(image: bytes) -> str:
    """Return the SHA-256 of an encoded image in hexadecimal; call it in a thread if it may be large."""
    return hashlib.sha256(image).hexdigest()
