"""Batches on their way to the device keep the right pixels."""

from __future__ import annotations

import numpy as np
import torch

from blip2_actor.engine.encoded_image import EncodedImage
from blip2_actor.engine.upload import Upload


def make_images(*values: int) -> list[EncodedImage]:
    return [EncodedImage(np.full((2, 2, 3), value, np.uint8)) for value in values]


def seen(batch: torch.Tensor) -> list[int]:
    assert batch.dtype is torch.uint8
    assert batch.shape[1:] == (2, 2, 3)
    return batch[:, 1, 1, 2].tolist()


def test_batches_of_any_size_hold_their_own_pixels() -> None:
    """The buffer on the host is reused: an earlier batch must not change."""
    upload = Upload(torch.device("cpu"))
    batches = [upload(make_images(*values)) for values in ([9], range(7), [5, 6])]
    assert [seen(batch) for batch in batches] == [[9], list(range(7)), [5, 6]]
